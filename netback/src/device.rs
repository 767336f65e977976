//! What xenstore says of a vif: nodes read and written, and the step that follows from both ends' states.

use std::net::Ipv4Addr;

use domain_kit::xs::{XsClient, XsError, XsOps};
use xen_abi::io::netif::node;

use crate::connection::{Params, VifId};
use crate::tap::Offloads;

/// xenbus states (io/xenbus.h).
pub mod state {
    /// Not there.
    pub const UNKNOWN: u32 = 0;
    /// Just made.
    pub const INITIALISING: u32 = 1;
    /// The backend waits for the frontend.
    pub const INIT_WAIT: u32 = 2;
    /// The frontend has told its rings.
    pub const INITIALISED: u32 = 3;
    /// Works.
    pub const CONNECTED: u32 = 4;
    /// On its way out.
    pub const CLOSING: u32 = 5;
    /// Out.
    pub const CLOSED: u32 = 6;
}

/// What to do with a vif.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Stay,
    /// End a connection if there is one, tell the features, go to InitWait.
    Offer,
    /// Connect, go to Connected.
    Connect,
    /// End the connection, go to this state.
    Close(u32),
}

/// Decides by the states of backend and frontend. `online`: the toolstack wants the device to stay; `connected`: this
/// process serves it.
pub fn step(backend: u32, frontend: u32, online: bool, connected: bool) -> Step {
    match frontend {
        state::INITIALISING if !online && backend == state::CLOSED && !connected => Step::Stay,
        state::INITIALISING if !online => Step::Close(state::CLOSED),
        state::INITIALISING if backend == state::INIT_WAIT && !connected => Step::Stay,
        state::INITIALISING => Step::Offer,
        // The toolstack wants it closed, or we gave it up: the frontend moves next.
        state::INITIALISED | state::CONNECTED if backend >= state::CLOSING => Step::Stay,
        state::INITIALISED | state::CONNECTED if connected && backend == state::CONNECTED => Step::Stay,
        state::INITIALISED | state::CONNECTED => Step::Connect,
        state::CLOSING if connected || backend != state::CLOSING => Step::Close(state::CLOSING),
        state::CLOSED | state::UNKNOWN if connected || backend != state::CLOSED => Step::Close(state::CLOSED),
        _ => Step::Stay,
    }
}

/// Where a vif is in the store.
#[derive(Clone, Debug)]
pub struct Device {
    /// Which.
    pub id: VifId,
    /// The backend's directory.
    pub back: String,
    /// The frontend's directory.
    pub front: String,
}

/// Why a frontend's nodes are refused.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] XsError),
    /// A node is missing or is not what it should be.
    #[error("the frontend's node {0} is missing or not a number")]
    Number(&'static str),
    /// The frontend wants something that there is not.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl Device {
    /// The device of this id; `None` if the toolstack has not made it (or has removed it).
    ///
    /// # Errors
    /// The store's.
    pub fn find(xs: &XsClient, home: &str, id: VifId) -> Result<Option<Device>, XsError> {
        let back = format!("{home}/backend/vif/{}/{}", id.frontend, id.handle);
        let Some(front) = xs.read_opt(&format!("{back}/frontend"))? else { return Ok(None) };
        // The directory is ours and the toolstack's alone; still, a frontend's nodes are only looked for in its own home.
        if !front.starts_with(&format!("/local/domain/{}/", id.frontend)) {
            tracing::error!(%id, front, "the frontend's path is not in its home");
            return Ok(None);
        }
        Ok(Some(Device { id, back, front }))
    }

    fn number(xs: &XsClient, path: String) -> Result<Option<u32>, XsError> {
        Ok(xs.read_opt(&path)?.and_then(|text| text.trim().parse().ok()))
    }

    /// State of both ends, and whether the device is to stay: (backend, frontend, online).
    ///
    /// # Errors
    /// The store's.
    pub fn states(&self, xs: &XsClient) -> Result<(u32, u32, bool), XsError> {
        let online = Self::number(xs, format!("{}/online", self.back))? != Some(0);
        let read =
            |dir: &str| Ok::<_, XsError>(Self::number(xs, format!("{dir}/state"))?.unwrap_or(state::UNKNOWN));
        Ok((read(&self.back)?, read(&self.front)?, online))
    }

    /// Writes nodes of the backend's directory, unless it is gone.
    ///
    /// # Errors
    /// The store's.
    pub fn write(&self, xs: &XsClient, nodes: &[(&str, &str)]) -> Result<(), XsError> {
        xs.transaction(|tx| {
            if tx.exists(&format!("{}/frontend", self.back))? {
                for (name, value) in nodes {
                    tx.write(&format!("{}/{name}", self.back), value)?;
                }
            }
            Ok(())
        })
    }

    /// Tells the features and goes to InitWait.
    ///
    /// # Errors
    /// The store's.
    pub fn offer(&self, xs: &XsClient) -> Result<(), XsError> {
        self.write(
            xs,
            &[
                (node::FEATURE_RX_COPY, "1"),
                ("feature-rx-flip", "0"),
                (node::FEATURE_SG, "1"),
                (node::FEATURE_GSO_TCPV4, "1"),
                (node::FEATURE_GSO_TCPV6, "1"),
                (node::FEATURE_IPV6_CSUM_OFFLOAD, "1"),
                (node::FEATURE_SPLIT_EVENT_CHANNELS, "1"),
                (node::MULTI_QUEUE_MAX_QUEUES, "1"),
                ("hotplug-status", "connected"),
                ("state", "2"),
            ],
        )
    }

    /// Says in the store why the vif cannot work, and closes it.
    ///
    /// # Errors
    /// The store's.
    pub fn fail(&self, xs: &XsClient, home: &str, why: &str) -> Result<(), XsError> {
        let path = format!("{home}/error/backend/vif/{}/{}/error", self.id.frontend, self.id.handle);
        xs.write(&path, why)?;
        self.write(xs, &[("state", "5")])
    }

    /// What the frontend asked for.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn params(&self, xs: &XsClient) -> Result<Params, NodeError> {
        let number = |name: &str| Self::number(xs, format!("{}/{name}", self.front));
        let needed = |name: &'static str| number(name)?.ok_or(NodeError::Number(name));
        let flag = |name: &str| Ok::<_, XsError>(number(name)?.unwrap_or(0) != 0);
        if number(node::MULTI_QUEUE_NUM_QUEUES)?.unwrap_or(1) != 1 {
            return Err(NodeError::Unsupported("the frontend wants several queues; one was offered"));
        }
        if !flag(node::REQUEST_RX_COPY)? {
            return Err(NodeError::Unsupported(
                "the frontend does not want packets copied (request-rx-copy)",
            ));
        }
        if !flag(node::FEATURE_RX_NOTIFY)? {
            return Err(NodeError::Unsupported(
                "the frontend does not notify of rx requests (feature-rx-notify)",
            ));
        }
        if number("ctrl-ring-ref")?.is_some() {
            return Err(NodeError::Unsupported("the frontend wants a control ring, which was not offered"));
        }
        let (evtchn, evtchn_rx) = match number(node::EVENT_CHANNEL_TX)? {
            Some(tx) => (tx, Some(needed(node::EVENT_CHANNEL_RX)?)),
            None => (needed(node::EVENT_CHANNEL)?, None),
        };
        let offloads = Offloads {
            csum: !flag(node::FEATURE_NO_CSUM_OFFLOAD)?,
            csum_ipv6: flag(node::FEATURE_IPV6_CSUM_OFFLOAD)?,
            gso_tcpv4: flag(node::FEATURE_GSO_TCPV4)?,
            gso_tcpv6: flag(node::FEATURE_GSO_TCPV6)?,
            sg: flag(node::FEATURE_SG)?,
        };
        Ok(Params {
            tx_ring: needed(node::TX_RING_REF)?,
            rx_ring: needed(node::RX_RING_REF)?,
            evtchn,
            evtchn_rx,
            offloads,
        })
    }

    /// The toolstack's wishes: MTU (default 1500) and the guest's address.
    ///
    /// # Errors
    /// The store's.
    pub fn network(&self, xs: &XsClient) -> Result<(u32, Option<Ipv4Addr>), XsError> {
        let mtu = Self::number(xs, format!("{}/mtu", self.back))?.filter(|mtu| (68..=65535).contains(mtu));
        let ip = xs.read_opt(&format!("{}/ip", self.back))?;
        // Xen's toolstack allows a list; the first counts.
        let ip = ip.and_then(|text| text.split_whitespace().next().and_then(|ip| ip.parse().ok()));
        Ok((mtu.unwrap_or(1500), ip))
    }
}

#[cfg(test)]
mod tests {
    use super::state::*;
    use super::*;

    #[test]
    fn a_life_of_a_vif() {
        assert_eq!(step(INITIALISING, INITIALISING, true, false), Step::Offer);
        assert_eq!(step(INIT_WAIT, INITIALISING, true, false), Step::Stay);
        assert_eq!(step(INIT_WAIT, CONNECTED, true, false), Step::Connect);
        assert_eq!(step(CONNECTED, CONNECTED, true, true), Step::Stay);
        // After a restart, connected before the store was asked: also between connecting and saying so.
        assert_eq!(step(INIT_WAIT, CONNECTED, true, true), Step::Connect);
        assert_eq!(step(CONNECTED, CONNECTED, true, false), Step::Connect);
        // The guest unloads its driver.
        assert_eq!(step(CONNECTED, CLOSING, true, true), Step::Close(CLOSING));
        assert_eq!(step(CLOSING, CLOSED, true, false), Step::Close(CLOSED));
        assert_eq!(step(CLOSED, CLOSED, true, false), Step::Stay);
        // And loads it again.
        assert_eq!(step(CLOSED, INITIALISING, true, false), Step::Offer);
        // The toolstack closes it.
        assert_eq!(step(CLOSING, CONNECTED, false, true), Step::Stay);
        assert_eq!(step(CLOSING, INITIALISING, false, false), Step::Close(CLOSED));
        assert_eq!(step(CLOSING, CLOSED, false, true), Step::Close(CLOSED));
        assert_eq!(step(CLOSING, UNKNOWN, true, true), Step::Close(CLOSED));
        // A guest that connects again without a word.
        assert_eq!(step(CONNECTED, INITIALISING, true, true), Step::Offer);
    }

    #[test]
    fn no_state_is_looped_in() {
        for backend in 0..=6 {
            for frontend in 0..=6 {
                for (online, connected) in [(false, false), (false, true), (true, false), (true, true)] {
                    let next = match step(backend, frontend, online, connected) {
                        Step::Stay => continue,
                        Step::Offer => (INIT_WAIT, false),
                        Step::Connect => (CONNECTED, true),
                        Step::Close(state) => (state, false),
                    };
                    assert_eq!(
                        step(next.0, frontend, online, next.1),
                        Step::Stay,
                        "{backend} {frontend} {online} {connected}"
                    );
                }
            }
        }
    }
}
