//! The thin hypervisor: domains, event channels, grants, restarts

fn main() {}
