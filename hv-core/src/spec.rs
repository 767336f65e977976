//! A domain's specification: what dom0 asked for, checked once.

use hv_abi::*;
use proto::hvcore::{
    CreateDomainRequest, Resource as WireResource, RestartPolicy as WirePolicy, Role, resource,
};
use uuid::Uuid;

use crate::resources::Resource;
use crate::spawner::proto::{BindSpec, SeccompProfile};
use crate::spawner::sandbox::is_plain_absolute;

/// When and how a process comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Whether at all.
    pub restart: bool,
    /// First wait, milliseconds.
    pub backoff_ms: u32,
    /// Longest wait, milliseconds.
    pub backoff_max_ms: u32,
    /// Restarts within the window; 0 = no limit.
    pub burst: u32,
    /// The window, milliseconds.
    pub burst_window_ms: u32,
}

impl From<&WirePolicy> for RestartPolicy {
    fn from(p: &WirePolicy) -> Self {
        RestartPolicy {
            restart: p.restart,
            backoff_ms: p.backoff_ms,
            backoff_max_ms: p.backoff_max_ms.max(p.backoff_ms),
            burst: p.burst,
            burst_window_ms: p.burst_window_ms,
        }
    }
}

/// Quotas and limits, defaults filled in.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// cgroup memory.max, bytes; 0 = none.
    pub memory_bytes: u64,
    /// cgroup cpu.weight; 0 = default.
    pub cpu_weight: u32,
    /// Tasks.
    pub pids: u32,
    /// fd store entries.
    pub fd_store: u32,
    /// Ports.
    pub ports: u32,
    /// Pages in own regions.
    pub region_pages: u32,
    /// Pages of others mapped.
    pub map_pages: u32,
    /// Hypercall sockets of one incarnation.
    pub channels: u32,
    /// Buffers for grant copies.
    pub buffers: u32,
    /// Bytes of all of them.
    pub buffer_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            memory_bytes: 0,
            cpu_weight: 0,
            pids: 64,
            fd_store: 512,
            ports: 4095,
            region_pages: 65536,
            map_pages: 65536,
            channels: 32,
            buffers: 64,
            buffer_bytes: 256 << 20,
        }
    }
}

impl Spec {
    /// Whether its program may need a loader and libraries: only where the filter profile is made for such a program.
    pub fn may_be_dynamic(&self) -> bool {
        self.seccomp == SeccompProfile::Qemu
    }
}

/// A checked specification.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// `ROLE_*` bits.
    pub roles: u32,
    /// Absolute path of the program.
    pub program: String,
    /// Arguments after the name.
    pub args: Vec<String>,
    /// KEY=VALUE.
    pub env: Vec<String>,
    /// Restarts.
    pub restart: RestartPolicy,
    /// Approved resources, listeners not listening yet.
    pub resources: Vec<(Name, Resource)>,
    /// What is in its file system.
    pub binds: Vec<BindSpec>,
    /// Limits.
    pub limits: Limits,
    /// Guest RAM, bytes; 0 without ROLE_PVH.
    pub ram_bytes: u64,
    /// Grant frames.
    pub grant_frames: u32,
    /// Interfaces to be moved in.
    pub netdevs: Vec<String>,
    /// Capability numbers.
    pub capabilities: Vec<u8>,
    /// Killed with hv-core.
    pub die_with_hypervisor: bool,
    /// System-call filter.
    pub seccomp: SeccompProfile,
    /// The process is started by StartProcess, not at creation.
    pub paused: bool,
}

impl Spec {
    /// What differs from `other` and can't be changed in a domain's life. (Of resources: what is approved now can be named.)
    pub fn fixed_field(&self, other: &Spec) -> Option<&'static str> {
        let quotas = |l: &Limits| {
            (l.fd_store, l.ports, l.region_pages, l.map_pages, l.channels, l.buffers, l.buffer_bytes)
        };
        let same = [
            ("name", self.name == other.name),
            ("uuid", self.uuid == other.uuid),
            ("roles", self.roles == other.roles),
            ("ram_bytes", (self.ram_bytes, self.grant_frames) == (other.ram_bytes, other.grant_frames)),
            ("netdevs", self.netdevs == other.netdevs),
            ("limits", quotas(&self.limits) == quotas(&other.limits)),
        ];
        same.into_iter().find(|(_, same)| !same).map(|(field, _)| field)
    }
}

/// Longest name of a domain: it is also a host name and a file's name.
const NAME_MAX: usize = 60;
/// Most arguments, variables, binds, resources, interfaces each.
const LIST_MAX: usize = 256;
/// Longest path or argument, bytes.
const TEXT_MAX: usize = 4096;
/// Longest interface name (IFNAMSIZ without the NUL).
const IFNAME_MAX: usize = 15;
/// Largest guest, bytes.
const RAM_MAX: u64 = 1 << 40;
/// Granularity of guest RAM, bytes.
const RAM_STEP: u64 = 2 << 20;
/// Highest domid for a created domain (xen.h: DOMID_FIRST_RESERVED is 0x7FF0).
pub const DOMID_MAX: u32 = 32751;

/// Names by number, from linux/capability.h.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A capability's number by its name, as "CAP_NET_ADMIN".
fn capability(name: &str) -> Option<u8> {
    let short = name.strip_prefix("CAP_")?;
    CAPABILITIES.iter().position(|c| *c == short).map(|n| n as u8)
}

fn bad<T>(field: &str, why: impl std::fmt::Display) -> Result<T, String> {
    Err(format!("{field}: {why}"))
}

fn check_text(field: &str, text: &str) -> Result<(), String> {
    if text.len() > TEXT_MAX || text.contains('\0') {
        return bad(
            field,
            format!("{:?}… is too long or has a NUL", text.chars().take(20).collect::<String>()),
        );
    }
    Ok(())
}

fn check_path(field: &str, path: &str) -> Result<(), String> {
    check_text(field, path)?;
    if !path.starts_with('/') { bad(field, format!("{path:?} is not an absolute path")) } else { Ok(()) }
}

/// A domain's name: a letter or digit, then letters, digits, '-', '_', '.', '@'.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if name.is_empty()
        || name.len() > NAME_MAX
        || !name.chars().all(good)
        || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        return bad("name", format!("{name:?} must be 1 to {NAME_MAX} letters, digits, '-', '_', '.', '@'"));
    }
    Ok(())
}

/// A wire resource, checked.
///
/// # Errors
/// In one line that begins with the field's name.
pub fn resource(r: &WireResource) -> Result<(Name, Resource), String> {
    let Some(name) = Name::new(&r.name) else {
        return bad("resources.name", format!("{:?} must be 1 to {NAME_LEN} printable ASCII bytes", r.name));
    };
    if r.kind() != resource::Kind::Connect {
        check_path("resources.path", &r.path)?;
    } else if !crate::resources::is_server(&r.path) {
        return bad(
            "resources.path",
            format!("{:?} is no socket's path, tcp:ADDRESS:PORT or inside:UUID:NAME", r.path),
        );
    }
    let kind = match r.kind() {
        resource::Kind::FileRo => resource_kind::FILE_RO,
        resource::Kind::FileRw => resource_kind::FILE_RW,
        resource::Kind::Listener => resource_kind::LISTENER,
        resource::Kind::Device => resource_kind::DEVICE,
        resource::Kind::Connect => resource_kind::CONNECT,
        resource::Kind::FileTemporary => resource_kind::FILE_TEMPORARY,
        resource::Kind::Unspecified => return bad("resources.kind", format!("of {:?} is missing", r.name)),
    };
    Ok((name, Resource { kind, path: r.path.clone(), mode: r.mode, listener: None, temporary: None }))
}

fn bind_field(binds: &[proto::hvcore::Bind]) -> Result<Vec<BindSpec>, String> {
    let mut out: Vec<BindSpec> = Vec::new();
    for b in binds {
        check_path("binds.source", &b.source)?;
        check_text("binds.target", &b.target)?;
        if !is_plain_absolute(&b.target) {
            return bad("binds.target", format!("{:?} is not a plain absolute path", b.target));
        }
        if out.iter().any(|o| o.target == b.target) {
            return bad("binds.target", format!("{:?} is there twice", b.target));
        }
        if b.executable && !b.read_only {
            return bad("binds.executable", format!("{:?} must be read-only", b.target));
        }
        out.push(BindSpec {
            source: b.source.clone(),
            target: b.target.clone(),
            read_only: b.read_only,
            executable: b.executable,
        });
    }
    Ok(out)
}

fn roles_field(roles: impl Iterator<Item = Role>) -> Result<u32, String> {
    let mut bits = 0;
    for role in roles {
        bits |= match role {
            Role::Xenstore => ROLE_XENSTORE,
            Role::Console => ROLE_CONSOLE,
            Role::Backend => ROLE_BACKEND,
            Role::Pvh => ROLE_PVH,
            Role::ProcessGuest => ROLE_PROCESS_GUEST,
            Role::Service => 0,
            Role::Unspecified => return bad("roles", "a role is unknown to this hv-core"),
        };
    }
    let guest = bits & (ROLE_PVH | ROLE_PROCESS_GUEST);
    if guest != 0 && bits != guest || guest.count_ones() > 1 {
        return bad("roles", "a guest has no other role");
    }
    Ok(bits)
}

fn or_default(value: u32, default: u32, max: u32) -> u32 {
    if value == 0 { default } else { value.min(max) }
}

impl Spec {
    /// Checks a request.
    ///
    /// # Errors
    /// In one line that begins with the field's name.
    pub fn parse(r: &CreateDomainRequest) -> Result<Spec, String> {
        check_name(&r.name)?;
        let uuid = if r.uuid.is_empty() {
            Uuid::new_v4()
        } else {
            Uuid::parse_str(&r.uuid).or_else(|e| bad("uuid", e))?
        };
        if r.domid > DOMID_MAX {
            return bad("domid", format!("{} is above {DOMID_MAX}", r.domid));
        }
        let lists = [
            ("args", r.args.len()),
            ("env", r.env.len()),
            ("binds", r.binds.len()),
            ("resources", r.resources.len()),
            ("netdevs", r.netdevs.len()),
        ];
        if let Some((field, n)) = lists.into_iter().find(|(_, n)| *n > LIST_MAX) {
            return bad(field, format!("{n} entries, at most {LIST_MAX}"));
        }
        check_path("program", &r.program)?;
        for arg in &r.args {
            check_text("args", arg)?;
        }
        for var in &r.env {
            check_text("env", var)?;
            if !var.contains('=') {
                return bad("env", format!("{var:?} is not KEY=VALUE"));
            }
        }
        let known = |n: &i32| Role::try_from(*n).unwrap_or(Role::Unspecified);
        let roles = roles_field(r.roles.iter().map(known))?;
        let mut resources: Vec<(Name, Resource)> = Vec::new();
        for r in &r.resources {
            let (name, resource) = resource(r)?;
            if resources.iter().any(|(n, _)| *n == name) {
                return bad("resources.name", format!("{:?} is there twice", r.name));
            }
            resources.push((name, resource));
        }
        let is_pvh = roles & ROLE_PVH != 0;
        if is_pvh && (r.ram_bytes == 0 || !r.ram_bytes.is_multiple_of(RAM_STEP) || r.ram_bytes > RAM_MAX) {
            return bad("ram_bytes", "must be a multiple of 2 MiB, at most 1 TiB");
        }
        if !is_pvh && r.ram_bytes != 0 {
            return bad("ram_bytes", "only a PVH domain has RAM");
        }
        if r.grant_frames > 1024 {
            return bad("grant_frames", "at most 1024");
        }
        for dev in &r.netdevs {
            if dev.is_empty() || dev.len() > IFNAME_MAX || dev.contains(['/', '\0']) {
                return bad("netdevs", format!("{dev:?} is no interface name"));
            }
        }
        let mut capabilities = Vec::new();
        for name in &r.capabilities {
            match capability(name) {
                Some(number) => capabilities.push(number),
                None => return bad("capabilities", format!("{name:?} is unknown (as \"CAP_NET_ADMIN\")")),
            }
        }
        let seccomp = match r.seccomp.as_str() {
            "" | "service" => SeccompProfile::Service,
            "net" => SeccompProfile::Net,
            "runner" => SeccompProfile::Runner,
            "toolstack" => SeccompProfile::Toolstack,
            "qemu" => SeccompProfile::Qemu,
            other => {
                return bad("seccomp", format!("{other:?} is not service, net, runner, toolstack or qemu"));
            }
        };
        let wire = r.limits.unwrap_or_default();
        if wire.cpu_weight > 10000 {
            return bad("limits.cpu_weight", "1 to 10000");
        }
        let default = Limits::default();
        let limits = Limits {
            memory_bytes: wire.memory_bytes,
            cpu_weight: wire.cpu_weight,
            pids: or_default(wire.pids, default.pids, 4096),
            fd_store: or_default(wire.fd_store, default.fd_store, 8192),
            ports: or_default(wire.ports, default.ports, 65536),
            region_pages: or_default(wire.region_pages, default.region_pages, 1 << 24),
            map_pages: or_default(wire.map_pages, default.map_pages, 1 << 24),
            channels: or_default(wire.channels, default.channels, 1024),
            buffers: or_default(wire.buffers, default.buffers, 4096),
            buffer_bytes: match wire.buffer_bytes {
                0 => default.buffer_bytes,
                bytes => bytes.min(64 << 30),
            },
        };
        Ok(Spec {
            name: r.name.clone(),
            uuid,
            roles,
            program: r.program.clone(),
            args: r.args.clone(),
            env: r.env.clone(),
            restart: RestartPolicy::from(&r.restart.unwrap_or_default()),
            resources,
            binds: bind_field(&r.binds)?,
            limits,
            ram_bytes: r.ram_bytes,
            grant_frames: if is_pvh { or_default(r.grant_frames, 32, 1024) } else { 0 },
            netdevs: r.netdevs.clone(),
            capabilities,
            die_with_hypervisor: r.die_with_hypervisor,
            seccomp,
            paused: r.paused,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> CreateDomainRequest {
        CreateDomainRequest { name: "blkback".into(), program: "/x".into(), ..Default::default() }
    }

    #[test]
    fn each_bad_field_is_named() {
        assert!(Spec::parse(&good()).is_ok());
        type Spoil = Box<dyn Fn(&mut CreateDomainRequest)>;
        let cases: Vec<(&str, Spoil)> = vec![
            ("name", Box::new(|r| r.name = "../x".into())),
            ("name", Box::new(|r| r.name = ".x".into())),
            ("uuid", Box::new(|r| r.uuid = "1".into())),
            ("domid", Box::new(|r| r.domid = 0x7ff0)),
            ("program", Box::new(|r| r.program = "x".into())),
            ("env", Box::new(|r| r.env = vec!["x".into()])),
            ("roles", Box::new(|r| r.roles = vec![4, 3])),
            ("roles", Box::new(|r| r.roles = vec![77])),
            ("ram_bytes", Box::new(|r| r.roles = vec![4])),
            ("ram_bytes", Box::new(|r| r.ram_bytes = 1 << 21)),
            ("grant_frames", Box::new(|r| r.grant_frames = 5000)),
            ("netdevs", Box::new(|r| r.netdevs = vec!["a/b".into()])),
            ("capabilities", Box::new(|r| r.capabilities = vec!["NET_ADMIN".into()])),
            ("seccomp", Box::new(|r| r.seccomp = "none".into())),
            ("args", Box::new(|r| r.args = vec!["x\0".into()])),
            (
                "binds.target",
                Box::new(|r| {
                    r.binds = vec![proto::hvcore::Bind {
                        source: "/a".into(),
                        target: "/../b".into(),
                        read_only: true,
                        executable: false,
                    }];
                }),
            ),
            (
                "binds.executable",
                Box::new(|r| {
                    r.binds = vec![proto::hvcore::Bind {
                        source: "/a".into(),
                        target: "/b".into(),
                        read_only: false,
                        executable: true,
                    }];
                }),
            ),
            (
                "resources.kind",
                Box::new(|r| {
                    r.resources =
                        vec![WireResource { name: "d".into(), path: "/d".into(), ..Default::default() }];
                }),
            ),
        ];
        for (field, spoil) in cases {
            let mut r = good();
            spoil(&mut r);
            let error = Spec::parse(&r).unwrap_err();
            assert!(error.starts_with(&format!("{field}:")), "{field}: {error}");
        }
    }

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        assert_eq!(capability("CAP_NET_ADMIN"), Some(12));
        assert_eq!(capability("CAP_SYS_ADMIN"), Some(21));
        assert_eq!(capability("CAP_CHECKPOINT_RESTORE"), Some(40));
    }
}
