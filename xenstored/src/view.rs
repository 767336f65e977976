//! The store as the toolstack looks at it: `bulkhead.store.v1` on descriptor 4. Looks are taken by the event loop between two requests;
//! everything else goes through a connection of this process's own, as a client's would.

use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use domain_kit::xs::{Op, SocketTransport, XsClient, XsErrno, XsError, XsOps};
use proto::store as wire;
use proto::store::store_server::{Store as Service, StoreServer};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use xenstored::calls::Caller;
use xenstored::daemon::Stats;
use xenstored::door::Door;
use xenstored::perms::Perms;
use xenstored::store::{Item, Quota, Store};
use xenstored::tree::{Lookup, View as _};

/// How long a look may wait for its turn, and a request of ours for its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Nodes of a snapshot, unless asked for otherwise, and at most.
const NODES: usize = 20_000;
const NODES_MAX: usize = 100_000;
/// Nodes in one message, and about as many bytes of them.
const PART_NODES: usize = 500;
const PART_BYTES: usize = 512 << 10;
/// Watch streams at once; each has a thread.
const WATCHES_MAX: usize = 64;
/// How often a watch stream looks whether its reader is still there.
const WATCH_LOOK: Duration = Duration::from_millis(500);

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
#[derive(Clone)]
pub struct View {
    caller: Caller,
    door: Door,
    stats: Arc<Stats>,
    client: Arc<Mutex<Option<XsClient>>>,
    watching: Arc<AtomicUsize>,
}

/// A node as a snapshot finds it.
struct Seen {
    path: Vec<u8>,
    value: Vec<u8>,
    perms: Perms,
}

impl View {
    /// Over calls into the event loop and its door for clients.
    pub fn service(caller: Caller, door: Door, stats: Arc<Stats>) -> StoreServer<View> {
        StoreServer::new(View { caller, door, stats, client: Arc::default(), watching: Arc::default() })
    }

    /// Our connection, made at the first use.
    fn client(&self) -> Result<XsClient, Status> {
        let mut slot = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*slot {
            return Ok(client.clone());
        }
        let failed =
            |e: &dyn std::fmt::Display| Status::unavailable(format!("xenstored's own connection: {e}"));
        let (ours, theirs) = UnixStream::pair().map_err(|e| failed(&e))?;
        if !self.door.client(theirs.into()) {
            return Err(Status::unavailable("xenstored is ending"));
        }
        let transport = SocketTransport::connected(ours).map_err(|e| failed(&e))?;
        let client = XsClient::connect(transport, PATIENCE).map_err(|e| failed(&e))?;
        client.set_timeout(PATIENCE);
        *slot = Some(client.clone());
        Ok(client)
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(XsClient) -> Result<T, XsError> + Send + 'static,
    ) -> Result<T, Status> {
        let this = self.clone();
        blocking(move || {
            let result = work(this.client()?);
            if matches!(result, Err(XsError::Disconnected | XsError::Closed)) {
                // Cut off: the next call makes another.
                *this.client.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            result.map_err(|e| status(&e))
        })
        .await
    }

    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let caller = self.caller.clone();
        let busy = || Status::unavailable("xenstored is busy");
        blocking(move || caller.call(PATIENCE, |engine| look(&engine.store)).ok_or_else(busy)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(Status::internal(e.to_string())))
}

fn status(e: &XsError) -> Status {
    match e {
        XsError::Errno(XsErrno::ENOENT) => Status::not_found("no such node"),
        XsError::Errno(XsErrno::EINVAL) => {
            Status::invalid_argument("the store takes it for malformed (EINVAL)")
        }
        XsError::Errno(XsErrno::ENOSPC | XsErrno::E2BIG) => Status::resource_exhausted(e.to_string()),
        XsError::Errno(XsErrno::EACCES) => Status::permission_denied(e.to_string()),
        XsError::Errno(XsErrno::ENOSYS) => Status::unimplemented("this xenstored does not know that call"),
        XsError::Nul | XsError::TooLong(_) => Status::invalid_argument(e.to_string()),
        e => Status::unavailable(e.to_string()),
    }
}

/// # Errors
/// What is wrong with a path that is to be absolute.
fn absolute(path: &str) -> Result<Vec<u8>, Status> {
    let asked = if path.is_empty() { "/" } else { path };
    let trimmed = match asked.trim_end_matches('/') {
        "" => "/",
        trimmed => trimmed,
    };
    if !asked.starts_with('/') || trimmed.contains("//") || trimmed.contains('\0') {
        let text = format!("path {path:?}: write an absolute path, as /local/domain/0");
        return Err(Status::invalid_argument(text));
    }
    Ok(trimmed.as_bytes().to_vec())
}

fn see(store: &Store, path: Vec<u8>) -> Option<Seen> {
    let Lookup::Node(found) = store.tree.find(&path) else { return None };
    let (value, perms) = (found.value.to_vec(), found.perms.clone());
    Some(Seen { path, value, perms })
}

/// The nodes at and below `root`, or `Err(true)`: there is none, `Err(false)`: there are more than `most`.
fn walk(store: &Store, root: &[u8], depth: usize, most: usize) -> Result<Vec<Seen>, bool> {
    let tree = &store.tree;
    let mut out = Vec::new();
    let mut waiting = vec![(root.to_vec(), 0)];
    while let Some((path, level)) = waiting.pop() {
        let seen = see(store, path.clone()).ok_or(true)?;
        if out.len() == most {
            return Err(false);
        }
        out.push(seen);
        if depth != 0 && level == depth {
            continue;
        }
        // The last one waiting is the next one: children in their order, each with all below it.
        for name in tree.children(&path).into_iter().rev() {
            let mut below = if path == b"/" { Vec::new() } else { path.clone() };
            below.push(b'/');
            below.extend_from_slice(name);
            waiting.push((below, level + 1));
        }
    }
    Ok(out)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn node(seen: Seen) -> wire::Node {
    let entry = |perm: &xenstored::perms::Perm| {
        let mut out = Vec::new();
        perm.format(&mut out);
        text(&out).trim_end_matches('\0').to_owned()
    };
    let permissions = seen.perms.entries().iter().map(entry).collect();
    wire::Node { path: text(&seen.path), value: seen.value, permissions }
}

fn parts(nodes: Vec<Seen>, generation: u64) -> Vec<Result<wire::SnapshotPart, Status>> {
    let mut out = Vec::new();
    let (mut part, mut bytes) = (Vec::new(), 0);
    for seen in nodes {
        bytes += seen.path.len() + seen.value.len();
        part.push(node(seen));
        if part.len() == PART_NODES || bytes >= PART_BYTES {
            out.push(Ok(wire::SnapshotPart { nodes: std::mem::take(&mut part), generation }));
            bytes = 0;
        }
    }
    if !part.is_empty() {
        out.push(Ok(wire::SnapshotPart { nodes: part, generation }));
    }
    out
}

/// The payload of GET_QUOTA and SET_QUOTA: strings, each with its nul.
fn strings(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|p| p.bytes().chain([0])).collect()
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tonic::async_trait]
impl Service for View {
    type SnapshotStream = Streamed<wire::SnapshotPart>;

    async fn snapshot(&self, request: Request<wire::SnapshotRequest>) -> Answer<Self::SnapshotStream> {
        let wire::SnapshotRequest { path, depth, max_nodes } = request.into_inner();
        let root = absolute(&path)?;
        let most = if max_nodes == 0 { NODES } else { (max_nodes as usize).min(NODES_MAX) };
        let (found, generation) = self
            .look(move |store| (walk(store, &root, depth as usize, most), store.tree.generation()))
            .await?;
        let nodes = found.map_err(|missing| match missing {
            true => Status::not_found(format!("no node {path}")),
            false => Status::resource_exhausted(format!(
                "more than {most} nodes; take a part of them, less depth, or allow more"
            )),
        })?;
        Ok(Response::new(Box::pin(tokio_stream::iter(parts(nodes, generation)))))
    }

    async fn read(&self, request: Request<wire::ReadRequest>) -> Answer<wire::Node> {
        let path = request.into_inner().path;
        let at = absolute(&path)?;
        let found = self.look(move |store| see(store, at)).await?;
        found.map(node).map(Response::new).ok_or_else(|| Status::not_found(format!("no node {path}")))
    }

    async fn write(&self, request: Request<wire::WriteRequest>) -> Answer<wire::WriteReply> {
        let wire::WriteRequest { path, value } = request.into_inner();
        let path = text(&absolute(&path)?);
        self.ask(move |xs| xs.write(&path, &value)).await?;
        Ok(Response::new(wire::WriteReply {}))
    }

    async fn remove(&self, request: Request<wire::RemoveRequest>) -> Answer<wire::RemoveReply> {
        let path = text(&absolute(&request.into_inner().path)?);
        self.ask(move |xs| xs.rm(&path)).await?;
        Ok(Response::new(wire::RemoveReply {}))
    }

    type WatchStream = Streamed<wire::WatchEvent>;

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Answer<Self::WatchStream> {
        let path = request.into_inner().path;
        let path = if path.starts_with('@') { path } else { text(&absolute(&path)?) };
        if self.watching.fetch_add(1, Ordering::Relaxed) >= WATCHES_MAX {
            drop(Counted(Arc::clone(&self.watching)));
            return Err(Status::resource_exhausted(format!(
                "{WATCHES_MAX} watch streams are open, which is the most"
            )));
        }
        let counted = Counted(Arc::clone(&self.watching));
        let set = self
            .ask(move |xs| {
                let set = xs.watch_set()?;
                set.watch(&path, "view")?;
                Ok((set, xs))
            })
            .await?;
        let (sender, stream) = tokio::sync::mpsc::channel(64);
        let forward = move || {
            let _counted = counted;
            let (set, xs) = set;
            while !sender.is_closed() {
                let Some(event) = set.next_timeout(WATCH_LOOK) else { continue };
                let node = match event.path.starts_with('@') {
                    true => None,
                    false => match xs.read(&event.path) {
                        Ok(value) => {
                            let permissions = xs.get_perms(&event.path).unwrap_or_default();
                            Some(wire::Node { path: event.path.clone(), value, permissions })
                        }
                        Err(e) if e.is_not_found() => None,
                        Err(e) => {
                            let _ = sender.blocking_send(Err(status(&e)));
                            return;
                        }
                    },
                };
                // A slow reader holds up only this thread; the events of the set are folded meanwhile.
                if sender.blocking_send(Ok(wire::WatchEvent { path: event.path, node })).is_err() {
                    return;
                }
            }
        };
        let spawned = std::thread::Builder::new().name("view-watch".into()).spawn(forward);
        spawned.map_err(|e| Status::resource_exhausted(format!("a thread: {e}")))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn statistics(&self, _request: Request<wire::StatisticsRequest>) -> Answer<wire::StatisticsReply> {
        let journal_bytes = self.stats.journal_bytes.load(Ordering::Relaxed);
        let reply = self.look(move |store| statistics(store, journal_bytes)).await?;
        Ok(Response::new(reply))
    }

    async fn quotas(&self, request: Request<wire::QuotasRequest>) -> Answer<wire::QuotasReply> {
        let quotas = match request.into_inner().domid {
            None => self.look(|store| quotas(&store.limits().guest)).await?,
            Some(domid) => {
                let at = u16::try_from(domid).unwrap_or(u16::MAX);
                let found = self.look(move |store| quotas_of(store, at)).await?;
                let gone = || {
                    let text =
                        format!("no domain {domid} in the store yet; a quota can be set for it all the same");
                    Status::not_found(text)
                };
                found.ok_or_else(gone)?
            }
        };
        Ok(Response::new(wire::QuotasReply { quotas }))
    }

    async fn set_quota(&self, request: Request<wire::SetQuotaRequest>) -> Answer<wire::SetQuotaReply> {
        let wire::SetQuotaRequest { domid, name, value } = request.into_inner();
        let (domid, value) = (domid.map(|d| d.to_string()), value.to_string());
        let said = format!(
            "quota {name} of {}",
            domid.as_deref().map_or("new domains".into(), |d| format!("domain {d}"))
        );
        let set = self
            .ask(move |xs| {
                let args: Vec<&str> = domid.as_deref().into_iter().chain([name.as_str(), &value]).collect();
                xs.request(Op::SetQuota, &[&strings(&args)]).map(drop)
            })
            .await;
        set.map_err(|e| match e.code() {
            tonic::Code::InvalidArgument => Status::invalid_argument(format!(
                "{said}: there is none of that name, or not that value; see bh store quota"
            )),
            tonic::Code::NotFound => Status::not_found(format!("{said}: no such domain")),
            _ => e,
        })?;
        Ok(Response::new(wire::SetQuotaReply {}))
    }
}

fn quotas(quota: &Quota) -> Vec<wire::Quota> {
    let one = |item: Item| wire::Quota {
        name: item.name().to_owned(),
        value: quota.get(item, false).into(),
        soft: quota.get(item, true).into(),
        ..wire::Quota::default()
    };
    Item::ALL.into_iter().map(one).collect()
}

fn quotas_of(store: &Store, domid: u16) -> Option<Vec<wire::Quota>> {
    let domain = store.domain(domid)?;
    let mut out = quotas(&domain.quota);
    for (quota, item) in out.iter_mut().zip(Item::ALL) {
        quota.used = store.used(domid, item);
        quota.peak = domain.account.peak(item).into();
        quota.refused = domain.account.refused(item);
    }
    Some(out)
}

/// Requests refused because a quota was used up: domain, which quota, how many.
pub fn refusals(store: &Store) -> Vec<(u16, &'static str, u64)> {
    let of = |(domid, domain): (u16, &xenstored::store::Domain)| {
        let account = &domain.account;
        let refused = Item::ALL.into_iter().map(|item| (domid, item.name(), account.refused(item)));
        refused.filter(|(_, _, n)| *n > 0).collect::<Vec<_>>()
    };
    store.domains().flat_map(of).collect()
}

fn statistics(store: &Store, journal_bytes: u64) -> wire::StatisticsReply {
    let mut domains: std::collections::BTreeMap<u16, wire::DomainUse> = store
        .domains()
        .map(|(domid, _)| domid)
        .chain(store.tree.owners().keys().copied())
        .map(|domid| {
            let nodes = store.tree.owners().get(&domid).copied().unwrap_or(0);
            (domid, wire::DomainUse { domid: domid.into(), nodes, ..wire::DomainUse::default() })
        })
        .collect();
    for (domid, _, refused) in refusals(store) {
        if let Some(used) = domains.get_mut(&domid) {
            used.refused += refused;
        }
    }
    let mut connections = 0;
    for (_, conn) in store.conns() {
        connections += 1;
        if let Some(used) = conn.domid.and_then(|domid| domains.get_mut(&domid)) {
            used.watches += conn.watches.len() as u64;
            used.transactions += conn.txs.len() as u64;
        }
    }
    wire::StatisticsReply {
        nodes: store.tree.len() as u64,
        watches: store.watches.len() as u64,
        connections,
        requests: store.requests,
        generation: store.tree.generation(),
        journal_bytes,
        domains: domains.into_values().collect(),
    }
}
