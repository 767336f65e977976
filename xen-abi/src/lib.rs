//! The Xen public ABI as Rust types
