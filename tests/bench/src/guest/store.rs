//! xenstore round trips over the domain's own ring.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use domain_kit::Domain;
use domain_kit::mem::Page;
use domain_kit::xs::{RingTransport, XsClient, XsOps};
use serde_json::{Value, json};

/// How long a call may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The domain's client, made at first use.
#[derive(Default)]
pub struct Store {
    client: Option<XsClient>,
}

impl Store {
    /// The client.
    pub fn client(&mut self, domain: &Domain) -> Result<&XsClient> {
        if self.client.is_none() {
            self.client = Some(connect(domain)?);
        }
        self.client.as_ref().context("just made")
    }

    /// Mean time of `count` reads or writes of `size` bytes, microseconds.
    pub fn round_trips(&mut self, domain: &Domain, command: &Value) -> Result<Value> {
        let (size, count) = (super::number(command, "size")? as usize, super::number(command, "count")?);
        ensure!(size <= 2048 && count > 0, "size or count out of range");
        let client = self.client(domain)?;
        let value = vec![b'x'; size];
        let path = format!("/local/domain/{}/data/bench", domain.domid());
        client.write(&path, &value)?;
        let start = Instant::now();
        match super::text(command, "op")? {
            "read" => {
                for _ in 0..count {
                    ensure!(client.read(&path)?.len() == size, "a read gave another length");
                }
            }
            "write" => {
                for _ in 0..count {
                    client.write(&path, &value)?;
                }
            }
            other => bail!("no such operation: {other}"),
        }
        Ok(json!({"us": start.elapsed().as_secs_f64() * 1e6 / count as f64}))
    }
}

fn connect(domain: &Domain) -> Result<XsClient> {
    let (region, port) = domain.store_ring()?.context("there is no xenstore domain")?;
    let rx = port.rx().try_clone_to_owned()?;
    let tx = port.tx().context("the store's port cannot send")?.try_clone_to_owned()?;
    let ring = RingTransport::new(Arc::new(Page::new(region.mem.clone(), 0)), rx, tx)?;
    let client = XsClient::connect(ring, TIMEOUT)?;
    client.set_timeout(TIMEOUT);
    Ok(client)
}
