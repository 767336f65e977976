//! CONTROL: the few commands of Xen's daemon that make sense here.

use super::Store;
use crate::wire::{Errno, strings};

impl Store {
    /// Runs a command. What it says is the reply; commands that change nothing answer at once.
    pub(super) fn control(&mut self, payload: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        let args: Vec<&[u8]> = strings(payload).collect();
        let text = match args[..] {
            [b"check"] => match self.check() {
                Ok(()) => "OK".to_owned(),
                Err(what) => {
                    tracing::error!(what, "the store is inconsistent");
                    what
                }
            },
            // Log levels are the process's (RUST_LOG); the command exists so that callers do not fail.
            [b"log"] | [b"log", b"on" | b"off"] => "OK".to_owned(),
            [b"print", text] => {
                tracing::info!(text = %String::from_utf8_lossy(text), "CONTROL print");
                "OK".to_owned()
            }
            [b"quota"] => {
                let lines = self.limits.guest.list().into_iter().map(|(n, v)| format!("{n}: {v}\n"));
                lines.collect()
            }
            [b"quota", b"set", name, value] => {
                let name = std::str::from_utf8(name).map_err(|_| Errno::EINVAL)?;
                if !self.limits.guest.set(name, crate::wire::decimal(value)?) {
                    return Err(Errno::EINVAL);
                }
                "OK".to_owned()
            }
            [b"quota", domid] => {
                let domid: u16 = crate::wire::decimal(domid)?;
                let conn = self.conns.values().find(|c| c.domid == Some(domid));
                format!(
                    "nodes: {}\nwatches: {}\ntransactions: {}\n",
                    self.tree.owners().get(&domid).copied().unwrap_or(0),
                    conn.map_or(0, |c| c.watches.len()),
                    conn.map_or(0, |c| c.txs.len()),
                )
            }
            [b"memreport"] => format!(
                "nodes: {}\nconnections: {}\nwatches: {}\ndomains: {}\n",
                self.tree.len(),
                self.conns.len(),
                self.watches.len(),
                self.domains.len()
            ),
            [b"help"] => "check\nhelp\nlog\nmemreport\nprint\nquota\n".to_owned(),
            _ => return Err(Errno::EINVAL),
        };
        reply.extend_from_slice(text.as_bytes());
        reply.push(0);
        Ok(())
    }
}
