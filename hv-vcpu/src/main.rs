//! Runs one unmodified PVH guest on KVM with Xen's guest ABI

fn main() {}
