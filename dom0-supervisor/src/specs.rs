//! From configuration to hv-core's `CreateDomainRequest`: which program, which role, which resources. Pure.

use std::path::Path;

use domain_kit::resource_of;
use proto::hvcore::resource::Kind;
use proto::hvcore::{Bind, CreateDomainRequest, Limits, Resource, RestartPolicy, Role};

use crate::config::{
    AccessMode, BlkbackEntry, DiskEntry, DomainFile, GuestType, HostFile, LimitsEntry, NetbackEntry,
    NetbackMode, Place, RestartEntry,
};
use crate::state::{Guest, guest_uuid_text, private_backend_name, private_backend_uuid, service_uuid};

/// What kind of service a domain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// Serves the store.
    Xenstored,
    /// Serves consoles.
    Console,
    /// Serves a disk.
    Blkback,
    /// Serves a network.
    Netback,
}

impl ServiceKind {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Xenstored => "xenstored",
            Self::Console => "console",
            Self::Blkback => "blkback",
            Self::Netback => "netback",
        }
    }
}

/// A service that the host file wants.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: ServiceKind,
    /// How hv-core makes it.
    pub request: CreateDomainRequest,
    /// A disk whose files are to be looked at before it is made.
    pub disk: Option<DiskEntry>,
}

/// All services of the host file, in the order in which they are made.
pub fn services(host: &HostFile) -> Vec<Service> {
    let mut out = vec![xenstored(host)];
    out.extend(host.console.enabled.then(|| console(host)));
    out.extend(host.blkback.iter().map(|b| blkback(host, b)));
    out.extend(host.netback.iter().map(|n| netback(host, n)));
    out
}

fn restart_policy(entry: RestartEntry) -> RestartPolicy {
    RestartPolicy {
        restart: true,
        backoff_ms: entry.backoff_ms,
        backoff_max_ms: entry.backoff_max_ms,
        burst: entry.burst,
        burst_window_ms: entry.burst_window_ms,
    }
}

fn limits(entry: LimitsEntry) -> Limits {
    Limits {
        memory_bytes: entry.memory << 20,
        cpu_weight: entry.cpu_weight,
        pids: entry.pids,
        fd_store: entry.fd_store,
        ports: entry.ports,
        map_pages: entry.map_pages,
        channels: entry.channels,
        buffers: entry.buffers,
        buffer_bytes: entry.buffer_memory << 20,
        ..Limits::default()
    }
}

fn program(host: &HostFile, name: &str) -> String {
    host.bin_dir.join(name).display().to_string()
}

fn service(
    host: &HostFile,
    name: &str,
    role: Role,
    program_name: &str,
    own_restart: Option<RestartEntry>,
    own_limits: Option<LimitsEntry>,
) -> CreateDomainRequest {
    CreateDomainRequest {
        name: name.to_owned(),
        uuid: guest_uuid_text(&service_uuid(name)),
        roles: vec![role.into()],
        program: program(host, program_name),
        env: logging(),
        restart: Some(restart_policy(own_restart.unwrap_or(host.restart))),
        limits: Some(limits(own_limits.unwrap_or(host.limits))),
        seccomp: "service".into(),
        ..CreateDomainRequest::default()
    }
}

/// dom0's own log filter goes on to what it starts.
fn logging() -> Vec<String> {
    std::env::var("RUST_LOG").map(|v| format!("RUST_LOG={v}")).into_iter().collect()
}

fn resource(name: &str, kind: Kind, path: &Path) -> Resource {
    Resource { name: name.into(), kind: kind.into(), path: path.display().to_string(), mode: 0 }
}

/// What blkback is told of a disk of its own, and what it may open. Names and resources belong together by a hash of the name, so that
/// the one can be changed before the other (see [`disk_resources`]).
fn disk_files(disk: &DiskEntry, request: &mut CreateDomainRequest) {
    if disk.mode == AccessMode::ReadOnly {
        request.args.extend(["--mode".into(), "r".into()]);
    }
    request.args.extend(disk.options().args());
    if disk.is_empty_drive() {
        request.args.push("--empty".into());
    } else if !disk.is_plain() {
        for file in disk.files() {
            request.args.extend(["--disk".into(), format!("{}:{}", file.format, file.name)]);
        }
    }
    request.resources.extend(disk_resources(disk));
}

/// The approved resources of a disk of its own.
pub fn disk_resources(disk: &DiskEntry) -> Vec<Resource> {
    let mut out = Vec::new();
    for file in disk.files() {
        let name = |base: &str| if disk.is_plain() { base.to_owned() } else { resource_of(base, &file.name) };
        let kind = if file.writable { Kind::FileRw } else { Kind::FileRo };
        out.push(match file.place {
            Place::Path(path) => resource(&name("disk"), kind, path),
            Place::Server(server) => resource(&name("disk"), Kind::Connect, Path::new(server)),
            Place::Temporary(dir) => resource(&name("disk"), Kind::FileTemporary, dir),
        });
        out.extend(file.key.map(|key| resource(&name("key"), Kind::FileRo, key)));
    }
    out
}

fn xenstored(host: &HostFile) -> Service {
    let entry = &host.xenstored;
    let mut request = service(host, "xenstored", Role::Xenstore, "xenstored", entry.restart, entry.limits);
    let mut socket = resource("socket", Kind::Listener, &entry.socket);
    socket.mode = entry.socket_mode;
    request.resources.push(socket);
    Service { name: "xenstored".into(), kind: ServiceKind::Xenstored, request, disk: None }
}

fn console(host: &HostFile) -> Service {
    let entry = &host.console;
    let request = service(host, "console", Role::Console, "console-backend", entry.restart, entry.limits);
    Service { name: "console".into(), kind: ServiceKind::Console, request, disk: None }
}

fn blkback(host: &HostFile, entry: &BlkbackEntry) -> Service {
    let name = entry.name.as_str();
    let mut request = service(host, name, Role::Backend, "blkback", entry.restart, entry.limits);
    let disk = entry.as_disk();
    disk_files(&disk, &mut request);
    request.args.extend(entry.args.iter().cloned());
    Service { name: name.into(), kind: ServiceKind::Blkback, request, disk: Some(disk) }
}

fn netback(host: &HostFile, entry: &NetbackEntry) -> Service {
    let name = entry.name.as_str();
    let mut request = service(host, name, Role::Backend, "netback", entry.restart, entry.limits);
    request.capabilities.push("CAP_NET_ADMIN".into());
    request.seccomp = "net".into();
    let tun = "/dev/net/tun".to_owned();
    request.binds.push(Bind { source: tun.clone(), target: tun, read_only: false, executable: false });
    let mode = match entry.mode {
        NetbackMode::Bridged => "bridged",
        NetbackMode::Isolated => "isolated",
        NetbackMode::Routed => "routed",
        NetbackMode::Nat => "nat",
    };
    request.args = vec!["--mode".into(), mode.into()];
    if let Some(uplink) = &entry.uplink {
        request.netdevs.push(uplink.clone());
        request.args.extend(["--uplink".into(), uplink.clone()]);
    }
    if let Some(gateway) = &entry.gateway {
        request.args.extend(["--gateway".into(), gateway.clone()]);
    }
    if let Some(address) = &entry.uplink_address {
        request.args.extend(["--uplink-address".into(), address.clone()]);
    }
    if let Some(router) = entry.uplink_gateway {
        request.args.extend(["--uplink-gateway".into(), router.to_string()]);
    }
    if let Some(gateway) = &entry.gateway6 {
        request.args.extend(["--gateway6".into(), gateway.clone()]);
        // The switches for IPv6 routing have no other door. It shows who looks there its own network namespace alone.
        let sysctl = "/proc/sys/net".to_owned();
        request.binds.push(Bind {
            source: sysctl.clone(),
            target: sysctl,
            read_only: false,
            executable: false,
        });
    }
    if let Some(address) = &entry.uplink_address6 {
        request.args.extend(["--uplink-address6".into(), address.clone()]);
    }
    if let Some(router) = entry.uplink_gateway6 {
        request.args.extend(["--uplink-gateway6".into(), router.to_string()]);
    }
    for server in &entry.dns {
        request.args.extend(["--dns".into(), server.to_string()]);
    }
    if !entry.dhcp {
        request.args.push("--no-dhcp".into());
    }
    if !entry.ra {
        request.args.push("--no-ra".into());
    }
    request.args.extend(entry.args.iter().cloned());
    Service { name: name.into(), kind: ServiceKind::Netback, request, disk: None }
}

/// The driver domain of a guest's own disk.
pub fn private_blkback(host: &HostFile, guest: &Guest, index: usize) -> Option<CreateDomainRequest> {
    let disk = guest.config.disk.get(index)?;
    if !disk.has_own_backend() {
        return None;
    }
    let vdev = disk.vdev.name();
    let name = private_backend_name(guest.config.name.as_str(), vdev);
    let mut request = service(host, &name, Role::Backend, "blkback", None, None);
    request.uuid = guest_uuid_text(&private_backend_uuid(&guest.uuid, vdev));
    disk_files(disk, &mut request);
    Some(request)
}

/// A guest's own domain.
pub fn guest(host: &HostFile, guest: &Guest) -> CreateDomainRequest {
    let config = &guest.config;
    let mut request = CreateDomainRequest {
        name: config.name.to_string(),
        uuid: guest_uuid_text(&guest.uuid),
        // A runner that died has lost its guest; dom0 decides what follows (on_crash).
        restart: Some(RestartPolicy::default()),
        limits: Some(limits(config.limits)),
        env: logging(),
        paused: true,
        ..CreateDomainRequest::default()
    };
    match config.guest_type {
        GuestType::Pvh => pvh(host, config, &mut request),
        GuestType::Process => {
            request.roles = vec![Role::ProcessGuest.into()];
            request.program = config.program.as_deref().unwrap_or(Path::new("")).display().to_string();
            request.args = config.args.clone();
            request.env.extend(config.env.iter().cloned());
            request.seccomp = "service".into();
        }
        GuestType::Qemu => {
            request.roles = vec![Role::ProcessGuest.into()];
            request.program = program(host, "qemu-bridge");
            request.seccomp = "service".into();
            // The guest is in another domain: this one comes back.
            request.restart = Some(restart_policy(host.restart));
            request.limits = None;
            request.resources.extend(config.usbdev.iter().filter_map(crate::ops::usb_resource));
            request.resources.extend(crate::specs_qemu::variables(config));
        }
    }
    request
}

fn pvh(host: &HostFile, config: &DomainFile, request: &mut CreateDomainRequest) {
    request.roles = vec![Role::Pvh.into()];
    request.program = program(host, "hv-vcpu");
    request.ram_bytes = config.ram_bytes();
    request.seccomp = "runner".into();
    request.args = vec!["--domain".into(), "--vcpus".into(), config.vcpus().to_string()];
    if !config.cmdline.is_empty() {
        request.args.extend(["--cmdline".into(), config.cmdline.clone()]);
    }
    let files = [("kernel", &config.kernel), ("initrd", &config.ramdisk)];
    for (name, path) in files {
        request.resources.extend(path.as_deref().map(|path| resource(name, Kind::FileRo, path)));
    }
    request.resources.push(resource("kvm", Kind::Device, Path::new("/dev/kvm")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_in_order_with_their_rights() {
        let host = HostFile::parse(include_str!("../../deploy/examples/host.toml"), "h").unwrap();
        let services = services(&host);
        let kinds: Vec<_> = services.iter().map(|s| s.kind.word()).collect();
        assert_eq!(kinds, ["xenstored", "console", "blkback", "blkback", "blkback", "netback"]);
        for service in &services {
            let r = &service.request;
            assert_eq!(r.roles.len(), 1);
            assert!(r.restart.unwrap().restart);
            let net = service.kind == ServiceKind::Netback;
            assert_eq!(!r.capabilities.is_empty(), net, "{}", r.name);
            assert_eq!(!r.netdevs.is_empty(), net, "{}", r.name);
            assert!(!r.resources.iter().any(|r| r.kind() == Kind::Device), "{}", r.name);
        }
        assert_eq!(services[2].request.resources[0].name, "disk");
    }

    #[test]
    fn only_the_runner_of_a_pvh_guest_gets_kvm() {
        let host = HostFile::parse("", "h").unwrap();
        let pvh_file = DomainFile::parse(include_str!("../../deploy/examples/debian.toml"), "d").unwrap();
        let pvh = Guest::new(pvh_file, 0);
        let request = guest(&host, &pvh);
        let names: Vec<_> = request.resources.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["kernel", "initrd", "kvm"]);
        assert_eq!(request.ram_bytes, 512 << 20);
        assert!(!request.restart.unwrap().restart, "dom0 decides");
        assert!(private_blkback(&host, &pvh, 0).is_none(), "the host file's");
        let own = private_blkback(&host, &pvh, 1).unwrap();
        assert_eq!(own.name, "blkback-debian-xvdb");
        assert_eq!(own.resources.len(), 1);

        let file = DomainFile::parse(include_str!("../../deploy/examples/process-guest.toml"), "p").unwrap();
        let request = guest(&host, &Guest::new(file, 0));
        assert!(request.resources.is_empty() && request.capabilities.is_empty());
        assert_eq!(request.args, ["--seed", "1"]);
    }
}
