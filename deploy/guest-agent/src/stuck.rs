//! Steps that are told when they begin and end, and looked into when they take too long: so that a hang says where it hangs.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};
use workload::report::{Json, Report};

/// After this a step is looked into, and again each time as much later.
const LONG: Duration = Duration::from_secs(60);
/// Tasks told of at most, and lines of each one's stack.
const MOST: (usize, usize) = (12, 16);

/// A step under way; its drop is its end.
pub struct Step {
    disk: String,
    name: String,
    began: Instant,
    reporter: &'static dyn Report,
    /// Closed with the step.
    _ended: mpsc::Sender<()>,
}

impl Step {
    /// Tells that it begins.
    pub fn begin(disk: &str, name: &str, reporter: &'static dyn Report) -> Self {
        reporter.line(&Json::new("step").text("disk", disk).text("name", name));
        let (_ended, end) = mpsc::channel::<()>();
        let (place, step) = (disk.to_owned(), name.to_owned());
        thread::spawn(move || {
            while end.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
                blocked(&place, &step, reporter);
            }
        });
        Self { disk: disk.to_owned(), name: name.to_owned(), began: Instant::now(), reporter, _ended }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let line = Json::new("step").text("disk", &self.disk).text("name", &self.name);
        self.reporter.line(&line.millis("ms", self.began.elapsed()));
    }
}

/// Tells what each task waits for in the kernel, and which requests its disks have in flight.
fn blocked(disk: &str, step: &str, reporter: &dyn Report) {
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let line = Json::new("blocked").text("disk", disk).text("step", step);
    reporter.line(&line.text("inflight", read(format!("/sys/block/{disk}/inflight")).trim()));
    let tasks = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = tasks.filter_map(|entry| entry.file_name().into_string().ok()?.parse::<u32>().ok());
    let waiting = numbers.filter(|pid| {
        let stat = read(format!("/proc/{pid}/stat"));
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['D', 'R']))
            // What brings disks up and down.
            || read(format!("/proc/{pid}/comm")).starts_with("xen")
    });
    for pid in waiting.take(MOST.0) {
        let stack = read(format!("/proc/{pid}/stack"));
        let stack: Vec<&str> = stack.lines().take(MOST.1).map(str::trim).collect();
        reporter.line(
            &Json::new("blocked")
                .text("task", read(format!("/proc/{pid}/comm")).trim())
                .text("wchan", &read(format!("/proc/{pid}/wchan")))
                .text("stack", &stack.join(" < ")),
        );
    }
}
