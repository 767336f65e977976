//! The guest as QEMU has it.
//!
//! QEMU is started with its processors stopped and without any device but the serial line, and never ends by itself: a guest that powers
//! off or panics leaves a stopped machine, whose state tells the next incarnation what happened while there was none.
//!
//! ```text
//!   prelaunch ──all devices plugged──► running ◄──► paused
//!                                        │ │
//!                  power-off: shutdown ◄─┘ └─► guest-panicked, internal-error        ──► the domain ends
//! ```

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use domain_kit::{Domain, HvError, Hypercall};
use nix::errno::Errno;
use serde_json::{Value, json};
use xen_abi::sched::{SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT};

use crate::qmp::{Event, PATIENCE, Qmp, QmpError};

/// The resource that leads to the monitor.
pub const QMP_RESOURCE: &str = "qmp";
/// How long QEMU may take to come up: a loaded machine, and a large program.
const COME_UP: Duration = Duration::from_secs(60);
/// How often the state is asked for.
const LOOK: Duration = Duration::from_secs(2);

/// How the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It powered off.
    PowerOff,
    /// It was asked to reboot and did.
    Reboot,
    /// It, or QEMU, broke; one line.
    Crash(String),
}

impl End {
    /// As sched.h numbers it.
    pub fn reason(&self) -> u32 {
        match self {
            End::PowerOff => SHUTDOWN_POWEROFF,
            End::Reboot => SHUTDOWN_REBOOT,
            End::Crash(_) => SHUTDOWN_CRASH,
        }
    }
}

/// What QEMU's word for its state means for the domain; `None`: it goes on.
fn end_of(state: &str) -> Option<End> {
    match state {
        "shutdown" => Some(End::PowerOff),
        "guest-panicked" => Some(End::Crash("the guest's kernel panicked".into())),
        "internal-error" => Some(End::Crash("QEMU: internal error of its accelerator".into())),
        _ => None,
    }
}

/// The resource that is the file of a UEFI guest's variables.
pub const NVRAM_RESOURCE: &str = "nvram";
/// Most bytes of that file: QEMU's PC has room for no more flash (`max-fw-size`).
const MOST_NVRAM: u64 = 8 << 20;

/// Bounds the one file of the host that a QEMU can write. (A limit of its process would be one of its memory and of its disks' images, too.)
#[derive(Debug)]
pub struct Nvram(Option<File>);

impl Nvram {
    /// The approved file, if there is one.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(hv: &Hypercall) -> Result<Nvram, HvError> {
        match hv.resource_open(NVRAM_RESOURCE) {
            Ok((_, fd)) => Ok(Nvram(Some(fd.into()))),
            Err(e) if e.is(Errno::ENOENT) => Ok(Nvram(None)),
            Err(e) => Err(e),
        }
    }

    /// What is wrong with it.
    pub fn broken(&self) -> Option<String> {
        let bytes = self.0.as_ref()?.metadata().ok()?.len();
        (bytes > MOST_NVRAM).then(|| format!("nvram has {bytes} bytes, more than a machine has room for"))
    }
}

/// The machine, for all threads.
#[derive(Debug)]
pub struct Machine {
    qmp: Qmp,
    /// What it was last seen in; "silent" while it does not answer.
    state: Mutex<String>,
    version: String,
    accel: String,
    resets: AtomicU32,
    /// A reboot was asked for: the next power-off is one.
    rebooting: Mutex<Option<Instant>>,
}

impl Machine {
    /// Takes the monitor up.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn open(hv: &Hypercall) -> Result<(Arc<Machine>, Receiver<Event>), QmpError> {
        let (_, fd) = hv.resource_open(QMP_RESOURCE).map_err(|error| {
            tracing::error!(%error, "QEMU's monitor");
            QmpError::Closed
        })?;
        let stream = UnixStream::from(fd);
        let _best_effort = stream.set_write_timeout(Some(PATIENCE));
        let (qmp, events) = Qmp::open(stream, COME_UP)?;
        let version = qmp.call("query-version", json!({}))?;
        let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
        let kvm = qmp.call("query-kvm", json!({}))?["enabled"].as_bool().unwrap_or(false);
        let machine = Machine {
            version: format!("{}.{}.{}", number("major"), number("minor"), number("micro")),
            accel: if kvm { "kvm" } else { "tcg" }.into(),
            qmp,
            state: Mutex::default(),
            resets: AtomicU32::new(0),
            rebooting: Mutex::default(),
        };
        machine.look()?;
        Ok((Arc::new(machine), events))
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// What it was last seen in.
    pub fn state(&self) -> String {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// QEMU's version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// "kvm" or "tcg".
    pub fn accel(&self) -> &str {
        &self.accel
    }

    /// Resets that this incarnation saw.
    pub fn resets(&self) -> u32 {
        self.resets.load(Relaxed)
    }

    /// Asks for the state.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn look(&self) -> Result<String, QmpError> {
        let answer = self.qmp.call("query-status", json!({})).and_then(|value| {
            let state = value["status"].as_str().map(str::to_owned);
            state.ok_or(QmpError::Garbage("a state that is none"))
        });
        let state = answer.clone().unwrap_or_else(|_| "silent".into());
        let mut now = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *now != state {
            tracing::info!(from = *now, to = state, "the guest");
        }
        *now = state;
        answer
    }

    /// Lets the processors run.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn resume(&self) -> Result<(), QmpError> {
        self.qmp.call("cont", json!({}))?;
        self.look().map(drop)
    }

    /// Stops the processors.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn pause(&self) -> Result<(), QmpError> {
        self.qmp.call("stop", json!({}))?;
        self.look().map(drop)
    }

    /// Presses the reset button: everything but the processors' and devices' state stays.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn reset(&self) -> Result<(), QmpError> {
        self.qmp.call("system_reset", json!({}))?;
        self.look().map(drop)
    }

    /// Presses the power button. `reboot`: what follows is to be a reboot.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn power_button(&self, reboot: bool) -> Result<(), QmpError> {
        *self.rebooting.lock().unwrap_or_else(PoisonError::into_inner) = reboot.then(Instant::now);
        self.qmp.call("system_powerdown", json!({})).map(drop)
    }

    fn ended(&self, end: End) -> End {
        let asked = self.rebooting.lock().unwrap_or_else(PoisonError::into_inner).take();
        match end {
            End::PowerOff if asked.is_some() => End::Reboot,
            end => end,
        }
    }

    /// Follows the machine until it ends. `silent` is told when QEMU stops or begins to answer; `broken` says what else ends it.
    pub fn follow(
        &self,
        events: &Receiver<Event>,
        silent: impl Fn(bool),
        broken: impl Fn() -> Option<String>,
    ) -> End {
        let mut was_silent = false;
        loop {
            if let Some(why) = broken() {
                return End::Crash(why);
            }
            match events.recv_timeout(LOOK) {
                Ok(event) => self.happened(&event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return End::Crash(match self.look() {
                        Err(why @ QmpError::Garbage(_)) => why.to_string(),
                        _ => "QEMU ended".into(),
                    });
                }
            }
            match self.look() {
                Ok(state) => {
                    if std::mem::take(&mut was_silent) {
                        tracing::info!("QEMU answers again");
                        silent(false);
                    }
                    if let Some(end) = end_of(&state) {
                        return self.ended(end);
                    }
                }
                // It may be stopped, or the host overloaded: nothing is lost as long as it is there.
                Err(QmpError::Silent(_)) => {
                    if !std::mem::replace(&mut was_silent, true) {
                        tracing::error!("QEMU does not answer; the guest is left as it is");
                        silent(true);
                    }
                }
                Err(why @ QmpError::Garbage(_)) => return End::Crash(why.to_string()),
                Err(why) => tracing::debug!(%why, "the state cannot be asked for"),
            }
        }
    }

    fn happened(&self, event: &Event) {
        match event.name.as_str() {
            "RESET" => {
                self.resets.fetch_add(1, Relaxed);
                tracing::info!("the guest was reset");
            }
            "RTC_CHANGE" | "NIC_RX_FILTER_CHANGED" | "CHARDEV_CHANGE" => {}
            name => tracing::info!(event = name, data = %short(&event.data), "QEMU"),
        }
    }
}

fn short(data: &Value) -> String {
    data.to_string().chars().take(200).collect()
}

/// Ends the domain: QEMU is told to go, and hv-core how the guest ended.
pub fn end(domain: &Domain, machine: &Machine, end: &End) -> anyhow::Result<()> {
    tracing::info!(?end, "the guest ended");
    let _gone_or_ended_by_dom0 = machine.qmp().call_with("quit", json!({}), None, Duration::from_secs(2));
    domain.hv.shutdown(end.reason())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_variables_that_grows_is_told() {
        let file = tempfile::tempfile().unwrap();
        let nvram = Nvram(Some(file.try_clone().unwrap()));
        file.set_len(MOST_NVRAM).unwrap();
        assert_eq!(nvram.broken(), None);
        file.set_len(MOST_NVRAM + 1).unwrap();
        assert!(nvram.broken().unwrap().contains("8388609 bytes"));
        assert_eq!(Nvram(None).broken(), None);
    }

    #[test]
    fn states_that_end_a_guest() {
        assert_eq!(end_of("shutdown"), Some(End::PowerOff));
        assert_eq!(end_of("guest-panicked").unwrap().reason(), SHUTDOWN_CRASH);
        for on in ["running", "paused", "prelaunch", "suspended", "io-error", "inmigrate", "unknown"] {
            assert_eq!(end_of(on), None, "{on}");
        }
    }
}
