//! Place-holder for **qemu-bridge**: device models and QEMU guests as restartable compartments.
//!
//! This program does nothing yet and says so. What it will be is in `docs/architecture.md`, "Not there yet".

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "qemu-bridge: not part of this release. Guests run as PVH domains (type = \"pvh\") or process domains \
         (type = \"process\"); see docs/domain-file.md"
    );
    // EX_UNAVAILABLE of sysexits.h.
    ExitCode::from(69)
}
