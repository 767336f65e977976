//! What hv-core and its spawner say to each other over their socket pair: one JSON document a message, descriptors
//! beside it.

use serde::{Deserialize, Serialize};

/// Largest message, bytes.
pub const MAX_SPAWNER_MESSAGE: usize = 128 * 1024;

/// A path of the host bound into a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindSpec {
    /// Absolute path on the host.
    pub source: String,
    /// Absolute path in the sandbox.
    pub target: String,
    /// Not writable.
    pub read_only: bool,
    /// Files below may be executed: the loader of a dynamically linked program.
    #[serde(default)]
    pub executable: bool,
}

/// Which system calls the process may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompProfile {
    /// Files, memory, threads, Unix sockets, io_uring.
    Service,
    /// Service, and network sockets, TAP and bridge set-up.
    Net,
    /// Service, and KVM.
    Runner,
    /// Service, and changing files' names and owners, inotify.
    Toolstack,
    /// Service, KVM, and filters of its own: a device model. It has no event channels to keep from blocking.
    Qemu,
}

/// Limits written to the domain's cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupLimits {
    /// The cgroup's directory; empty: this host has none.
    pub dir: String,
    /// memory.max, bytes; 0 = none.
    pub memory_bytes: u64,
    /// cpu.weight; 0 = default.
    pub cpu_weight: u32,
    /// pids.max.
    pub pids: u32,
}

/// A process to start. Descriptors beside it: program, hypercall socket, control listener, log, user namespace, network
/// namespace, and dom0's control stream if `control_stream`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpawnRequest {
    /// The domain's name: argv\[0\] and host name.
    pub name: String,
    /// Arguments after the name.
    pub args: Vec<String>,
    /// KEY=VALUE.
    pub env: Vec<String>,
    /// What is in its file system.
    pub binds: Vec<BindSpec>,
    /// System-call filter.
    pub seccomp: SeccompProfile,
    /// Numbers of the capabilities to keep.
    pub capabilities: Vec<u8>,
    /// Kill it when the spawner, and so hv-core, dies.
    pub die_with_hypervisor: bool,
    /// A seventh descriptor is there and becomes fd 5.
    pub control_stream: bool,
    /// Limits.
    pub cgroup: CgroupLimits,
}

/// From hv-core.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToSpawner {
    /// Make a user and a network namespace whose root is this host uid and gid.
    MakeNamespaces {
        /// Host uid and gid.
        uid: u32,
    },
    /// Start a process.
    Spawn(Box<SpawnRequest>),
}

/// From the spawner.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromSpawner {
    /// Made; descriptors: user namespace, network namespace.
    Namespaces,
    /// Started; descriptor: pidfd.
    Spawned {
        /// Its host process id.
        pid: i32,
        /// What of its sandbox this host could not give, in words.
        missing: Vec<String>,
    },
    /// The last request failed.
    Failed {
        /// In one line.
        reason: String,
    },
    /// A process ended. Comes by itself.
    Reaped {
        /// Host process id.
        pid: i32,
        /// Wait status, as wait(2) has it.
        status: i32,
        /// CLOCK_MONOTONIC nanoseconds.
        ns: u64,
    },
}
