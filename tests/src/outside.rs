//! The outside world of a system under test: a network namespace with one end of a veth pair whose other end becomes the
//! driver domain's uplink.

use std::process::Command;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

type Job = Box<dyn FnOnce() + Send>;

/// A thread inside the namespace. The namespace ends with the last process and thread in it.
#[derive(Debug)]
pub struct Outside {
    jobs: mpsc::Sender<Job>,
}

/// Name of the interface given to the driver domain.
pub const UPLINK: &str = "bh-up0";
/// Name of the outside's end.
pub const PEER: &str = "bh-out0";
/// Name of a second interface for another driver domain, see [`Outside::add_uplink`].
pub const SECOND_UPLINK: &str = "bh-up1";
/// The outside's address; guests get .2 and up of the same network.
pub const ADDRESS: &str = "10.77.0.1";
/// Length of the network's prefix.
pub const PREFIX: u8 = 24;

impl Outside {
    /// Makes the namespace and the veth pair. Needs root and iproute2.
    ///
    /// # Errors
    /// In words: no permission, no veth support, no `ip` program.
    pub fn new() -> Result<Outside> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::channel();
        thread::Builder::new().name("outside".into()).spawn(move || {
            let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .context("no network namespace can be made (run as root)");
            let failed = made.is_err();
            if ready.send(made).is_err() || failed {
                return;
            }
            for job in inbox {
                job();
            }
        })?;
        is_ready.recv().context("the outside's thread ended")??;
        let outside = Outside { jobs };
        outside.run(|| -> Result<()> {
            ip(&["link", "set", "lo", "up"])?;
            ip(&["link", "add", PEER, "type", "veth", "peer", "name", UPLINK])?;
            ip(&["addr", "add", &format!("{ADDRESS}/{PREFIX}"), "dev", PEER])?;
            ip(&["link", "set", PEER, "up"])
        })??;
        Ok(outside)
    }

    /// Makes [`SECOND_UPLINK`]: a bridge joins its other end and that of [`UPLINK`], and the outside's address is the bridge's.
    ///
    /// # Errors
    /// In words: no bridges, no `ip` program.
    pub fn add_uplink(&self) -> Result<()> {
        self.run(|| -> Result<()> {
            let (bridge, peer) = ("bh-outbr", "bh-out1");
            ip(&["link", "add", peer, "type", "veth", "peer", "name", SECOND_UPLINK])?;
            ip(&["link", "add", bridge, "type", "bridge", "forward_delay", "0"])?;
            ip(&["addr", "del", &format!("{ADDRESS}/{PREFIX}"), "dev", PEER])?;
            ip(&["addr", "add", &format!("{ADDRESS}/{PREFIX}"), "dev", bridge])?;
            for port in [PEER, peer] {
                ip(&["link", "set", port, "master", bridge])?;
                ip(&["link", "set", port, "up"])?;
            }
            ip(&["link", "set", bridge, "up"])
        })?
    }

    /// Makes another network with an uplink into it, number `n` from 1: gives the uplink's name. The outside has the address 10.77.`n`.1
    /// and fd77:`n`::1 there.
    ///
    /// # Errors
    /// In words: no veth support, no `ip` program.
    pub fn add_network(&self, n: u8) -> Result<String> {
        let (uplink, peer) = (format!("bh-net{n}"), format!("bh-onet{n}"));
        let name = uplink.clone();
        self.run(move || -> Result<()> {
            ip(&["link", "add", &peer, "type", "veth", "peer", "name", &uplink])?;
            ip(&["addr", "add", &format!("10.77.{n}.1/{PREFIX}"), "dev", &peer])?;
            ip(&["-6", "addr", "add", &format!("fd77:{n}::1/64"), "dev", &peer, "nodad"])?;
            ip(&["link", "set", &peer, "up"])
        })??;
        Ok(name)
    }

    /// Runs `job` on the thread inside the namespace and gives what it gives. Threads and processes that it starts are in the
    /// namespace too.
    ///
    /// # Errors
    /// If the thread has ended.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || {
            // Nobody waits any more: the result has no reader.
            drop(done.send(job()));
        });
        if self.jobs.send(job).is_err() {
            bail!("the outside's thread has ended");
        }
        result.recv().context("the job on the outside's thread panicked")
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("running ip (package iproute2)")?;
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
