//! Services: restart, and their own counters.

use std::time::{Duration, Instant};

use proto::service::StatisticsRequest;
use proto::service::service_client::ServiceClient;
use proto::toolstack::{Counter, ServiceInfo};
use tonic::transport::{Channel, Endpoint};

use super::Api;
use crate::manager::{Manager, OpError};
use crate::specs::ServiceKind;

/// How long one service may take to tell its counters.
const ASK: Duration = Duration::from_secs(1);
/// Counters shown of one service.
const MOST: usize = 512;

/// The connection to a service's own socket. Connecting happens at the first call.
pub(crate) fn channel(path: String) -> Channel {
    proto::unix::at_with(path, Endpoint::from_static("http://service").connect_timeout(ASK))
}

impl Api {
    /// Asks every running service, all at once, each with its own deadline.
    pub(super) async fn add_statistics(&self, services: &mut [ServiceInfo]) {
        let Ok(domains) = self.blocking(|m| Ok(m.hv.list()?)).await else { return };
        let mut asked = Vec::new();
        for (index, service) in services.iter().enumerate() {
            let domain = domains.iter().find(|d| d.instance == service.instance && d.domid != 0);
            let Some(domain) = domain.filter(|d| d.host_pid != 0) else { continue };
            let path = domain.control_socket.clone();
            asked.push(tokio::spawn(async move {
                let mut client = ServiceClient::new(channel(path));
                let reply = tokio::time::timeout(ASK, client.statistics(StatisticsRequest {})).await;
                (index, reply)
            }));
        }
        for task in asked {
            let Ok((index, reply)) = task.await else { continue };
            let service = &mut services[index];
            match reply {
                Ok(Ok(reply)) => {
                    let counters = reply.into_inner().counters.into_iter().take(MOST);
                    service.counters = counters
                        .map(|c| Counter { name: c.name, value: c.value, subject: c.subject, unit: c.unit })
                        .collect();
                }
                Ok(Err(e)) if service.note.is_empty() => {
                    service.note = format!("gives no statistics: {}", crate::manager::one_line(e.message()));
                }
                Err(_) if service.note.is_empty() => {
                    service.note = format!("gives no statistics within {} ms", ASK.as_millis());
                }
                _ => {}
            }
        }
    }
}

/// Within this time xenstored ends by itself.
const ENDS: Duration = Duration::from_secs(3);

/// How long netback may take to put down the packets in its hands.
const REST: Duration = Duration::from_millis(500);

/// Asks a netback to finish the packets in its hands, so that none is lost. One that does not answer is killed all the same.
fn rest(manager: &Manager, service: &ServiceInfo) {
    let rested = manager.hv.list().and_then(|all| {
        let domain = all.into_iter().find(|d| d.instance == service.instance);
        domain.map_or(Ok(()), |d| manager.hv.drain(&d.control_socket, REST))
    });
    if let Err(error) = rested {
        tracing::warn!(%error, service = service.name, "does not rest; a packet in its hands can be lost");
    }
}

/// Ends a service's process (SIGKILL: every service is made for it) and waits for the next incarnation; starts that of a failed
/// one. xenstored is asked to end first: after a kill hv-core runs the same program again, which may have been replaced on disk.
pub(super) fn restart(manager: &Manager, name: &str, timeout: Duration) -> Result<ServiceInfo, OpError> {
    let find = || -> Result<ServiceInfo, OpError> {
        let all = manager.services()?;
        let service = all.into_iter().find(|s| s.name == name || (s.kind == "dom0" && name == "dom0"));
        service.ok_or_else(|| OpError::NotFound(format!("no service {name:?}; see bh services")))
    };
    let before = find()?;
    if before.kind == "dom0" {
        // The answer has to leave first; hv-core starts the next one.
        std::thread::Builder::new()
            .name("restart".into())
            .spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                tracing::info!("restarting on request");
                std::process::exit(0);
            })
            .map_err(|e| OpError::Unavailable(e.to_string()))?;
        return Ok(before);
    }
    let domid = u16::try_from(before.domid).unwrap_or(0);
    let mut asked = (before.kind == ServiceKind::Xenstored.word()).then(|| Instant::now() + ENDS);
    match before.state.as_str() {
        // Refused until now; whatever was wrong may be right.
        "missing" if before.guest.is_empty() => {
            manager.make_service_now(name).map_err(|e| e.at(&format!("service {name}")))?;
        }
        "missing" => {
            return Err(OpError::Failed(format!(
                "service {name} is not there: it is that of guest {}; see bh list",
                before.guest
            )));
        }
        "failed" | "shutdown" => {
            manager.hv.start(domid, before.instance)?;
        }
        "dying" => return Err(OpError::Failed(format!("service {name} is being taken down"))),
        _ => {
            if before.kind == ServiceKind::Netback.word() {
                rest(manager, &before);
            }
            manager.hv.kill(domid, before.instance, if asked.is_some() { 15 } else { 9 })?;
        }
    }
    let deadline = Instant::now() + timeout;
    loop {
        let now = find()?;
        if now.generation == before.generation && asked.take_if(|until| Instant::now() > *until).is_some() {
            manager.hv.kill(domid, before.instance, 9)?;
        }
        if now.state == "running" && now.generation > before.generation {
            return Ok(now);
        }
        if now.state == "failed" && before.state != "failed" {
            return Err(OpError::Failed(format!("service {name} did not come back: {}", now.note)));
        }
        if Instant::now() > deadline {
            return Err(OpError::Timeout(format!(
                "service {name} is {} after {} s; see bh services",
                now.state,
                timeout.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
