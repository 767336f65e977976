//! A domain's own nodes.

use super::device::device_nodes;
use super::{Nodes, home};
use crate::config::{GuestType, UsbEntry};
use crate::state::{Guest, guest_uuid_text};
use crate::store::Change;

/// The node that tells whether [`guest_nodes`] was carried out (all of it is one transaction), and its value. The guest
/// can't write it.
pub fn guest_marker(guest: &Guest, domid: u16) -> (String, String) {
    (format!("{}/vm", home(domid)), format!("/vm/{}", guest_uuid_text(&guest.uuid)))
}

/// All nodes of a guest's new domain. Not to be carried out twice: it begins by removing what an earlier domain of this
/// number left.
pub fn guest_nodes(guest: &Guest, domid: u16) -> Vec<Change> {
    let uuid = guest_uuid_text(&guest.uuid);
    let (home, vm) = (home(domid), format!("/vm/{uuid}"));
    let name = guest.config.name.as_str();
    let mut out =
        vec![Change::Remove { path: home.clone() }, Change::Remove { path: format!("/libxl/{domid}") }];
    let (os, kind) = match guest.config.guest_type {
        GuestType::Pvh => ("linux", "pvh"),
        GuestType::Process => ("process", "process"),
        GuestType::Qemu => ("hvm", "hvm"),
    };

    // What the toolstack alone may see.
    let mut own = Nodes::new(0, &[]);
    own.put(format!("/libxl/{domid}"), "");
    own.put(format!("/libxl/{domid}/type"), kind);
    out.extend(own.out);

    // What the guest may read.
    let mut ro = Nodes::new(0, &[domid]);
    ro.put(&vm, "");
    ro.put(format!("{vm}/uuid"), &uuid);
    ro.put(format!("{vm}/name"), name);
    ro.put(format!("{vm}/image/ostype"), os);
    ro.put(format!("{vm}/start_time"), format!("{}.00", guest.started_unix_ms / 1000));
    ro.put(&home, "");
    ro.put(format!("{home}/vm"), &vm);
    ro.put(format!("{home}/name"), name);
    ro.put(format!("{home}/domid"), domid.to_string());
    ro.put(format!("{home}/uuid"), &uuid);
    if guest.config.guest_type != GuestType::Process {
        ro.put(format!("{home}/memory"), "");
        ro.put(format!("{home}/memory/static-max"), (guest.config.maxmem() << 10).to_string());
        ro.put(format!("{home}/memory/videoram"), "0");
        ro.put(format!("{home}/cpu"), "");
        for cpu in 0..guest.config.maxvcpus() {
            ro.put(format!("{home}/cpu/{cpu}"), "");
        }
        ro.out.extend(size_nodes(guest, domid));
    }
    if guest.config.guest_type == GuestType::Qemu {
        ro.put(format!("{home}/usb"), "");
        ro.out.extend(usb_nodes(domid, &guest.config.usbdev));
    }
    ro.put(format!("{home}/control"), "");
    ro.put(format!("{home}/control/platform-feature-multiprocessor-suspend"), "1");
    ro.put(format!("{home}/control/platform-feature-xs_reset_watches"), "1");
    ro.put(format!("{home}/console"), "");
    ro.put(format!("{home}/console/type"), "xenconsoled");
    ro.put(format!("{home}/console/output"), "pty");
    ro.put(format!("{home}/console/limit"), "65536");
    ro.put(format!("{home}/device"), "");
    for device in super::device_paths_of(guest, domid) {
        ro.put(format!("{home}/device/{}", device.kind), "");
    }
    out.extend(ro.out);

    // What the guest may write.
    let mut rw = Nodes::new(domid, &[]);
    rw.put(format!("{home}/control/shutdown"), "");
    for feature in ["poweroff", "reboot", "suspend"] {
        rw.put(format!("{home}/control/feature-{feature}"), "");
    }
    rw.put(format!("{home}/control/sysrq"), "");
    rw.put(format!("{home}/device/suspend/event-channel"), "");
    for dir in ["data", "drivers", "feature", "attr", "error"] {
        rw.put(format!("{home}/{dir}"), "");
    }
    out.extend(rw.out);
    out.extend(device_nodes(guest, domid));
    out
}

/// How much memory and how many processors a guest is to have, as Xen's toolstack says it. Can be carried out again at any time.
pub fn size_nodes(guest: &Guest, domid: u16) -> Vec<Change> {
    let home = home(domid);
    let mut ro = Nodes::new(0, &[domid]);
    ro.put(format!("{home}/memory/target"), (guest.memory_mib() << 10).to_string());
    for cpu in 0..guest.config.maxvcpus() {
        let availability = if cpu < guest.vcpus_now() { "online" } else { "offline" };
        ro.put(format!("{home}/cpu/{cpu}/availability"), availability);
    }
    ro.out
}

/// Where a USB device of a QEMU guest is wanted; its bridge follows.
pub fn usb_wanted(domid: u16, id: &str) -> String {
    format!("{}/usb/{id}", home(domid))
}

/// Where the bridge says how that went.
pub fn usb_said(domid: u16, id: &str) -> String {
    format!("{}/data/usb/{id}", home(domid))
}

/// The nodes of USB devices. Can be carried out again at any time.
pub fn usb_nodes(domid: u16, devices: &[UsbEntry]) -> Vec<Change> {
    let mut ro = Nodes::new(0, &[domid]);
    devices.iter().for_each(|entry| ro.put(usb_wanted(domid, &entry.id), entry.node()));
    ro.out
}

/// Takes away all nodes of a guest's domain but the backends' (those by [`super::remove_device`]).
pub fn remove_guest_nodes(guest: &Guest, domid: u16) -> Vec<Change> {
    vec![
        Change::Remove { path: home(domid) },
        Change::Remove { path: format!("/libxl/{domid}") },
        Change::Remove { path: format!("/vm/{}", guest_uuid_text(&guest.uuid)) },
    ]
}

/// Home of a service's domain. Can be carried out again at any time: nothing below is touched.
pub fn service_nodes(domid: u16, name: &str, uuid: &str) -> Vec<Change> {
    let home = home(domid);
    let mut ro = Nodes::new(0, &[domid]);
    ro.put(&home, "");
    ro.put(format!("{home}/name"), name);
    ro.put(format!("{home}/domid"), domid.to_string());
    ro.put(format!("{home}/uuid"), uuid);
    let mut rw = Nodes::new(domid, &[]);
    for dir in ["backend", "backend/vbd", "backend/vif", "data", "error"] {
        rw.put(format!("{home}/{dir}"), "");
    }
    ro.out.extend(rw.out);
    ro.out
}

/// Takes away the home of a service that is gone for good.
pub fn remove_service_nodes(domid: u16) -> Vec<Change> {
    vec![Change::Remove { path: home(domid) }]
}

/// What is there once for the host.
pub fn dom0_nodes() -> Vec<Change> {
    let mut own = Nodes::new(0, &[]);
    own.put("/tool", "");
    own.put("/libxl", "");
    own.put("/vm", "");
    own.put("/local/domain/0", "");
    own.put("/local/domain/0/name", "Domain-0");
    own.put("/local/domain/0/domid", "0");
    own.out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DomainFile;
    use crate::state::OwnDisk;
    use std::collections::BTreeMap;

    fn guest() -> Guest {
        let text = "name = \"g\"\nkernel = \"/k\"\nmemory = 64\nvcpus = 2\n\
             disk = [{vdev = \"xvda\", path = \"/d\", mode = \"ro\"}]\nvif = [{backend = \"lan\"}]";
        let mut guest = Guest::new(DomainFile::parse(text, "t").unwrap(), 0);
        guest.disk_backends[0] = Some(OwnDisk { domid: 3, instance: 1, private: true });
        guest.vif_backends[0] = Some(4);
        guest
    }

    fn nodes(changes: &[Change]) -> BTreeMap<&str, (&str, Vec<&str>)> {
        changes
            .iter()
            .filter_map(|c| match c {
                Change::Put { path, value, perms } => {
                    Some((path.as_str(), (value.as_str(), perms.iter().map(String::as_str).collect())))
                }
                _ => None,
            })
            .collect()
    }

    #[test]
    fn devices_are_owned_by_their_ends() {
        let guest = guest();
        let changes = guest_nodes(&guest, 7);
        let nodes = nodes(&changes);
        assert_eq!(nodes["/local/domain/7/device/vbd/51712/state"], ("1", vec!["n7", "r3"]));
        assert_eq!(nodes["/local/domain/3/backend/vbd/7/51712/state"], ("1", vec!["n3", "r7"]));
        assert_eq!(nodes["/local/domain/3/backend/vbd/7/51712/mode"].0, "r");
        assert_eq!(
            nodes["/local/domain/3/backend/vbd/7/51712/frontend"].0,
            "/local/domain/7/device/vbd/51712"
        );
        assert_eq!(
            nodes["/local/domain/7/device/vbd/51712/backend"].0,
            "/local/domain/3/backend/vbd/7/51712"
        );
        assert_eq!(
            nodes["/local/domain/4/backend/vif/7/0/mac"],
            (guest.mac(0).to_string().as_str(), vec!["n4", "r7"])
        );
        assert_eq!(nodes["/local/domain/7/name"], ("g", vec!["n0", "r7"]));
        assert_eq!(nodes["/local/domain/7/control/shutdown"], ("", vec!["n7"]));
        assert_eq!(nodes["/local/domain/7/memory/target"].0, "65536");
        assert_eq!(nodes["/local/domain/7/cpu/1/availability"].0, "online");
    }

    /// XSA-175, XSA-178: what the toolstack itself looks at must not be the guest's or a backend's to write.
    #[test]
    fn xsa_175_178_the_toolstacks_nodes_are_its_own() {
        let guest = guest();
        let changes = guest_nodes(&guest, 7);
        let nodes = nodes(&changes);
        for (path, (_, perms)) in &nodes {
            let toolstacks = path.starts_with("/libxl") || path.starts_with("/vm");
            assert!(!toolstacks || perms[0] == "n0", "{path} {perms:?}");
            assert!(!perms.iter().any(|p| p.starts_with(['w', 'b'])), "{path} {perms:?}");
        }
        assert_eq!(nodes[guest_marker(&guest, 7).0.as_str()].1[0], "n0");
    }

    #[test]
    fn parents_come_before_children() {
        let changes = guest_nodes(&guest(), 7);
        let mut seen: Vec<&str> = vec![
            "/local/domain",
            "/local/domain/3/backend/vbd",
            "/local/domain/4/backend/vif",
            "/vm",
            "/libxl",
        ];
        for change in &changes {
            let Change::Put { path, .. } = change else { continue };
            let parent = path.rsplit_once('/').unwrap().0;
            let implicit = parent.ends_with("/image") || parent.ends_with("/suspend");
            assert!(seen.contains(&parent) || implicit, "{path} before its parent");
            seen.push(path);
        }
    }
}
