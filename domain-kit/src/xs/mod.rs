//! The xenstore client that every domain uses.
//!
//! [`XsClient`] blocks its callers, each with a deadline, and may be used from several threads at once.
//! Watch events arrive in [`WatchSet`]s, whose fd an epoll loop can wait on. A lost or misbehaving server
//! costs the calls under way (they fail with [`XsError::Disconnected`]); the client then connects again
//! and sets all watches again, which fires each of them once, so a consumer that looks again at every
//! event misses nothing.
//!
//! A process domain that was restarted makes a new client over its old ring page: the ring is reset
//! first (docs/misc/xenstore-ring.txt, "ring reconnection"), and xenstored forgets the watches and
//! transactions of the former incarnation.
//!
//! xenstored's own restart is not visible here beyond a pause. The server is not trusted: its indices,
//! lengths and types are checked, and nothing it sends makes the client panic or grow without bound.
//!
//! ```no_run
//! use domain_kit::xs::{XsClient, XsOps};
//! use std::time::Duration;
//! # fn main() -> Result<(), domain_kit::xs::XsError> {
//! let xs = XsClient::connect_socket("/run/xenstored/socket", Duration::from_secs(5))?;
//! xs.write("/tool/example", "1")?;
//! let watches = xs.watch_set()?;
//! watches.watch("/tool/example", "token")?;
//! while let Some(event) = watches.next_timeout(Duration::from_secs(1)) {
//!     println!("{} changed", event.path);
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod error;
mod ops;
mod ring;
mod transport;
mod watch;
mod wire;

pub use client::{Tx, XsClient};
pub use error::{XsErrno, XsError};
pub use ops::XsOps;
pub use ring::{RingTransport, SharedPage};
pub use transport::{SocketTransport, Transport};
pub use watch::{WatchEvent, WatchSet};
pub use wire::{Op, PAYLOAD_MAX};
