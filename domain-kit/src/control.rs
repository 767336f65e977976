//! gRPC on descriptor 4: `grpc.health.v1`, `bulkhead.service.v1`, reflection, and what else a service offers. Runs on a thread of
//! its own; no data path touches it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hv_abi::CONTROL_LISTENER_FD;
use proto::service::service_server::{Service, ServiceServer};
use proto::service::{
    Counter, DrainReply, DrainRequest, InfoReply, InfoRequest, StatisticsReply, StatisticsRequest,
};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;

use crate::Domain;

/// What a service tells and does when dom0 asks.
pub trait ServiceControl: Send + Sync + 'static {
    /// Its counters now.
    fn statistics(&self) -> Vec<Counter>;
    /// Finishes what is in flight within `deadline` and takes nothing new until `resume` is asked. True when done.
    fn drain(&self, deadline: Duration, resume: bool) -> bool;
}

/// Sets the health that `grpc.health.v1` tells.
#[derive(Clone, Debug)]
pub struct ControlHandle {
    serving: watch::Sender<bool>,
}

impl ControlHandle {
    /// SERVING or NOT_SERVING.
    pub fn set_serving(&self, serving: bool) {
        self.serving.send_replace(serving);
    }
}

struct Api {
    domain: Arc<Domain>,
    control: Arc<dyn ServiceControl>,
}

#[tonic::async_trait]
impl Service for Api {
    async fn info(&self, _request: Request<InfoRequest>) -> Result<Response<InfoReply>, Status> {
        Ok(Response::new(InfoReply {
            name: self.domain.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            domid: self.domain.domid().into(),
            generation: self.domain.hello.generation,
            uptime_ms: self.domain.started.elapsed().as_millis() as u64,
        }))
    }

    async fn statistics(
        &self,
        _request: Request<StatisticsRequest>,
    ) -> Result<Response<StatisticsReply>, Status> {
        Ok(Response::new(StatisticsReply { counters: self.control.statistics() }))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        let DrainRequest { deadline_ms, resume } = request.into_inner();
        let control = self.control.clone();
        let deadline = Duration::from_millis(deadline_ms.into());
        let drained = tokio::task::spawn_blocking(move || control.drain(deadline, resume))
            .await
            .map_err(|e| Status::internal(e.to_string()))?;
        if !drained {
            return Err(Status::deadline_exceeded("still busy"));
        }
        Ok(Response::new(DrainReply { drained }))
    }
}

/// Serves on descriptor 4 until the process ends. Health starts as NOT_SERVING.
///
/// # Errors
/// Descriptor 4 is missing or not a listening Unix socket; no thread could be made.
pub fn serve(domain: &Arc<Domain>, control: Arc<dyn ServiceControl>) -> io::Result<ControlHandle> {
    serve_with(domain, control, Routes::default())
}

/// The same with further gRPC services of the domain's own.
///
/// # Errors
/// As [`serve`].
pub fn serve_with(
    domain: &Arc<Domain>,
    control: Arc<dyn ServiceControl>,
    routes: Routes,
) -> io::Result<ControlHandle> {
    let listener = std::os::unix::net::UnixListener::from(crate::os::take_inherited(CONTROL_LISTENER_FD)?);
    crate::os::set_nonblocking(&listener)?;
    let (serving, mut changes) = watch::channel(false);
    let api = Api { domain: domain.clone(), control };
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(io::Error::other)?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(2)
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!(%error, "no gRPC: runtime"),
        };
        let served = runtime.block_on(async move {
            let (reporter, health) = tonic_health::server::health_reporter();
            reporter.set_service_status("", ServingStatus::NotServing).await;
            tokio::spawn(async move {
                while changes.changed().await.is_ok() {
                    let serving = *changes.borrow_and_update();
                    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
                    reporter.set_service_status("", status).await;
                }
                // The handle is gone: what was said last stays true until the process ends.
                std::future::pending::<()>().await;
            });
            Server::builder()
                .add_routes(routes)
                .add_service(health)
                .add_service(reflection)
                .add_service(ServiceServer::new(api))
                .serve_with_incoming(UnixListenerStream::new(UnixListener::from_std(listener)?))
                .await
                .map_err(io::Error::other)
        });
        if let Err(error) = served {
            tracing::error!(%error, "gRPC ended");
        }
    })?;
    Ok(ControlHandle { serving })
}
