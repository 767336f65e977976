//! CONTROL: the commands of Xen's daemon that make sense here. `live-update` is not the store's matter (`live.rs`).

use std::fmt::Write as _;

use super::{Item, Store};
use crate::wire::{Errno, decimal, strings};

const HELP: &str = "\
check           
log             [on|off|+io|-io]
live-update     [-F] [-t <timeout>] <file>
memreport       
print           <string>
quota           [set <name> <val>|<domid>|max [-r]]
quota-soft      [set <name> <val>]
help            
";

impl Store {
    /// Runs a command that only looks, if it is one: whether the answer is an error, and the answer. Not part of an event, as it
    /// depends on more than the events before: on what clients have read, for example.
    pub fn look(&self, payload: &[u8]) -> Option<(bool, Vec<u8>)> {
        let args: Vec<&[u8]> = strings(payload).collect();
        let mut text = String::new();
        match args[..] {
            [b"check"] => match self.check() {
                Ok(()) => text.push_str("OK"),
                Err(what) => {
                    tracing::error!(what, "the store is inconsistent");
                    text = what;
                }
            },
            [b"log"] => {
                let on = if self.log_requests { "on" } else { "off" };
                let _ = writeln!(text, "Log switch settings:\n{:<8}: {on}", "io");
            }
            [b"quota"] => self.show_limits(&mut text, false),
            [b"quota-soft"] => self.show_limits(&mut text, true),
            [b"quota", domid] if domid != b"max" => match self.show_use(domid, &mut text) {
                Ok(()) => {}
                Err(e) => return Some((true, e.payload().to_vec())),
            },
            [b"memreport"] => {
                let _ = write!(
                    text,
                    "nodes: {}\narena: {}\nconnections: {}\nwatches: {}\ndomains: {}\n",
                    self.tree.len(),
                    self.tree.arena().used(),
                    self.conns.len(),
                    self.watches.len(),
                    self.domains.len()
                );
            }
            [b"help"] => text.push_str(HELP),
            _ => return None,
        }
        text.push('\0');
        Some((false, text.into_bytes()))
    }

    fn show_use(&self, domid: &[u8], text: &mut String) -> Result<(), Errno> {
        let domid: u16 = decimal(domid)?;
        let domain = self.domains.get(&domid).ok_or(Errno::ENOENT)?;
        let _ = writeln!(text, "Domain {domid}:");
        for item in Item::ALL {
            let (used, peak) = (self.used(domid, item), domain.account.peak(item));
            let refused = domain.account.refused(item);
            let peak = u64::from(peak).max(used);
            let _ = write!(text, "{:<17}: {used:8} (max {peak:8})", item.name());
            let _ = if refused > 0 { writeln!(text, " refused {refused}") } else { writeln!(text) };
        }
        Ok(())
    }

    /// Runs a command. What it says is the reply.
    pub(super) fn control(&mut self, payload: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        let args: Vec<&[u8]> = strings(payload).collect();
        let mut text = String::new();
        match args[..] {
            [b"log", how @ (b"on" | b"+io" | b"off" | b"-io")] => {
                self.log_requests = matches!(how, b"on" | b"+io");
                text.push_str("OK");
            }
            [b"print", what] => {
                tracing::info!(text = %String::from_utf8_lossy(what), "CONTROL print");
                text.push_str("OK");
            }
            [which @ (b"quota" | b"quota-soft"), b"set", name, value] => {
                let name = std::str::from_utf8(name).map_err(|_| Errno::EINVAL)?;
                let (item, false) = Item::parse(name).ok_or(Errno::EINVAL)? else {
                    return Err(Errno::EINVAL);
                };
                let value: u32 = decimal(value)?;
                if value == 0 {
                    return Err(Errno::EINVAL);
                }
                self.limits.guest.set(item, which == b"quota-soft", value);
                text.push_str("OK");
            }
            [b"quota", b"max", ref reset @ ..] if matches!(reset, [] | [b"-r"]) => {
                if !reset.is_empty() {
                    self.peaks.reset_peaks();
                    self.domains.values_mut().for_each(|d| d.account.reset_peaks());
                }
                text.push_str("Max. seen accounting values:\n");
                for item in Item::ALL {
                    let _ = writeln!(text, "{:<17}: {:8}", item.name(), self.peaks.peak(item));
                }
            }
            _ => return Err(Errno::EINVAL),
        }
        reply.extend_from_slice(text.as_bytes());
        reply.push(0);
        Ok(())
    }

    fn show_limits(&self, text: &mut String, soft: bool) {
        text.push_str("Quota settings:\n");
        for item in Item::ALL {
            let value = self.limits.guest.get(item, soft);
            if value != 0 || !soft {
                let _ = writeln!(text, "{:<17}: {value:8} {}", item.name(), item.description());
            }
        }
    }
}
