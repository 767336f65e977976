//! gRPC for `bh`: `bulkhead.toolstack.v1`. Handlers do nothing long themselves: operations run in threads, so a client that
//! leaves ends nothing, and a service that hangs holds up nobody else.

mod console;
mod network;
mod relay;
mod services;
mod store;
mod vnc;
pub(crate) use services::channel;
pub use store::StoreRelay;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::toolstack::toolstack_server::Toolstack;
use proto::toolstack::*;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::config::{UsbEntry, UsbKind};
use crate::manager::{Manager, OpError, one_line};

/// The service.
#[derive(Clone)]
pub struct Api {
    manager: Arc<Manager>,
    host_file: String,
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The status of an error; its message is one line.
pub fn status(e: OpError) -> Status {
    let text = one_line(&e.to_string());
    match e {
        OpError::Invalid(_) => Status::invalid_argument(text),
        OpError::Exists(_) => Status::already_exists(text),
        OpError::NotFound(_) => Status::not_found(text),
        OpError::Busy(_) => Status::aborted(text),
        OpError::Failed(_) => Status::failed_precondition(text),
        OpError::Timeout(_) => Status::deadline_exceeded(text),
        OpError::Unavailable(_) => Status::unavailable(text),
        OpError::Killed => Status::unavailable("dom0 is ending; try again"),
    }
}

impl Api {
    /// Over the manager; `host_file` is shown.
    pub fn new(manager: Arc<Manager>, host_file: String) -> Api {
        Api { manager, host_file }
    }

    /// Runs `work` where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Manager>) -> Result<T, OpError> + Send + 'static,
    ) -> Result<T, Status> {
        let manager = Arc::clone(&self.manager);
        match tokio::task::spawn_blocking(move || work(manager)).await {
            Ok(result) => result.map_err(status),
            Err(e) => Err(Status::internal(one_line(&e.to_string()))),
        }
    }
}

/// What a time-out in a request means.
pub(crate) fn timeout_or(ms: u32, default: Duration) -> Duration {
    if ms == 0 { default } else { Duration::from_millis(ms.into()) }
}

#[tonic::async_trait]
impl Toolstack for Api {
    async fn ping(&self, _request: Request<PingRequest>) -> Answer<PingReply> {
        Ok(Response::new(PingReply { version: env!("CARGO_PKG_VERSION").into() }))
    }

    async fn info(&self, _request: Request<InfoRequest>) -> Answer<InfoReply> {
        let mut info = self.blocking(|m| m.info()).await?;
        info.host_file = self.host_file.clone();
        Ok(Response::new(info))
    }

    async fn list_guests(&self, request: Request<ListGuestsRequest>) -> Answer<ListGuestsReply> {
        let which = request.into_inner().guest;
        let guests = self.blocking(move |m| m.guests((!which.is_empty()).then_some(which.as_str()))).await?;
        Ok(Response::new(ListGuestsReply { guests }))
    }

    async fn create_guest(&self, request: Request<CreateGuestRequest>) -> Answer<Guest> {
        let CreateGuestRequest { domain_file, source, restore } = request.into_inner();
        let source = if source.is_empty() { "domain file".into() } else { one_line(&source) };
        let guest = self
            .blocking(move |m| {
                let name = match restore.as_str() {
                    "" => m.create(&domain_file, &source)?,
                    file => m.restore(&domain_file, &source, file.into())?,
                };
                Ok(m.guests(Some(&name))?.into_iter().next())
            })
            .await?;
        guest.map(Response::new).ok_or_else(|| Status::aborted("it ended as soon as it began; see bh events"))
    }

    async fn shutdown_guest(&self, request: Request<ShutdownGuestRequest>) -> Answer<ShutdownGuestReply> {
        let ShutdownGuestRequest { guest, reboot, wait, timeout_ms } = request.into_inner();
        let timeout = timeout_or(timeout_ms, Duration::from_secs(60));
        self.blocking(move |m| {
            let before = m.guests(Some(&guest))?;
            let Some(before) = before.into_iter().next() else { return Err(crate::ops::no_guest(&guest)) };
            m.request_shutdown(&guest, reboot)?;
            if wait { await_shutdown(&m, &before, reboot, timeout) } else { Ok(()) }
        })
        .await?;
        Ok(Response::new(ShutdownGuestReply {}))
    }

    async fn destroy_guest(&self, request: Request<GuestRef>) -> Answer<DestroyGuestReply> {
        let guest = request.into_inner().guest;
        self.blocking(move |m| m.destroy(&guest)).await?;
        Ok(Response::new(DestroyGuestReply {}))
    }

    async fn list_services(&self, request: Request<ListServicesRequest>) -> Answer<ListServicesReply> {
        let statistics = request.into_inner().statistics;
        let mut services = self.blocking(|m| m.services()).await?;
        if statistics {
            self.add_statistics(&mut services).await;
        }
        Ok(Response::new(ListServicesReply { services }))
    }

    async fn reload(&self, _request: Request<ReloadRequest>) -> Answer<ReloadReply> {
        let source = self.host_file.clone();
        self.blocking(move |m| {
            let host = crate::daemon::read_host(std::path::Path::new(&source))
                .map_err(|e| OpError::Invalid(format!("{e:#}")))?;
            m.set_host(host);
            m.events.tell("operation", "dom0-supervisor", 0, "the host file was read again");
            // What is to be made anew ends in the first pass and begins in the second.
            m.reconcile()?;
            m.reconcile()
        })
        .await?;
        let services = self.blocking(|m| m.services()).await?;
        Ok(Response::new(ReloadReply { services }))
    }

    async fn restart_service(&self, request: Request<RestartServiceRequest>) -> Answer<ServiceInfo> {
        let RestartServiceRequest { name, timeout_ms } = request.into_inner();
        let timeout = timeout_or(timeout_ms, Duration::from_secs(10));
        let service = self.blocking(move |m| services::restart(&m, &name, timeout)).await?;
        Ok(Response::new(service))
    }

    type WatchEventsStream = Streamed<Event>;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let WatchEventsRequest { after_seq, kept_only } = request.into_inner();
        let (kept, live) = self.manager.events.watch(after_seq);
        let kept = tokio_stream::iter(kept.into_iter().map(Ok));
        if kept_only {
            return Ok(Response::new(Box::pin(kept)));
        }
        let live = tokio_stream::wrappers::BroadcastStream::new(live).map(|event| match event {
            Ok(event) => Ok(event),
            Err(tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged(lost)) => Ok(Event {
                kind: "warning".into(),
                detail: "events were lost here".into(),
                lost,
                ..Event::default()
            }),
        });
        Ok(Response::new(Box::pin(kept.chain(live))))
    }

    async fn list_disks(&self, request: Request<GuestRef>) -> Answer<ListDisksReply> {
        let guest = request.into_inner().guest;
        let disks = self.blocking(move |m| m.disks(&guest)).await?;
        Ok(Response::new(ListDisksReply { disks }))
    }

    async fn attach_disk(&self, request: Request<AttachDiskRequest>) -> Answer<AttachDiskReply> {
        let AttachDiskRequest { guest, disk } = request.into_inner();
        self.blocking(move |m| {
            if let Some(entry) = UsbEntry::qdisk(&disk).map_err(|e| OpError::Invalid(e.0))? {
                return m.attach_usb(&guest, entry);
            }
            let entry = crate::config::DiskEntry::parse(&disk).map_err(|e| OpError::Invalid(e.0))?;
            m.attach_disk(&guest, entry)
        })
        .await?;
        Ok(Response::new(AttachDiskReply {}))
    }

    async fn detach_disk(&self, request: Request<DetachDiskRequest>) -> Answer<DetachDiskReply> {
        let DetachDiskRequest { guest, vdev, force } = request.into_inner();
        self.blocking(move |m| m.detach_disk(&guest, &vdev, force)).await?;
        Ok(Response::new(DetachDiskReply {}))
    }

    async fn list_vifs(&self, request: Request<GuestRef>) -> Answer<ListVifsReply> {
        let guest = request.into_inner().guest;
        let vifs = self.blocking(move |m| m.vifs(&guest)).await?;
        Ok(Response::new(ListVifsReply { vifs }))
    }

    async fn attach_vif(&self, request: Request<AttachVifRequest>) -> Answer<AttachVifReply> {
        let AttachVifRequest { guest, vif } = request.into_inner();
        let id = self
            .blocking(move |m| {
                let entry = crate::config::VifEntry::parse(&vif).map_err(|e| OpError::Invalid(e.0))?;
                m.attach_vif(&guest, entry)
            })
            .await?;
        Ok(Response::new(AttachVifReply { id }))
    }

    async fn detach_vif(&self, request: Request<DetachVifRequest>) -> Answer<DetachVifReply> {
        let DetachVifRequest { guest, id, force } = request.into_inner();
        self.blocking(move |m| m.detach_vif(&guest, id, force)).await?;
        Ok(Response::new(DetachVifReply {}))
    }

    async fn move_vif(&self, request: Request<MoveVifRequest>) -> Answer<MoveVifReply> {
        let MoveVifRequest { guest, id, backend } = request.into_inner();
        self.blocking(move |m| {
            let backend = backend.parse().map_err(|e: crate::config::ConfigError| OpError::Invalid(e.0))?;
            m.move_vif(&guest, id, backend)
        })
        .await?;
        Ok(Response::new(MoveVifReply {}))
    }

    async fn link_vif(&self, request: Request<LinkVifRequest>) -> Answer<LinkVifReply> {
        let LinkVifRequest { guest, id, up } = request.into_inner();
        self.blocking(move |m| m.link_vif(&guest, id, up)).await?;
        Ok(Response::new(LinkVifReply {}))
    }

    async fn check_vif_rules(&self, request: Request<CheckVifRulesRequest>) -> Answer<CheckVifRulesReply> {
        self.relay_check(request.into_inner()).await.map(Response::new)
    }

    type CaptureVifStream = Streamed<CapturedPackets>;

    async fn capture_vif(&self, request: Request<CaptureVifRequest>) -> Answer<Self::CaptureVifStream> {
        self.relay_capture(request.into_inner()).await.map(Response::new)
    }

    async fn resize_disk(&self, request: Request<ResizeDiskRequest>) -> Answer<ResizeDiskReply> {
        let ResizeDiskRequest { guest, vdev, bytes } = request.into_inner();
        if bytes == 0 {
            return Err(Status::invalid_argument("a disk of no bytes is none"));
        }
        let bytes = self.blocking(move |m| m.resize_disk(&guest, &vdev, bytes)).await?;
        Ok(Response::new(ResizeDiskReply { bytes }))
    }

    async fn snapshot_disk(&self, request: Request<SnapshotDiskRequest>) -> Answer<SnapshotDiskReply> {
        let SnapshotDiskRequest { guest, vdev, path } = request.into_inner();
        self.blocking(move |m| m.snapshot_disk(&guest, &vdev, path.into())).await?;
        Ok(Response::new(SnapshotDiskReply {}))
    }

    async fn commit_disk(&self, request: Request<CommitDiskRequest>) -> Answer<CommitDiskReply> {
        let CommitDiskRequest { guest, vdev } = request.into_inner();
        self.blocking(move |m| m.commit_disk(&guest, &vdev)).await?;
        Ok(Response::new(CommitDiskReply {}))
    }

    async fn change_medium(&self, request: Request<ChangeMediumRequest>) -> Answer<ChangeMediumReply> {
        let ChangeMediumRequest { guest, vdev, path } = request.into_inner();
        let path = (!path.is_empty()).then(|| path.into());
        self.blocking(move |m| m.change_medium(&guest, &vdev, path)).await?;
        Ok(Response::new(ChangeMediumReply {}))
    }

    async fn limit_disk(&self, request: Request<LimitDiskRequest>) -> Answer<LimitDiskReply> {
        let LimitDiskRequest { guest, vdev, iops, iops_burst, bandwidth, bandwidth_burst } =
            request.into_inner();
        let limits = crate::config::DiskLimits { iops, iops_burst, bandwidth, bandwidth_burst };
        self.blocking(move |m| m.limit_disk(&guest, &vdev, limits)).await?;
        Ok(Response::new(LimitDiskReply {}))
    }

    async fn pause_guest(&self, request: Request<PauseGuestRequest>) -> Answer<PauseGuestReply> {
        let PauseGuestRequest { guest, pause } = request.into_inner();
        let state = self.blocking(move |m| m.pause_guest(&guest, pause)).await?;
        Ok(Response::new(PauseGuestReply { state }))
    }

    async fn reset_guest(&self, request: Request<GuestRef>) -> Answer<PauseGuestReply> {
        let guest = request.into_inner().guest;
        let state = self.blocking(move |m| m.reset_guest(&guest)).await?;
        Ok(Response::new(PauseGuestReply { state }))
    }

    async fn save_guest(&self, request: Request<SaveGuestRequest>) -> Answer<SaveGuestReply> {
        let SaveGuestRequest { guest, path } = request.into_inner();
        let (bytes, took) = self.blocking(move |m| m.save_guest(&guest, &path)).await?;
        Ok(Response::new(SaveGuestReply { bytes, took_ms: took.as_millis() as u64 }))
    }

    async fn screenshot(&self, request: Request<GuestRef>) -> Answer<ScreenshotReply> {
        let guest = request.into_inner().guest;
        let png = self.blocking(move |m| m.screenshot(&guest)).await?;
        Ok(Response::new(ScreenshotReply { png }))
    }

    async fn list_usb(&self, request: Request<GuestRef>) -> Answer<ListUsbReply> {
        let guest = request.into_inner().guest;
        let devices = self.blocking(move |m| m.usb(&guest)).await?;
        let device = |(entry, state): (UsbEntry, String)| UsbDevice {
            kind: entry.kind.word().into(),
            path: entry.disk().map(|p| p.display().to_string()).unwrap_or_default(),
            read_only: entry.mode == crate::config::AccessMode::ReadOnly,
            id: entry.id,
            state,
        };
        let usb = devices.into_iter().filter(|(entry, _)| entry.kind != UsbKind::Qdisk);
        Ok(Response::new(ListUsbReply { devices: usb.map(device).collect() }))
    }

    async fn attach_usb(&self, request: Request<AttachUsbRequest>) -> Answer<AttachUsbReply> {
        let AttachUsbRequest { guest, usbdev } = request.into_inner();
        self.blocking(move |m| {
            let entry = UsbEntry::parse(&usbdev).map_err(|e| OpError::Invalid(e.0))?;
            m.attach_usb(&guest, entry)
        })
        .await?;
        Ok(Response::new(AttachUsbReply {}))
    }

    async fn detach_usb(&self, request: Request<DetachUsbRequest>) -> Answer<DetachUsbReply> {
        let DetachUsbRequest { guest, id } = request.into_inner();
        self.blocking(move |m| m.detach_usb(&guest, &id)).await?;
        Ok(Response::new(DetachUsbReply {}))
    }

    async fn resize_guest(&self, request: Request<ResizeGuestRequest>) -> Answer<ResizeGuestReply> {
        let ResizeGuestRequest { guest, memory_mib, vcpus } = request.into_inner();
        self.blocking(move |m| {
            if memory_mib > 0 {
                m.set_memory(&guest, memory_mib)?;
            }
            if vcpus > 0 { m.set_vcpus(&guest, vcpus) } else { Ok(()) }
        })
        .await?;
        Ok(Response::new(ResizeGuestReply {}))
    }

    type VncStream = Streamed<VncOutput>;

    async fn vnc(&self, request: Request<Streaming<VncInput>>) -> Answer<Self::VncStream> {
        self.relay_vnc(request.into_inner()).await.map(Response::new)
    }

    type ConsoleStream = Streamed<ConsoleOutput>;

    async fn console(&self, request: Request<Streaming<ConsoleInput>>) -> Answer<Self::ConsoleStream> {
        self.relay_console(request.into_inner()).await.map(Response::new)
    }
}

fn await_shutdown(manager: &Manager, before: &Guest, reboot: bool, timeout: Duration) -> Result<(), OpError> {
    let deadline = Instant::now() + timeout;
    loop {
        match manager.guests(Some(&before.uuid)) {
            Err(OpError::NotFound(_)) => return Ok(()),
            Err(OpError::Unavailable(_)) => {}
            Err(e) => return Err(e),
            Ok(now) => {
                if let Some(now) = now.first() {
                    let anew = now.boots > before.boots && now.state == "running";
                    if anew || (!reboot && now.state == "shutdown") {
                        return Ok(());
                    }
                }
            }
        }
        if Instant::now() > deadline {
            let what = if reboot { "rebooted" } else { "shut down" };
            return Err(OpError::Timeout(format!(
                "guest {} has not {what} within {} s; wait longer, or bh destroy it",
                before.name,
                timeout.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(25));
    }
}
