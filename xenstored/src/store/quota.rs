//! Limits per domain. The defaults for guests are those of Xen's daemon.

use crate::codec::{Reader, Writer};

/// What one domain may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    /// Nodes owned.
    pub nodes: u32,
    /// Watches.
    pub watches: u32,
    /// Open transactions.
    pub transactions: u32,
    /// Bytes in a node's value.
    pub node_size: u32,
    /// Entries in a node's permissions.
    pub perms: u32,
    /// Bytes in a path, `/local/domain/<domid>/` not counted.
    pub path_max: u32,
    /// Nodes touched by a transaction's changes.
    pub transaction_nodes: u32,
    /// Bytes of requests in a transaction.
    pub transaction_bytes: u32,
    /// Bytes of unread output at which no more requests are taken (Xen's `outstanding`, in bytes).
    pub unread: u32,
}

impl Quota {
    /// For guests.
    pub const GUEST: Self = Self {
        nodes: 1000,
        watches: 128,
        transactions: 10,
        node_size: 2048,
        perms: 5,
        path_max: 2048,
        transaction_nodes: 1024,
        transaction_bytes: 256 << 10,
        unread: 16 << 10,
    };

    /// For service domains: a driver domain has nodes and watches for every device it serves.
    pub const SERVICE: Self = Self {
        nodes: 200_000,
        watches: 16_384,
        transactions: 256,
        node_size: 2048,
        perms: 16,
        path_max: 2048,
        transaction_nodes: 8192,
        transaction_bytes: 4 << 20,
        unread: 64 << 10,
    };

    /// For dom0 and socket clients only `unread` counts.
    pub const PRIVILEGED_UNREAD: u32 = 256 << 10;

    fn fields(&mut self) -> [(&'static str, &mut u32); 9] {
        [
            ("nodes", &mut self.nodes),
            ("watches", &mut self.watches),
            ("transactions", &mut self.transactions),
            ("node-size", &mut self.node_size),
            ("node-permissions", &mut self.perms),
            ("path-max", &mut self.path_max),
            ("transaction-nodes", &mut self.transaction_nodes),
            ("transaction-bytes", &mut self.transaction_bytes),
            ("unread", &mut self.unread),
        ]
    }

    /// Names and values.
    pub fn list(&self) -> Vec<(&'static str, u32)> {
        self.clone().fields().map(|(name, value)| (name, *value)).to_vec()
    }

    /// Sets one limit by its name; false if there is none of that name.
    pub fn set(&mut self, name: &str, value: u32) -> bool {
        let field = self.fields().into_iter().find(|(n, _)| *n == name);
        field.is_some_and(|(_, slot)| {
            *slot = value;
            true
        })
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        for (_, value) in self.list() {
            out.u32(value);
        }
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Option<Self> {
        let mut quota = Self::GUEST;
        for (_, slot) in quota.fields() {
            *slot = input.u32()?;
        }
        Some(quota)
    }
}

/// The limits of both classes of domains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Guests.
    pub guest: Quota,
    /// Service domains.
    pub service: Quota,
}

impl Default for Limits {
    fn default() -> Self {
        Self { guest: Quota::GUEST, service: Quota::SERVICE }
    }
}
