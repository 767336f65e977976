//! The line to a frontend: taken up where a predecessor left it, dialled again whenever the frontend hung up.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::wire::{self, Place, Talk};

/// Between two attempts to reach the frontend.
const REDIAL: Duration = Duration::from_millis(100);

/// What the thread that talks on the line and those that end it share.
#[derive(Debug, Default)]
pub struct Line {
    ended: AtomicBool,
    /// The conversation, to be hung up.
    stream: Mutex<Option<UnixStream>>,
    /// Whether what a predecessor left is served again, or there was nothing.
    settled: Mutex<bool>,
    settling: Condvar,
}

impl Line {
    /// Hangs up for good: [`Line::keep`] returns.
    pub fn end(&self) {
        self.ended.store(true, Relaxed);
        if let Some(stream) = &*self.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            let _gone_already = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whoever talks says by this that all that a predecessor was told is carried out.
    pub fn settle(&self) {
        *self.settled.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.settling.notify_all();
    }

    /// Waits until what a predecessor left is served again; false: not in that time.
    pub fn wait_settled(&self, time: Duration) -> bool {
        let settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.settling.wait_timeout_while(settled, time, |settled| !*settled);
        waited.is_ok_and(|(settled, _)| *settled)
    }

    /// Calls `talk` for the conversation that a predecessor left at `place`, then for each new one, dialled by the approved resource,
    /// until the line is ended. `crashed`: the predecessor ended by its own fault.
    pub fn keep(
        &self,
        place: Place<'_>,
        resource: &str,
        crashed: bool,
        mut talk: impl FnMut(&mut Talk<'_>) -> Result<(), String>,
    ) {
        let device = place.device;
        let mut left = wire::take_up(place, crashed);
        if left.is_none() {
            self.settle();
        }
        let mut complained = false;
        while !self.ended.load(Relaxed) {
            let dialled = match left.take() {
                Some(left) => {
                    tracing::info!(device, "the conversation with the frontend goes on");
                    Ok(left)
                }
                None => dial(place, resource),
            };
            let (mut conversation, stream) = match dialled {
                Ok(dialled) => dialled,
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!(device, error, "the frontend cannot be reached; tried again");
                    }
                    std::thread::sleep(REDIAL);
                    continue;
                }
            };
            complained = false;
            self.set(Some(stream));
            // Who ended it meanwhile had nothing to hang up.
            if self.ended.load(Relaxed) {
                break;
            }
            let result = talk(&mut conversation);
            self.settle();
            self.set(None);
            drop(conversation);
            match result {
                Ok(()) => tracing::info!(device, "the frontend hung up"),
                Err(error) => {
                    tracing::error!(device, error, "vhost-user");
                    std::thread::sleep(REDIAL);
                }
            }
        }
    }

    fn set(&self, stream: Option<UnixStream>) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

fn dial<'a>(place: Place<'a>, resource: &str) -> Result<(Talk<'a>, UnixStream), String> {
    let (_, fd) = place.hv.resource_open(resource).map_err(|e| e.to_string())?;
    let stream = UnixStream::from(fd);
    let ours = stream.try_clone().map_err(|e| format!("the connection: {e}"))?;
    Ok((wire::talk_at(place, stream)?, ours))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::super::fake;
    use super::super::record::Message;
    use super::*;

    /// Answers each message with itself until the other end hangs up; one whose body is `!` is a broken protocol.
    fn echo(talk: &mut Talk<'_>) -> Result<(), String> {
        while let Some(message) = talk.next_message()? {
            if message.body == b"!" {
                return Err("broken".into());
            }
            let (request, flags, body) = (message.request, message.flags, message.body.clone());
            let reply = Message { request, flags, body, fds: Vec::new() };
            if !talk.answer(&message, Some(&reply))? {
                break;
            }
        }
        Ok(())
    }

    fn message(body: &[u8]) -> Vec<u8> {
        Message::<()> { request: 1, flags: 1, body: body.to_vec(), fds: Vec::new() }.bytes()
    }

    fn say(frontend: &mut UnixStream, body: &[u8]) {
        let sent = message(body);
        frontend.write_all(&sent).unwrap();
        let mut heard = vec![0; sent.len()];
        frontend.read_exact(&mut heard).unwrap();
        assert_eq!(heard, sent);
    }

    fn place(hv: &crate::Hypercall) -> Place<'_> {
        Place { hv, device: "test", instance: 5 }
    }

    #[test]
    fn a_frontend_that_refuses_hangs_up_or_breaks_the_protocol_is_dialled_again() {
        let (frontends, dialled) = channel();
        let (hv, store) = fake::hypervisor(2, frontends);
        let line = Arc::new(Line::default());
        let keeper = {
            let line = Arc::clone(&line);
            std::thread::spawn(move || line.keep(place(&hv), "vhost-x", false, echo))
        };
        let began = Instant::now();
        let patience = Duration::from_secs(10);
        for last_words in [&b""[..], b"!", b""] {
            let mut frontend = dialled.recv_timeout(patience).unwrap();
            say(&mut frontend, b"a");
            assert_eq!(store.names(), ["talk-test", "talk-test.socket"]);
            if !last_words.is_empty() {
                frontend.write_all(&message(last_words)).unwrap();
            }
        }
        assert!(began.elapsed() >= REDIAL * 3, "refusals and broken protocols are waited after");
        // Ended in the middle of a conversation: the frontend is hung up on, and nobody is dialled any more.
        let mut frontend = dialled.recv_timeout(patience).unwrap();
        say(&mut frontend, b"b");
        line.end();
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
        keeper.join().unwrap();
        assert!(dialled.try_recv().is_err());
        assert!(store.names().is_empty(), "nothing is kept of what is over");
    }

    #[test]
    fn a_line_that_was_ended_before_is_never_taken_up() {
        let (frontends, dialled) = channel();
        let (hv, _) = fake::hypervisor(0, frontends);
        let line = Line::default();
        line.end();
        line.keep(place(&hv), "vhost-x", false, |_| panic!("nobody is to be talked to"));
        assert!(dialled.try_recv().is_err());
    }

    /// A predecessor that was killed in the middle: nobody is dialled, and the frontend notices nothing.
    #[test]
    fn what_a_predecessor_left_is_taken_up() {
        let (frontends, dialled) = channel();
        let (hv, store) = fake::hypervisor(0, frontends);
        let first = dial(place(&hv), "vhost-x").unwrap();
        let mut frontend = dialled.recv().unwrap();
        // As SIGKILL leaves it.
        std::mem::forget(first);
        frontend.write_all(&message(b"a")).unwrap();
        let line = Arc::new(Line::default());
        assert!(!line.wait_settled(Duration::ZERO));
        let keeper = {
            let line = Arc::clone(&line);
            let ready = Arc::clone(&line);
            std::thread::spawn(move || {
                line.keep(place(&hv), "vhost-x", false, |talk| {
                    ready.settle();
                    echo(talk)
                });
            })
        };
        assert!(line.wait_settled(Duration::from_secs(10)));
        let mut heard = message(b"b");
        frontend.read_exact(&mut heard).unwrap();
        assert_eq!(heard, message(b"a"));
        say(&mut frontend, b"c");
        assert!(dialled.try_recv().is_err());
        line.end();
        keeper.join().unwrap();
        assert!(store.names().is_empty());
    }
}
