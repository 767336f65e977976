//! QMP, QEMU's machine protocol: JSON, one message a line, over a stream socket.
//!
//! A small client of our own: the crates for it bring generated types of every command of some QEMU version, and neither deadlines nor bounds;
//! a dozen commands are used here. Whatever QEMU sends is an allegation: lines and events are bounded, and what is not QMP ends the
//! conversation with [`QmpError::Garbage`].

use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Map, Value, json};

/// Longest message, bytes.
const MAX_LINE: usize = 1 << 20;
/// Events that are kept for whoever takes them.
const MAX_EVENTS: usize = 256;
/// What a command may take if nothing else is said.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU says no.
    #[error("QEMU refuses {command}: {text}")]
    Refused {
        /// Which command.
        command: String,
        /// Why, in one line.
        text: String,
    },
    /// QEMU does not answer.
    #[error("QEMU does not answer {0}")]
    Silent(String),
    /// QEMU is gone.
    #[error("QEMU's monitor is closed")]
    Closed,
    /// QEMU says what is not QMP.
    #[error("QEMU's monitor answers garbage: {0}")]
    Garbage(&'static str),
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// As in QEMU's documentation: "SHUTDOWN".
    pub name: String,
    /// Its data.
    pub data: Value,
}

type Answer = Result<Value, QmpError>;

#[derive(Default)]
struct Waiting {
    next: u64,
    calls: BTreeMap<u64, SyncSender<Answer>>,
    /// Why there will be no more answers.
    over: Option<QmpError>,
}

struct Inner {
    stream: UnixStream,
    /// One message after the other.
    sending: Mutex<()>,
    waiting: Mutex<Waiting>,
}

/// A conversation, for several threads.
#[derive(Clone)]
pub struct Qmp(Arc<Inner>);

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Qmp")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One line of text, not too long, without control characters.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

impl Qmp {
    /// Waits for the greeting and leaves the negotiation behind. Events come out of the receiver, whose end is that of the
    /// conversation.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn open(stream: UnixStream, patience: Duration) -> Result<(Qmp, Receiver<Event>), QmpError> {
        let reader = stream.try_clone().map_err(|_| QmpError::Closed)?;
        let inner = Inner { stream, sending: Mutex::default(), waiting: Mutex::default() };
        let this = Qmp(Arc::new(inner));
        let (events, taken) = sync_channel(MAX_EVENTS);
        let (greeting, greeted) = sync_channel(1);
        let theirs = this.0.clone();
        let spawned = std::thread::Builder::new().name("qmp".into()).stack_size(256 << 10).spawn(move || {
            let why = read_all(reader, &theirs, &events, &greeting);
            let mut waiting = lock(&theirs.waiting);
            waiting.over = Some(why.clone());
            for call in std::mem::take(&mut waiting.calls).into_values() {
                let _given_up = call.send(Err(why.clone()));
            }
        });
        spawned.map_err(|_| QmpError::Closed)?;
        match greeted.recv_timeout(patience) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => {
                this.close();
                return Err(QmpError::Silent("its greeting".into()));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(lock(&this.0.waiting).over.clone().unwrap_or(QmpError::Closed));
            }
        }
        this.call("qmp_capabilities", json!({}))?;
        Ok((this, taken))
    }

    /// Ends it.
    pub fn close(&self) {
        let _closed_already = self.0.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Carries out a command with [`PATIENCE`].
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn call(&self, command: &str, arguments: Value) -> Answer {
        self.call_with(command, arguments, None, PATIENCE)
    }

    /// Gives QEMU a descriptor under a name, for the next command that takes it.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn give_fd(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.call_with("getfd", json!({ "fdname": name }), Some(fd), PATIENCE).map(drop)
    }

    /// The same with a deadline, and perhaps a descriptor beside it.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn call_with(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> Answer {
        let (answer, answered) = sync_channel(1);
        let id = {
            let mut waiting = lock(&self.0.waiting);
            if let Some(why) = &waiting.over {
                return Err(why.clone());
            }
            waiting.next += 1;
            let id = waiting.next;
            waiting.calls.insert(id, answer);
            id
        };
        let mut message = Map::new();
        message.insert("execute".into(), command.into());
        if arguments.as_object().is_some_and(|a| !a.is_empty()) {
            message.insert("arguments".into(), arguments);
        }
        message.insert("id".into(), id.into());
        let mut line = Value::Object(message).to_string();
        line.push('\n');
        let sent = {
            let _one_at_a_time = lock(&self.0.sending);
            send(&self.0.stream, line.as_bytes(), fd)
        };
        let result = match sent {
            Ok(()) => match answered.recv_timeout(patience) {
                Ok(answer) => answer,
                Err(RecvTimeoutError::Timeout) => Err(QmpError::Silent(command.into())),
                Err(RecvTimeoutError::Disconnected) => Err(QmpError::Closed),
            },
            // A monitor that takes nothing for so long is as good as silent.
            Err(nix::errno::Errno::EAGAIN) => Err(QmpError::Silent(command.into())),
            Err(_) => Err(QmpError::Closed),
        };
        lock(&self.0.waiting).calls.remove(&id);
        match result {
            Err(QmpError::Refused { text, .. }) => Err(QmpError::Refused { command: command.into(), text }),
            other => other,
        }
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), nix::errno::Errno> {
    let raw: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let mut rest = bytes;
    while !rest.is_empty() {
        let rights = [ControlMessage::ScmRights(&raw)];
        // Beside the first byte.
        let control: &[ControlMessage<'_>] =
            if raw.is_empty() || rest.len() < bytes.len() { &[] } else { &rights };
        match sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(rest)], control, MsgFlags::MSG_NOSIGNAL, None)
        {
            Ok(n) => rest = &rest[n..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Until the end; gives its reason.
fn read_all(
    mut stream: UnixStream,
    inner: &Inner,
    events: &SyncSender<Event>,
    greeting: &SyncSender<()>,
) -> QmpError {
    let mut buffer = Vec::new();
    let mut chunk = vec![0; 16 << 10];
    loop {
        let n = match stream.read(&mut chunk) {
            Ok(0) => return QmpError::Closed,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return QmpError::Closed,
        };
        buffer.extend_from_slice(&chunk[..n]);
        let mut start = 0;
        while let Some(end) = buffer[start..].iter().position(|b| *b == b'\n') {
            let line = &buffer[start..start + end];
            start += end + 1;
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            if let Err(why) = message(line, inner, events, greeting) {
                let _closed_already = stream.shutdown(std::net::Shutdown::Both);
                return why;
            }
        }
        buffer.drain(..start);
        if buffer.len() > MAX_LINE {
            let _closed_already = stream.shutdown(std::net::Shutdown::Both);
            return QmpError::Garbage("a line without an end");
        }
    }
}

fn message(
    line: &[u8],
    inner: &Inner,
    events: &SyncSender<Event>,
    greeting: &SyncSender<()>,
) -> Result<(), QmpError> {
    let garbage = QmpError::Garbage;
    let value: Value = serde_json::from_slice(line).map_err(|_| garbage("no JSON"))?;
    let Value::Object(mut object) = value else { return Err(garbage("no object")) };
    if let Some(name) = object.get("event") {
        let name = name.as_str().ok_or(garbage("an event without a name"))?.to_owned();
        let data = object.remove("data").unwrap_or(Value::Null);
        // What nobody takes is lost; states are asked for anyway.
        if let Err(TrySendError::Full(event)) = events.try_send(Event { name, data }) {
            tracing::warn!(event = event.name, "too many events");
        }
        return Ok(());
    }
    if object.contains_key("QMP") {
        let _only_once = greeting.try_send(());
        return Ok(());
    }
    let id = object.get("id").and_then(Value::as_u64);
    let answer = if let Some(value) = object.remove("return") {
        Ok(value)
    } else if let Some(error) = object.get("error") {
        let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
        Err(QmpError::Refused { command: String::new(), text: one_line(text) })
    } else {
        return Err(garbage("neither answer nor event"));
    };
    let Some(id) = id else {
        // What QEMU could not read has no number.
        return Err(garbage("an answer without a number"));
    };
    let call = lock(&inner.waiting).calls.remove(&id);
    if let Some(call) = call {
        let _given_up = call.send(answer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};

    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    /// A monitor that answers each command by `reply`, which gets the command and its number.
    fn monitor(reply: impl Fn(&str, u64) -> Option<String> + Send + 'static) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut out = theirs.try_clone().unwrap();
            out.write_all(GREETING).unwrap();
            for line in BufReader::new(theirs).lines() {
                let Ok(line) = line else { return };
                let value: Value = serde_json::from_str(&line).unwrap();
                let id = value["id"].as_u64().unwrap();
                let command = value["execute"].as_str().unwrap();
                let text = match command {
                    "qmp_capabilities" => Some(json!({ "return": {}, "id": id }).to_string()),
                    other => reply(other, id),
                };
                let Some(text) = text else { continue };
                if out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\r\n")).is_err() {
                    return;
                }
            }
        });
        ours
    }

    #[test]
    fn answers_errors_and_events() {
        let stream = monitor(|command, id| {
            Some(match command {
                "query-status" => {
                    let event = json!({ "event": "RESET", "data": { "guest": true }, "timestamp": {} });
                    format!("{event}\r\n{}", json!({ "return": { "status": "running" }, "id": id }))
                }
                _ => {
                    json!({ "error": { "class": "GenericError", "desc": "no\nsuch" }, "id": id }).to_string()
                }
            })
        });
        let (qmp, events) = Qmp::open(stream, PATIENCE).unwrap();
        assert_eq!(qmp.call("query-status", json!({})).unwrap()["status"], "running");
        assert_eq!(events.recv().unwrap().name, "RESET");
        let error = qmp.call("x", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses x: no such");
    }

    #[test]
    fn silence_garbage_and_ends_are_told_apart() {
        let short = Duration::from_millis(50);
        let (qmp, _events) = Qmp::open(monitor(|_, _| None), PATIENCE).unwrap();
        assert_eq!(qmp.call_with("stop", json!({}), None, short), Err(QmpError::Silent("stop".into())));
        qmp.close();
        assert_eq!(qmp.call("stop", json!({})), Err(QmpError::Closed));

        let (silent, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(Qmp::open(silent, short), Err(QmpError::Silent(_))));
        let (gone, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(Qmp::open(gone, PATIENCE).unwrap_err(), QmpError::Closed);

        for garbage in ["nonsense", "[1]", "{}", "{\"return\":{}}", "{\"event\":5}", "\u{1}"] {
            let (qmp, _events) = Qmp::open(monitor(move |_, _| Some(garbage.into())), PATIENCE).unwrap();
            assert!(matches!(qmp.call("x", json!({})), Err(QmpError::Garbage(_))), "{garbage}");
        }
        let (endless, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || while theirs.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(matches!(Qmp::open(endless, PATIENCE), Err(QmpError::Garbage(_))));
    }

    #[test]
    fn events_that_nobody_takes_are_bounded() {
        let flood = |_: &str, id: u64| {
            let mut text = "{\"event\": \"X\"}\r\n".repeat(10_000);
            text.push_str(&json!({ "return": 7, "id": id }).to_string());
            Some(text)
        };
        let (qmp, events) = Qmp::open(monitor(flood), PATIENCE).unwrap();
        assert_eq!(qmp.call("x", json!({})).unwrap(), 7);
        assert_eq!(events.try_iter().count(), MAX_EVENTS);
    }
}
