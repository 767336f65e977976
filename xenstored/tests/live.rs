//! Live update of the real daemon under load: connections, watches, transactions and half-sent requests stay.

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::Daemon;

/// A client that never connects again: whatever happens, this is its one connection.
struct Client {
    stream: UnixStream,
    req_id: u32,
    events: Vec<Vec<u8>>,
}

impl Client {
    fn new(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        Self { stream, req_id: 0, events: Vec::new() }
    }

    fn message(&mut self, op: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
        self.req_id += 1;
        let head = [op, self.req_id, tx, payload.len() as u32].map(u32::to_ne_bytes).concat();
        [&head, payload].concat()
    }

    fn receive(&mut self) -> (u32, Vec<u8>) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).expect("the connection lives");
        let word = |i: usize| u32::from_ne_bytes(head[4 * i..4 * i + 4].try_into().expect("word"));
        let mut payload = vec![0; word(3) as usize];
        self.stream.read_exact(&mut payload).expect("payload");
        if word(0) != 15 {
            assert_eq!(word(1), self.req_id, "replies come in order, each once");
        }
        (word(0), payload)
    }

    fn reply(&mut self) -> (u32, Vec<u8>) {
        loop {
            match self.receive() {
                (15, event) => self.events.push(event),
                reply => return reply,
            }
        }
    }

    fn ask(&mut self, op: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
        let message = self.message(op, tx, payload);
        self.stream.write_all(&message).expect("send");
        let (kind, reply) = self.reply();
        assert_eq!(kind, op, "{}", String::from_utf8_lossy(&reply));
        reply
    }

    fn control(&mut self, args: &[&str]) -> String {
        let payload: Vec<u8> = args.iter().flat_map(|a| [a.as_bytes(), b"\0"].concat()).collect();
        let reply = self.ask(0, 0, &payload);
        String::from_utf8_lossy(&reply).trim_end_matches('\0').to_owned()
    }
}

fn update(client: &mut Client, file: &str, options: &[&str]) {
    assert_eq!(client.control(&["live-update", "-f", file]), "OK");
    assert_eq!(client.control(&[&["live-update", "-s", "-t", "5"], options].concat()), "OK");
}

#[test]
fn everything_is_kept_in_the_journal() {
    everything_is_kept(&[]);
}

#[test]
fn everything_is_kept_in_a_stream() {
    everything_is_kept(&["-v", "2"]);
}

#[test]
fn everything_is_kept_in_a_stream_of_version_1() {
    everything_is_kept(&["-v", "1"]);
}

fn everything_is_kept(options: &[&str]) {
    let daemon = Daemon::start();
    let binary = daemon.dir.path().join("new-xenstored");
    std::fs::copy(env!("CARGO_BIN_EXE_xenstored"), &binary).expect("copy");
    let file = binary.to_str().expect("text");
    let pid = daemon.pid();
    let (mut a, mut b, mut admin) =
        (Client::new(&daemon.socket()), Client::new(&daemon.socket()), Client::new(&daemon.socket()));
    a.ask(4, 0, b"/w\0token\0");
    let tx: u32 = String::from_utf8_lossy(&a.ask(6, 0, b"\0")).trim_end_matches('\0').parse().expect("id");
    a.ask(11, tx, b"/w/in-tx\x001");
    // One that saw what another changes after the update, and one that saw what was changed before.
    let start = |client: &mut Client| -> u32 {
        String::from_utf8_lossy(&client.ask(6, 0, b"\0")).trim_end_matches('\0').parse().expect("id")
    };
    let (late, early, clean) = (start(&mut admin), start(&mut admin), start(&mut admin));
    admin.ask(11, 0, b"/seen\0old");
    admin.ask(11, 0, b"/changed\0old");
    for tx in [late, early, clean] {
        assert_eq!(admin.ask(2, tx, b"/seen\0"), b"old");
        admin.ask(11, tx, format!("/by-{tx}\0x").as_bytes());
    }
    // What it saw counts although it has changed it itself.
    admin.ask(11, late, b"/seen\0mine");
    assert_eq!(admin.ask(2, early, b"/changed\0"), b"old");
    admin.ask(11, 0, b"/changed\0new");
    // A request of which the half is sent.
    let half = b.message(11, 0, b"/w/half\0whole");
    b.stream.write_all(&half[..20]).expect("send");
    for bad in ["/nonexistent", "/dev/null"] {
        assert!(admin.control(&["live-update", "-f", bad]).starts_with("File not"), "{bad}");
    }
    for other in ["/bin/true", "/bin/false"] {
        assert!(admin.control(&["live-update", "-f", other]).contains("does not take over"), "{other}");
    }
    assert_eq!(admin.control(&["live-update", "-f", file]), "OK");
    assert_eq!(admin.control(&["live-update", "-a"]), "OK");
    assert_eq!(admin.control(&["live-update", "-s"]), "Not in live-update session.");
    for round in 0..5 {
        update(&mut admin, file, options);
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).expect("the same process");
        assert!(exe.ends_with("new-xenstored"), "round {round}: {exe:?}");
    }
    b.stream.write_all(&half[20..]).expect("send");
    assert_eq!(b.reply(), (11, b"OK\0".to_vec()));
    admin.ask(7, clean, b"T\0");
    admin.ask(11, 0, b"/seen\0new");
    for tx in [late, early] {
        let end = admin.message(7, tx, b"T\0");
        admin.stream.write_all(&end).expect("send");
        assert_eq!(admin.reply(), (16, b"EAGAIN\0".to_vec()));
    }
    let by = |tx: u32| format!("/by-{tx}\0").into_bytes();
    assert_eq!(admin.ask(2, 0, &by(clean)), b"x");
    a.ask(11, tx, b"/w/in-tx2\x002");
    a.ask(7, tx, b"T\0");
    assert_eq!(b.ask(2, 0, b"/w/in-tx2\0"), b"2");
    a.ask(2, 0, b"/w/half\0");
    let seen: Vec<String> = a.events.iter().map(|e| String::from_utf8_lossy(e).into_owned()).collect();
    assert_eq!(seen, ["/w\0token\0", "/w/half\0token\0", "/w/in-tx\0token\0", "/w/in-tx2\0token\0"]);
    assert_eq!(admin.control(&["check"]), "OK");
    // New clients find the same socket.
    assert_eq!(Client::new(&daemon.socket()).ask(2, 0, b"/w/in-tx\0"), b"1");
}

/// 10,000 nodes, four busy clients: the longest time without an answer.
#[test]
fn the_gap_is_short() {
    let daemon = Daemon::start();
    let mut admin = Client::new(&daemon.socket());
    for i in 0..10_000 {
        admin.ask(11, 0, format!("/n/{}/{i}\0value {i}", i / 100).as_bytes());
    }
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|number| {
            let (socket, stop) = (daemon.socket(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut client = Client::new(&socket);
                let path = format!("/load/{number}\0");
                let (mut longest, mut count) = (Duration::ZERO, 0u64);
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    client.ask(11, 0, format!("{path}{count}").as_bytes());
                    assert_eq!(client.ask(2, 0, path.as_bytes()), count.to_string().into_bytes());
                    longest = longest.max(start.elapsed());
                    count += 1;
                }
                (longest, count)
            })
        })
        .collect();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(20));
        update(&mut admin, env!("CARGO_BIN_EXE_xenstored"), &[]);
    }
    stop.store(true, Ordering::Relaxed);
    let results: Vec<_> = clients.into_iter().map(|c| c.join().expect("client")).collect();
    let longest = results.iter().map(|(longest, _)| *longest).max().expect("clients");
    println!("longest {longest:?}, {} requests", results.iter().map(|(_, n)| 2 * n).sum::<u64>());
    // The goal is 20 ms on a machine of one's own; a shared one gets some more.
    assert!(longest < Duration::from_millis(400), "{longest:?}");
}

#[test]
fn streams_go_round() {
    let mut daemon = Daemon::start();
    let mut client = Client::new(&daemon.socket());
    client.ask(11, 0, b"/a/b\0value");
    client.ask(14, 0, b"/a/b\0n5\0r6\0");
    client.ask(26, 0, b"watches\x0077\0");
    client.ask(4, 0, b"/a\0t\0");
    daemon.kill();
    let path = |name: &str| daemon.dir.path().join(name).display().to_string();
    let run = |args: &[&str]| {
        let out =
            std::process::Command::new(env!("CARGO_BIN_EXE_xenstored")).args(args).output().expect("run");
        (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let state = daemon.state().display().to_string();
    let (stream, copy) = (path("stream"), path("copy"));
    assert!(run(&["--export", &stream, "--state", &state]).0);
    let (done, said) = run(&["--import", &stream, "--state", &copy]);
    assert!(done && said.contains("1 watches"), "{said}");
    assert!(!run(&["--import", &stream, "--state", &copy]).0, "only into a new state");
    std::fs::rename(&copy, daemon.state()).expect("rename");
    daemon.spawn();
    daemon.wait();
    let mut client = Client::new(&daemon.socket());
    assert_eq!(client.ask(2, 0, b"/a/b\0"), b"value");
    assert_eq!(client.ask(3, 0, b"/a/b\0"), b"n5\0r6\0");
    assert_eq!(client.ask(25, 0, b"watches\0"), b"77\0");
}
