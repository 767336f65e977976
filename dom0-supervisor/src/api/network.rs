//! What dom0 passes on to the netback of a network device: captures, and the check of rules. It keeps nothing.

use std::time::Duration;

use proto::toolstack::network_backend_client::NetworkBackendClient;
use proto::toolstack::{
    CaptureVifRequest, CapturedPackets, CheckVifRulesReply, CheckVifRulesRequest, MAX_CAPTURED,
};
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::relay::{answered, passed};
use super::services::channel;
use super::{Api, Streamed};

/// What it is called in answers.
const NETBACK: &str = "netback";

/// How long netback may take to answer, or to begin a stream.
const PATIENCE: Duration = Duration::from_secs(5);

impl Api {
    /// The netback of a device, the guest's domid and the device's number in the store.
    async fn netback(
        &self,
        guest: &str,
        id: u32,
    ) -> Result<(NetworkBackendClient<Channel>, u32, u32), Status> {
        let guest = guest.to_owned();
        let (domid, devid, path) = self.blocking(move |m| m.vif_socket(&guest, id)).await?;
        let client = NetworkBackendClient::new(channel(path)).max_decoding_message_size(MAX_CAPTURED);
        Ok((client, domid.into(), devid))
    }

    pub(super) async fn relay_capture(
        &self,
        request: CaptureVifRequest,
    ) -> Result<Streamed<CapturedPackets>, Status> {
        let CaptureVifRequest { guest, id, snap_length, .. } = request;
        let (mut client, domid, devid) = self.netback(&guest, id).await?;
        let to_netback = CaptureVifRequest { guest: String::new(), id: devid, domid, snap_length };
        let stream = answered(NETBACK, PATIENCE, client.capture(to_netback))
            .await
            .map_err(|e| at(&guest, id, e))?
            .into_inner();
        Ok(Box::pin(stream.map(|part| part.map_err(|e| passed(NETBACK, &e)))))
    }

    pub(super) async fn relay_check(
        &self,
        request: CheckVifRulesRequest,
    ) -> Result<CheckVifRulesReply, Status> {
        let (mut client, ..) = self.netback(&request.guest, request.id).await?;
        answered(NETBACK, PATIENCE, client.check_rules(request)).await.map(Response::into_inner)
    }
}

fn at(guest: &str, id: u32, e: Status) -> Status {
    Status::new(e.code(), format!("guest {guest}: vif {id}: {}", e.message()))
}
