//! All of a guest's state that is not in its memory or in KVM, in one place: plain values that can be serialised,
//! and beside them what belongs to this process (file descriptors).

use crate::hypervisor::PortFds;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use xen_abi::hvm::HVM_NR_PARAMS;

/// What a port of the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortKind {
    /// Unbound or interdomain; hv-core knows which.
    Remote,
    /// Bound to a VIRQ.
    Virq(u32),
    /// Between the guest's own vCPUs.
    Ipi,
}

/// A port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// What it is.
    pub kind: PortKind,
    /// The vCPU that gets its upcalls.
    pub vcpu: u32,
}

/// A page of Xen's that the guest asked for at a frame of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum XenPage {
    /// The shared info page.
    SharedInfo,
    /// A frame of the grant table.
    GrantFrame(u32),
}

/// A vCPU's part of the state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Guest-physical address of a registered `vcpu_info`; else it is in shared_info.
    pub vcpu_info: Option<u64>,
    /// Guest-physical address of the runstate area.
    pub runstate: Option<u64>,
    /// Guest-physical address of the secondary time area.
    pub time_info: Option<u64>,
    /// The vCPU's own upcall vector.
    pub upcall_vector: Option<u8>,
    /// When a singleshot timer fires that was set before VIRQ_TIMER was bound.
    pub timer_ns: u64,
}

/// The guest's state.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// HVM parameters by index.
    pub params: Vec<u64>,
    /// Ports by number.
    pub ports: BTreeMap<u32, Port>,
    /// vCPUs by number.
    pub vcpus: Vec<VcpuState>,
    /// Xen's pages by guest frame.
    pub xen_pages: BTreeMap<u64, XenPage>,
    /// Grant frames in use: one more than the highest that the guest asked for.
    pub grant_frames: u32,
    /// Guest frames of RAM that the guest gave back (one bit each).
    pub ballooned: Vec<u64>,
    /// How many of them.
    pub ballooned_pages: u64,
    /// `SCHEDOP_shutdown_code`: what a later shutdown means.
    pub shutdown_code: Option<u32>,
    /// The eventfds of ports towards other domains.
    #[serde(skip)]
    pub fds: BTreeMap<u32, PortFds>,
}

impl State {
    /// The state of a guest that has not run.
    pub fn new(vcpus: u32) -> Self {
        Self {
            params: vec![0; HVM_NR_PARAMS as usize],
            vcpus: vec![VcpuState::default(); vcpus as usize],
            grant_frames: 1,
            ..Self::default()
        }
    }

    /// Marks a frame as given back or not; returns whether that changed anything.
    pub fn set_ballooned(&mut self, gfn: u64, given_back: bool) -> bool {
        let (word, bit) = ((gfn / 64) as usize, 1u64 << (gfn % 64));
        if self.ballooned.len() <= word {
            if !given_back {
                return false;
            }
            self.ballooned.resize(word + 1, 0);
        }
        let was = self.ballooned[word] & bit != 0;
        if was == given_back {
            return false;
        }
        self.ballooned[word] ^= bit;
        if given_back {
            self.ballooned_pages += 1;
        } else {
            self.ballooned_pages -= 1;
        }
        true
    }
}
