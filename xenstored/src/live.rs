//! CONTROL live-update: another binary goes on where this process stands, with every connection kept.
//!
//! The commands are those that `xenstore-control live-update` sends: `-f FILE`, `-c COMMANDLINE`, `-s [-F] [-t S] [-v N]`, `-a`.
//! State is handed over in the journal, which is compacted first, so that the other binary may carry requests out differently; or,
//! to a binary of another journal layout and with `-v`, as Xen's migration stream.
//! Open transactions are kept too, so there is nothing to wait for and `-F` and `-t` change nothing. The `-s` request stays in
//! its connection's input with a mark in the journal; the other binary answers it.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::migrate::VERSION as STREAM_VERSION;
use crate::store::ConnId;
use crate::wire::{Errno, decimal};

/// What is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The binary.
    pub file: PathBuf,
    /// Arguments, if they are not to be the same as this process's.
    pub arguments: Option<String>,
    /// The version of the migration stream by which state is handed over; none: in the journal.
    pub stream: Option<u32>,
}

/// What a binary takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepts {
    /// This version's journal.
    Journal,
    /// A migration stream alone.
    Stream,
}

/// How an attempt ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Started {
    /// This process is to end now, and another takes over. (An exec that succeeds does not return at all.)
    Replaced,
    /// This process goes on; why.
    Failed(String),
}

/// What the other binary is given.
#[derive(Debug)]
pub struct Handover<'a> {
    /// What is to be started.
    pub plan: &'a Plan,
    /// Whose request it answers first.
    pub asking: ConnId,
    /// The listening socket.
    pub listener: Option<BorrowedFd<'a>>,
    /// The clients'.
    pub sockets: &'a [(ConnId, BorrowedFd<'a>)],
    /// The state, if it is not taken from the journal.
    pub stream: Option<&'a [u8]>,
}

/// Starts other binaries.
pub trait Successor {
    /// Whether the binary is there, and what it takes over.
    ///
    /// # Errors
    /// What is wrong with it, for the administrator.
    fn check(&self, plan: &Plan) -> Result<Accepts, String>;

    /// Starts it in place of this process.
    fn start(&mut self, handover: &Handover<'_>) -> Started;
}

/// Live update is not possible.
pub struct NoSuccessor;

impl Successor for NoSuccessor {
    fn check(&self, _plan: &Plan) -> Result<Accepts, String> {
        Err("Live update is not possible here.".into())
    }

    fn start(&mut self, _handover: &Handover<'_>) -> Started {
        Started::Failed("Live update is not possible here.".into())
    }
}

/// What to do for a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Answer it.
    Answer(Result<String, Errno>),
    /// Start the other binary.
    Start,
}

/// The update that is being prepared. Its end is that of its connection, or `-a`.
#[derive(Debug, Default)]
pub struct Session(Option<(ConnId, Plan)>);

impl Session {
    /// Takes one command.
    pub fn step(&mut self, conn: ConnId, args: &[Vec<u8>], successor: &dyn Successor) -> Step {
        let args: Vec<&[u8]> = args.iter().map(|a| &a[..]).collect();
        let text = |s: &str| Step::Answer(Ok(s.to_owned()));
        match &args[..] {
            [b"-f", file] => {
                if self.0.as_ref().is_some_and(|(who, _)| *who != conn) {
                    return text("live-update session already active.");
                }
                let mut plan = Plan { file: os_path(file), arguments: None, stream: None };
                match successor.check(&plan) {
                    Ok(accepts) => {
                        plan.stream = (accepts == Accepts::Stream).then_some(STREAM_VERSION);
                        self.0 = Some((conn, plan));
                        text("OK")
                    }
                    Err(why) => text(&why),
                }
            }
            [b"-c", arguments] => match &mut self.0 {
                Some((who, plan)) if *who == conn => {
                    plan.arguments = Some(String::from_utf8_lossy(arguments).into_owned());
                    text("OK")
                }
                _ => text("Not in live-update session."),
            },
            [b"-a"] => match self.0.take() {
                Some(_) => text("OK"),
                None => text("No live-update session active."),
            },
            [b"-s", options @ ..] => {
                let mut options = options.iter();
                let mut stream = None;
                while let Some(option) = options.next() {
                    let valid = match *option {
                        b"-F" => true,
                        b"-t" => options.next().is_some_and(|s| decimal::<u32>(s).is_ok()),
                        b"-v" => match options.next().map(|v| decimal::<u32>(v)) {
                            Some(Ok(v)) if v == 0 || v > STREAM_VERSION => {
                                return text("Migration stream version not supported.");
                            }
                            Some(Ok(version)) => {
                                stream = Some(version);
                                true
                            }
                            _ => false,
                        },
                        _ => false,
                    };
                    if !valid {
                        return Step::Answer(Err(Errno::EINVAL));
                    }
                }
                if let (Some((_, plan)), Some(version)) = (&mut self.0, stream) {
                    plan.stream = Some(version);
                }
                Step::Start
            }
            _ => Step::Answer(Err(Errno::EINVAL)),
        }
    }

    /// The plan of this connection; the session is over with it.
    pub fn take(&mut self, conn: ConnId) -> Option<Plan> {
        self.0.take_if(|(who, _)| *who == conn).map(|(_, plan)| plan)
    }

    /// The connection is gone.
    pub fn forget(&mut self, conn: ConnId) {
        self.0.take_if(|(who, _)| *who == conn);
    }
}

fn os_path(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    std::ffi::OsStr::from_bytes(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Any;
    impl Successor for Any {
        fn check(&self, plan: &Plan) -> Result<Accepts, String> {
            match plan.file.to_str() {
                Some("bad") => Err("File not accessible.".into()),
                Some("other") => Ok(Accepts::Stream),
                _ => Ok(Accepts::Journal),
            }
        }
        fn start(&mut self, _handover: &Handover<'_>) -> Started {
            Started::Replaced
        }
    }

    #[test]
    fn the_sequence_of_commands() {
        let mut session = Session::default();
        let mut step = |conn, args: &[&str]| {
            let args: Vec<Vec<u8>> = args.iter().map(|a| a.as_bytes().to_vec()).collect();
            session.step(ConnId(conn), &args, &Any)
        };
        let text = |s: &str| Step::Answer(Ok(s.to_owned()));
        assert_eq!(step(1, &["-a"]), text("No live-update session active."));
        assert_eq!(step(1, &["-f", "bad"]), text("File not accessible."));
        assert_eq!(step(1, &["-f", "good"]), text("OK"));
        assert_eq!(step(2, &["-f", "good"]), text("live-update session already active."));
        assert_eq!(step(2, &["-c", "x"]), text("Not in live-update session."));
        assert_eq!(step(1, &["-c", "--a b"]), text("OK"));
        assert_eq!(step(1, &["-s", "-v", "3"]), text("Migration stream version not supported."));
        for bad in [&["-s", "-t"][..], &["-s", "x"], &["-s", "-t", "x"], &["-x"], &[]] {
            assert_eq!(step(1, bad), Step::Answer(Err(Errno::EINVAL)), "{bad:?}");
        }
        assert_eq!(step(1, &["-s", "-t", "60", "-F", "-v", "2"]), Step::Start);
        assert_eq!(session.take(ConnId(2)), None);
        let plan = Plan { file: "good".into(), arguments: Some("--a b".into()), stream: Some(2) };
        assert_eq!(session.take(ConnId(1)), Some(plan));
        assert_eq!(session.take(ConnId(1)), None);
        for (file, stream) in [("other", Some(2)), ("good", None)] {
            for args in [&["-f", file][..], &["-s"]] {
                let args: Vec<Vec<u8>> = args.iter().map(|a| a.as_bytes().to_vec()).collect();
                session.step(ConnId(1), &args, &Any);
            }
            assert_eq!(session.take(ConnId(1)).and_then(|plan| plan.stream), stream, "{file}");
        }
    }
}
