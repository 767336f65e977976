//! A toolstack that makes the xenstore domain and some relay domains, and tells who xenstored is now.
//!
//! Arguments: xenstored's path, the relay's path, the socket that xenstored shall listen on, how many relays. For every byte that
//! comes over descriptor 4 it answers with a line: xenstored's host process id and incarnation.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context, Result};
use domain_kit::Domain;
use proto::hvcore::hv_core_client::HvCoreClient;
use proto::hvcore::{CreateDomainRequest, DomainRef, Limits, Resource, RestartPolicy, Role, resource::Kind};
use store_soak::world::{FIRST_GUEST, XENSTORED};
use tonic::transport::Channel;

fn main() -> Result<()> {
    let domain = Domain::join("store-soak-dom0")?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [xenstored, relay, socket, guests] = &args[..] else {
        anyhow::bail!("usage: store-soak-dom0 XENSTORED RELAY SOCKET GUESTS")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut hv_core = runtime.block_on(connect())?;
    let mut make = |request| runtime.block_on(hv_core.create_domain(request)).map(drop);
    make(xenstored_domain(xenstored, socket)).context("making xenstored")?;
    for guest in 0..guests.parse::<u16>()? {
        make(CreateDomainRequest {
            name: format!("relay-{guest}"),
            domid: (FIRST_GUEST + guest).into(),
            roles: vec![Role::ProcessGuest.into()],
            program: relay.clone(),
            ..CreateDomainRequest::default()
        })
        .with_context(|| format!("making relay {guest}"))?;
    }
    domain.hv.served()?;
    let listener = domain_kit::os::take_inherited(hv_abi::CONTROL_LISTENER_FD).context("descriptor 4")?;
    let mut tell = |mut stream: UnixStream| -> Result<()> {
        while stream.read(&mut [0])? == 1 {
            let who = DomainRef { domid: XENSTORED.into(), instance: 0 };
            let now = runtime.block_on(hv_core.get_domain(who))?.into_inner();
            stream.write_all(format!("{} {}\n", now.host_pid, now.generation).as_bytes())?;
        }
        Ok(())
    };
    for stream in UnixListener::from(listener).incoming() {
        // A driver that went away is no reason to end.
        let _ = stream.map_err(Into::into).and_then(&mut tell);
    }
    Ok(())
}

fn xenstored_domain(program: &str, socket: &str) -> CreateDomainRequest {
    CreateDomainRequest {
        name: "xenstored".into(),
        domid: XENSTORED.into(),
        roles: vec![Role::Xenstore.into()],
        program: program.into(),
        env: vec!["RUST_LOG=warn".into()],
        // At once, as often as it takes: being killed is what it is here for.
        restart: Some(RestartPolicy { restart: true, ..RestartPolicy::default() }),
        resources: vec![Resource {
            name: "socket".into(),
            kind: Kind::Listener.into(),
            path: socket.into(),
            mode: 0o600,
        }],
        limits: Some(Limits { fd_store: 4096, ..Limits::default() }),
        ..CreateDomainRequest::default()
    }
}

/// Inside the runtime: the channel's task is started here.
async fn connect() -> Result<HvCoreClient<Channel>> {
    let control = domain_kit::os::control_stream().context("descriptor 5")?;
    Ok(HvCoreClient::new(proto::unix::over(tokio::net::UnixStream::from_std(control)?)))
}
