//! The connection to dom0. dom0 can be killed at any moment: hv-core keeps its socket, so a call waits for the next
//! incarnation, and a call that can be made again is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::toolstack::toolstack_client::ToolstackClient;
use tokio::net::UnixStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// How long a lost dom0 is waited for.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long one attempt of a short call may take.
const ATTEMPT: Duration = Duration::from_secs(20);

/// Why a command did not succeed; one line.
#[derive(Debug)]
pub enum Failure {
    /// dom0 said no.
    Status(Status),
    /// dom0 can't be reached.
    NoDom0(PathBuf, String),
    /// The user's input.
    Input(String),
    /// Standard output.
    Output(std::io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Status(status) => match status.message() {
                "" => write!(f, "{:?}", status.code()),
                text => f.write_str(text),
            },
            Failure::NoDom0(path, why) => {
                write!(
                    f,
                    "dom0 does not answer at {}: {why}; is hv-core running? (or give --socket)",
                    path.display()
                )
            }
            Failure::Input(text) => f.write_str(text),
            Failure::Output(e) => write!(f, "standard output: {e}"),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Failure::Output(e)
    }
}

impl Failure {
    /// The exit status, as `docs/bh.md` has it.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Input(_) => 2,
            Failure::NoDom0(..) => 4,
            Failure::Output(_) => 1,
            Failure::Status(status) => match status.code() {
                Code::InvalidArgument => 2,
                Code::NotFound => 3,
                Code::Unavailable => 4,
                Code::DeadlineExceeded => 5,
                Code::AlreadyExists | Code::Aborted => 6,
                _ => 1,
            },
        }
    }

    /// dom0 went away in the middle: whether the call took effect is not known.
    pub fn lost(&self) -> bool {
        match self {
            Failure::Status(status) => lost(status),
            _ => false,
        }
    }
}

/// The stream broke, as opposed to an answer of dom0's.
pub fn lost(status: &Status) -> bool {
    let text = status.message();
    let broken =
        ["transport", "h2 protocol", "connection", "broken pipe", "dom0 is ending", "error reading a body"];
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
        && broken.iter().any(|b| text.contains(b))
}

/// How to reach dom0.
#[derive(Clone, Debug)]
pub struct Dom0 {
    path: PathBuf,
}

/// A connected client.
pub type Client = ToolstackClient<Channel>;

impl Dom0 {
    /// By the socket's path.
    pub fn new(path: &Path) -> Dom0 {
        Dom0 { path: path.to_owned() }
    }

    /// Connects; a socket that refuses for a moment is tried again.
    pub async fn connect(&self) -> Result<Client, Failure> {
        Ok(ToolstackClient::new(self.channel().await?))
    }

    async fn channel(&self) -> Result<Channel, Failure> {
        let end = Instant::now() + Duration::from_secs(2);
        loop {
            // hv-core holds the socket: connecting succeeds while dom0 is between two lives.
            match UnixStream::connect(&self.path).await {
                Ok(_probe) => {}
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused && Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                Err(e) => {
                    let why = match e.kind() {
                        std::io::ErrorKind::NotFound => "no such socket".to_owned(),
                        std::io::ErrorKind::PermissionDenied => "permission denied (run as root)".to_owned(),
                        std::io::ErrorKind::ConnectionRefused => "nobody listens".to_owned(),
                        _ => e.to_string(),
                    };
                    return Err(Failure::NoDom0(self.path.clone(), why));
                }
            }
            return Ok(proto::unix::at(&self.path));
        }
    }

    /// A call that can be made again as often as one likes.
    pub async fn call<T, F>(&self, make: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_over(ToolstackClient::new, &make).await
    }

    /// The same for any service that dom0's socket serves.
    pub async fn call_over<C, T, F>(
        &self,
        client: impl Fn(Channel) -> C,
        make: &impl Fn(C) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let end = Instant::now() + PATIENCE;
        loop {
            let client = client(self.channel().await?);
            let result = match tokio::time::timeout(ATTEMPT, make(client)).await {
                Ok(result) => result,
                Err(_) => {
                    let text = format!("no answer within {} s", ATTEMPT.as_secs());
                    return Err(Failure::NoDom0(self.path.clone(), text));
                }
            };
            match result {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) if lost(&status) && Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(status) if lost(&status) => {
                    return Err(Failure::NoDom0(
                        self.path.clone(),
                        "the connection breaks again and again".into(),
                    ));
                }
                Err(status) => return Err(Failure::Status(status)),
            }
        }
    }

    /// A call that must be made once, and how long it may take.
    pub async fn once<T, F>(&self, within: Duration, make: impl FnOnce(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let client = self.connect().await?;
        match tokio::time::timeout(within, make(client)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Failure::Status(status)),
            Err(_) => {
                let text = format!("not done within {} s; it goes on, see bh list", within.as_secs());
                Err(Failure::Status(Status::deadline_exceeded(text)))
            }
        }
    }
}
