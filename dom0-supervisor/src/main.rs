//! The toolstack: restartable dom0 and the bh command line

fn main() {}
