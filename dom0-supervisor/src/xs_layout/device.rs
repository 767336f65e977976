//! A PV device's two directories.

use super::{Nodes, home};
use crate::config::{AccessMode, DevType, DiskEntry, GuestType, VifEntry};
use crate::specs_qemu::vhost_resource;
use crate::state::Guest;
use crate::store::Change;
use domain_kit::xenbus::VHOST_USER;

/// "1": the cable of a vif is pulled. In the frontend's directory it has that name and meaning in XenServer, whose Windows drivers show
/// it; Linux's netfront looks at the state alone.
const DISCONNECT: &str = "disconnect";

/// xenbus states (io/xenbus.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum XenbusState {
    /// Not there, or not a state.
    Unknown,
    /// Just made by the toolstack.
    Initialising,
    /// The backend told its features and waits for the frontend.
    InitWait,
    /// The frontend told its ring.
    Initialised,
    /// Works.
    Connected,
    /// On its way out.
    Closing,
    /// Out.
    Closed,
}

impl XenbusState {
    /// From a node's value: any text is allowed in.
    pub fn parse(text: Option<&str>) -> XenbusState {
        match text {
            Some("1") => Self::Initialising,
            Some("2") => Self::InitWait,
            Some("3") => Self::Initialised,
            Some("4") => Self::Connected,
            Some("5") => Self::Closing,
            Some("6") => Self::Closed,
            _ => Self::Unknown,
        }
    }

    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Initialising => "Initialising",
            Self::InitWait => "InitWait",
            Self::Initialised => "Initialised",
            Self::Connected => "Connected",
            Self::Closing => "Closing",
            Self::Closed => "Closed",
        }
    }
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePaths {
    /// "vbd" or "vif".
    pub kind: &'static str,
    /// For people: "xvda", "0" (the vif's own number).
    pub name: String,
    /// Number in the store.
    pub id: u32,
    /// Name of the driver domain.
    pub backend: String,
    /// The driver domain.
    pub backend_domid: u16,
    /// The frontend's directory.
    pub front: String,
    /// The backend's directory.
    pub back: String,
}

/// The devices of a guest's domain of now whose backends are known. From the record alone, never from the store.
pub fn device_paths(guest: &Guest) -> Vec<DevicePaths> {
    guest.domain.map_or_else(Vec::new, |domain| device_paths_of(guest, domain.domid))
}

/// The same for a given domid.
pub fn device_paths_of(guest: &Guest, domid: u16) -> Vec<DevicePaths> {
    let mut out = Vec::new();
    let mut add = |kind, name: String, id, backend, backend_domid| {
        out.push(DevicePaths {
            kind,
            name,
            id,
            backend,
            backend_domid,
            front: format!("{}/device/{kind}/{id}", home(domid)),
            back: format!("{}/backend/{kind}/{domid}/{id}", home(backend_domid)),
        });
    };
    for (index, (disk, backend)) in guest.config.disk.iter().zip(&guest.disk_backends).enumerate() {
        if let Some(backend) = backend {
            let name = disk.vdev.name().to_owned();
            add("vbd", name, disk.vdev.number(), guest.disk_backend_name(index), backend.domid);
        }
    }
    for (index, (vif, backend)) in guest.config.vif.iter().zip(&guest.vif_backends).enumerate() {
        if let Some(backend) = backend {
            let name = guest.vif_id(index).to_string();
            add("vif", name, guest.vif_device(index), vif.backend.to_string(), *backend);
        }
    }
    out
}

/// Where a backend says what went wrong with a device (as Linux's xenbus_dev_error does).
pub fn device_error_path(device: &DevicePaths) -> String {
    let home = home(device.backend_domid);
    let rest = device.back.strip_prefix(&home).unwrap_or(&device.back);
    format!("{home}/error{rest}/error")
}

/// The nodes of one device of a running guest, which may be its first of the kind ("vbd", "vif").
pub fn nodes_of_one(guest: &Guest, domid: u16, kind: &str, number: u32) -> Vec<Change> {
    let mut parent = Nodes::new(0, &[domid]);
    parent.put(format!("{}/device/{kind}", home(domid)), "");
    let mut out = parent.out;
    out.extend(nodes_of(guest, domid, |device| device.kind == kind && device.id == number));
    out
}

/// Both ends' own directories of a device of a guest, whose other devices stay.
pub fn remove_both_ends(guest: &Guest, device: &DevicePaths) -> Vec<Change> {
    let shared = |other: &DevicePaths| {
        other.id != device.id && other.kind == device.kind && other.backend_domid == device.backend_domid
    };
    // The last one at that backend takes the guest's directory there with it.
    let mut out = match device_paths(guest).iter().any(shared) {
        true => vec![Change::Remove { path: device.back.clone() }],
        false => remove_device(device),
    };
    out.push(Change::Remove { path: device.front.clone() });
    out
}

/// Asks both ends of a running guest's device to let go, as libxl does; or, with `stay`, that it stays after all.
pub fn unplug_device(device: &DevicePaths, stay: bool) -> Vec<Change> {
    let set =
        |key: &str, value: &str| Change::Set { path: format!("{}/{key}", device.back), value: value.into() };
    if stay {
        vec![set("online", "1"), set("state", "4")]
    } else {
        vec![set("online", "0"), set("state", "5")]
    }
}

/// The nodes of one guest's devices. The parents exist: see [`super::guest_nodes`] and [`super::service_nodes`].
pub(super) fn device_nodes(guest: &Guest, domid: u16) -> Vec<Change> {
    nodes_of(guest, domid, |_| true)
}

fn nodes_of(guest: &Guest, domid: u16, wanted: impl Fn(&DevicePaths) -> bool) -> Vec<Change> {
    let mut out = Vec::new();
    for device in device_paths_of(guest, domid).into_iter().filter(wanted) {
        let backend = device.backend_domid;
        // The frontend's end: the guest writes, the backend reads.
        let mut front = Nodes::new(domid, &[backend]);
        // The backend's end: the backend writes, the guest reads.
        let mut back = Nodes::new(backend, &[domid]);
        back.put(format!("{}/backend/{}/{domid}", home(backend), device.kind), "");
        back.put(&device.back, "");
        back.put(format!("{}/frontend", device.back), &device.front);
        back.put(format!("{}/frontend-id", device.back), domid.to_string());
        back.put(format!("{}/online", device.back), "1");
        front.put(&device.front, "");
        front.put(format!("{}/backend", device.front), &device.back);
        front.put(format!("{}/backend-id", device.front), backend.to_string());
        if guest.config.guest_type == GuestType::Qemu {
            let resource = vhost_resource(&guest.uuid, device.kind, device.id);
            back.put(format!("{}/{VHOST_USER}", device.back), resource);
        }
        match device.kind {
            "vbd" => {
                let disk = &guest.config.disk
                    [guest.config.disk.iter().position(|d| d.vdev.number() == device.id).unwrap_or(0)];
                let mode = match disk.mode {
                    AccessMode::ReadOnly => "r",
                    AccessMode::ReadWrite => "w",
                    AccessMode::Shared => "w!",
                };
                back.put(format!("{}/dev", device.back), &device.name);
                back.put(format!("{}/type", device.back), "phy");
                back.put(format!("{}/params", device.back), params(disk));
                back.put(format!("{}/mode", device.back), mode);
                back.put(format!("{}/device-type", device.back), disk.devtype.word());
                let removable = u32::from(disk.devtype == DevType::Cdrom);
                back.put(format!("{}/removable", device.back), removable.to_string());
                for (node, value) in disk.limits().nodes() {
                    back.put(format!("{}/{node}", device.back), value.to_string());
                }
                back.put(format!("{}/bootable", device.back), "1");
                front.put(format!("{}/virtual-device", device.front), device.id.to_string());
                // Linux leaves drives called "cdrom" alone in every guest that is not paravirtualized: it takes them for the emulated
                // one that a device model has. A PVH guest has none, so its drive is a disk with a medium that can be taken out.
                let pvh = guest.config.guest_type == GuestType::Pvh;
                let devtype = if pvh { DevType::Disk } else { disk.devtype };
                front.put(format!("{}/device-type", device.front), devtype.word());
            }
            _ => {
                let Some(index) = guest.vif_index_of_device(device.id) else { continue };
                let mac = guest.mac(index).to_string();
                back.put(format!("{}/handle", device.back), device.id.to_string());
                back.put(format!("{}/mac", device.back), &mac);
                back.put(format!("{}/type", device.back), "vif");
                let vif = &guest.config.vif[index];
                for (node, value) in vif_settings(vif) {
                    back.put(format!("{}/{node}", device.back), value);
                }
                if let Some(mtu) = vif.mtu {
                    front.put(format!("{}/mtu", device.front), mtu.to_string());
                }
                if !vif.link {
                    front.put(format!("{}/{DISCONNECT}", device.front), "1");
                }
                front.put(format!("{}/handle", device.front), device.id.to_string());
                front.put(format!("{}/mac", device.front), mac);
            }
        }
        // States last: by then the rest is there, also for one who reads outside the transaction.
        back.put(format!("{}/state", device.back), "1");
        front.put(format!("{}/state", device.front), "1");
        out.extend(back.out);
        out.extend(front.out);
    }
    out
}

/// What the guest may know of the medium: whether there is one.
fn params(disk: &DiskEntry) -> &'static str {
    if disk.is_empty_drive() { "" } else { "disk" }
}

/// Tells of a medium that was put in or taken out.
pub fn medium_nodes(device: &DevicePaths, disk: &DiskEntry) -> Vec<Change> {
    vec![Change::Set { path: format!("{}/params", device.back), value: params(disk).into() }]
}

/// Other limits for a disk that is there.
pub fn limit_nodes(device: &DevicePaths, disk: &DiskEntry) -> Vec<Change> {
    let set = |(node, value): (&str, u64)| Change::Set {
        path: format!("{}/{node}", device.back),
        value: value.to_string(),
    };
    disk.limits().nodes().into_iter().map(set).collect()
}

/// Where a guest says what went wrong with a device.
pub fn frontend_error_path(device: &DevicePaths) -> String {
    match device.front.split_once("/device/") {
        Some((home, rest)) => format!("{home}/error/device/{rest}/error"),
        None => format!("{}/error", device.front),
    }
}

/// The settings of a vif that netback reads, as far as they are not its defaults.
fn vif_settings(vif: &VifEntry) -> Vec<(&'static str, String)> {
    let mut out = Vec::new();
    if !vif.ip.is_empty() {
        out.push(("ip", vif.ip.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")));
    }
    if let Some(mtu) = vif.mtu {
        out.push(("mtu", mtu.to_string()));
    }
    if !vif.antispoof {
        out.push(("antispoof", "0".into()));
    }
    if vif.isolated {
        out.push(("isolated", "1".into()));
    }
    for (node, on) in [("dhcp", vif.dhcp), ("ra", vif.ra)] {
        if !on {
            out.push((node, "0".into()));
        }
    }
    if !vif.link {
        out.push((DISCONNECT, "1".into()));
    }
    if let Some(rate) = vif.rate {
        // As Xen's toolstack writes it: so many bytes in 50 ms.
        out.push(("rate", format!("{},50000", (rate / 20).max(1))));
    }
    if !vif.firewall.is_empty() {
        out.push(("firewall", vif.firewall.join("\n")));
    }
    out
}

/// Pulls a vif's cable, or plugs it in: for netback, and for drivers of guests that look at it.
pub fn link_nodes(device: &DevicePaths, domid: u16, up: bool) -> Vec<Change> {
    let value = if up { "0" } else { "1" };
    let mut back = Nodes::new(device.backend_domid, &[domid]);
    back.put(format!("{}/{DISCONNECT}", device.back), value);
    let mut front = Nodes::new(domid, &[device.backend_domid]);
    front.put(format!("{}/{DISCONNECT}", device.front), value);
    back.out.extend(front.out);
    back.out
}

/// Asks a backend to let go of a device whose guest has ended: a frontend that is no more cannot say so itself.
pub fn close_device(device: &DevicePaths) -> Vec<Change> {
    let set =
        |dir: &str, key: &str, value: &str| Change::Set { path: format!("{dir}/{key}"), value: value.into() };
    vec![set(&device.back, "online", "0"), set(&device.front, "state", "6"), set(&device.back, "state", "5")]
}

/// Removes the backend's directory of all of a guest's devices of this kind; the frontend's goes with the guest.
pub fn remove_device(device: &DevicePaths) -> Vec<Change> {
    let guest_dir = device.back.rsplit_once('/').map(|(dir, _)| dir.to_owned()).unwrap_or_default();
    vec![Change::Remove { path: guest_dir }]
}
