//! The console of a process guest.

use std::io::Write;
use std::sync::Mutex;

use domain_kit::Domain;
use frontends::console::Console;
use workload::report::Report;

/// The console, or stderr where there is none. Shared by all threads.
pub struct Reporter {
    console: Mutex<Option<Console>>,
}

impl Reporter {
    /// Takes the domain's console ring.
    pub fn open(domain: &Domain) -> Self {
        let console = Console::open(domain).unwrap_or_else(|error| {
            tracing::warn!(%error, "no console; reports go to stderr");
            None
        });
        Reporter { console: Mutex::new(console) }
    }
}

impl Report for Reporter {
    fn write(&self, line: &str) {
        let mut console = self.console.lock().unwrap_or_else(|e| e.into_inner());
        match console.as_mut() {
            Some(console) => {
                console.write(line.as_bytes());
                // Nobody reads input here; it is taken so that the backend's ring never stays full.
                console.read(&mut Vec::new());
            }
            // Nowhere else to say that this failed.
            None => drop(std::io::stderr().write_all(line.as_bytes())),
        }
    }
}
