//! gRPC beside `bulkhead.service.v1`: captures and the check of rules, both for dom0 (`NetworkBackend` of `toolstack.proto`).

use std::pin::Pin;
use std::sync::Arc;

use proto::toolstack::network_backend_server::{NetworkBackend, NetworkBackendServer};
use proto::toolstack::{CaptureVifRequest, CapturedPackets, CheckVifRulesReply, CheckVifRulesRequest};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::backend::Vifs;
use crate::capture::MAX_CAPTURES;
use crate::connection::VifId;
use crate::qubes;

/// For `domain_kit::control::serve_with`.
pub fn routes(vifs: Arc<Vifs>) -> Routes {
    Routes::new(NetworkBackendServer::new(Api { vifs }))
}

struct Api {
    vifs: Arc<Vifs>,
}

#[tonic::async_trait]
impl NetworkBackend for Api {
    type CaptureStream = Pin<Box<dyn Stream<Item = Result<CapturedPackets, Status>> + Send>>;

    async fn capture(
        &self,
        request: Request<CaptureVifRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let CaptureVifRequest { domid, id, snap_length, .. } = request.into_inner();
        let vif = u16::try_from(domid).ok().zip(u16::try_from(id).ok());
        let vif = vif.map(|(frontend, handle)| VifId { frontend, handle }).filter(|id| self.vifs.serves(*id));
        let vif = vif.ok_or_else(|| Status::not_found("the device is not connected"))?;
        let snap = if snap_length == 0 { usize::MAX } else { snap_length as usize };
        let running = self.vifs.captures.begin(vif, snap).ok_or_else(|| {
            Status::resource_exhausted(format!(
                "there are {MAX_CAPTURES} captures at this driver domain, which is the most; end one"
            ))
        })?;
        // One message waits for the connection, the rest in the bounded queue.
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut next = Ok(CapturedPackets::default());
            loop {
                let ended = next.is_err();
                let message = next.map_err(|_| Status::unavailable("the device is not served here any more"));
                if sender.send(message).await.is_err() || ended {
                    return;
                }
                next = tokio::select! {
                    next = running.next() => next,
                    () = sender.closed() => return,
                };
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn check_rules(
        &self,
        request: Request<CheckVifRulesRequest>,
    ) -> Result<Response<CheckVifRulesReply>, Status> {
        let CheckVifRulesRequest { rules, policy, .. } = request.into_inner();
        let numbered = rules.into_iter().enumerate().map(|(i, rule)| (format!("{i:04}"), rule));
        let entries = numbered.chain([("policy".to_owned(), policy)]).collect();
        qubes::parse(&entries).map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(CheckVifRulesReply {}))
    }
}
