//! `bh capture`: packets of a vif to a pcapng file. Restarts of dom0 and of the driver domain, and a move of the device, leave a gap
//! that the file tells of.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use proto::toolstack::{CaptureVifRequest, CapturedPackets, MAX_CAPTURED};
use tonic::{Code, Status, Streaming};

use crate::client::{Dom0, Failure, PATIENCE, lost};
use crate::pcapng::Writer;

/// What stands in the file's header if all of a packet is wanted.
const WHOLE: u32 = 262_144;

/// What is to be captured.
#[derive(Args, Debug)]
pub struct Wanted {
    /// Name, domid or uuid.
    guest: String,
    /// The vif's number.
    #[arg(default_value_t = 0)]
    vif: u32,
    /// The file; - for standard output.
    #[arg(short = 'w', long, value_name = "FILE")]
    write: PathBuf,
    /// Bytes of each packet at most; all if missing.
    #[arg(short, long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(14..=i64::from(WHOLE)))]
    snaplen: Option<u32>,
    /// End after so many packets.
    #[arg(short = 'n', long)]
    count: Option<u64>,
    /// End after so many seconds; without either it goes on until it is interrupted.
    #[arg(long)]
    seconds: Option<u64>,
}

/// What is in the file so far.
#[derive(Default)]
struct Seen {
    packets: u64,
    dropped: u64,
    gaps: u64,
}

/// Runs it.
///
/// # Errors
/// [`Failure`].
pub async fn run(dom0: &Dom0, wanted: Wanted) -> Result<(), Failure> {
    let Wanted { guest, vif, write, snaplen, count, seconds } = wanted;
    let request =
        CaptureVifRequest { guest: guest.clone(), id: vif, domid: 0, snap_length: snaplen.unwrap_or(0) };
    let end = seconds.map(|s| tokio::time::Instant::now() + Duration::from_secs(s));
    // Nothing is made before there is something to capture.
    let mut stream = open(dom0, &request, None).await?;
    let out = output(&write)?;
    let name = format!("guest {guest} vif {vif}");
    let mut file =
        Writer::new(out, &name, snaplen.unwrap_or(WHOLE)).and_then(|mut f| f.flush().map(|()| f))?;
    eprintln!("bh: capturing {name}; interrupt to end");
    let mut seen = Seen::default();
    let most = count.unwrap_or(u64::MAX);
    let mut comment = None;
    let mut dropped = 0;
    let result = loop {
        let message = tokio::select! {
            message = stream.message() => message,
            () = at(end) => break Ok(()),
            _ = tokio::signal::ctrl_c() => break Ok(()),
        };
        match message {
            Ok(Some(CapturedPackets { packets, dropped: missed })) => {
                dropped += missed;
                seen.dropped += missed;
                for packet in packets {
                    if seen.packets == most {
                        break;
                    }
                    file.packet(&packet, std::mem::take(&mut dropped), comment.take())?;
                    seen.packets += 1;
                }
                file.flush()?;
                if seen.packets == most {
                    break Ok(());
                }
            }
            Err(e) if e.code() != Code::Unavailable && !lost(&e) => break Err(Failure::Status(e)),
            ended => {
                let why = ended.err().map_or("dom0 ended it".to_owned(), |e| e.message().to_owned());
                eprintln!("bh: the capture was interrupted ({why}); packets are missing there");
                seen.gaps += 1;
                comment = Some("the capture was interrupted before this packet");
                let until = Instant::now() + PATIENCE;
                let again = tokio::select! {
                    again = open(dom0, &request, Some(until)) => again,
                    () = at(end) => break Ok(()),
                    _ = tokio::signal::ctrl_c() => break Ok(()),
                };
                match again {
                    Ok(again) => {
                        eprintln!("bh: the capture goes on");
                        stream = again;
                    }
                    Err(e) => break Err(e),
                }
            }
        }
    };
    let Seen { packets, dropped, gaps } = seen;
    eprintln!(
        "bh: {packets} packets captured, {dropped} missed because this end was too slow, {gaps} interruptions"
    );
    result
}

async fn at(end: Option<tokio::time::Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

fn output(path: &Path) -> Result<Box<dyn Write>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(BufWriter::new(std::io::stdout())));
    }
    let file = File::create(path).map_err(|e| Failure::Input(format!("{}: {e}", path.display())))?;
    Ok(Box::new(BufWriter::new(file)))
}

/// Begins, or goes on until then: what was served a moment ago is there again soon.
async fn open(
    dom0: &Dom0,
    request: &CaptureVifRequest,
    until: Option<Instant>,
) -> Result<Streaming<CapturedPackets>, Failure> {
    let until = until.unwrap_or_else(Instant::now);
    loop {
        let result = dom0
            .call(|c| {
                let request = request.clone();
                async move { c.max_decoding_message_size(MAX_CAPTURED).capture_vif(request).await }
            })
            .await;
        match result {
            Err(Failure::Status(e)) if soon(&e) && Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => return result,
        }
    }
}

fn soon(e: &Status) -> bool {
    matches!(e.code(), Code::Unavailable | Code::NotFound | Code::Aborted)
}
