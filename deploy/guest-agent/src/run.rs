//! Scripts that the kernel command line brings.

use crate::system;
use std::process::Command;
use workload::report::{Json, Report};

/// Runs all of them, one after the other, and tells what they say and how each ended.
pub fn all(scripts: &[String], reporter: &dyn Report) {
    for (number, script) in scripts.iter().enumerate() {
        let number = number as u64;
        let said = |line: &str| reporter.line(&Json::new("run").count("script", number).text("line", line));
        let end = Json::new("run_end").count("script", number);
        let mut shell = Command::new("/bin/busybox");
        reporter.line(&match system::lines_of(shell.args(["sh", "-c", script]), said) {
            Ok(status) => end.maybe("why", None).number("status", f64::from(status.code().unwrap_or(-1))),
            Err(e) => end.text("why", &e.to_string()).number("status", -1.0),
        });
    }
}
