//! `bh store`: the tree, its watches and its quotas.

use std::io::Write;
use std::time::Duration;

use clap::Subcommand;
use proto::store::store_client::StoreClient;
use proto::store::*;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::client::{Dom0, Failure};
use crate::table::Table;

/// What to do with the store.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// The nodes directly below a path, with values and permissions.
    Ls {
        /// Absolute path.
        #[arg(default_value = "/")]
        path: String,
    },
    /// One node's value.
    Read {
        /// Absolute path.
        path: String,
    },
    /// Make a node, or replace its value.
    Write {
        /// Absolute path.
        path: String,
        /// The new value.
        value: String,
    },
    /// Remove a node and all below it.
    Rm {
        /// Absolute path.
        path: String,
    },
    /// What changes at and below a path, until interrupted. Goes on when dom0 or xenstored restart.
    Watch {
        /// Absolute path, or @introduceDomain, @releaseDomain.
        path: String,
        /// End after so many events; the first comes at once.
        #[arg(short = 'n', long)]
        count: Option<u64>,
    },
    /// All nodes at and below a path, as they are at one instant.
    Tree {
        /// Absolute path.
        #[arg(default_value = "/")]
        path: String,
        /// Levels below the path; 0 for all.
        #[arg(long, default_value_t = 0)]
        depth: u32,
        /// Refuse to show more nodes than this (at most 100000).
        #[arg(long, default_value_t = 20_000)]
        max_nodes: u32,
    },
    /// Quotas: those of new guests, or of one domain; with NAME=VALUE, sets one (soft-NAME=VALUE: a soft one).
    Quota {
        /// A domid or a guest's name, then NAME=VALUE; both can be left out.
        args: Vec<String>,
    },
    /// Numbers of the store and of each domain.
    Stat,
}

type Client = StoreClient<Channel>;

/// Runs one.
///
/// # Errors
/// [`Failure`].
pub async fn run(dom0: &Dom0, command: StoreCommand, as_json: bool) -> Result<(), Failure> {
    match command {
        StoreCommand::Ls { path } => ls(dom0, path, as_json).await,
        StoreCommand::Read { path } => read(dom0, path, as_json).await,
        StoreCommand::Write { path, value } => {
            let request = WriteRequest { path: path.clone(), value: value.into_bytes() };
            dom0.store_call(|mut c| {
                let request = request.clone();
                async move { c.write(request).await }
            })
            .await?;
            done(as_json, &path, "written")
        }
        StoreCommand::Rm { path } => {
            let request = RemoveRequest { path: path.clone() };
            dom0.store_call(|mut c| {
                let request = request.clone();
                async move { c.remove(request).await }
            })
            .await?;
            done(as_json, &path, "removed")
        }
        StoreCommand::Watch { path, count } => watch(dom0, path, count, as_json).await,
        StoreCommand::Tree { path, depth, max_nodes } => {
            let nodes = snapshot(dom0, SnapshotRequest { path: path.clone(), depth, max_nodes }).await?;
            if as_json {
                crate::commands::print_json(&json!({ "nodes": all(&nodes) }))
            } else {
                tree(&path, &nodes)
            }
        }
        StoreCommand::Quota { args } => quota(dom0, args, as_json).await,
        StoreCommand::Stat => stat(dom0, as_json).await,
    }
}

/// A value as text; what is no text is shown in hexadecimal.
fn shown(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) if !text.chars().any(|c| c.is_control() && c != '\t') => text.to_owned(),
        _ => value.iter().map(|b| format!("\\x{b:02x}")).collect(),
    }
}

fn node_json(node: &Node) -> Value {
    let mut out = json!({ "path": node.path, "value": String::from_utf8_lossy(&node.value), "permissions": node.permissions });
    if std::str::from_utf8(&node.value).is_err() {
        out["bytes"] = json!(node.value);
    }
    out
}

fn all(nodes: &[Node]) -> Vec<Value> {
    nodes.iter().map(node_json).collect()
}

fn done(as_json: bool, path: &str, what: &str) -> Result<(), Failure> {
    crate::commands::say(as_json, &format!("{path} {what}"), json!({ "path": path, "result": what }))
}

/// Nodes at and below a path.
pub(crate) async fn snapshot(dom0: &Dom0, request: SnapshotRequest) -> Result<Vec<Node>, Failure> {
    let end = std::time::Instant::now() + crate::client::PATIENCE;
    'again: loop {
        let asked = request.clone();
        let mut stream = dom0
            .store_call(|mut c| {
                let asked = asked.clone();
                async move { c.snapshot(asked).await }
            })
            .await?;
        let mut nodes = Vec::new();
        loop {
            match stream.message().await {
                Ok(Some(part)) => nodes.extend(part.nodes),
                Ok(None) => return Ok(nodes),
                // Broken off in the middle: a part of it is of no use.
                Err(e) if e.code() == Code::Unavailable && std::time::Instant::now() < end => continue 'again,
                Err(e) => return Err(Failure::Status(e)),
            }
        }
    }
}

async fn ls(dom0: &Dom0, path: String, as_json: bool) -> Result<(), Failure> {
    let nodes = snapshot(dom0, SnapshotRequest { path, depth: 1, max_nodes: 100_000 }).await?;
    let below = nodes.get(1..).unwrap_or_default();
    if as_json {
        return crate::commands::print_json(&json!({ "nodes": all(below) }));
    }
    let mut table = Table::new(&["NAME", "VALUE", "PERMISSIONS"]);
    for node in below {
        let name = node.path.rsplit('/').next().unwrap_or_default();
        table.row(vec![name.to_owned(), shown(&node.value), node.permissions.join(",")]);
    }
    Ok(table.print()?)
}

async fn read(dom0: &Dom0, path: String, as_json: bool) -> Result<(), Failure> {
    let request = ReadRequest { path };
    let node = dom0
        .store_call(|mut c| {
            let request = request.clone();
            async move { c.read(request).await }
        })
        .await?;
    if as_json {
        return crate::commands::print_json(&node_json(&node));
    }
    let mut out = std::io::stdout().lock();
    out.write_all(&node.value)?;
    Ok(out.write_all(b"\n")?)
}

fn tree(root: &str, nodes: &[Node]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let base = root.trim_end_matches('/').matches('/').count();
    for (index, node) in nodes.iter().enumerate() {
        let level = if node.path == "/" { 0 } else { node.path.matches('/').count() - base };
        let name =
            if index == 0 { node.path.as_str() } else { node.path.rsplit('/').next().unwrap_or_default() };
        let (indent, perms) = ("  ".repeat(level), node.permissions.join(","));
        let line = match node.value.is_empty() {
            true => format!("{indent}{name}  ({perms})"),
            false => format!("{indent}{name} = {}  ({perms})", shown(&node.value)),
        };
        writeln!(out, "{line}")?;
    }
    Ok(())
}

async fn watch(dom0: &Dom0, path: String, count: Option<u64>, as_json: bool) -> Result<(), Failure> {
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let request = WatchRequest { path: path.clone() };
        let mut stream = dom0
            .store_call(|mut c| {
                let request = request.clone();
                async move { c.watch(request).await }
            })
            .await?;
        while left > 0 {
            match stream.message().await {
                Ok(Some(event)) => {
                    show(&event, as_json)?;
                    left -= 1;
                }
                // The next stream begins with an event for the path itself.
                Ok(None) => break,
                Err(e) if e.code() == Code::Unavailable || crate::client::lost(&e) => break,
                Err(e) => return Err(Failure::Status(e)),
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn show(event: &WatchEvent, as_json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match (&event.node, as_json) {
        (node, true) => {
            let value = node.as_ref().map_or(Value::Null, node_json);
            writeln!(out, "{}", json!({ "path": event.path, "node": value }))?;
        }
        (Some(node), false) => writeln!(out, "{} = {}", event.path, shown(&node.value))?,
        (None, false) if event.path.starts_with('@') => writeln!(out, "{}", event.path)?,
        (None, false) => writeln!(out, "{} is not there", event.path)?,
    }
    Ok(out.flush()?)
}

/// `[DOMAIN] [NAME=VALUE]`.
async fn quota(dom0: &Dom0, args: Vec<String>, as_json: bool) -> Result<(), Failure> {
    let (domain, setting) = match args.as_slice() {
        [] => (None, None),
        [one] if one.contains('=') => (None, Some(one)),
        [one] => (Some(one), None),
        [domain, setting] if setting.contains('=') => (Some(domain), Some(setting)),
        _ => return Err(Failure::Input("write: bh store quota [DOMAIN] [NAME=VALUE]".into())),
    };
    let domid = match domain {
        Some(text) => Some(domid_of(dom0, text).await?),
        None => None,
    };
    if let Some(setting) = setting {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        let value = value
            .parse()
            .map_err(|_| Failure::Input(format!("{setting}: write NAME=NUMBER; 0 is no limit")))?;
        let request = SetQuotaRequest { domid, name: name.to_owned(), value };
        dom0.store_call(|mut c| {
            let request = request.clone();
            async move { c.set_quota(request).await }
        })
        .await?;
    }
    let request = QuotasRequest { domid };
    let reply = dom0.store_call(|mut c| async move { c.quotas(request).await }).await?;
    if as_json {
        let one = |q: &Quota| match domid {
            None => json!({ "name": q.name, "limit": q.value, "soft": q.soft }),
            Some(_) => json!({
                "name": q.name, "limit": q.value, "soft": q.soft, "used": q.used, "peak": q.peak, "refused": q.refused,
            }),
        };
        let quotas: Vec<Value> = reply.quotas.iter().map(one).collect();
        return crate::commands::print_json(&json!({ "domid": domid, "quotas": quotas }));
    }
    let limit = |n: u64| if n == 0 { "none".to_owned() } else { n.to_string() };
    let mut table = match domid {
        None => Table::new(&["QUOTA", ">LIMIT", ">SOFT"]),
        Some(_) => Table::new(&["QUOTA", ">LIMIT", ">SOFT", ">USED", ">PEAK", ">REFUSED"]),
    };
    for q in &reply.quotas {
        let mut row = vec![q.name.clone(), limit(q.value), limit(q.soft)];
        if domid.is_some() {
            row.extend([q.used, q.peak, q.refused].map(|n| n.to_string()));
        }
        table.row(row);
    }
    Ok(table.print()?)
}

/// A domid, or that of a guest or service by its name.
pub(crate) async fn domid_of(dom0: &Dom0, text: &str) -> Result<u32, Failure> {
    if let Ok(domid) = text.parse() {
        return Ok(domid);
    }
    let services = crate::commands::list_services(dom0, false).await?;
    if let Some(service) = services.iter().find(|s| s.name == text && s.state != "missing") {
        return Ok(service.domid);
    }
    let guests = crate::commands::guests(dom0, text).await?;
    guests
        .first()
        .map(|g| g.domid)
        .filter(|domid| *domid != 0)
        .ok_or_else(|| Failure::Status(Status::not_found(format!("{text} has no domain now; see bh list"))))
}

async fn statistics(dom0: &Dom0) -> Result<StatisticsReply, Failure> {
    dom0.store_call(|mut c| async move { c.statistics(StatisticsRequest {}).await }).await
}

fn use_json(d: &DomainUse) -> Value {
    json!({ "domid": d.domid, "nodes": d.nodes, "watches": d.watches, "transactions": d.transactions, "refused": d.refused })
}

async fn stat(dom0: &Dom0, as_json: bool) -> Result<(), Failure> {
    let s = statistics(dom0).await?;
    if as_json {
        return crate::commands::print_json(&json!({
            "nodes": s.nodes, "watches": s.watches, "connections": s.connections, "requests": s.requests,
            "generation": s.generation, "journal_bytes": s.journal_bytes,
            "domains": s.domains.iter().map(use_json).collect::<Vec<_>>(),
        }));
    }
    let mut out = std::io::stdout().lock();
    let rows = [
        ("nodes", s.nodes),
        ("watches", s.watches),
        ("connections", s.connections),
        ("requests", s.requests),
        ("generation", s.generation),
        ("journal bytes", s.journal_bytes),
    ];
    for (name, value) in rows {
        writeln!(out, "{name:<13} {value}")?;
    }
    writeln!(out)?;
    drop(out);
    let mut table = Table::new(&[">DOMID", ">NODES", ">WATCHES", ">TRANSACTIONS", ">REFUSED"]);
    for d in &s.domains {
        let numbers = [u64::from(d.domid), d.nodes, d.watches, d.transactions, d.refused];
        table.row(numbers.iter().map(u64::to_string).collect());
    }
    Ok(table.print()?)
}

impl Dom0 {
    /// A call about the store that can be made again as often as one likes; waits for xenstored's and dom0's restarts.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn store_call<T, F>(&self, make: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let end = std::time::Instant::now() + crate::client::PATIENCE;
        loop {
            match self.call_over(StoreClient::new, &make).await {
                Err(Failure::Status(e))
                    if e.code() == Code::Unavailable && std::time::Instant::now() < end =>
                {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                result => return result,
            }
        }
    }
}
