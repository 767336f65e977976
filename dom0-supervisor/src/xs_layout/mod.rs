//! Which nodes dom0 makes in xenstore, with which permissions: the layout of Xen's `docs/misc/xenstore-paths.pandoc`, as libxl
//! makes it for PVH guests. Nothing here talks to the store.

mod device;
mod guest;

pub use device::{
    DevicePaths, XenbusState, close_device, device_error_path, device_paths, device_paths_of,
    frontend_error_path, limit_nodes, link_nodes, medium_nodes, nodes_of_one, remove_both_ends,
    remove_device, unplug_device,
};
pub use guest::{
    dom0_nodes, guest_marker, guest_nodes, remove_guest_nodes, remove_service_nodes, service_nodes,
    size_nodes, usb_nodes, usb_said, usb_wanted,
};

use crate::store::Change;

/// Home of a domain.
pub fn home(domid: u16) -> String {
    format!("/local/domain/{domid}")
}

/// Permissions: `owner` has all, the others nothing, `readers` may read.
fn perms(owner: u16, readers: &[u16]) -> Vec<String> {
    let mut perms = vec![format!("n{owner}")];
    perms.extend(readers.iter().filter(|r| **r != owner).map(|r| format!("r{r}")));
    perms
}

/// Gathers nodes below one directory that have the same permissions.
struct Nodes {
    out: Vec<Change>,
    perms: Vec<String>,
}

impl Nodes {
    fn new(owner: u16, readers: &[u16]) -> Nodes {
        Nodes { out: Vec::new(), perms: perms(owner, readers) }
    }

    fn put(&mut self, path: impl Into<String>, value: impl Into<String>) {
        self.out.push(Change::Put { path: path.into(), value: value.into(), perms: self.perms.clone() });
    }
}
