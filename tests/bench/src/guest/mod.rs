//! What runs inside a process domain: commands from the driver, each a measurement or a step of setting one up.

mod block;
mod bulk;
mod console;
mod copy;
mod events;
mod load;
mod net;
mod packets;
mod store;

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use domain_kit::Domain;
use domain_kit::xs::XsOps;
use serde_json::{Value, json};

use crate::endpoint::Endpoint;

/// A domain under measurement.
pub struct Guest {
    domain: Arc<Domain>,
    events: events::Events,
    copy: copy::Copy,
    store: store::Store,
    block: block::Block,
    net: net::Net,
    packets: packets::Packets,
    loads: HashMap<String, load::Load>,
}

/// Joins as a domain and serves the driver on descriptor 4, one connection after the other, for ever.
///
/// # Errors
/// The process is not a domain.
pub fn run() -> Result<()> {
    let domain = Domain::join("bench-guest")?;
    let listener = UnixListener::from(
        domain_kit::os::take_inherited(hv_abi::CONTROL_LISTENER_FD).context("descriptor 4")?,
    );
    domain.hv.served()?;
    let mut guest = Guest {
        events: events::Events::default(),
        copy: copy::Copy::default(),
        store: store::Store::default(),
        block: block::Block::default(),
        net: net::Net::default(),
        packets: packets::Packets::default(),
        loads: HashMap::new(),
        domain,
    };
    for stream in listener.incoming() {
        // A driver that went away is no reason to end.
        if let Err(error) = stream.and_then(|s| crate::wire::serve(&s, |command| guest.handle(command))) {
            tracing::warn!(%error, "a driver's connection failed");
        }
    }
    Ok(())
}

impl Guest {
    fn handle(&mut self, command: &Value) -> Result<Value> {
        match text(command, "cmd")? {
            "info" => Ok(json!({
                "domid": self.domain.domid(),
                "generation": self.domain.hello.generation,
                "roles": self.domain.hello.roles,
            })),
            "port_alloc" => self.events.alloc(&self.domain, number(command, "remote")? as u16),
            "port_bind" => self.events.bind(
                &self.domain,
                number(command, "remote")? as u16,
                number(command, "port")? as u32,
            ),
            "pong" => self.events.pong(number(command, "port")? as u32),
            "ping" => self.events.ping(number(command, "port")? as u32, number(command, "count")? as u32),
            "region" => self.copy.region(
                &self.domain,
                number(command, "peer")? as u16,
                number(command, "pages")? as u32,
            ),
            "copy" => self.copy.grant_copy(&self.domain, &copy::Job::from(command)?),
            "memcpy" => self.copy.memory_copy(&copy::Job::from(command)?),
            "store" => self.store.round_trips(&self.domain, command),
            "block" => {
                let client = self.store.client(&self.domain)?;
                self.block.run(&self.domain, client, command)
            }
            "packets_mac" | "packets_send" | "packets_take" | "bulk" => {
                let client = self.store.client(&self.domain)?;
                let packets = &mut self.packets;
                match text(command, "cmd")? {
                    "packets_mac" => packets.mac(&self.domain, client, command),
                    "packets_send" => packets.send(&self.domain, client, command),
                    "bulk" => packets.bulk(&self.domain, client, command),
                    _ => packets.take(&self.domain, client, command),
                }
            }
            "stream" => locked(&*self.endpoint()?).stream_command(command),
            "ping_outside" => locked(&*self.endpoint()?).ping_command(command),
            "load" => self.load(text(command, "kind")?, command["on"].as_bool().unwrap_or(false)),
            "longest" => self.loads.get(text(command, "kind")?).context("that load does not run")?.longest(),
            other => bail!("no such command: {other}"),
        }
    }

    fn endpoint(&mut self) -> Result<Arc<Mutex<Endpoint<net::Nic>>>> {
        let client = self.store.client(&self.domain)?;
        self.net.endpoint(&self.domain, client)
    }

    /// Starts or ends a light load.
    fn load(&mut self, kind: &str, on: bool) -> Result<Value> {
        if let Some(load) = self.loads.remove(kind) {
            load.stop()?;
        }
        if on {
            let load = match kind {
                "store" => {
                    let client = self.store.client(&self.domain)?.clone();
                    let path = format!("/local/domain/{}/name", self.domain.domid());
                    load::Load::start(move || client.read(&path).map(drop).map_err(Into::into))?
                }
                "block" => {
                    let client = self.store.client(&self.domain)?;
                    let disk = self.block.disk(&self.domain, client)?;
                    load::Load::start(move || locked(&*disk).load_request())?
                }
                "block-deep" => {
                    let client = self.store.client(&self.domain)?;
                    let mut deep = block::Deep::new(self.block.disk(&self.domain, client)?, DEEP);
                    load::Load::start(move || deep.step())?
                }
                "net" => {
                    let endpoint = self.endpoint()?;
                    let peer = bulkhead_tests::outside::ADDRESS.parse()?;
                    load::Load::start(move || locked(&*endpoint).load_echo(peer))?
                }
                "console" => {
                    let mut console = console::Console::open(&self.domain)?;
                    load::Load::start(move || console.request())?
                }
                other => bail!("no such load: {other}"),
            };
            self.loads.insert(kind.into(), load);
        }
        Ok(json!({}))
    }
}

/// Requests that the load `block-deep` keeps in flight.
const DEEP: u32 = 32;

pub(crate) fn number(command: &Value, key: &str) -> Result<u64> {
    command[key].as_u64().with_context(|| format!("{key} is missing"))
}

pub(crate) fn text<'a>(command: &'a Value, key: &str) -> Result<&'a str> {
    command[key].as_str().with_context(|| format!("{key} is missing"))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
