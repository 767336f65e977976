//! `bh network-…`.

use std::time::Duration;

use clap::Args;
use dom0_supervisor::config::{Mac, Name, VifEntry};
use proto::toolstack::*;
use serde_json::json;

use crate::client::{Dom0, Failure};
use crate::commands::{print_json, say};
use crate::rules;
use crate::table::{Table, or_dash};

/// How long dom0 may take: a guest is asked to let go, a backend takes the device up.
const WITHIN: Duration = Duration::from_secs(60);

/// What a new network device is.
#[derive(Args, Debug)]
pub struct Wanted {
    /// The netback that is to serve it.
    #[arg(long)]
    backend: Name,
    /// Its Ethernet address; made from the guest's uuid if missing.
    #[arg(long)]
    mac: Option<Mac>,
    /// An address of the guest's, which it may use; without any all are allowed. May be given several times.
    #[arg(long)]
    ip: Vec<std::net::IpAddr>,
    /// No packets to and from other guests.
    #[arg(long)]
    isolated: bool,
    /// A firewall rule for what it sends, as "action=accept proto=tcp dstports=443-443". May be given several times.
    #[arg(long)]
    rule: Vec<String>,
}

pub async fn list(dom0: &Dom0, guest: String, json: bool) -> Result<(), Failure> {
    let request = GuestRef { guest };
    let reply = dom0.call(|mut c| {
        let request = request.clone();
        async move { c.list_vifs(request).await }
    });
    let vifs = reply.await?.vifs;
    if json {
        let vifs: Vec<_> = vifs
            .iter()
            .map(|v| {
                json!({ "vif": v.id, "backend": v.backend, "mac": v.mac, "ip": v.ip,
                    "devid": v.devid, "frontend_state": v.frontend_state, "backend_state": v.backend_state, "link": v.link })
            })
            .collect();
        return print_json(&json!({ "vifs": vifs }));
    }
    let mut table =
        Table::new(&[">VIF", ">DEVID", "BACKEND", "MAC", "FRONTEND", "BACKEND STATE", "LINK", "IP"]);
    for v in &vifs {
        table.row(vec![
            v.id.to_string(),
            v.devid.to_string(),
            v.backend.clone(),
            v.mac.clone(),
            v.frontend_state.clone(),
            v.backend_state.clone(),
            if v.link { "up" } else { "down" }.into(),
            or_dash(v.ip.join(" ")),
        ]);
    }
    Ok(table.print()?)
}

pub async fn attach(
    dom0: &Dom0,
    guest: String,
    vif: Option<u32>,
    wanted: Wanted,
    json: bool,
) -> Result<(), Failure> {
    let Wanted { backend, mac, ip, isolated, rule } = wanted;
    let entry = VifEntry { devid: vif, mac, ip, isolated, firewall: rule, ..VifEntry::of(backend.clone()) };
    let vif = entry.to_text().map_err(|e| Failure::Input(e.0))?;
    let request = AttachVifRequest { guest: guest.clone(), vif };
    let id = dom0.once(WITHIN, |mut c| async move { c.attach_vif(request).await }).await?.id;
    say(
        json,
        &format!("guest {guest} has vif {id} at {backend}"),
        json!({ "guest": guest, "vif": id, "backend": backend.as_str(), "result": "attached" }),
    )
}

pub async fn detach(dom0: &Dom0, guest: String, id: u32, force: bool, json: bool) -> Result<(), Failure> {
    let request = DetachVifRequest { guest: guest.clone(), id, force };
    dom0.once(WITHIN, |mut c| async move { c.detach_vif(request).await }).await?;
    let text = format!("guest {guest} has vif {id} no more");
    say(json, &text, json!({ "guest": guest, "vif": id, "result": "detached" }))
}

pub async fn change(dom0: &Dom0, guest: String, id: u32, backend: Name, json: bool) -> Result<(), Failure> {
    let request = MoveVifRequest { guest: guest.clone(), id, backend: backend.to_string() };
    // The rules of its addresses are there before it is.
    let vif = rules::vif_of(dom0, &guest, id).await?;
    let copied = match vif.backend == backend.as_str() {
        true => None,
        false => match rules::copy(dom0, &vif, backend.as_str()).await {
            // One of the two has no domain: then there is no such set, or dom0 says what is wrong.
            Err(Failure::Status(e)) if e.code() == tonic::Code::NotFound => None,
            copied => Some(copied?),
        },
    };
    let moved = dom0.once(WITHIN, |mut c| async move { c.move_vif(request).await }).await;
    if let Some(copied) = copied {
        copied.settle(dom0, moved.is_ok()).await?;
    }
    moved?;
    let text = format!("vif {id} of guest {guest} is at {backend} now");
    say(json, &text, json!({ "guest": guest, "vif": id, "backend": backend.as_str(), "result": "moved" }))
}

/// How a cable can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Link {
    /// Plugged in.
    Up,
    /// Pulled.
    Down,
}

pub async fn link(dom0: &Dom0, guest: String, id: u32, link: Link, json: bool) -> Result<(), Failure> {
    let up = link == Link::Up;
    let request = LinkVifRequest { guest: guest.clone(), id, up };
    dom0.call(|mut c| {
        let request = request.clone();
        async move { c.link_vif(request).await }
    })
    .await?;
    let word = if up { "up" } else { "down" };
    let text = format!("vif {id} of guest {guest}: link {word}");
    say(json, &text, json!({ "guest": guest, "vif": id, "link": up, "result": word }))
}
