//! Counters of one vif.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Reads.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident $unit:literal,)*) => {
        /// Counters since this incarnation started. "tx" and "rx" are the frontend's.
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl Stats {
            /// All of them: name, value, unit.
            pub fn all(&self) -> Vec<(&'static str, u64, &'static str)> {
                vec![$((stringify!($name), self.$name.get(), $unit),)*]
            }
        }
    };
}

stats! {
    /// Packets sent for the frontend.
    tx_packets "packets",
    /// Their bytes.
    tx_bytes "bytes",
    /// Packets that were refused: malformed, or not granted.
    tx_errors "packets",
    /// Packets that the kernel did not take.
    tx_dropped "packets",
    /// Packets with addresses that are not the guest's.
    tx_spoofed "packets",
    /// Packets that a firewall rule dropped.
    tx_denied "packets",
    /// Packets to nobody, or to a guest that this one may not talk to.
    tx_no_way "packets",
    /// Slots that recovery answered without sending their packet (again).
    tx_recovered "slots",
    /// Packets delivered to the frontend.
    rx_packets "packets",
    /// Their bytes.
    rx_bytes "bytes",
    /// Slots whose page could not be written.
    rx_errors "slots",
    /// Packets that the frontend could not take by its features, or for which it had no slots for too long.
    rx_dropped "packets",
    /// Packets that crashed netback too often and were dropped.
    poisoned "packets",
    /// Events sent to the frontend.
    notifies "events",
}
