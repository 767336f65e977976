//! Consoles: dom0 finds the guest and relays between `bh` and console-backend. It keeps nothing: what is kept is with
//! console-backend, and `bh` attaches again where it was.

use std::time::Duration;

use proto::hvcore::Role;
use proto::toolstack::console_backend_client::ConsoleBackendClient;
use proto::toolstack::console_input::Input;
use proto::toolstack::{ConsoleAttach, ConsoleInput, ConsoleOutput};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use super::relay::first;
use super::services::channel;
use super::{Api, Streamed};
use crate::manager::OpError;

/// How long a client has for its first message, and console-backend for its answer.
const PATIENCE: Duration = Duration::from_secs(5);

impl Api {
    pub(super) async fn relay_console(
        &self,
        mut from_client: Streaming<ConsoleInput>,
    ) -> Result<Streamed<ConsoleOutput>, Status> {
        let first = first(&mut from_client, PATIENCE).await?;
        let Some(Input::Attach(attach)) = first.and_then(|m| m.input) else {
            return Err(Status::invalid_argument("the first message must be attach"));
        };
        let wanted = attach.guest.clone();
        let (guest, path) = self
            .blocking(move |m| {
                let guest = m.guests(Some(&wanted))?.into_iter().next();
                let guest = guest.filter(|g| g.domid != 0);
                let guest =
                    guest.ok_or_else(|| OpError::Failed(format!("guest {wanted} has no domain now")))?;
                let domains = m.hv.list()?;
                let console = domains.iter().find(|d| d.roles.contains(&(Role::Console as i32)));
                let path = console.map(|d| d.control_socket.clone());
                let path = path
                    .ok_or_else(|| OpError::Failed("there is no console service; see bh services".into()))?;
                Ok((guest, path))
            })
            .await?;
        if attach.instance != 0 && attach.instance != guest.instance {
            return Err(Status::not_found(format!("guest {} was started anew", guest.name)));
        }
        let attach = ConsoleAttach { domid: guest.domid, instance: guest.instance, ..attach };
        let head = tokio_stream::once(ConsoleInput { input: Some(Input::Attach(attach)) });
        // Ends with the client's stream; a client's error ends it too.
        let rest = from_client.map_while(Result::ok).filter(|m| matches!(m.input, Some(Input::Data(_))));
        let mut client = ConsoleBackendClient::new(channel(path));
        let answer = tokio::time::timeout(PATIENCE, client.attach(head.chain(rest))).await;
        let output = answer.map_err(|_| {
            let text = format!("the console service did not answer within {} s", PATIENCE.as_secs());
            Status::deadline_exceeded(text)
        })??;
        Ok(Box::pin(output.into_inner()))
    }
}
