//! `bh network-rules`: the firewall rules of a guest's addresses, at the paths that Qubes uses, in the part of the store that belongs to
//! the netback of its device.
//!
//! A set is changed in place and comes into force with the write to the address itself, which is the last: netback never sees half a
//! set, nor for a moment none.

use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use proto::store::{RemoveRequest, SnapshotRequest, WriteRequest};
use proto::toolstack::{CheckVifRulesRequest, GuestRef, Vif};
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::client::{Dom0, Failure};
use crate::commands::{print_json, say};
use crate::store::{domid_of, snapshot};
use crate::table::Table;

/// Most rules of a set: netback's limit.
const MOST: usize = 512;

/// What is done with the rules.
#[derive(Args, Debug)]
pub struct Wanted {
    /// Name, domid or uuid.
    guest: String,
    /// The vif's number.
    #[arg(default_value_t = 0)]
    vif: u32,
    /// The rules of this address alone; else of all that the toolstack gave the vif. May be given several times.
    #[arg(long)]
    address: Vec<IpAddr>,
    #[command(flatten)]
    change: Option<Change>,
    /// What happens to packets that no rule fits: accept or drop. Without it what it was, and drop for a new set.
    #[arg(long, value_parser = ["accept", "drop"])]
    policy: Option<String>,
    /// With --add: before the rule of this number; else the rule is the last.
    #[arg(long, requires = "add")]
    at: Option<usize>,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct Change {
    /// Replace all rules by those of this file, one a line; - for standard input.
    #[arg(long, value_name = "FILE")]
    set: Option<PathBuf>,
    /// Add a rule, as "action=accept proto=tcp dstports=443-443".
    #[arg(long, value_name = "RULE")]
    add: Option<String>,
    /// Remove the rule of this number.
    #[arg(long, value_name = "NUMBER")]
    remove: Option<usize>,
    /// Remove all rules and the policy: everything is let through.
    #[arg(long)]
    clear: bool,
}

/// The rules of one address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Set {
    policy: Option<String>,
    rules: Vec<String>,
    /// Names of the nodes, in the order of the rules.
    nodes: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// [`Failure`].
pub async fn run(dom0: &Dom0, wanted: Wanted, as_json: bool) -> Result<(), Failure> {
    let Wanted { guest, vif, address, change, policy, at } = wanted;
    let found = vif_of(dom0, &guest, vif).await?;
    let addresses = if address.is_empty() { addresses(&found) } else { address };
    if addresses.is_empty() {
        let text =
            format!("the toolstack gave vif {vif} of guest {guest} no address; name one with --address");
        return Err(Failure::Input(text));
    }
    let domid = domid_of(dom0, &found.backend).await?;
    if change.is_none() && policy.is_none() {
        return show(dom0, domid, &addresses, as_json).await;
    }
    let change = change.unwrap_or(Change { set: None, add: None, remove: None, clear: false });
    let from_file = change.set.as_deref().map(read_rules).transpose()?;
    let mut sets = Vec::new();
    for address in addresses {
        let old = read(dom0, domid, address).await?;
        if change.clear {
            sets.push((address, old, None));
            continue;
        }
        let mut new = Set { nodes: Vec::new(), ..old.clone() };
        if let Some(rules) = &from_file {
            new.rules.clone_from(rules);
        }
        if let Some(rule) = &change.add {
            let at = at.unwrap_or(new.rules.len());
            if at > new.rules.len() {
                return Err(Failure::Input(format!(
                    "{address} has no rule {at}; see bh network-rules {guest} {vif}"
                )));
            }
            new.rules.insert(at, rule.trim().to_owned());
        }
        if let Some(at) = change.remove {
            if at >= new.rules.len() {
                return Err(Failure::Input(format!(
                    "{address} has no rule {at}; see bh network-rules {guest} {vif}"
                )));
            }
            new.rules.remove(at);
        }
        if new.rules.len() > MOST {
            return Err(Failure::Input(format!("{address}: {} rules; {MOST} are the most", new.rules.len())));
        }
        new.policy = Some(policy.clone().or(new.policy).unwrap_or_else(|| "drop".into()));
        check(dom0, &guest, vif, &new).await?;
        sets.push((address, old, Some(new)));
    }
    let mut rules = 0;
    for (address, old, new) in &sets {
        match new {
            Some(new) => write(dom0, domid, *address, old, new).await?,
            None => remove(dom0, &root(domid, *address)).await?,
        }
        rules = new.as_ref().map_or(0, |new| new.rules.len());
    }
    let list: Vec<String> = sets.iter().map(|(address, ..)| address.to_string()).collect();
    let text = format!("{} has {rules} rules at {}", list.join(", "), found.backend);
    say(
        as_json,
        &text,
        json!({ "addresses": list, "rules": rules, "backend": found.backend, "result": "set" }),
    )
}

/// The device.
pub async fn vif_of(dom0: &Dom0, guest: &str, id: u32) -> Result<Vif, Failure> {
    let request = GuestRef { guest: guest.to_owned() };
    let reply = dom0.call(|mut c| {
        let request = request.clone();
        async move { c.list_vifs(request).await }
    });
    let vif = reply.await?.vifs.into_iter().find(|vif| vif.id == id);
    vif.ok_or_else(|| {
        let text = format!("guest {guest} has no vif {id}; see bh network-list {guest}");
        Failure::Status(Status::not_found(text))
    })
}

fn addresses(vif: &Vif) -> Vec<IpAddr> {
    vif.ip.iter().filter_map(|ip| ip.parse().ok()).collect()
}

/// Where the set of an address is: xenstore allows neither dots nor colons in a path.
fn root(domid: u32, address: IpAddr) -> String {
    format!("/local/domain/{domid}/qubes-firewall/{}", address.to_string().replace(['.', ':'], "_"))
}

async fn read(dom0: &Dom0, domid: u32, address: IpAddr) -> Result<Set, Failure> {
    let path = root(domid, address);
    let request = SnapshotRequest { path: path.clone(), depth: 1, max_nodes: 10_001 };
    let nodes = match snapshot(dom0, request).await {
        Err(Failure::Status(e)) if e.code() == Code::NotFound => return Ok(Set::default()),
        nodes => nodes?,
    };
    let mut set = Set::default();
    for node in &nodes {
        let Some(name) = node.path.strip_prefix(&path).and_then(|rest| rest.strip_prefix('/')) else {
            continue;
        };
        let value = String::from_utf8_lossy(&node.value).into_owned();
        if name == "policy" {
            set.policy = Some(value);
        } else {
            set.nodes.push(name.to_owned());
            set.rules.push(value);
        }
    }
    Ok(set)
}

async fn put(dom0: &Dom0, path: String, value: &str) -> Result<(), Failure> {
    let request = WriteRequest { path, value: value.as_bytes().to_vec() };
    dom0.store_call(|mut c| {
        let request = request.clone();
        async move { c.write(request).await }
    })
    .await
    .map(drop)
}

async fn remove(dom0: &Dom0, path: &str) -> Result<(), Failure> {
    let request = RemoveRequest { path: path.to_owned() };
    let done = dom0.store_call(|mut c| {
        let request = request.clone();
        async move { c.remove(request).await }
    });
    match done.await {
        Err(Failure::Status(e)) if e.code() == Code::NotFound => Ok(()),
        done => done.map(drop),
    }
}

async fn write(dom0: &Dom0, domid: u32, address: IpAddr, old: &Set, new: &Set) -> Result<(), Failure> {
    let root = root(domid, address);
    put(dom0, format!("{root}/policy"), new.policy.as_deref().unwrap_or("drop")).await?;
    let name = |index: usize| format!("{index:04}");
    for (index, rule) in new.rules.iter().enumerate() {
        put(dom0, format!("{root}/{}", name(index)), rule).await?;
    }
    let kept: Vec<String> = (0..new.rules.len()).map(name).collect();
    for node in old.nodes.iter().filter(|node| !kept.contains(node)) {
        remove(dom0, &format!("{root}/{node}")).await?;
    }
    put(dom0, root, "").await
}

/// Refused before it is written: netback blocks an address whose set it does not understand.
async fn check(dom0: &Dom0, guest: &str, id: u32, set: &Set) -> Result<(), Failure> {
    let request = CheckVifRulesRequest {
        guest: guest.to_owned(),
        id,
        rules: set.rules.clone(),
        policy: set.policy.clone().unwrap_or_default(),
    };
    dom0.call(|mut c| {
        let request = request.clone();
        async move { c.check_vif_rules(request).await }
    })
    .await
    .map(drop)
}

fn read_rules(path: &Path) -> Result<Vec<String>, Failure> {
    let mut text = String::new();
    let done = if path == Path::new("-") {
        std::io::stdin().take(1 << 20).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(1 << 20).read_to_string(&mut text))
    };
    done.map_err(|e| Failure::Input(format!("{}: {e}", path.display())))?;
    Ok(lines(&text))
}

fn lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(str::to_owned).collect()
}

async fn show(dom0: &Dom0, domid: u32, addresses: &[IpAddr], as_json: bool) -> Result<(), Failure> {
    let mut table = Table::new(&["ADDRESS", ">NUMBER", "RULE"]);
    let mut sets: Vec<Value> = Vec::new();
    for address in addresses {
        let set = read(dom0, domid, *address).await?;
        for (number, rule) in set.rules.iter().enumerate() {
            table.row(vec![address.to_string(), number.to_string(), rule.clone()]);
        }
        let policy = set.policy.clone().unwrap_or_else(|| "none: everything is let through".into());
        table.row(vec![address.to_string(), "policy".into(), policy]);
        sets.push(json!({ "address": address.to_string(), "policy": set.policy, "rules": set.rules }));
    }
    if as_json { print_json(&json!({ "sets": sets })) } else { Ok(table.print()?) }
}

/// Copies the sets of a device's addresses to another netback, which is to serve it; what it copied.
///
/// # Errors
/// [`Failure`].
pub async fn copy(dom0: &Dom0, vif: &Vif, to: &str) -> Result<Copied, Failure> {
    let (from, to) = (domid_of(dom0, &vif.backend).await?, domid_of(dom0, to).await?);
    let mut copied = Copied { from, to, addresses: Vec::new() };
    for address in addresses(vif) {
        let set = read(dom0, from, address).await?;
        if set != Set::default() {
            let there = read(dom0, to, address).await?;
            write(dom0, to, address, &there, &set).await?;
            copied.addresses.push(address);
        }
    }
    Ok(copied)
}

/// What [`copy`] did.
#[derive(Debug)]
pub struct Copied {
    from: u32,
    to: u32,
    addresses: Vec<IpAddr>,
}

impl Copied {
    /// Removes the sets at the netback that does not serve the device.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn settle(self, dom0: &Dom0, moved: bool) -> Result<(), Failure> {
        for address in self.addresses {
            remove(dom0, &root(if moved { self.from } else { self.to }, address)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_paths() {
        assert_eq!(
            lines("# a\n\n action=accept proto=tcp \naction=drop"),
            ["action=accept proto=tcp", "action=drop"]
        );
        assert_eq!(root(7, [10, 0, 0, 9].into()), "/local/domain/7/qubes-firewall/10_0_0_9");
        assert_eq!(root(7, "fd00::9".parse().unwrap()), "/local/domain/7/qubes-firewall/fd00__9");
    }
}
