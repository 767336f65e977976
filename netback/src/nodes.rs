//! The nodes of a vif: what is offered to a frontend, what the frontend says, and what the toolstack says.

use std::net::IpAddr;

use domain_kit::xenbus::{DeviceError, DeviceNode, Properties};
use domain_kit::xs::XsError;
use xen_abi::io::netif::node;

use crate::connection::{MAX_QUEUES, Params, QueueParams};
use crate::headers::Mac;
use crate::slots::MAX_HEADROOM;
use crate::switch::rules::{Action, Firewall, MAX_RULES};
use crate::switch::settings::{Rate, Settings};
use crate::tap::Offloads;

/// What is published before the frontend connects.
pub fn features(max_queues: usize) -> Properties {
    let queues = max_queues.clamp(1, MAX_QUEUES).to_string();
    [
        (node::FEATURE_RX_COPY, "1"),
        ("feature-rx-flip", "0"),
        (node::FEATURE_SG, "1"),
        (node::FEATURE_GSO_TCPV4, "1"),
        (node::FEATURE_GSO_TCPV6, "1"),
        (node::FEATURE_IPV6_CSUM_OFFLOAD, "1"),
        (node::FEATURE_SPLIT_EVENT_CHANNELS, "1"),
        (node::FEATURE_MULTICAST_CONTROL, "1"),
        (node::FEATURE_CTRL_RING, "1"),
        (node::FEATURE_XDP_HEADROOM, "1"),
        (node::MULTI_QUEUE_MAX_QUEUES, &queues),
        ("hotplug-status", "connected"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .into()
}

fn failed<T>(why: impl Into<String>) -> Result<T, DeviceError> {
    Err(DeviceError::Failed(why.into()))
}

fn needed(device: &DeviceNode, name: &str) -> Result<u32, DeviceError> {
    match device.front_number(name)? {
        Some(number) => Ok(number),
        None => failed(format!("the frontend's node {name} is no number")),
    }
}

/// Rings and ports of one queue; `prefix` is "" or "queue-N/".
fn queue(device: &DeviceNode, prefix: &str) -> Result<QueueParams, DeviceError> {
    let name = |name: &str| format!("{prefix}{name}");
    let (evtchn, evtchn_rx) = match device.front_number(&name(node::EVENT_CHANNEL_TX))? {
        Some(tx) => (tx, Some(needed(device, &name(node::EVENT_CHANNEL_RX))?)),
        None => (needed(device, &name(node::EVENT_CHANNEL))?, None),
    };
    Ok(QueueParams {
        tx_ring: needed(device, &name(node::TX_RING_REF))?,
        rx_ring: needed(device, &name(node::RX_RING_REF))?,
        evtchn,
        evtchn_rx,
    })
}

/// Bytes of headroom that the frontend asks for.
///
/// # Errors
/// [`DeviceError::Failed`] for more than [`MAX_HEADROOM`].
pub fn headroom(device: &DeviceNode) -> Result<usize, DeviceError> {
    match device.front_number::<usize>(node::XDP_HEADROOM)?.unwrap_or(0) {
        headroom if headroom <= MAX_HEADROOM => Ok(headroom),
        headroom => {
            failed(format!("the frontend wants {headroom} bytes of headroom; {MAX_HEADROOM} are offered"))
        }
    }
}

/// What the frontend asks for.
///
/// # Errors
/// [`DeviceError::Failed`] for a node that is missing or wants what was not offered; the store's.
pub fn params(device: &DeviceNode, max_queues: usize) -> Result<Params, DeviceError> {
    let number = |name: &str| device.front_number::<u32>(name);
    let flag = |name: &str| Ok::<_, XsError>(number(name)?.unwrap_or(0) != 0);
    let count = number(node::MULTI_QUEUE_NUM_QUEUES)?;
    let wanted = count.unwrap_or(1) as usize;
    if !(1..=max_queues.clamp(1, MAX_QUEUES)).contains(&wanted) {
        return failed(format!("the frontend wants {wanted} queues; {max_queues} were offered"));
    }
    if !flag(node::REQUEST_RX_COPY)? {
        return failed("the frontend does not want packets copied (request-rx-copy); pages are not flipped");
    }
    if !flag(node::FEATURE_RX_NOTIFY)? {
        return failed("the frontend does not notify of rx requests (feature-rx-notify)");
    }
    // One queue has its nodes in the device's own directory, however it was asked for (netif.h).
    let queues = if wanted == 1 {
        vec![queue(device, "")?]
    } else {
        (0..wanted).map(|i| queue(device, &format!("queue-{i}/"))).collect::<Result<_, _>>()?
    };
    let ctrl = match number(node::CTRL_RING_REF)? {
        Some(gref) => Some((gref, needed(device, node::EVENT_CHANNEL_CTRL)?)),
        None => None,
    };
    let offloads = Offloads {
        csum: !flag(node::FEATURE_NO_CSUM_OFFLOAD)?,
        csum_ipv6: flag(node::FEATURE_IPV6_CSUM_OFFLOAD)?,
        gso_tcpv4: flag(node::FEATURE_GSO_TCPV4)?,
        gso_tcpv6: flag(node::FEATURE_GSO_TCPV6)?,
        sg: flag(node::FEATURE_SG)?,
    };
    Ok(Params {
        queues,
        ctrl,
        offloads,
        multicast_control: flag(node::REQUEST_MULTICAST_CONTROL)?,
        headroom: headroom(device)?,
    })
}

/// Parses aa:bb:cc:dd:ee:ff.
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        *byte = (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok())??;
    }
    parts.next().is_none().then_some(mac)
}

/// Parses Xen's rate: "bytes,microseconds", so many bytes in such a time.
pub fn parse_rate(text: &str) -> Option<Rate> {
    let (bytes, window) = text.trim().split_once(',')?;
    let (bytes, window): (u64, u64) = (bytes.trim().parse().ok()?, window.trim().parse().ok()?);
    // Xen's way of saying "no limit".
    if bytes == 0 || window == 0 || bytes >= u64::from(u32::MAX) {
        return None;
    }
    let per_second = (u128::from(bytes) * 1_000_000 / u128::from(window)).min(u128::from(u64::MAX)) as u64;
    Some(Rate { bytes: per_second.max(1), burst: bytes.max(crate::slots::MAX_RX_PACKET as u64) })
}

/// The toolstack's settings, from the backend's directory.
///
/// # Errors
/// [`DeviceError::NotReady`] for a firewall rule or an address that cannot be understood: nothing is let through by mistake.
pub fn settings(device: &DeviceNode) -> Result<Settings, DeviceError> {
    let not_ready = |why: String| DeviceError::NotReady(why);
    let number = |name: &str| device.back_number::<u32>(name);
    let mut settings = Settings {
        mac: device.back_node(node::MAC)?.as_deref().and_then(parse_mac),
        antispoof: number("antispoof")?.unwrap_or(1) != 0,
        isolated: number("isolated")?.unwrap_or(0) != 0,
        dhcp: number("dhcp")?.unwrap_or(1) != 0,
        ra: number("ra")?.unwrap_or(1) != 0,
        link: number("disconnect")?.unwrap_or(0) == 0,
        mtu: number("mtu")?.filter(|mtu| (68..=65535).contains(mtu)).unwrap_or(1500),
        rate: device.back_node("rate")?.as_deref().and_then(parse_rate),
        ..Settings::default()
    };
    // Xen's toolstack writes all addresses, of both families, to one node.
    for text in device.back_node("ip")?.unwrap_or_default().split_whitespace().take(64) {
        match text.split('/').next().unwrap_or_default().parse() {
            Ok(IpAddr::V4(address)) => settings.ipv4.push(address),
            Ok(IpAddr::V6(address)) => settings.ipv6.push(address),
            Err(_) => return Err(not_ready(format!("node ip: {text:?} is no address"))),
        }
    }
    let rules = device.back_node("firewall")?.unwrap_or_default();
    for line in rules.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if settings.firewall.rules.len() == MAX_RULES {
            return Err(not_ready(format!("more than {MAX_RULES} firewall rules")));
        }
        settings.firewall.rules.push(line.parse().map_err(|e| not_ready(format!("{e}")))?);
    }
    settings.firewall = Firewall {
        policy: match device.back_node("firewall-policy")? {
            Some(text) => text.parse().map_err(|e| not_ready(format!("{e}")))?,
            // As in Qubes: what no rule of a set allows is dropped.
            None if settings.firewall.rules.is_empty() => Action::Accept,
            None => Action::Drop,
        },
        ..settings.firewall
    };
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_as_xen_writes_them() {
        // xl's rate=10Mb/s@50ms.
        let rate = parse_rate("62500,50000").unwrap();
        assert_eq!((rate.bytes, rate.burst), (1_250_000, 65549));
        for none in ["4294967295,0", "0,50000", "", "5", "x,1"] {
            assert_eq!(parse_rate(none), None, "{none}");
        }
        assert_eq!(parse_mac("00:16:3e:00:00:01"), Some([0, 0x16, 0x3e, 0, 0, 1]));
    }
}
