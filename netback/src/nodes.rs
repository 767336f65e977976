//! The nodes of a vif: what is offered to a frontend, and what the frontend says.

use std::net::Ipv4Addr;

use domain_kit::xenbus::{DeviceError, DeviceNode, Properties};
use domain_kit::xs::XsError;
use xen_abi::io::netif::node;

use crate::connection::Params;
use crate::tap::Offloads;

/// What is published before the frontend connects. No control ring, no hashes, no multicast filter.
pub fn features() -> Properties {
    [
        (node::FEATURE_RX_COPY, "1"),
        ("feature-rx-flip", "0"),
        (node::FEATURE_SG, "1"),
        (node::FEATURE_GSO_TCPV4, "1"),
        (node::FEATURE_GSO_TCPV6, "1"),
        (node::FEATURE_IPV6_CSUM_OFFLOAD, "1"),
        (node::FEATURE_SPLIT_EVENT_CHANNELS, "1"),
        (node::MULTI_QUEUE_MAX_QUEUES, "1"),
        ("hotplug-status", "connected"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .into()
}

/// What the frontend asks for.
///
/// # Errors
/// [`DeviceError::Failed`] for a node that is missing or wants what was not offered; the store's.
pub fn params(device: &DeviceNode) -> Result<Params, DeviceError> {
    let number = |name: &str| device.front_number::<u32>(name);
    let needed = |name: &str| {
        number(name)?.ok_or_else(|| DeviceError::Failed(format!("the frontend's node {name} is no number")))
    };
    let flag = |name: &str| Ok::<_, XsError>(number(name)?.unwrap_or(0) != 0);
    let failed = |why: &str| Err(DeviceError::Failed(why.into()));
    if number(node::MULTI_QUEUE_NUM_QUEUES)?.unwrap_or(1) != 1 {
        return failed("the frontend wants several queues; one was offered");
    }
    if !flag(node::REQUEST_RX_COPY)? {
        return failed("the frontend does not want packets copied (request-rx-copy)");
    }
    if !flag(node::FEATURE_RX_NOTIFY)? {
        return failed("the frontend does not notify of rx requests (feature-rx-notify)");
    }
    if number("ctrl-ring-ref")?.is_some() {
        return failed("the frontend wants a control ring, which was not offered");
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
    let (tx_ring, rx_ring) = (needed(node::TX_RING_REF)?, needed(node::RX_RING_REF)?);
    Ok(Params { tx_ring, rx_ring, evtchn, evtchn_rx, offloads })
}

/// The toolstack's wishes: MTU (default 1500) and the guest's address.
///
/// # Errors
/// The store's.
pub fn network(device: &DeviceNode) -> Result<(u32, Option<Ipv4Addr>), XsError> {
    let mtu = device.back_number::<u32>("mtu")?.filter(|mtu| (68..=65535).contains(mtu));
    // Xen's toolstack allows a list; the first counts.
    let ip = device.back_node("ip")?;
    let ip = ip.and_then(|text| text.split_whitespace().next().and_then(|ip| ip.parse().ok()));
    Ok((mtu.unwrap_or(1500), ip))
}
