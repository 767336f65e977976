//! hv-core with real processes: starts the real binary in a temporary run directory; this program itself is dom0 and every
//! domain. `cargo test -p hv-core --test domains [NAME-PART]`; needs root.

mod agent;
mod boundaries;
mod fuzz;
mod grants;
mod lives;
mod opens;
mod ports;
mod pvh;
mod raw;
mod system;

use std::io::{Read, Seek};
use std::time::Instant;

type Test = (&'static str, fn());

macro_rules! tests {
    ($($module:ident: $($name:ident),+;)+) => {
        &[$($((concat!(stringify!($module), "::", stringify!($name)), $module::$name as fn())),+),+]
    };
}

const TESTS: &[Test] = tests! {
    lives: first_steps, restart_policy_backoff_and_burst, own_faults_are_told, dom0_restarts_and_services_go_on,
        orderly_end_leaves_nothing, creation_errors_name_the_field, kept_network_namespace, fd_store_quota_and_kinds,
        resources_are_fresh_descriptions, listeners_queue_while_dead, netdevs_move_in, shutdown_and_start_again,
        events_in_order, xsa_380_teardown_is_bounded, second_hv_core_is_refused,
        destroyed_in_every_state, hundreds_of_kills_leak_nothing;
    opens: hung_opens_hold_up_nobody, a_specification_changes_in_a_life;
    ports: round_trip_between_domains, xsa_355_close_and_rebind, anothers_port, virq_dom_exc_tells_of_every_change,
        xsa_496_error_paths_leave_other_state_alone, xsa_344_many_ports;
    grants: region_map_and_copy, anothers_grant, stale_handles, claims_and_drops, xsa_318_every_status_is_written,
        copies_from_grant_to_grant,
        xsa_382_nothing_outside_the_buffer, copy_buffers_die_with_the_incarnation;
    pvh: xsa_18_references_before_any_setup, copy_checks_the_table, copies_from_table_to_table, xsa_500_entry_changes_during_copies,
        maps_need_udmabuf, lying_backend_is_caught, destroyed_guest_is_released;
    boundaries: sandbox_holds_nothing_else, seccomp_kills, control_api_is_dom0s_alone, wrong_roles;
    fuzz: garbage_on_the_hypercall_socket;
};

fn content(file: &mut std::fs::File) -> String {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("a test's output");
    String::from_utf8_lossy(&bytes).into_owned()
}

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
        // Files, not pipes: whatever a failed test leaves running holds its end open, and holds nobody up.
        let [mut out, mut err] = [(); 2].map(|()| tempfile::tempfile().expect("a file for output"));
        let status = std::process::Command::new(std::env::current_exe().expect("own path"))
            .env("HV_CORE_TEST", name)
            .stdout(out.try_clone().expect("another descriptor"))
            .stderr(err.try_clone().expect("another descriptor"))
            .status()
            .expect("running a test");
        let (text, errors) = (content(&mut out), content(&mut err));
        let notes: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("NOTE ")).collect();
        let note = notes.join("; ");
        let took = started.elapsed();
        if status.success() {
            println!("test {name} ... ok ({took:.2?}) {note}");
        } else {
            println!("test {name} ... FAILED ({took:.2?})");
            println!("{text}{errors}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
