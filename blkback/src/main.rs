//! Block backend: one process domain per disk

fn main() {}
