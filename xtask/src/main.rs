//! Project automation: demo, test, lab, bench, soak, fuzz
//!
//! Each task is a module with its options (`…Args`) and a `run` that returns the exit status.

mod bench;
mod checks;
mod cpio;
mod debian;
mod demo;
mod fuzz;
mod guest;
mod lab;
mod lab_tests;
mod libtest;
mod licences;
mod modules;
mod paths;
mod run;
mod setup;
mod soak;
mod tools;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about, version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The main job: a guest under load while every part of the system is killed under it.
    Demo(demo::DemoArgs),
    /// Runs all checks and tests.
    Test(checks::TestArgs),
    /// Measures the system beside the machine's limits.
    Bench(bench::BenchArgs),
    /// Runs the kill runs with their full counts.
    Soak(soak::SoakArgs),
    /// Runs the coverage-guided fuzzers.
    Fuzz(fuzz::FuzzArgs),
    /// Runs a command as root in the lab (L1 with hardware virtualization, emulated).
    Lab(lab::LabArgs),
    /// Makes the guest images (Debian kernels, our initramfs).
    GuestImage(guest::GuestArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The second part is the status on an error of ours.
    let (result, on_error) = match &cli.task {
        Task::Demo(args) => (demo::run(args), 1),
        Task::Test(args) => (checks::run(args), 1),
        Task::Bench(args) => (bench::run(args), 1),
        Task::Soak(args) => (soak::run(args), 1),
        Task::Fuzz(args) => (fuzz::run(args), 1),
        Task::Lab(args) => (lab::run(args), lab::EXIT_LAB),
        Task::GuestImage(args) => (guest::run(args), 1),
    };
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::from(u8::try_from(on_error).unwrap_or(1))
        }
    }
}
