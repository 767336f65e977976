//! The driver's side and the domain's side of `bench-guest`'s commands: one JSON object a line each way.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Longest command line that a guest reads, bytes.
pub const MAX_LINE: u64 = 64 * 1024;

/// A connection to a `bench-guest`.
#[derive(Debug)]
pub struct Remote {
    stream: BufReader<UnixStream>,
}

impl Remote {
    /// Connects, waiting up to `timeout` for the guest to be there.
    ///
    /// # Errors
    /// No answer in time.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Remote> {
        let deadline = Instant::now() + timeout;
        loop {
            match Self::try_connect(path) {
                Ok(remote) => return Ok(remote),
                Err(e) if Instant::now() >= deadline => {
                    return Err(e).with_context(|| format!("bench-guest at {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn try_connect(path: &Path) -> Result<Remote> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut remote = Remote { stream: BufReader::new(stream) };
        remote.call(&serde_json::json!({"cmd": "info"}))?;
        Ok(remote)
    }

    /// Runs one command and gives its answer.
    ///
    /// # Errors
    /// The connection's, or what the guest says went wrong.
    pub fn call(&mut self, command: &Value) -> Result<Value> {
        let mut text = command.to_string();
        text.push('\n');
        self.stream.get_mut().write_all(text.as_bytes()).context("sending a command to bench-guest")?;
        let mut line = String::new();
        self.stream.read_line(&mut line).with_context(|| format!("bench-guest's answer to {command}"))?;
        let answer: Value =
            serde_json::from_str(&line).with_context(|| format!("bench-guest's answer to {command}"))?;
        if let Some(error) = answer["error"].as_str() {
            bail!("bench-guest, {command}: {error}");
        }
        Ok(answer)
    }

    /// Runs one command and gives one number of its answer.
    ///
    /// # Errors
    /// As [`Remote::call`], or there is no such number.
    pub fn number(&mut self, command: &Value, key: &str) -> Result<f64> {
        let answer = self.call(command)?;
        answer[key].as_f64().with_context(|| format!("{command}: no {key} in {answer}"))
    }
}

/// Serves one connection until its end: `handle` gets each command and gives its answer.
///
/// # Errors
/// The connection's.
pub fn serve(stream: &UnixStream, mut handle: impl FnMut(&Value) -> Result<Value>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = serde_json::from_str(&line)
            .map_err(anyhow::Error::from)
            .and_then(|command| handle(&command))
            .unwrap_or_else(|e| serde_json::json!({"error": format!("{e:#}")}));
        writer.write_all(format!("{answer}\n").as_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_and_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = serve(&stream.unwrap(), |c| match c["cmd"].as_str() {
                    Some("info") => Ok(serde_json::json!({"n": 5})),
                    _ => bail!("what?"),
                });
            }
        });
        let mut remote = Remote::connect(&path, Duration::from_secs(5)).unwrap();
        assert_eq!(remote.number(&serde_json::json!({"cmd": "info"}), "n").unwrap(), 5.0);
        let error = remote.call(&serde_json::json!({"cmd": "x"})).unwrap_err();
        assert!(format!("{error:#}").contains("what?"));
    }
}
