//! hv-core's control API over descriptor 5: one connected stream, inherited; there is no path to reach it by.

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use domain_kit::Domain as Me;
use proto::blkback::disk_client::DiskClient;
use proto::blkback::{Commit, DescribeRequest, GrowRequest, SettleRequest};
use proto::hvcore::hv_core_client::HvCoreClient;
use proto::hvcore::{
    CreateDomainRequest, Domain, DomainRef, Empty, Event, KillRequest, Resource, SetResourcesRequest,
    UpdateDomainRequest, VersionReply, VersionRequest, WatchEventsRequest,
};
use proto::qemu::qemu_client::QemuClient;
use proto::qemu::{
    QemuPauseRequest, QemuResetRequest, QemuResumeRequest, QemuSaveRequest, QemuSaved, QemuScreenshotRequest,
    QemuSizes, QemuSizesRequest, QemuStatus, QemuStatusRequest,
};
use proto::service::DrainRequest;
use proto::service::service_client::ServiceClient;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::hv::{Hv, HvError};

/// How long a call may take. Creating a domain makes namespaces and may move interfaces.
const TIMEOUT: Duration = Duration::from_secs(15);
/// How long a guest's state may take to be written.
const SAVE: Duration = Duration::from_secs(900);

/// The real [`Hv`].
pub struct GrpcHv {
    runtime: Handle,
    client: HvCoreClient<Channel>,
    me: Arc<Me>,
}

impl GrpcHv {
    /// Speaks over the stream on `fd5`. Must be called inside the runtime.
    ///
    /// # Errors
    /// The stream can't be used.
    pub fn new(fd5: StdStream, me: Arc<Me>) -> io::Result<GrpcHv> {
        let channel = proto::unix::over(UnixStream::from_std(fd5)?);
        Ok(GrpcHv { runtime: Handle::current(), client: HvCoreClient::new(channel), me })
    }

    fn call<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, HvError> {
        self.call_within(TIMEOUT, call)
    }

    fn call_within<T>(
        &self,
        within: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, HvError> {
        let result = self.runtime.block_on(async { tokio::time::timeout(within, call).await });
        match result {
            Err(_) => Err(HvError::Busy(format!("no answer within {} s", within.as_secs()))),
            Ok(Err(status)) => Err(from_status(&status)),
            Ok(Ok(reply)) => Ok(reply.into_inner()),
        }
    }

    /// A call to a service: that it does not answer is no sign of hv-core's end.
    fn ask<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, HvError> {
        self.call(call).map_err(not_gone)
    }

    /// hv-core's events after `seq`, for as long as the connection lives.
    ///
    /// # Errors
    /// [`HvError`].
    pub async fn watch(&self, after_seq: u64) -> Result<Streaming<Event>, HvError> {
        let mut client = self.client.clone();
        let reply = client.watch_events(WatchEventsRequest { after_seq }).await;
        reply.map(tonic::Response::into_inner).map_err(|s| from_status(&s))
    }
}

/// The qemu-bridge at this control socket.
fn bridge(control_socket: &str) -> QemuClient<tonic::transport::Channel> {
    QemuClient::new(crate::api::channel(control_socket.to_owned()))
}

fn not_gone(e: HvError) -> HvError {
    match e {
        HvError::Gone => HvError::Busy("the service does not answer".into()),
        e => e,
    }
}

fn from_status(status: &Status) -> HvError {
    let text = crate::manager::one_line(status.message());
    match status.code() {
        Code::NotFound => HvError::NotFound,
        Code::AlreadyExists => HvError::AlreadyExists(text),
        Code::Unavailable if text.contains("transport") || text.contains("connect") => HvError::Gone,
        Code::Unavailable | Code::DeadlineExceeded | Code::Aborted | Code::Cancelled => HvError::Busy(text),
        Code::Unknown if text.contains("transport") => HvError::Gone,
        _ => HvError::Refused(text),
    }
}

/// Longest screenshot, bytes.
const MAX_SCREENSHOT: usize = 64 << 20;

fn domain_ref(domid: u16, instance: u64) -> DomainRef {
    DomainRef { domid: domid.into(), instance }
}

impl Hv for GrpcHv {
    fn version(&self) -> Result<VersionReply, HvError> {
        let mut client = self.client.clone();
        self.call(client.version(VersionRequest {}))
    }

    fn list(&self) -> Result<Vec<Domain>, HvError> {
        let mut client = self.client.clone();
        Ok(self.call(client.list_domains(Empty {}))?.domains)
    }

    fn create(&self, request: CreateDomainRequest) -> Result<Domain, HvError> {
        let mut client = self.client.clone();
        self.call(client.create_domain(request))
    }

    fn destroy(&self, domid: u16, instance: u64) -> Result<(), HvError> {
        let mut client = self.client.clone();
        self.call(client.destroy_domain(domain_ref(domid, instance))).map(drop)
    }

    fn update(&self, domid: u16, instance: u64, request: CreateDomainRequest) -> Result<(), HvError> {
        let mut client = self.client.clone();
        let domain = Some(domain_ref(domid, instance));
        self.call(client.update_domain(UpdateDomainRequest { domain, spec: Some(request) })).map(drop)
    }

    fn drain(&self, control_socket: &str, within: Duration) -> Result<(), HvError> {
        let request = DrainRequest { deadline_ms: within.as_millis() as u32, resume: false };
        let path = control_socket.to_owned();
        let asked = async move {
            let mut client = ServiceClient::new(crate::api::channel(path));
            // Its own deadline is in the request; this is for one that does not answer.
            tokio::time::timeout(within * 2, client.drain(request)).await
        };
        match self.runtime.block_on(asked) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(HvError::Busy(crate::manager::one_line(status.message()))),
            Err(_) => Err(HvError::Busy("the service does not answer".into())),
        }
    }

    fn approve(
        &self,
        domid: u16,
        instance: u64,
        add: Vec<Resource>,
        remove: Vec<String>,
    ) -> Result<(), HvError> {
        let mut client = self.client.clone();
        let domain = Some(domain_ref(domid, instance));
        self.call(client.set_resources(SetResourcesRequest { domain, add, remove })).map(drop)
    }

    fn settle_disk(&self, control_socket: &str) -> Result<(), HvError> {
        let mut client = DiskClient::new(crate::api::channel(control_socket.to_owned()));
        self.ask(async move { client.settle(SettleRequest {}).await }).map(drop)
    }

    fn disk_bytes(&self, control_socket: &str, grow: u64) -> Result<u64, HvError> {
        let mut client = DiskClient::new(crate::api::channel(control_socket.to_owned()));
        let asked = async move {
            match grow {
                0 => client.describe(DescribeRequest {}).await,
                bytes => client.grow(GrowRequest { bytes }).await,
            }
        };
        self.ask(asked).map(|reply| reply.bytes)
    }

    fn disk_commit(&self, control_socket: &str) -> Result<Commit, HvError> {
        let mut client = DiskClient::new(crate::api::channel(control_socket.to_owned()));
        let asked = async move { client.describe(DescribeRequest {}).await };
        self.ask(asked).map(|reply| reply.commit.unwrap_or_default())
    }

    fn qemu(&self, control_socket: &str, pause: Option<bool>) -> Result<QemuStatus, HvError> {
        let mut client = bridge(control_socket);
        let asked = async move {
            match pause {
                None => client.status(QemuStatusRequest {}).await,
                Some(true) => client.pause(QemuPauseRequest {}).await,
                Some(false) => client.resume(QemuResumeRequest {}).await,
            }
        };
        self.ask(asked)
    }

    fn qemu_reset(&self, control_socket: &str) -> Result<QemuStatus, HvError> {
        let mut client = bridge(control_socket);
        self.ask(async move { client.reset(QemuResetRequest {}).await })
    }

    fn qemu_save(
        &self,
        control_socket: &str,
        resource: &str,
        description: &str,
    ) -> Result<QemuSaved, HvError> {
        let mut client = bridge(control_socket);
        let request = QemuSaveRequest { resource: resource.into(), description: description.into() };
        self.call_within(SAVE, async move { client.save(request).await }).map_err(not_gone)
    }

    fn qemu_sizes(&self, control_socket: &str) -> Result<QemuSizes, HvError> {
        let mut client = bridge(control_socket);
        self.ask(async move { client.sizes(QemuSizesRequest {}).await })
    }

    fn screenshot(&self, control_socket: &str) -> Result<Vec<u8>, HvError> {
        let client = bridge(control_socket);
        let mut client = client.max_decoding_message_size(MAX_SCREENSHOT);
        self.ask(async move { client.screenshot(QemuScreenshotRequest {}).await }).map(|reply| reply.png)
    }

    fn kill(&self, domid: u16, instance: u64, signal: u32) -> Result<(), HvError> {
        let mut client = self.client.clone();
        self.call(client.kill_process(KillRequest { domain: Some(domain_ref(domid, instance)), signal }))
            .map(drop)
    }

    fn start(&self, domid: u16, instance: u64) -> Result<Domain, HvError> {
        let mut client = self.client.clone();
        self.call(client.start_process(domain_ref(domid, instance)))
    }

    fn has_store_ring(&self, domid: u16) -> Result<bool, HvError> {
        match self.me.hv.dom_info(domid) {
            Ok(info) => Ok(info.store_port != 0),
            Err(e) if e.is(nix::errno::Errno::ESRCH) || e.is(nix::errno::Errno::ENOENT) => {
                Err(HvError::NotFound)
            }
            Err(e) => Err(HvError::Busy(e.to_string())),
        }
    }
}
