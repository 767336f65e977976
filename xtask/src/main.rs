//! Project automation: demo, test, lab, bench, soak

fn main() {}
