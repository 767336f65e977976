//! Event-channel round trips.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use domain_kit::Domain;
use domain_kit::evtchn::Port;
use serde_json::{Value, json};

/// Ports made so far.
#[derive(Default)]
pub struct Events {
    ports: HashMap<u32, Arc<Port>>,
}

impl Events {
    /// A port that `remote` may bind.
    pub fn alloc(&mut self, domain: &Domain, remote: u16) -> Result<Value> {
        Ok(self.keep(domain.hv.port_alloc_unbound(remote)?))
    }

    /// Binds a port of `remote`'s.
    pub fn bind(&mut self, domain: &Domain, remote: u16, port: u32) -> Result<Value> {
        Ok(self.keep(domain.hv.port_bind_interdomain(remote, port)?))
    }

    fn keep(&mut self, port: Port) -> Value {
        let number = port.port;
        self.ports.insert(number, Arc::new(port));
        json!({"port": number})
    }

    fn get(&self, port: u32) -> Result<&Arc<Port>> {
        self.ports.get(&port).context("no such port")
    }

    /// Answers every kick on it from now on, on a thread of its own.
    pub fn pong(&self, port: u32) -> Result<Value> {
        let port = self.get(port)?.clone();
        std::thread::Builder::new().name("pong".into()).spawn(move || {
            loop {
                match port.wait(None) {
                    Ok(_) => port.notify(),
                    Err(error) => return tracing::error!(%error, "pong ended"),
                }
            }
        })?;
        Ok(json!({}))
    }

    /// Mean round trip of `count`, microseconds.
    pub fn ping(&self, port: u32, count: u32) -> Result<Value> {
        let port = self.get(port)?;
        port.clear();
        let start = Instant::now();
        for _ in 0..count {
            port.notify();
            // Without a timeout, as the limit has none: setting a timer costs half a microsecond. The driver waits for our answer
            // with one, which an event lost would use up.
            ensure!(port.wait(None)?, "an event was lost");
        }
        Ok(json!({"us": start.elapsed().as_secs_f64() * 1e6 / f64::from(count)}))
    }
}
