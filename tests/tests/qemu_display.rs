//! A QEMU guest's display: screenshots and VNC sessions, through kills of what is between viewer and QEMU. Natively, under TCG.

mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/machine.rs"]
mod machine;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use bulkhead_tests::system::{System, bridge_name};
use common::*;
use linux::*;
use machine::file;
use qemu_bridge::rfb::{self, Picture};

const PATIENCE: Duration = Duration::from_secs(10);
/// What the guest writes on its text console; below and beside it the console is empty.
const WRITTEN: &[&str] = &["BULKHEAD", "", "  LAKE  BADE", "AAAAAAAABBBBBBBB"];
/// A character of VGA's text mode, pixels.
const CELL: (usize, usize) = (9, 16);

fn screenshot(system: &System) -> Picture {
    let file = system.dir().join("screen.png");
    system
        .bh_ok(&["screenshot", "linux", file.to_str().unwrap()])
        .unwrap_or_else(|e| panic!("{e:#}\n{}", system.log_tail(25)));
    let bytes = std::fs::read(&file).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgb).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    Picture { width: info.width as u16, height: info.height as u16, rgb }
}

fn cell(picture: &Picture, column: usize, line: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for row in 0..CELL.1 {
        let at = ((line * CELL.1 + row) * usize::from(picture.width) + column * CELL.0) * 3;
        out.extend_from_slice(&picture.rgb[at..at + CELL.0 * 3]);
    }
    out
}

/// Nobody here has the font, but: equal characters look the same, different ones do not, and a blank is of one colour.
fn shows_what_was_written(picture: &Picture) -> Result<(), String> {
    if (picture.width, picture.height) != (720, 400) {
        return Err(format!("{} x {}", picture.width, picture.height));
    }
    let mut glyphs = std::collections::BTreeMap::new();
    for line in 0..25 {
        let text = WRITTEN.get(line).copied().unwrap_or("").as_bytes();
        for column in 0..80 {
            let character = text.get(column).copied().unwrap_or(b' ');
            let looks = cell(picture, column, line);
            let known = glyphs.entry(character).or_insert_with(|| looks.clone());
            if *known != looks {
                return Err(format!("line {line}, column {column}: not as other {:?}", character as char));
            }
        }
    }
    let blank = &glyphs[&b' '];
    if blank.chunks(3).any(|pixel| pixel != &blank[..3]) {
        return Err("a blank is not of one colour".into());
    }
    let mut different: Vec<&Vec<u8>> = glyphs.values().collect();
    different.sort();
    different.dedup();
    if different.len() != glyphs.len() {
        return Err(format!("{} characters look like {}", glyphs.len(), different.len()));
    }
    Ok(())
}

/// `bh vnc --listen`; ended with its value.
struct Viewing(Child);

impl Drop for Viewing {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn picture_at(socket: &Path) -> Result<Picture, String> {
    let stream = UnixStream::connect(socket).map_err(|e| e.to_string())?;
    rfb::picture(stream, PATIENCE).map_err(|e| e.to_string())
}

/// Types a line at a viewer.
fn type_line(socket: &Path, text: &str) {
    let mut stream = UnixStream::connect(socket).unwrap();
    rfb::begin(&mut stream, Instant::now() + PATIENCE).unwrap();
    for key in text.bytes().map(u32::from).chain([0xff0d]) {
        for down in [true, false] {
            rfb::press(&mut stream, key, down, PATIENCE).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // What was typed is on its way until QEMU's answer to something later.
    std::thread::sleep(Duration::from_millis(200));
}

/// The picture is what the guest wrote, by a screenshot and by viewers; keys arrive; a viewer that does not read holds up nobody; after kills of
/// the bridge and of dom0 viewers have their picture again; nothing listens in QEMU.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_shows_its_display() {
    let system = start();
    let write =
        format!("echo -en '\\033[?25l\\033[2J\\033[H{}' > /dev/tty1; echo written", WRITTEN.join("\\r\\n"));
    let read = "read line < /dev/tty1; echo $line".to_owned();
    let words = [script(&write), script(&read)].join(" ");
    let (progress, _console) = boot(&system, &file(&system, &words, "display = true"));
    assert_eq!(said(&system, &progress, 0, Duration::from_secs(20)), ["written"]);
    shows_what_was_written(&screenshot(&system)).unwrap();

    let socket = system.dir().join("vnc.sock");
    let listen = ["vnc", "linux", "--listen", socket.to_str().unwrap()];
    let mut viewing = Viewing(system.bh_command(&listen).spawn().unwrap());
    until(&system, "the viewers' socket", || socket.exists());
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    // One that begins a session, asks for everything again and again, and takes nothing.
    let mut deaf = UnixStream::connect(&socket).unwrap();
    rfb::begin(&mut deaf, Instant::now() + PATIENCE).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let ask = [3u8, 0, 0, 0, 0, 0, 2, 0xd0, 1, 0x90].repeat(200);
    let _as_much_as_goes = std::io::Write::write(&mut deaf, &ask);
    // Two at once, beside it.
    let both: Vec<_> = (0..2)
        .map(|_| {
            let socket = socket.clone();
            std::thread::spawn(move || picture_at(&socket))
        })
        .collect();
    for one in both {
        shows_what_was_written(&one.join().unwrap().unwrap()).unwrap();
    }
    shows_what_was_written(&screenshot(&system)).unwrap();

    for victim in [bridge_name("linux"), "dom0-supervisor".into(), bridge_name("linux")] {
        let mut watching = UnixStream::connect(&socket).unwrap();
        rfb::begin(&mut watching, Instant::now() + PATIENCE).unwrap();
        let began = Instant::now();
        system.kill(std::slice::from_ref(&victim)).unwrap();
        watching.set_read_timeout(Some(PATIENCE)).unwrap();
        let told = std::io::Read::read(&mut watching, &mut [0; 1]);
        assert!(matches!(told, Ok(0)), "the viewer of before is told: {told:?}");
        shows_what_was_written(&picture_at(&socket).unwrap_or_else(|e| panic!("{victim}: {e}"))).unwrap();
        println!(
            "{victim}: another viewer had its picture {} ms after the kill",
            began.elapsed().as_millis()
        );
    }

    type_line(&socket, "ahoy");
    assert_eq!(said(&system, &progress, 1, Duration::from_secs(20)), ["ahoy"]);
    for pid in machine::emulators(&system) {
        let listening = machine::listening(pid);
        // At these, inside QEMU's own domain, its backends dial in.
        let odd = listening.iter().find(|name| !name.starts_with("@vbd"));
        assert!(odd.is_none() && !listening.is_empty(), "{listening:?}");
    }
    // A clean end takes the socket with it.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(viewing.0.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert!(viewing.0.wait().unwrap().success());
    assert!(!socket.exists());
    system.bh_ok(&["destroy", "linux"]).unwrap();
}

/// A guest without a display says so.
#[test]
#[ignore = "needs the guest image: cargo xtask guest-image"]
fn qemu_guest_without_a_display_says_so() {
    let system = start();
    let (_progress, _console) = boot(&system, &file(&system, "", ""));
    for args in [
        vec!["screenshot", "linux", "/nonexistent/x.png"],
        vec!["vnc", "linux", "--listen", "/nonexistent/x"],
    ] {
        let refused = system.bh(&args).unwrap();
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && why.contains("no display") && why.lines().count() == 1, "{why}");
    }
}
