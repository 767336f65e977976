//! Against qemu-nbd, with and without structured replies; servers and clients that die.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process};
use std::time::Instant;

use super::session::{STATE_BYTES, drain};
use super::*;
use domain_kit::mem::SharedMem;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

struct Unix(PathBuf);

impl Connector for Unix {
    fn connect(&self) -> Result<OwnedFd> {
        Ok(UnixStream::connect(&self.0)?.into())
    }
}

fn kept() -> Kept {
    Kept(SharedMem::create("nbd", STATE_BYTES).unwrap().0)
}

struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(dir: &Path, image: &Path) -> Server {
        let socket = dir.join("s");
        let _gone = std::fs::remove_file(&socket);
        let child = Process::new("qemu-nbd")
            .args(["-f", "raw", "-t", "-x", "e", "--discard=unmap", "-k"])
            .arg(&socket)
            .arg(image)
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            assert!(Instant::now() < end, "qemu-nbd does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        Server { child, socket }
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

#[test]
fn a_server_as_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("i");
    let size = 4usize << 20;
    std::fs::write(&image, vec![0; size]).unwrap();
    let mut server = Server::start(dir.path(), &image);
    let layer = Arc::new(NbdLayer::open(Box::new(Unix(server.socket.clone())), "e", kept()).unwrap());
    assert_eq!(layer.len(), size as u64);
    assert!(layer.shared.first.structured && !layer.read_only() && layer.has(flag::SEND_FLUSH));
    // Four threads, each on its quarter, and a server that dies and comes back under them.
    let threads: Vec<_> = (0..4usize)
        .map(|quarter| {
            let layer = layer.clone();
            std::thread::spawn(move || {
                let mut rng = SmallRng::seed_from_u64(quarter as u64);
                let mut flat = vec![0; size / 4];
                let base = (quarter * size / 4) as u64;
                for round in 0..400 {
                    let at = rng.random_range(0..flat.len() / 512 - 400) * 512;
                    let len = rng.random_range(1..400usize) * 512;
                    match rng.random_range(0..8) {
                        0..4 => {
                            let mut data = vec![0; len];
                            rng.fill(&mut data[..]);
                            layer.write(base + at as u64, &data).unwrap();
                            flat[at..at + len].copy_from_slice(&data);
                        }
                        4 => {
                            layer.write_zeroes(base + at as u64, len as u64).unwrap();
                            flat[at..at + len].fill(0);
                        }
                        5 => layer.flush().unwrap(),
                        _ => {
                            let mut data = vec![0; len];
                            layer.read(base + at as u64, &mut data).unwrap();
                            assert!(data == flat[at..at + len], "round {round}");
                        }
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                flat
            })
        })
        .collect();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(60));
        server.stop();
        server = Server::start(dir.path(), &image);
    }
    let flat: Vec<u8> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    layer.discard(0, 4096).unwrap();
    layer.flush().unwrap();
    let mut beyond = vec![1; 1024];
    layer.read(size as u64 - 512, &mut beyond).unwrap();
    assert!(beyond[512..] == [0; 512]);
    assert_eq!(layer.write(size as u64, &[0; 512]).unwrap_err().kind(), ErrorKind::StorageFull);
    drop(layer);
    drop(server);
    assert!(std::fs::read(&image).unwrap()[4096..] == flat[4096..]);
}

/// More callers than slots, none of which pauses: a slot that was free for a moment before its call was over came to serve two calls, and
/// a reply's header went to the guest as data.
#[test]
fn a_slot_serves_one_call_at_a_time() {
    const EACH: usize = 32 << 10;
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("i");
    std::fs::File::create(&image).unwrap().set_len(24 * EACH as u64).unwrap();
    let server = Server::start(dir.path(), &image);
    let layer = NbdLayer::open(Box::new(Unix(server.socket.clone())), "e", kept()).unwrap();
    std::thread::scope(|scope| {
        for part in 0..24usize {
            let layer = &layer;
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(part as u64);
                let mut flat = vec![0; EACH];
                for round in 0..300u32 {
                    let at = rng.random_range(0..EACH / 512) * 512;
                    let len = rng.random_range(1..=(EACH - at) / 512) * 512;
                    let offset = (part * EACH + at) as u64;
                    if rng.random_range(0..3) == 0 {
                        let short = len.min(1024);
                        flat[at..at + short].fill(round as u8);
                        layer.write(offset, &flat[at..at + short]).unwrap();
                    } else {
                        let mut data = vec![1; len];
                        layer.read(offset, &mut data).unwrap();
                        assert!(data == flat[at..at + len], "part {part}, round {round}");
                    }
                }
            });
        }
    });
}

#[test]
fn what_is_refused_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("i");
    std::fs::write(&image, vec![0; 4096]).unwrap();
    let server = Server::start(dir.path(), &image);
    let error = NbdLayer::open(Box::new(Unix(server.socket.clone())), "other", kept()).unwrap_err();
    assert!(error.to_string().contains("refuses export \"other\""), "{error}");
    assert!(NbdLayer::open(Box::new(Unix("/nonexistent".into())), "e", kept()).is_err());
}

/// A server of our own that answers late and out of order, and tells when it carries a write out.
struct Slow {
    stream: UnixStream,
}

impl Slow {
    fn request(&mut self) -> Option<(u16, u64, u64, Vec<u8>)> {
        let mut header = [0; wire::REQUEST_BYTES];
        self.stream.read_exact(&mut header).ok()?;
        let kind = u16::from_be_bytes([header[6], header[7]]);
        let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        let len = u32::from_be_bytes(header[24..].try_into().unwrap());
        let mut data = vec![0; if kind == Command::Write as u16 { len as usize } else { 0 }];
        self.stream.read_exact(&mut data).ok()?;
        Some((kind, word(8), word(16), data))
    }

    fn answer(&mut self, cookie: u64) {
        let mut frame = 0x6744_6698u32.to_be_bytes().to_vec();
        frame.extend([0; 4]);
        frame.extend(cookie.to_be_bytes());
        self.stream.write_all(&frame).unwrap();
    }
}

/// The fence: a process dies at any moment of its sending (here: the bytes that the socket took are all that there is). The next one
/// must see the end of each write that the server got whole, of none that it did not, and must not wait for what was answered.
#[test]
fn the_fence_waits_for_what_was_sent_whole() {
    let mut rng = SmallRng::seed_from_u64(1);
    for round in 0..200 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let memory = kept();
        memory.clear();
        let mut slow = Slow { stream: theirs };
        let whole = rng.random_range(0..6usize);
        for slot in 0..whole {
            let header = wire::request(Command::Write, false, slot as u64, 0, 1024);
            memory.send(ours.as_fd(), slot, 0, [&header, &[slot as u8; 1024]]).unwrap();
        }
        let taken: Vec<_> = (0..whole).map(|_| slow.request().unwrap().1).collect();
        // Some are answered; of these, some are noted by the one that died.
        let answered = rng.random_range(0..=whole);
        for cookie in &taken[..answered] {
            slow.answer(*cookie);
        }
        let noted = rng.random_range(0..=answered);
        let mut buffer = Vec::new();
        for _ in 0..noted {
            next_reply(ours.as_fd(), &memory, &mut buffer, None, |reply, _| {
                if let Reply::Simple { cookie, .. } = reply {
                    memory.answered(slot_of(cookie).unwrap());
                }
                Ok(())
            })
            .unwrap();
        }
        // It dies with a frame half out, or out and not noted: as the kernel leaves it.
        let cut = rng.random_range(0..3);
        if cut > 0 {
            let header = wire::request(Command::Write, false, 9, 0, 1024);
            let frame = [&header[..], &[7; 1024]].concat();
            let n = if cut == 1 { rng.random_range(0..frame.len()) } else { frame.len() };
            memory.forge(9, frame.len() as u32, n as u32);
            (&ours).write_all(&frame[..n]).unwrap();
        }
        let late = answered..whole;
        let carried_out = std::sync::Arc::new(AtomicU64::new(0));
        let done = carried_out.clone();
        let expected = late.len() as u64 + u64::from(cut == 2);
        let server = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            for at in late {
                done.fetch_add(1, Relaxed);
                slow.answer(taken[at]);
            }
            while let Some((_, cookie, _, _)) = slow.request() {
                done.fetch_add(1, Relaxed);
                slow.answer(cookie);
            }
        });
        drain(&ours, &memory, Duration::from_secs(5))
            .unwrap_or_else(|e| panic!("round {round}, cut {cut}: {e}"));
        assert_eq!(
            carried_out.load(Relaxed),
            expected,
            "round {round}: everything is over when the fence is passed"
        );
        drop(ours);
        server.join().unwrap();
        assert_eq!(carried_out.load(Relaxed), expected, "round {round}: and nothing comes later");
    }
}

#[test]
fn a_server_that_says_nothing_is_told() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let memory = kept();
    memory.clear();
    let header = wire::request(Command::Write, false, 0, 0, 0);
    memory.send(ours.as_fd(), 0, 0, [&header, &[]]).unwrap();
    let error = drain(&ours, &memory, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(_theirs);
    assert!(drain(&ours, &memory, Duration::from_millis(20)).is_err());
}
