//! A toolstack that makes the two domains of the event-channel and grant-copy benches, and nothing else.
//!
//! Started by `hv-core --dom0`; its one argument is the path of `bench-guest`. On descriptor 4 it tells the driver the two
//! processes' ids.

use anyhow::{Context, Result};
use bench::cases::pair::{GRANTER, TAKER};
use domain_kit::Domain;
use proto::hvcore::hv_core_client::HvCoreClient;
use proto::hvcore::{CreateDomainRequest, RestartPolicy, Role};

fn main() -> Result<()> {
    let domain = Domain::join("bench-dom0")?;
    let program = std::env::args().nth(1).context("usage: bench-dom0 PATH-OF-BENCH-GUEST")?;
    let control = domain_kit::os::control_stream().context("descriptor 5")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let control = tokio::net::UnixStream::from_std(control)?;
        let mut hv_core = HvCoreClient::new(proto::unix::over(control));
        let mut pids = serde_json::Map::new();
        for (domid, name, role) in
            [(GRANTER, "bench-granter", Role::ProcessGuest), (TAKER, "bench-taker", Role::Backend)]
        {
            let request = CreateDomainRequest {
                name: name.into(),
                domid: domid.into(),
                roles: vec![role.into()],
                program: program.clone(),
                restart: Some(RestartPolicy::default()),
                ..CreateDomainRequest::default()
            };
            let made = hv_core.create_domain(request).await.with_context(|| format!("making {name}"))?;
            pids.insert(domid.to_string(), made.into_inner().host_pid.into());
        }
        domain.hv.served()?;
        let listener = domain_kit::os::take_inherited(hv_abi::CONTROL_LISTENER_FD).context("descriptor 4")?;
        let listener = std::os::unix::net::UnixListener::from(listener);
        let pids = serde_json::Value::Object(pids);
        for stream in listener.incoming() {
            // A driver that went away is no reason to end.
            drop(stream.and_then(|s| bench::wire::serve(&s, |_| Ok(pids.clone()))));
        }
        Ok(())
    })
}
