//! hv-core with real processes: starts the real binary in a temporary run directory; this program itself is dom0 and every
//! domain. `cargo test -p hv-core --test domains [NAME-PART]`; needs root.

mod agent;
mod boundaries;
mod fuzz;
mod grants;
mod lives;
mod ports;
mod pvh;
mod raw;
mod system;

use std::time::Instant;

type Test = (&'static str, fn());

macro_rules! tests {
    ($($module:ident: $($name:ident),+;)+) => {
        &[$($((concat!(stringify!($module), "::", stringify!($name)), $module::$name as fn())),+),+]
    };
}

const TESTS: &[Test] = tests! {
    lives: first_steps;
};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "agent") {
        agent::run(&args[1..]);
    }
    if args.iter().any(|a| a == "--list") {
        for (name, _) in TESTS {
            println!("{name}: test");
        }
        return;
    }
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("domains: NOT RUN, needs root");
        return;
    }
    // Each test in a process of its own: a failed one takes its hv-core with it.
    if let Ok(name) = std::env::var("HV_CORE_TEST") {
        let test = TESTS.iter().find(|(n, _)| *n == name).expect("a test of that name");
        test.1();
        return;
    }
    let mut failed = Vec::new();
    let chosen = TESTS
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())));
    for (name, _) in chosen {
        let started = Instant::now();
        let output = std::process::Command::new(std::env::current_exe().expect("own path"))
            .env("HV_CORE_TEST", name)
            .output()
            .expect("running a test");
        let text = String::from_utf8_lossy(&output.stdout);
        let note = text.lines().find(|l| l.starts_with("NOTE")).unwrap_or_default();
        let took = started.elapsed();
        if output.status.success() {
            println!("test {name} ... ok ({took:.2?}) {note}");
        } else {
            println!("test {name} ... FAILED ({took:.2?})");
            println!("{text}{}", String::from_utf8_lossy(&output.stderr));
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
