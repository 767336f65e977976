//! Starts the emulator, moves CMD's streams, and tells how the run ended.

use super::{LabArgs, RunDir, deadline, image, target_inside_tree};
use crate::debian::Kernel;
use crate::{paths, run as exec};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// The emulated CPU: SVM with nested paging, and without what was seen to go wrong under it
/// (docs/lab.md).
const CPU: &str = "EPYC,+svm,+npt,-smap,-monitor,-rdtscp,-xsave,-xsavec,-xsaveopt,-xgetbv1,-xsaves,\
                   -avx,-avx2,-f16c,-fma,check=off";

/// Mitigations cost time and protect nothing under emulation; the TSC is the host's and is stable,
/// which KVM's guests need to hear. On a busy host the emulator gets too little time for the check of
/// the timer's interrupts, which then ends in a panic.
const CMDLINE: &str = "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check \
                       cryptomgr.notests random.trust_cpu=on 8250.nr_uarts=1 audit=0";

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// CMD ended with this status (128 + N when a signal N ended it).
    Exited(i32),
    /// CMD reported that the emulator broke its guest (text from `/run/lab/emulator-fault`).
    Fault(String),
    /// The emulator or L1's kernel died first; says what is known.
    Died(String),
    /// Nothing ended in time; says what was seen last.
    Timeout(String),
}

enum Event {
    Up,
    Fault(String),
    Exit(i32),
    /// The control stream ended: the emulator is gone.
    Gone,
}

/// Runs CMD in a new L1.
pub fn run(args: &LabArgs, kernel: &Kernel) -> Result<Outcome> {
    let dir = RunDir::new(args.keep)?;
    let initrd = image::initrd(args, kernel, &dir.path)?;
    let listeners = ["out", "err", "control"].map(|name| {
        let path = dir.path.join(name);
        UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))
    });
    let [out, err, control] = listeners;
    let (out, err, control) = (out?, err?, control?);
    let mut cmd = command(args, kernel, &initrd, &dir.path)?;
    if args.verbose {
        eprintln!("lab: {}", exec::show(&cmd));
    }
    let _terminal = args.tty.then(Terminal::save);
    let started = Instant::now();
    let limit = deadline(args);
    let log = File::create(dir.path.join("qemu.log"))?;
    cmd.stdin(if args.tty { Stdio::inherit() } else { Stdio::null() })
        .stdout(if args.tty { Stdio::inherit() } else { log.try_clone()?.into() })
        .stderr(log);
    let mut qemu = Qemu(cmd.spawn().with_context(|| format!("cannot start {}", exec::show(&cmd)))?);

    let accepted = accept(&mut qemu, [&out, &err, &control], started + Duration::from_secs(20));
    let [out, err, control] = match accepted {
        Ok(streams) => streams,
        Err(e) => bail!("{e:#}: {}", tail(&dir.path.join("qemu.log"))),
    };
    if args.stdin && !args.tty {
        let to = out.try_clone()?;
        thread::spawn(move || forward_stdin(to));
    }
    let out = thread::spawn(move || copy(out, &mut io::stdout()));
    let err = thread::spawn(move || copy(err, &mut io::stderr()));
    let (events, receiver) = mpsc::channel();
    let heart = control.try_clone()?;
    thread::spawn(move || beat(heart));
    thread::spawn(move || listen(control, &events));

    let outcome = wait(args, &receiver, limit, started, &mut qemu, &dir.path);
    // The control message comes after the last byte of CMD's output was taken over by the
    // emulator, so ending it here loses nothing.
    qemu.end();
    out.join().ok();
    err.join().ok();
    Ok(outcome)
}

/// The terminal's settings, put back when dropped: the emulator makes it raw and is then killed.
struct Terminal(Option<String>);

impl Terminal {
    fn save() -> Self {
        Self(stty("-g"))
    }
}

fn stty(arg: &str) -> Option<String> {
    let mut cmd = Command::new("stty");
    let out = cmd.arg(arg).stdin(Stdio::inherit()).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    out.status.success().then_some(text)
}

/// Rows and columns of our terminal, if we have one.
pub fn terminal_size() -> Option<(u16, u16)> {
    let text = stty("size")?;
    let (rows, cols) = text.split_once(' ')?;
    Some((rows.parse().ok()?, cols.parse().ok()?))
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            Command::new("stty").arg(settings).status().ok();
        }
    }
}

struct Qemu(Child);

impl Qemu {
    fn end(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
    }
}

fn command(args: &LabArgs, kernel: &Kernel, initrd: &Path, dir: &Path) -> Result<Command> {
    // setpriv makes the emulator end with us however we end.
    let mut cmd = Command::new("setpriv");
    cmd.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    cmd.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    cmd.args(["-machine", "q35,accel=tcg", "-smp", "1", "-cpu", CPU]);
    cmd.args(["-m", &format!("{}M", args.memory), "-rtc", "base=utc"]);
    cmd.arg("-kernel").arg(&kernel.vmlinuz);
    cmd.arg("-initrd").arg(initrd);
    cmd.args(["-append", &format!("{CMDLINE} {}", args.append)]);
    let console = dir.join("console.log");
    cmd.args(["-chardev", &format!("file,id=con,path={}", console.display())]);
    cmd.args(["-serial", "chardev:con", "-device", "virtio-serial-pci"]);
    for name in ["out", "err", "control"] {
        let path = dir.join(name);
        cmd.args(["-chardev", &format!("socket,id={name},path={}", path.display())]);
        cmd.args(["-device", &format!("virtserialport,chardev={name},name=bh.{name}")]);
    }
    if args.tty {
        cmd.args(["-chardev", "stdio,id=tty,signal=off", "-device", "virtconsole,chardev=tty"]);
    }
    share(&mut cmd, "root", &args.root, true);
    share(&mut cmd, "tree", &paths::root(), false);
    if !target_inside_tree() {
        share(&mut cmd, "target", &paths::target(), false);
    }
    for (n, mib) in args.disks.iter().enumerate() {
        let path = dir.join(format!("disk{n}"));
        File::create(&path)?.set_len(u64::from(*mib) << 20)?;
        let file = path.display();
        cmd.args(["-drive", &format!("if=none,id=d{n},format=raw,cache=unsafe,file={file}")]);
        cmd.args(["-device", &format!("virtio-blk-pci,drive=d{n}")]);
    }
    Ok(cmd)
}

fn share(cmd: &mut Command, tag: &str, path: &Path, readonly: bool) {
    let ro = if readonly { ",readonly=on" } else { "" };
    // A comma in QEMU's option values is doubled.
    let path = path.display().to_string().replace(',', ",,");
    cmd.args(["-fsdev", &format!("local,id={tag},path={path},security_model=none,multidevs=remap{ro}")]);
    cmd.args(["-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
}

fn accept(qemu: &mut Qemu, from: [&UnixListener; 3], limit: Instant) -> Result<[UnixStream; 3]> {
    let mut streams = Vec::new();
    for listener in from {
        listener.set_nonblocking(true)?;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            if let Some(status) = qemu.0.try_wait()? {
                bail!("the emulator did not start ({status})");
            }
            if Instant::now() > limit {
                bail!("the emulator opened no stream in 20 s");
            }
            thread::sleep(Duration::from_millis(5));
        };
        stream.set_nonblocking(false)?;
        streams.push(stream);
    }
    streams.try_into().map_err(|_| anyhow::anyhow!("three streams expected"))
}

/// Copies without holding anything back, so that progress is seen as it happens.
fn copy(mut from: UnixStream, to: &mut dyn Write) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buf) {
        if n == 0 || to.write_all(&buf[..n]).is_err() || to.flush().is_err() {
            break;
        }
    }
}

/// How long a lost interrupt stays lost (see [`beat`]).
const BEAT: Duration = Duration::from_millis(50);

/// Interrupts L1 now and then, until the emulator ends.
///
/// QEMU's SVM changes a CPU's pending interrupts (`interrupt_request`) at VMRUN and #VMEXIT without the lock that its timers hold when they
/// add to them (before QEMU 10.2). So an interrupt is lost at times: it waits in the local APIC, and nobody tells the CPU. Any other
/// interrupt makes up for it; but when it was the one-shot timer and L1 idles, there is none and L1 stands still for good.
fn beat(mut control: UnixStream) {
    while control.write_all(b"\n").is_ok() {
        thread::sleep(BEAT);
    }
}

fn forward_stdin(mut to: UnixStream) {
    let mut buf = vec![0; 16 << 10];
    let mut stdin = io::stdin().lock();
    while let Ok(n) = stdin.read(&mut buf) {
        if n == 0 || to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
}

fn listen(control: UnixStream, events: &Sender<Event>) {
    for line in BufReader::new(control).lines().map_while(Result::ok) {
        let event = match line.split_once(' ') {
            None if line == "up" => Event::Up,
            Some(("exit", code)) => Event::Exit(code.trim().parse().unwrap_or(super::EXIT_LAB)),
            Some(("fault", what)) => Event::Fault(what.to_owned()),
            _ => continue,
        };
        if events.send(event).is_err() {
            return;
        }
    }
    events.send(Event::Gone).ok();
}

fn wait(
    args: &LabArgs,
    events: &Receiver<Event>,
    limit: Instant,
    started: Instant,
    qemu: &mut Qemu,
    dir: &Path,
) -> Outcome {
    let mut up = false;
    let mut fault = None;
    loop {
        let left = limit.saturating_duration_since(Instant::now());
        match events.recv_timeout(left) {
            Ok(Event::Up) => {
                up = true;
                if args.verbose {
                    eprintln!("lab: up after {:.1} s", started.elapsed().as_secs_f32());
                }
            }
            Ok(Event::Fault(what)) => fault = Some(what),
            Ok(Event::Exit(code)) => {
                return match fault {
                    Some(what) => Outcome::Fault(what),
                    None => Outcome::Exited(code),
                };
            }
            Err(RecvTimeoutError::Timeout) => {
                let doing = if up { "the command was running" } else { "L1 was not up" };
                return Outcome::Timeout(format!("{doing}; {}", console(dir)));
            }
            Ok(Event::Gone) | Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(Duration::from_millis(200));
                let status = match qemu.0.try_wait() {
                    Ok(Some(status)) => format!("the emulator ended ({status})"),
                    _ => "the emulator closed its streams".to_owned(),
                };
                let words = tail(&dir.join("qemu.log"));
                return Outcome::Died(format!("{status} {words}; {}", console(dir)));
            }
        }
    }
}

fn console(dir: &Path) -> String {
    let text = tail(&dir.join("console.log"));
    if text.is_empty() {
        "L1's console is empty".to_owned()
    } else {
        format!("the end of L1's console:\n{text}")
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    exec::tail(&String::from_utf8_lossy(&text), 25)
}
