//! A checked byte stream over TCP, both ways at once. Each direction is a pseudo-random stream by
//! offset; every byte is compared. Both ends run this code.
//!
//! The client opens with 16 bytes: a magic word and the seed of the connection.

use crate::pattern::{check_stream, fill_stream, mix};
use crate::stall::GapMeter;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const MAGIC: u64 = u64::from_le_bytes(*b"BHSTREAM");
const CHUNK: usize = 16 << 10;

/// What a client sends first on a connection of this seed.
#[must_use]
pub fn hello(seed: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..].copy_from_slice(&seed.to_le_bytes());
    bytes
}

/// Totals of one end so far. All counters only grow.
#[derive(Debug, Default)]
pub struct StreamStats {
    /// Connections that were made.
    pub connects: AtomicU64,
    /// Bytes handed to the kernel.
    pub tx_bytes: AtomicU64,
    /// Bytes received and found right.
    pub rx_bytes: AtomicU64,
    /// Connections ended by anything but an orderly end (reset, broken pipe, timeout).
    pub resets: AtomicU64,
    /// Connections that the other end closed in order.
    pub closed: AtomicU64,
    /// Wrong bytes (counted once for each connection, which then ends).
    pub corrupt: AtomicU64,
    /// Gaps between received pieces.
    pub rx_gap: GapMeter,
    first: Mutex<Option<String>>,
}

impl StreamStats {
    /// The first reset or wrong byte in words.
    #[must_use]
    pub fn first_problem(&self) -> Option<String> {
        self.first.lock().map_or(None, |f| f.clone())
    }

    /// Counts a reset or a wrong byte, and keeps the first one's words.
    pub fn problem(&self, counter: &AtomicU64, text: impl FnOnce() -> String) {
        counter.fetch_add(1, Relaxed);
        if let Ok(mut first) = self.first.lock() {
            first.get_or_insert_with(text);
        }
    }
}

/// What both ends of a stream are told.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// Upper limit of what this end sends, in bytes a second (0: as fast as it goes).
    pub rate: u64,
    /// Ends the stream in order when it becomes true.
    pub stop: Arc<AtomicBool>,
}

/// Connects to `peer`, again after each loss, until told to stop or the other end closes in order.
pub fn client(peer: SocketAddr, seed: u64, config: &StreamConfig, stats: &StreamStats) {
    let mut round = 0;
    while !config.stop.load(Relaxed) {
        let connected = TcpStream::connect_timeout(&peer, Duration::from_secs(10));
        let Ok(mut sock) = connected else {
            // Not up yet: no connection existed, so none was lost.
            thread::sleep(Duration::from_millis(200));
            continue;
        };
        round += 1;
        let seed = mix(seed ^ round);
        stats.connects.fetch_add(1, Relaxed);
        if let Err(e) = sock.write_all(&hello(seed)) {
            stats.problem(&stats.resets, || format!("hello: {e}"));
            continue;
        }
        if exchange(sock, seed, true, config, stats) {
            break;
        }
    }
}

/// Serves connections, each in a thread, until told to stop.
///
/// # Errors
/// When the listener fails.
pub fn serve(listener: &TcpListener, config: &StreamConfig, stats: &Arc<StreamStats>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut threads = Vec::new();
    while !config.stop.load(Relaxed) {
        match listener.accept() {
            Ok((sock, _)) => {
                sock.set_nonblocking(false)?;
                let (config, stats) = (config.clone(), Arc::clone(stats));
                threads.push(thread::spawn(move || serve_one(sock, &config, &stats)));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(e),
        }
    }
    for thread in threads {
        thread.join().ok();
    }
    Ok(())
}

fn serve_one(mut sock: TcpStream, config: &StreamConfig, stats: &StreamStats) {
    let mut hello = [0; 16];
    stats.connects.fetch_add(1, Relaxed);
    sock.set_read_timeout(Some(Duration::from_secs(10))).ok();
    if let Err(e) = sock.read_exact(&mut hello) {
        stats.problem(&stats.resets, || format!("hello: {e}"));
        return;
    }
    let (words, _) = hello.as_chunks::<8>();
    if u64::from_le_bytes(words[0]) != MAGIC {
        stats.problem(&stats.corrupt, || "hello: not a stream of ours".to_owned());
        return;
    }
    exchange(sock, u64::from_le_bytes(words[1]), false, config, stats);
}

/// Runs both directions; true when the connection ended in order.
fn exchange(sock: TcpStream, seed: u64, client: bool, config: &StreamConfig, stats: &StreamStats) -> bool {
    sock.set_nodelay(true).ok();
    let (tx_seed, rx_seed) = if client { (seed, mix(seed)) } else { (mix(seed), seed) };
    let over = AtomicBool::new(false);
    // One connection counts as lost once, whichever direction notices.
    let lost = |what: &str, e: &io::Error| {
        if !over.swap(true, Relaxed) {
            stats.problem(&stats.resets, || format!("{what}: {e}"));
        }
    };
    stats.rx_gap.progress();
    thread::scope(|s| {
        s.spawn(|| {
            if let Err(e) = send(&sock, tx_seed, config, stats, &over) {
                lost("send", &e);
                sock.shutdown(Shutdown::Both).ok();
            } else {
                sock.shutdown(Shutdown::Write).ok();
            }
        });
        match receive(&sock, rx_seed, config, stats, &over) {
            Ok(()) => {}
            Err(e) => {
                lost("receive", &e);
                sock.shutdown(Shutdown::Both).ok();
            }
        }
        stats.rx_gap.pause();
        let in_order = !over.swap(true, Relaxed);
        if in_order {
            stats.closed.fetch_add(1, Relaxed);
        }
        in_order
    })
}

fn send(
    mut sock: &TcpStream,
    seed: u64,
    config: &StreamConfig,
    stats: &StreamStats,
    over: &AtomicBool,
) -> io::Result<()> {
    // A write that blocks is how a pause of the other side shows; it must still hear of the end.
    sock.set_write_timeout(Some(Duration::from_millis(500)))?;
    // Small pieces at a low rate keep the stream moving, so that a pause is seen as one.
    let piece = match config.rate {
        0 => CHUNK,
        rate => CHUNK.min((rate as usize / 50).max(64)),
    };
    let mut buf = vec![0; piece];
    let mut offset = 0;
    let start = Instant::now();
    while !config.stop.load(Relaxed) && !over.load(Relaxed) {
        fill_stream(seed, offset, &mut buf);
        let mut done = 0;
        while done < buf.len() {
            match sock.write(&buf[done..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if again(&e) => {
                    if config.stop.load(Relaxed) || over.load(Relaxed) {
                        return Ok(());
                    }
                }
                Err(e) => return Err(e),
            }
        }
        offset += done as u64;
        stats.tx_bytes.fetch_add(done as u64, Relaxed);
        if config.rate != 0 {
            let due = Duration::from_secs_f64(offset as f64 / config.rate as f64);
            // Never catch up on a pause with a burst longer than that: the clock is the limit.
            let ahead = due.saturating_sub(start.elapsed());
            thread::sleep(ahead.min(Duration::from_millis(500)));
        }
    }
    Ok(())
}

fn receive(
    mut sock: &TcpStream,
    seed: u64,
    config: &StreamConfig,
    stats: &StreamStats,
    over: &AtomicBool,
) -> io::Result<()> {
    sock.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut buf = vec![0; CHUNK];
    let mut offset = 0;
    let mut stopping: Option<Instant> = None;
    loop {
        match sock.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                if let Some(at) = check_stream(seed, offset, &buf[..n]) {
                    over.store(true, Relaxed);
                    stats.problem(&stats.corrupt, || format!("wrong byte at offset {at}"));
                    return Err(io::ErrorKind::InvalidData.into());
                }
                offset += n as u64;
                stats.rx_bytes.fetch_add(n as u64, Relaxed);
                stats.rx_gap.progress();
            }
            Err(e) if again(&e) => {
                if over.load(Relaxed) {
                    return Ok(());
                }
            }
            Err(e) => return Err(e),
        }
        if config.stop.load(Relaxed) {
            // What is still under way is read and compared, but not for ever.
            let since = *stopping.get_or_insert_with(Instant::now);
            if since.elapsed() > Duration::from_secs(2) {
                return Ok(());
            }
        }
    }
}

fn again(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
        && e.raw_os_error() != Some(nix::errno::Errno::ETIMEDOUT as i32)
}

#[cfg(test)]
mod tests {
    use super::{MAGIC, StreamConfig, StreamStats, client, serve};
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::thread;
    use std::time::Duration;

    fn config(rate: u64) -> StreamConfig {
        StreamConfig { rate, stop: Arc::new(AtomicBool::new(false)) }
    }

    #[test]
    fn both_ways_and_an_orderly_end() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let addr = listener.local_addr().expect("addr");
        let (server, clients) = (config(1 << 20), config(0));
        let (ss, cs) = (Arc::new(StreamStats::default()), Arc::new(StreamStats::default()));
        thread::scope(|s| {
            s.spawn(|| serve(&listener, &server, &ss).expect("serve"));
            s.spawn(|| client(addr, 5, &clients, &cs));
            thread::sleep(Duration::from_millis(300));
            clients.stop.store(true, Relaxed);
            thread::sleep(Duration::from_millis(100));
            server.stop.store(true, Relaxed);
        });
        for stats in [&ss, &cs] {
            assert_eq!(stats.first_problem(), None);
            assert_eq!(stats.resets.load(Relaxed) + stats.corrupt.load(Relaxed), 0);
            assert_eq!(stats.closed.load(Relaxed), 1);
            assert!(stats.rx_bytes.load(Relaxed) > 100_000);
        }
        assert_eq!(ss.rx_bytes.load(Relaxed), cs.tx_bytes.load(Relaxed));
    }

    #[test]
    fn a_wrong_byte_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let addr = listener.local_addr().expect("addr");
        let server = config(1000);
        let stats = Arc::new(StreamStats::default());
        thread::scope(|s| {
            s.spawn(|| serve(&listener, &server, &stats).expect("serve"));
            let mut sock = TcpStream::connect(addr).expect("connect");
            sock.write_all(&MAGIC.to_le_bytes()).expect("send");
            sock.write_all(&[0; 100]).expect("send");
            thread::sleep(Duration::from_millis(200));
            server.stop.store(true, Relaxed);
        });
        assert_eq!(stats.corrupt.load(Relaxed), 1);
        assert_eq!(stats.resets.load(Relaxed), 0);
    }
}
