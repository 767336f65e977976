//! The workload and init that runs inside a Linux guest of the lab and the demo

fn main() {}
