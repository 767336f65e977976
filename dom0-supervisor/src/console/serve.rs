//! gRPC: a client attaches, reads what is kept and what comes, and types.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proto::toolstack::console_backend_server::ConsoleBackend;
use proto::toolstack::console_input::Input;
use proto::toolstack::{ConsoleAttach, ConsoleInput, ConsoleOutput};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::table::{Console, Table};

/// How long a client has for its first message, and a guest for making its console.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longest piece of output in one message, bytes.
const PIECE: usize = 16 << 10;
/// Longest piece of input, bytes.
const KEYS: usize = 4096;
/// Input that a guest does not take within this is dropped.
const STUCK: Duration = Duration::from_secs(2);
/// Clients attached at once.
const CLIENTS: usize = 256;

/// The service.
pub struct Server {
    table: Arc<Table>,
    changed: Arc<Notify>,
    clients: Arc<tokio::sync::Semaphore>,
}

impl Server {
    /// Over the table; `changed` tells of new consoles.
    pub fn new(table: Arc<Table>, changed: Arc<Notify>) -> Server {
        Server { table, changed, clients: Arc::new(tokio::sync::Semaphore::new(CLIENTS)) }
    }

    /// A guest that was made a moment ago has no console yet.
    async fn find(&self, attach: &ConsoleAttach) -> Result<Arc<Console>, Status> {
        let domid = u16::try_from(attach.domid).map_err(|_| Status::invalid_argument("no such domid"))?;
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let changed = self.changed.notified();
                if let Some(console) = self.table.find(domid, attach.instance) {
                    return console;
                }
                changed.await;
            }
        });
        found.await.map_err(|_| Status::not_found(format!("domain {domid} has no console")))
    }
}

#[tonic::async_trait]
impl ConsoleBackend for Server {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let permit = Arc::clone(&self.clients).try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted("too many consoles are attached"))?;
        let mut input = request.into_inner();
        let first = tokio::time::timeout(PATIENCE, input.next()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no attach came"))?.transpose()?;
        let Some(Input::Attach(attach)) = first.and_then(|m| m.input) else {
            return Err(Status::invalid_argument("the first message must be attach"));
        };
        let console = self.find(&attach).await?;
        let (tx, rx) = mpsc::channel(4);
        let typing = tokio::spawn(type_in(input, Arc::clone(&console)));
        tokio::spawn(async move {
            show(&console, attach.from_offset, attach.kept_only, &tx).await;
            typing.abort();
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

/// Ends with the client, the guest, or (if only that is wanted) with what is kept.
async fn show(
    console: &Console,
    mut next: u64,
    kept_only: bool,
    tx: &mpsc::Sender<Result<ConsoleOutput, Status>>,
) {
    let mut news = console.watch();
    loop {
        news.borrow_and_update();
        let ended = console.ended();
        let (offset, data) = console.read(next, PIECE);
        if !data.is_empty() {
            next = offset + data.len() as u64;
            let output =
                ConsoleOutput { offset, data, domid: console.domid.into(), instance: console.instance };
            if tx.send(Ok(output)).await.is_err() {
                return;
            }
            continue;
        }
        if kept_only || ended {
            return;
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return },
            () = tx.closed() => return,
        }
    }
}

async fn type_in(mut input: Streaming<ConsoleInput>, console: Arc<Console>) {
    while let Some(Ok(message)) = input.next().await {
        let Some(Input::Data(data)) = message.input else { continue };
        let mut rest = &data[..data.len().min(KEYS)];
        let end = tokio::time::Instant::now() + STUCK;
        while !rest.is_empty() {
            let Some(taken) = console.input(rest) else { return };
            rest = &rest[taken..];
            if rest.is_empty() {
                break;
            }
            if tokio::time::Instant::now() > end {
                tracing::debug!(
                    guest = console.domid,
                    bytes = rest.len(),
                    "the guest takes no input; dropped"
                );
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
