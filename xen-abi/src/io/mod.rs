//! The PV device protocols: `io/ring.h`, `io/blkif.h`, `io/netif.h`.

pub mod blkif;
pub mod netif;
pub mod ring;
