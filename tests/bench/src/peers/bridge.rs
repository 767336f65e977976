//! The usual way of a guest's packets on Linux: two veth pairs that a bridge joins, the kernel's TCP on both ends. Beside our own load
//! also iperf3's, where it is installed.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::outside::Outside;

use super::veth::ip;

/// The server's address; the client has the next one.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 3, 1);
const CLIENT: &str = "10.78.3.2/24";

/// Two namespaces and what joins them.
#[derive(Debug)]
pub struct Bridge {
    server: Outside,
    client: Outside,
    // The bridge is in it.
    _middle: Outside,
    iperf: Option<Child>,
}

impl Bridge {
    /// Makes it.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn new() -> Result<Bridge> {
        let (middle, server, client) = (Outside::new()?, Outside::new()?, Outside::new()?);
        let ends = [server.run(nix::unistd::gettid)?, client.run(nix::unistd::gettid)?];
        middle.run(move || -> Result<()> {
            ip(&["link", "add", "bench-br", "type", "bridge", "forward_delay", "0"])?;
            ip(&["link", "set", "bench-br", "up"])?;
            for (port, end, there) in [("bench-p0", "bench-e0", ends[0]), ("bench-p1", "bench-e1", ends[1])] {
                ip(&["link", "add", port, "type", "veth", "peer", "name", end])?;
                ip(&["link", "set", end, "netns", &there.to_string()])?;
                ip(&["link", "set", port, "master", "bench-br"])?;
                ip(&["link", "set", port, "up"])?;
            }
            Ok(())
        })??;
        for (end, name, address) in
            [(&server, "bench-e0", format!("{SERVER}/24")), (&client, "bench-e1", CLIENT.to_owned())]
        {
            end.run(move || -> Result<()> {
                ip(&["addr", "add", &address, "dev", name])?;
                ip(&["link", "set", name, "up"])
            })??;
        }
        let spawn = || {
            let mut command = Command::new("iperf3");
            command.args(["-s", "-B", &SERVER.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
            // Not installed: one column less.
            command.spawn().ok()
        };
        let iperf = server.run(spawn)?;
        Ok(Bridge { server, client, _middle: middle, iperf })
    }

    /// Starts a sink at the server's end; its port.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn sink(&self) -> Result<u16> {
        self.server.run(|| super::sink::start(SERVER))?
    }

    /// Runs `job` at the client's end.
    ///
    /// # Errors
    /// `job`'s.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.client.run(job)?
    }

    /// Whether iperf3 is there.
    pub fn has_iperf(&self) -> bool {
        self.iperf.is_some()
    }

    /// One measurement of iperf3's from client to server, MiB a second that arrived. It knows whole seconds only.
    ///
    /// # Errors
    /// It cannot be started, or says what is wrong.
    pub fn iperf(&self, time: Duration) -> Result<f64> {
        let seconds = time.as_secs().max(1).to_string();
        self.run(move || {
            let out = Command::new("iperf3")
                .args(["-c", &SERVER.to_string(), "-t", &seconds, "-J"])
                .stdin(Stdio::null())
                .output()
                .context("running iperf3")?;
            let json: serde_json::Value = serde_json::from_slice(&out.stdout).context("iperf3's JSON")?;
            ensure!(out.status.success(), "iperf3: {}", json["error"]);
            let bits =
                json["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 tells no rate")?;
            Ok(bits / 8.0 / f64::from(1 << 20))
        })
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if let Some(mut child) = self.iperf.take() {
            // It may have ended by itself.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Direction;
    use crate::peers::sink;

    #[test]
    fn it_carries() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("not root: no namespaces");
        }
        let bridge = Bridge::new().unwrap();
        let port = bridge.sink().unwrap();
        let rate = bridge
            .run(move || sink::stream(SERVER, port, Direction::Out, Duration::from_millis(50)))
            .unwrap();
        assert!(rate > 1.0);
        assert!(!bridge.has_iperf() || bridge.iperf(Duration::from_secs(1)).unwrap() > 1.0);
    }
}
