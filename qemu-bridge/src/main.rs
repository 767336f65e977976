//! Place-holder for device models and QEMU guests as restartable compartments

fn main() {}
