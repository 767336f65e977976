//! `bulkhead.store.v1` for `bh`: dom0 passes each call on to xenstored's own socket. It keeps nothing, and waits for nobody without a
//! deadline; streams last as long as both ends do.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proto::hvcore::Role;
use proto::store::store_client::StoreClient;
use proto::store::store_server::Store;
use proto::store::*;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::channel;
use super::relay::{answered, passed};
use crate::manager::{Manager, OpError};

/// What it is called in answers.
const XENSTORED: &str = "xenstored";

/// How long xenstored may take to answer, or to begin a stream.
const PATIENCE: Duration = Duration::from_secs(8);

/// The relay.
#[derive(Clone)]
pub struct StoreRelay(Arc<Manager>);

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl StoreRelay {
    /// Over the manager.
    pub fn new(manager: Arc<Manager>) -> StoreRelay {
        StoreRelay(manager)
    }

    async fn client(&self) -> Result<StoreClient<Channel>, Status> {
        let manager = Arc::clone(&self.0);
        let found = tokio::task::spawn_blocking(move || -> Result<String, OpError> {
            let domains = manager.hv.list()?;
            let store = domains.into_iter().find(|d| d.roles.contains(&(Role::Xenstore as i32)));
            let store = store.filter(|d| d.host_pid != 0);
            store.map(|d| d.control_socket).ok_or_else(|| {
                OpError::Unavailable("xenstored does not run at the moment; see bh services".into())
            })
        });
        let path = found.await.map_err(|e| Status::internal(e.to_string()))?.map_err(super::status)?;
        Ok(StoreClient::new(channel(path)))
    }

    async fn pass<T, F>(&self, call: impl FnOnce(StoreClient<Channel>) -> F) -> Answer<T>
    where
        F: Future<Output = Answer<T>>,
    {
        let client = self.client().await?;
        answered(XENSTORED, PATIENCE, call(client)).await.map(|answer| Response::new(answer.into_inner()))
    }
}

#[tonic::async_trait]
impl Store for StoreRelay {
    type SnapshotStream = Streamed<SnapshotPart>;

    async fn snapshot(&self, request: Request<SnapshotRequest>) -> Answer<Self::SnapshotStream> {
        let request = request.into_inner();
        let stream = self.pass(|mut c| async move { c.snapshot(request).await }).await?.into_inner();
        Ok(Response::new(Box::pin(stream.map(|part| part.map_err(|e| passed(XENSTORED, &e))))))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Answer<Node> {
        let request = request.into_inner();
        self.pass(|mut c| async move { c.read(request).await }).await
    }

    async fn write(&self, request: Request<WriteRequest>) -> Answer<WriteReply> {
        let request = request.into_inner();
        let path = request.path.clone();
        let done = self.pass(|mut c| async move { c.write(request).await }).await?;
        self.0.events.tell("operation", "xenstored", 0, format!("the administrator wrote {path}"));
        Ok(done)
    }

    async fn remove(&self, request: Request<RemoveRequest>) -> Answer<RemoveReply> {
        let request = request.into_inner();
        let path = request.path.clone();
        let done = self.pass(|mut c| async move { c.remove(request).await }).await?;
        self.0.events.tell("operation", "xenstored", 0, format!("the administrator removed {path}"));
        Ok(done)
    }

    type WatchStream = Streamed<WatchEvent>;

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        let request = request.into_inner();
        let stream = self.pass(|mut c| async move { c.watch(request).await }).await?.into_inner();
        Ok(Response::new(Box::pin(stream.map(|event| event.map_err(|e| passed(XENSTORED, &e))))))
    }

    async fn statistics(&self, request: Request<StatisticsRequest>) -> Answer<StatisticsReply> {
        let request = request.into_inner();
        self.pass(|mut c| async move { c.statistics(request).await }).await
    }

    async fn quotas(&self, request: Request<QuotasRequest>) -> Answer<QuotasReply> {
        let request = request.into_inner();
        self.pass(|mut c| async move { c.quotas(request).await }).await
    }

    async fn set_quota(&self, request: Request<SetQuotaRequest>) -> Answer<SetQuotaReply> {
        let request = request.into_inner();
        self.pass(|mut c| async move { c.set_quota(request).await }).await
    }
}
