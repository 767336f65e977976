//! The console of a Linux guest.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Mutex;

use workload::report::Report;

/// The console. Shared by all threads.
pub struct Reporter {
    out: Mutex<Option<File>>,
}

impl Reporter {
    /// Takes Xen's console, else the one that the kernel chose.
    pub fn open() -> Self {
        let open = |path: &str| OpenOptions::new().write(true).open(path).ok();
        Self { out: Mutex::new(open("/dev/hvc0").or_else(|| open("/dev/console"))) }
    }
}

impl Report for Reporter {
    fn write(&self, line: &str) {
        if let Ok(mut out) = self.out.lock()
            && let Some(out) = out.as_mut()
        {
            out.write_all(line.as_bytes()).ok();
        }
    }
}
