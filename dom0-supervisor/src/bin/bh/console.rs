//! `bh console`: the terminal, and attaching again where it was when dom0 or the console service was restarted.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use proto::toolstack::console_input::Input;
use proto::toolstack::{ConsoleAttach, ConsoleInput};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::{Dom0, Failure, lost};

/// Ctrl-], as in telnet.
const LEAVE: u8 = 0x1d;
/// How long a console that went away is waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// A terminal in raw mode, put back at the end.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Raw {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Raw(None);
        }
        let Ok(before) = tcgetattr(stdin.as_fd()) else { return Raw(None) };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        match tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw) {
            Ok(()) => Raw(Some(before)),
            Err(_) => Raw(None),
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Nothing can be done about a terminal that is gone.
            let _ = tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, before);
        }
    }
}

/// Standard input in pieces, by a thread of its own (a read can't be given up). Ends at Ctrl-] on a terminal.
fn keys(terminal: bool) -> mpsc::Receiver<Vec<u8>> {
    let (tx, rx) = mpsc::channel(16);
    // Without a thread there is no input, and the output goes on.
    let _ = std::thread::Builder::new().name("keys".into()).spawn(move || {
        let stdin = std::io::stdin();
        let mut buffer = [0; 1024];
        loop {
            let n = match nix::unistd::read(stdin.as_fd(), &mut buffer) {
                Ok(0) => {
                    // The end of a pipe is not the end of the console.
                    if !terminal {
                        std::mem::forget(tx);
                    }
                    return;
                }
                Ok(n) => n,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return,
            };
            let leave = buffer[..n].iter().position(|b| terminal && *b == LEAVE);
            let piece = buffer[..leave.unwrap_or(n)].to_vec();
            if (!piece.is_empty() && tx.blocking_send(piece).is_err()) || leave.is_some() {
                return;
            }
        }
    });
    rx
}

enum End {
    /// The user left.
    Left,
    /// The stream broke; attach again.
    Broken,
    /// All that was wanted was shown, or the guest is gone.
    Done,
}

/// Follows a guest's console, or prints what is kept of it.
pub async fn run(dom0: &Dom0, guest: String, log: bool) -> Result<(), Failure> {
    let raw = if log { Raw(None) } else { Raw::enter() };
    let terminal = raw.0.is_some();
    let mut keys = if log { mpsc::channel(1).1 } else { keys(terminal) };
    if terminal {
        eprint!("[{guest}: Ctrl-] leaves]\r\n");
    }
    let (mut next, mut instance) = (0, 0);
    let mut give_up: Option<Instant> = None;
    loop {
        let attach = ConsoleAttach {
            guest: guest.clone(),
            instance,
            from_offset: next,
            kept_only: log,
            ..Default::default()
        };
        let before = next;
        match follow(dom0, attach, &mut keys, log, &mut next, &mut instance).await {
            Ok(End::Left) => {
                drop(raw);
                eprintln!("\n[left]");
                return Ok(());
            }
            Ok(End::Done) if log => return Ok(()),
            Ok(End::Done | End::Broken) => {}
            Err(Failure::Status(status)) if instance != 0 && status.code() == tonic::Code::NotFound => {
                // The guest was started anew (follow the new one), or is gone.
                if status.message().contains("anew") {
                    (next, instance) = (0, 0);
                } else {
                    drop(raw);
                    eprintln!("[guest {guest} is gone]");
                    return Ok(());
                }
            }
            Err(Failure::Status(status))
                if lost(&status) || status.code() == tonic::Code::Unavailable || instance != 0 => {}
            Err(e) => return Err(e),
        }
        if next > before {
            give_up = None;
        }
        if Instant::now() > *give_up.get_or_insert_with(|| Instant::now() + PATIENCE) {
            let text = format!("console of {guest} does not come back within {} s", PATIENCE.as_secs());
            return Err(Failure::Status(tonic::Status::deadline_exceeded(text)));
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn follow(
    dom0: &Dom0,
    attach: ConsoleAttach,
    keys: &mut mpsc::Receiver<Vec<u8>>,
    log: bool,
    next: &mut u64,
    instance: &mut u64,
) -> Result<End, Failure> {
    let mut client = dom0.connect().await?;
    let (tx, rx) = mpsc::channel(16);
    let head = tokio_stream::once(ConsoleInput { input: Some(Input::Attach(attach)) });
    let outgoing = head.chain(ReceiverStream::new(rx));
    let stream = match client.console(outgoing).await {
        Ok(stream) => stream,
        Err(status) => return Err(Failure::Status(status)),
    };
    let mut stream = stream.into_inner();
    loop {
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(output)) => {
                    if output.offset > *next && *next > 0 {
                        eprint!("\r\n[{} bytes were not kept]\r\n", output.offset - *next);
                    }
                    *next = output.offset + output.data.len() as u64;
                    *instance = output.instance;
                    let mut out = std::io::stdout().lock();
                    out.write_all(&output.data)?;
                    out.flush()?;
                }
                Ok(None) => return Ok(End::Done),
                Err(_) => return Ok(End::Broken),
            },
            piece = keys.recv(), if !log => match piece {
                // A full or broken stream loses keys, not output.
                Some(piece) => drop(tx.try_send(ConsoleInput { input: Some(Input::Data(piece)) })),
                None => return Ok(End::Left),
            },
        }
    }
}
