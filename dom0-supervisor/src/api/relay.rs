//! How dom0 passes a call on to a service: with a deadline, and with the service's own word as the answer.

use std::time::Duration;

use tokio_stream::StreamExt;
use tonic::{Response, Status, Streaming};

use crate::manager::one_line;

/// The first message of a client's stream, which says what it is about.
pub(super) async fn first<M>(from: &mut Streaming<M>, patience: Duration) -> Result<Option<M>, Status> {
    match tokio::time::timeout(patience, from.next()).await {
        Ok(message) => message.transpose(),
        Err(_) => Err(Status::deadline_exceeded(format!("no attach came within {} s", patience.as_secs()))),
    }
}

/// The answer of `service`, or that it gives none.
pub(super) async fn answered<T>(
    service: &str,
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, Status> {
    match tokio::time::timeout(patience, call).await {
        Ok(answer) => answer.map_err(|e| passed(service, &e)),
        Err(_) => {
            let text = format!("{service} does not answer within {} s; see bh services", patience.as_secs());
            Err(Status::unavailable(text))
        }
    }
}

/// The service's word, without what belongs to its connection. That one broke is told so that `bh` does not take it for dom0's.
pub(super) fn passed(service: &str, e: &Status) -> Status {
    if broken(e) {
        return Status::unavailable(format!("{service} is being restarted"));
    }
    Status::new(e.code(), one_line(e.message()))
}

/// A service's connection broke, as opposed to its answer.
fn broken(e: &Status) -> bool {
    ["transport", "h2 protocol", "connection", "broken pipe", "error reading a body"]
        .iter()
        .any(|b| e.message().contains(b))
}
