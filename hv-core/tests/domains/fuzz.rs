//! Garbage on fd 3.

use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hv_abi::*;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zerocopy::IntoBytes;

use crate::system::System;

/// Messages of every op with random bodies, random lengths, too many descriptors, nothing at all; hv-core lives, leaks
/// nothing, and others are served all the time.
pub fn garbage_on_the_hypercall_socket() {
    let seed = std::env::var("BH_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64);
    let messages = std::env::var("BH_FUZZ").ok().and_then(|s| s.parse().ok()).unwrap_or(20_000u32);
    let mut system = System::start();
    let (bad, good) = (system.backend("bad"), system.backend("good"));
    let witness = good.hv();
    let (info, _memfd) = witness.region_create(bad.id, 4, 0).unwrap();
    let pid = system.hv_core.id();
    let fds_of = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let mut random = StdRng::seed_from_u64(seed);
    let mut worst = Duration::ZERO;
    let before = fds_of(pid);
    let mut socket = bad.socket();
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut sent = 0;
    while sent < messages {
        let op: u16 = match random.random_range(0..10) {
            0 => random.random(),
            _ => random.random_range(0..70),
        };
        // Not these two: a shutdown ends the test's domain, and channels are threads of their own.
        if [Op::Shutdown as u16, Op::NewChannel as u16].contains(&op) {
            continue;
        }
        let header = ReqHeader { op, pad: u16::from(random.random_ratio(1, 50)), seq: random.random() };
        let len = match random.random_range(0..12) {
            0 => 0,
            1 => random.random_range(0..MAX_MESSAGE - 16),
            2 => MAX_MESSAGE,
            _ => random.random_range(0..12) * 8,
        };
        let mut body = vec![0u8; len];
        for word in body.chunks_mut(4) {
            // Mostly small numbers and things that exist.
            let value: u32 = match random.random_range(0..8) {
                0 => random.random(),
                1 => info.first_gref + random.random_range(0..5),
                2 => good.id.into(),
                3 => u32::MAX,
                _ => random.random_range(0..6),
            };
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        let count = match random.random_range(0..10) {
            0 => 1,
            1 => random.random_range(2..20),
            _ => 0,
        };
        let fds = vec![null.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let header = header.as_bytes();
        let cut = if random.random_ratio(1, 30) { random.random_range(0..8) } else { 8 };
        let slices = [IoSlice::new(&header[..cut]), IoSlice::new(&body)];
        let result = sendmsg::<()>(socket.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None);
        let mut space = nix::cmsg_space!([i32; 8]);
        let mut into = [std::io::IoSliceMut::new(&mut buffer)];
        let answer =
            recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC);
        let alive = result.is_ok() && answer.as_ref().is_ok_and(|a| a.bytes >= 8);
        if let Ok(answer) = answer
            && let Ok(controls) = answer.cmsgs()
        {
            for control in controls {
                if let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = control {
                    fds.into_iter().map(crate::raw::own).for_each(drop);
                }
            }
        }
        assert!(alive, "message {sent} of seed {seed} (op {op}) got no answer");
        sent += 1;
        if sent % 64 == 0 {
            let start = Instant::now();
            assert_eq!(witness.hello().unwrap().domid, good.id);
            worst = worst.max(start.elapsed());
        }
        if sent % 5000 == 0 {
            system.kill(&bad);
            socket = bad.socket();
        }
    }
    println!("NOTE {messages} messages of seed {seed}; the other domain's slowest call {worst:?}");
    assert!(worst < Duration::from_millis(500), "{worst:?}");
    system.destroy(&bad);
    crate::system::until("gone", || system.get(&bad).is_none());
    let after = fds_of(pid);
    assert!(after <= before, "hv-core had {before} descriptors, has {after}");
    assert_eq!(system.get(&good).unwrap().generation, 1);
}
