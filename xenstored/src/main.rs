//! The xenstore daemon as a restartable service domain

fn main() {}
