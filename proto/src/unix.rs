//! gRPC channels over Unix sockets: the only ones that there are.

use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

/// A channel that connects to the socket at `path` with its first call, and again after a loss. Must be called inside the runtime.
pub fn at(path: impl Into<PathBuf>) -> Channel {
    at_with(path, Endpoint::from_static("http://unix"))
}

/// The same, with the deadlines of `endpoint`, whose address counts for nothing.
pub fn at_with(path: impl Into<PathBuf>, endpoint: Endpoint) -> Channel {
    let path = path.into();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    }))
}

/// A channel over the one stream given; lost, it stays lost. Must be called inside the runtime.
pub fn over(stream: UnixStream) -> Channel {
    let once = Mutex::new(Some(stream));
    // The name is never resolved: the connector hands out the one stream that there is.
    Endpoint::from_static("http://unix").connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let stream = once.lock().ok().and_then(|mut slot| slot.take());
        async move { stream.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    }))
}
