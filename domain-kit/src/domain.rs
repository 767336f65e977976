//! Joining: what every domain's process does first.

use std::fmt;
use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use hv_abi::*;
use nix::errno::Errno;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, time::SystemTime};
use tracing_subscriber::registry::LookupSpan;

use crate::evtchn::Port;
use crate::grants::{GrantError, Region};
use crate::hypercall::Hypercall;

/// Tag of the region that holds the domain's own xenstore ring.
pub const STORE_RING_TAG: u64 = u64::from_le_bytes(*b"xs-ring\0");
/// Tag of the region that holds the domain's own console ring.
pub const CONSOLE_RING_TAG: u64 = u64::from_le_bytes(*b"console\0");

/// This process as a domain.
#[derive(Debug)]
pub struct Domain {
    /// The domain's name for logs and [`crate::control`].
    pub name: String,
    /// Who we are and how our predecessor died.
    pub hello: HelloRep,
    /// The main hypercall channel.
    pub hv: Hypercall,
    /// When this incarnation joined.
    pub started: Instant,
}

/// Why a process could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Descriptor 3 is not a hypercall socket.
    #[error(
        "{name} is a process domain and must be started by hv-core (descriptor 3 is not a hypercall socket: {source})"
    )]
    NotADomain {
        /// The program.
        name: String,
        /// What was wrong.
        source: std::io::Error,
    },
    /// hv-core refused Hello.
    #[error("{name}: hv-core refused to say hello: {source}")]
    Hello {
        /// The program.
        name: String,
        /// Why.
        source: crate::HvError,
    },
}

impl Domain {
    /// Joins by descriptor 3; sets up logging (with the domid in every line) and the panic rule: a panic in any thread ends
    /// the process with [`PANIC_EXIT_STATUS`], which hv-core counts as the process's own fault.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn join(name: &str) -> Result<Arc<Domain>, JoinError> {
        let socket = crate::os::take_inherited(HYPERCALL_FD)
            .map_err(|source| JoinError::NotADomain { name: name.into(), source })?;
        Self::join_on(name, socket)
    }

    /// The same over a given hypercall socket.
    ///
    /// # Errors
    /// [`JoinError::Hello`].
    pub fn join_on(name: &str, socket: OwnedFd) -> Result<Arc<Domain>, JoinError> {
        panic_ends_the_process();
        let hv = Hypercall::new(socket);
        let hello = hv.hello().map_err(|source| JoinError::Hello { name: name.into(), source })?;
        init_logging(&format!("d{}.{} {name}", hello.domid, hello.generation));
        if hello.prev_exit.how != EXIT_NONE {
            tracing::info!(
                domid = hello.domid,
                generation = hello.generation,
                how = hello.prev_exit.how,
                code = hello.prev_exit.code,
                own_fault = hello.prev_exit.own_fault,
                "back after the predecessor's end"
            );
        }
        Ok(Arc::new(Domain { name: name.into(), hello, hv, started: Instant::now() }))
    }

    /// Own domid.
    pub fn domid(&self) -> u16 {
        self.hello.domid
    }

    /// True if an earlier incarnation of this domain ran.
    pub fn is_restart(&self) -> bool {
        self.hello.generation > 1
    }

    /// True if the predecessor ended by its own fault (panic, SIGSEGV, abort), not from outside.
    pub fn predecessor_crashed(&self) -> bool {
        self.hello.prev_exit.own_fault != 0
    }

    /// The domain's own xenstore ring: page 0 of a region granted to the xenstore domain, and its port. Made and announced at
    /// the first call, found again after a restart. `None` if this system has no xenstore domain (yet).
    ///
    /// # Errors
    /// Those of regions and ports.
    pub fn store_ring(&self) -> Result<Option<(Region, Port)>, GrantError> {
        // Asked afresh: dom0 starts before the xenstore domain exists.
        self.ring(
            self.hv.hello()?.xenstore_domid,
            STORE_RING_TAG,
            |i| i.store_port,
            Hypercall::set_store_ring,
        )
    }

    /// The domain's own console ring, in the same way.
    ///
    /// # Errors
    /// Those of regions and ports.
    pub fn console_ring(&self) -> Result<Option<(Region, Port)>, GrantError> {
        self.ring(
            self.hv.hello()?.console_domid,
            CONSOLE_RING_TAG,
            |i| i.console_port,
            Hypercall::set_console_ring,
        )
    }

    fn ring(
        &self,
        peer: u16,
        tag: u64,
        port_of: fn(&DomInfo) -> u32,
        announce: fn(&Hypercall, u32, u32) -> crate::hypercall::HvResult<()>,
    ) -> Result<Option<(Region, Port)>, GrantError> {
        if peer == DOMID_INVALID {
            return Ok(None);
        }
        let region = match Region::find(&self.hv, tag)? {
            Some(region) => region,
            None => Region::create(&self.hv, peer, 1, tag)?,
        };
        // A domain may always see its own rings.
        let known = port_of(&self.hv.dom_info(DOMID_SELF)?);
        let fetched = if known == 0 { Err(Errno::ENOENT) } else { Ok(self.hv.port_fetch(known)?.1) };
        let port = match fetched {
            Ok(port) => port,
            Err(_) => {
                let port = self.hv.port_alloc_unbound(peer)?;
                announce(&self.hv, region.gref(0), port.port)?;
                port
            }
        };
        Ok(Some((region, port)))
    }
}

fn panic_ends_the_process() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::exit(PANIC_EXIT_STATUS);
    }));
}

/// Logs to stderr, every line beginning with `prefix`; `RUST_LOG` filters (default `info`). Does nothing if logging is set up
/// already.
pub fn init_logging(prefix: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let format = Prefixed { prefix: prefix.into(), inner: Format::default().compact().with_target(false) };
    let _already_set = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .event_format(format)
        .try_init();
}

struct Prefixed {
    prefix: String,
    inner: Format<tracing_subscriber::fmt::format::Compact, SystemTime>,
}

impl<S, N> FormatEvent<S, N> for Prefixed
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        write!(writer, "{} ", self.prefix)?;
        self.inner.format_event(ctx, writer, event)
    }
}
