//! VNC: dom0 finds the guest's qemu-bridge and relays between `bh` and it. It keeps nothing.

use std::time::Duration;

use proto::qemu::VncBytes;
use proto::qemu::qemu_client::QemuClient;
use proto::toolstack::vnc_input::Input;
use proto::toolstack::{VncInput, VncOutput};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use super::relay::{answered, first, passed};
use super::services::channel;
use super::{Api, Streamed};

/// How long a client has for its first message, and qemu-bridge for its answer.
const PATIENCE: Duration = Duration::from_secs(15);

impl Api {
    pub(super) async fn relay_vnc(
        &self,
        mut from_client: Streaming<VncInput>,
    ) -> Result<Streamed<VncOutput>, Status> {
        let first = first(&mut from_client, PATIENCE).await?;
        let Some(Input::Attach(attach)) = first.and_then(|m| m.input) else {
            return Err(Status::invalid_argument("the first message must be attach"));
        };
        let path = self.blocking(move |m| m.bridge(&attach.guest).map(|(_, d)| d.control_socket)).await?;
        // Ends with the client's stream; a client's error ends it too.
        let keys = from_client.map_while(Result::ok).filter_map(|m| match m.input {
            Some(Input::Data(data)) => Some(VncBytes { data }),
            _ => None,
        });
        let mut client = QemuClient::new(channel(path));
        let answer = answered("qemu-bridge", PATIENCE, client.vnc(keys)).await?;
        let pieces = answer.into_inner().map(|piece| match piece {
            Ok(piece) => Ok(VncOutput { data: piece.data }),
            Err(e) => Err(passed("qemu-bridge", &e)),
        });
        Ok(Box::pin(pieces))
    }
}
