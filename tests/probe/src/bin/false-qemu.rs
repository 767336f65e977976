//! Stands in QEMU's place: listens where QEMU's monitor does, and answers as its guest's name asks for.
//!
//! | guest | what its monitor does |
//! |---|---|
//! | `noise` | says bytes that are no JSON |
//! | `flood` | says a line that has no end |
//! | `short` | greets, and closes |
//! | `liar` | greets, and answers each command with what was not asked for |
//! | `rotten` | greets and runs the guest; a moment later it says bytes that are no JSON |

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use domain_kit::os::take_inherited;

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 0}}, \"capabilities\": []}}\r\n";
const NOISE: &[u8] = b"\xff\x00}{ nothing that a monitor says\r\n";
/// How long a rotten one is well.
const WELL: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let listener = UnixListener::from(take_inherited(hv_abi::CONTROL_LISTENER_FD).context("descriptor 4")?);
    let args: Vec<String> = std::env::args().collect();
    let name = args.iter().find_map(|arg| arg.strip_prefix("guest=")).unwrap_or_default();
    let name = name.split(',').next().unwrap_or_default();
    let mut started = None;
    for stream in listener.incoming() {
        // Who asks may have gone: the next one comes.
        if let Err(error) = converse(&stream.context("accept")?, name, &mut started) {
            println!("{error:#}");
        }
    }
    Ok(())
}

fn converse(mut stream: &UnixStream, name: &str, started: &mut Option<Instant>) -> Result<()> {
    match name {
        "noise" => stream.write_all(NOISE)?,
        "flood" => loop {
            stream.write_all(&[b'['; 65536])?;
        },
        _ => stream.write_all(GREETING.as_bytes())?,
    }
    if name == "short" {
        return Ok(());
    }
    for line in BufReader::new(stream).lines() {
        let line = line?;
        if name == "rotten" && started.is_some_and(|at: Instant| at.elapsed() > WELL) {
            stream.write_all(NOISE)?;
            continue;
        }
        // The last: arguments have such keys, too.
        let id = line.rsplit("\"id\":").next().unwrap_or_default();
        let id: String = id.trim_start().chars().take_while(char::is_ascii_digit).collect();
        let is = |command: &str| line.contains(&format!("\"{command}\""));
        if is("cont") {
            *started = Some(Instant::now());
        }
        let answer = match (name, started.is_some()) {
            ("liar", _) => "[[0], null, \"yes\"]",
            _ if !is("query-status") => "{}",
            (_, false) => "{\"status\": \"prelaunch\"}",
            (_, true) => "{\"status\": \"running\"}",
        };
        stream.write_all(format!("{{\"return\": {answer}, \"id\": {id}}}\r\n").as_bytes())?;
    }
    Ok(())
}
