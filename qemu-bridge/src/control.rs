//! gRPC: `bulkhead.qemu.v1`.

use std::sync::Arc;
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::control::ServiceControl;
use proto::qemu::qemu_server::{Qemu, QemuServer};
use proto::qemu::{
    QemuPauseRequest, QemuResetRequest, QemuResumeRequest, QemuSaveRequest, QemuSaved, QemuScreenshot,
    QemuScreenshotRequest, QemuSizes, QemuSizesRequest, QemuStatus, QemuStatusRequest, VncBytes,
};
use proto::service::Counter;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use crate::display::{self, Viewers};
use crate::machine::Machine;
use crate::qmp::QmpError;
use crate::resize::{self, Sizes};
use crate::save::{self, SaveError};

/// For `domain_kit::control::serve_with`.
pub fn routes(domain: Arc<Domain>, machine: Arc<Machine>) -> Routes {
    Routes::new(QemuServer::new(Api { machine, domain, viewers: Viewers::default() }))
}

struct Api {
    machine: Arc<Machine>,
    domain: Arc<Domain>,
    viewers: Viewers,
}

/// What a caller is told.
pub(crate) fn status(error: QmpError) -> Status {
    match error {
        QmpError::Refused { .. } => Status::failed_precondition(error.to_string()),
        QmpError::Silent(_) => Status::deadline_exceeded(error.to_string()),
        QmpError::Closed | QmpError::Garbage(_) => Status::unavailable(error.to_string()),
    }
}

impl Api {
    async fn on_machine<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Machine) -> Result<T, QmpError> + Send + 'static,
    ) -> Result<T, Status> {
        let machine = self.machine.clone();
        let done = tokio::task::spawn_blocking(move || work(&machine)).await;
        done.map_err(|e| Status::internal(e.to_string()))?.map_err(status)
    }

    fn told(&self) -> Response<QemuStatus> {
        Response::new(QemuStatus {
            state: self.machine.state(),
            version: self.machine.version().into(),
            accel: self.machine.accel().into(),
            resets: self.machine.resets(),
        })
    }
}

#[tonic::async_trait]
impl Qemu for Api {
    async fn status(&self, _request: Request<QemuStatusRequest>) -> Result<Response<QemuStatus>, Status> {
        Ok(self.told())
    }

    async fn pause(&self, _request: Request<QemuPauseRequest>) -> Result<Response<QemuStatus>, Status> {
        self.on_machine(Machine::pause).await?;
        Ok(self.told())
    }

    async fn resume(&self, _request: Request<QemuResumeRequest>) -> Result<Response<QemuStatus>, Status> {
        self.on_machine(|machine| save::abandon(machine).and_then(|()| machine.resume())).await?;
        Ok(self.told())
    }

    async fn reset(&self, _request: Request<QemuResetRequest>) -> Result<Response<QemuStatus>, Status> {
        self.on_machine(Machine::reset).await?;
        Ok(self.told())
    }

    async fn save(&self, request: Request<QemuSaveRequest>) -> Result<Response<QemuSaved>, Status> {
        let QemuSaveRequest { resource, description } = request.into_inner();
        let (machine, domain) = (self.machine.clone(), self.domain.clone());
        let work = move || -> Result<save::Done, SaveError> {
            let file = domain.hv.resource_open(&resource)?.1;
            save::save(&machine, file.into(), &description)
        };
        let done = tokio::task::spawn_blocking(work).await.map_err(|e| Status::internal(e.to_string()))?;
        let done = done.map_err(|e| match e {
            SaveError::Qmp(e) => status(e),
            e => Status::failed_precondition(e.to_string()),
        })?;
        Ok(Response::new(QemuSaved { bytes: done.bytes, took_ms: done.took.as_millis() as u64 }))
    }

    async fn screenshot(
        &self,
        _request: Request<QemuScreenshotRequest>,
    ) -> Result<Response<QemuScreenshot>, Status> {
        let png = self.on_machine(display::screenshot).await?;
        Ok(Response::new(QemuScreenshot { png }))
    }

    async fn sizes(&self, _request: Request<QemuSizesRequest>) -> Result<Response<QemuSizes>, Status> {
        let Sizes { memory, vcpus } = self.on_machine(|machine| resize::sizes(machine.qmp())).await?;
        Ok(Response::new(QemuSizes { memory_bytes: memory, vcpus }))
    }

    type VncStream = ReceiverStream<Result<VncBytes, Status>>;

    async fn vnc(&self, request: Request<Streaming<VncBytes>>) -> Result<Response<Self::VncStream>, Status> {
        self.viewers.serve(self.machine.clone(), request.into_inner()).await.map(Response::new)
    }
}

/// Counters of the bridge; its data path is elsewhere.
pub struct Counters(pub Arc<Machine>);

impl ServiceControl for Counters {
    fn statistics(&self) -> Vec<Counter> {
        let counter = |name: &str, value: u64| Counter { name: name.into(), value, ..Counter::default() };
        vec![counter("resets", self.0.resets().into())]
    }

    fn drain(&self, _deadline: Duration, _resume: bool) -> bool {
        true
    }
}
