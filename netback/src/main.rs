//! Network backend: one process domain per NIC

fn main() {}
