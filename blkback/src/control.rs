//! gRPC about the disk: `bulkhead.blkback.v1`.

use std::io;
use std::sync::Arc;

use domain_kit::xenbus::{BackendHandle, DeviceKey};
use proto::blkback::disk_server::{Disk as Api, DiskServer};
use proto::blkback::{
    DescribeReply, DescribeRequest, GrowRequest, SetLimitsReply, SetLimitsRequest, SettleReply, SettleRequest,
};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::disk::attachment::Disk;
use crate::driver::{DiskState, Registry};
use crate::limit::Limits;

/// For `domain_kit::control::serve_with`.
pub fn routes(disk: Arc<DiskState>, registry: Arc<Registry>, handle: BackendHandle) -> Routes {
    Routes::new(DiskServer::new(DiskApi { disk, registry, handle }))
}

struct DiskApi {
    disk: Arc<DiskState>,
    registry: Arc<Registry>,
    handle: BackendHandle,
}

impl DiskApi {
    fn disk(&self) -> Result<Arc<dyn Disk>, Status> {
        self.disk.get().map_err(Status::failed_precondition)
    }

    /// Runs what may block on the medium.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Disk) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        let disk = self.disk()?;
        let done = tokio::task::spawn_blocking(move || work(&*disk)).await;
        done.map_err(|e| Status::internal(e.to_string()))?.map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => {
                Status::invalid_argument("the new length must be whole sectors and not less than the old")
            }
            io::ErrorKind::Unsupported => {
                Status::failed_precondition("its length is not blkback's to change; change it where it is")
            }
            _ => Status::failed_precondition(e.to_string()),
        })
    }
}

fn describe(disk: &dyn Disk) -> DescribeReply {
    let geometry = disk.geometry();
    DescribeReply {
        bytes: geometry.sectors * 512,
        read_only: geometry.read_only,
        fence: disk.fence().how.into(),
        commit: disk.commit().map(|commit| proto::blkback::Commit {
            done: commit.done,
            total: commit.total,
            finished: commit.finished,
            failed: commit.failed.unwrap_or_default(),
        }),
    }
}

#[tonic::async_trait]
impl Api for DiskApi {
    async fn describe(&self, _request: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        Ok(Response::new(describe(&*self.disk()?)))
    }

    async fn set_limits(
        &self,
        request: Request<SetLimitsRequest>,
    ) -> Result<Response<SetLimitsReply>, Status> {
        let SetLimitsRequest { frontend, device, iops, iops_burst, bytes, bytes_burst } =
            request.into_inner();
        let not_found = || Status::not_found(format!("vbd {device} of domain {frontend} is not served"));
        let key = DeviceKey { frontend: frontend.try_into().map_err(|_| not_found())?, id: device };
        if !self.registry.ask_limits(key, Limits { iops, iops_burst, bytes, bytes_burst }) {
            return Err(not_found());
        }
        self.handle.wake();
        Ok(Response::new(SetLimitsReply {}))
    }

    async fn grow(&self, request: Request<GrowRequest>) -> Result<Response<DescribeReply>, Status> {
        let bytes = request.into_inner().bytes;
        let handle = self.handle.clone();
        let reply = self.on_disk(move |disk| {
            if bytes == 0 || !bytes.is_multiple_of(512) || disk.geometry().read_only {
                return Err(if bytes.is_multiple_of(512) && bytes > 0 {
                    io::ErrorKind::Unsupported.into()
                } else {
                    io::ErrorKind::InvalidInput.into()
                });
            }
            disk.grow(bytes)?;
            if disk.look_again()? {
                handle.wake();
            }
            Ok(describe(disk))
        });
        Ok(Response::new(reply.await?))
    }

    async fn settle(&self, _request: Request<SettleRequest>) -> Result<Response<SettleReply>, Status> {
        self.on_disk(|disk| disk.settle()).await?;
        Ok(Response::new(SettleReply {}))
    }
}
