//! Quotas: what a domain may use, what it uses, and what it was refused. Names and defaults for guests are those of Xen's
//! daemon (docs/misc/xenstore.txt, GET_QUOTA and SET_QUOTA). As there, a domain gets the global values when it is introduced
//! and keeps them until its own are set; 0 is no limit. dom0 and socket clients have none.

use crate::codec::{Reader, Writer};

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Item {
    /// Nodes owned.
    Nodes,
    /// Watches.
    Watches,
    /// Replies and events that the client has not read, at which no more of its requests are taken.
    Outstanding,
    /// Bytes of its nodes, watches and transactions.
    Memory,
    /// Open transactions.
    Transactions,
    /// Nodes touched by a transaction's changes.
    TransactionNodes,
    /// Entries in a node's permissions.
    NodePermissions,
    /// Bytes in a path, `/local/domain/<domid>/` not counted.
    PathMax,
    /// Bytes in a node's value.
    NodeSize,
}

/// Number of [`Item`]s.
pub const ITEMS: usize = 9;
/// Before the name of a soft quota.
const SOFT: &str = "soft-";

impl Item {
    /// All of them.
    pub const ALL: [Self; ITEMS] = [
        Self::Nodes,
        Self::Watches,
        Self::Outstanding,
        Self::Memory,
        Self::Transactions,
        Self::TransactionNodes,
        Self::NodePermissions,
        Self::PathMax,
        Self::NodeSize,
    ];

    /// Its name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Watches => "watches",
            Self::Outstanding => "outstanding",
            Self::Memory => "memory",
            Self::Transactions => "transactions",
            Self::TransactionNodes => "transaction-nodes",
            Self::NodePermissions => "node-permissions",
            Self::PathMax => "path-max",
            Self::NodeSize => "node-size",
        }
    }

    /// What it limits, in words.
    pub fn description(self) -> &'static str {
        match self {
            Self::Nodes => "nodes per domain",
            Self::Watches => "watches per domain",
            Self::Outstanding => "unread replies and events per domain",
            Self::Memory => "bytes of nodes, watches and transactions per domain",
            Self::Transactions => "open transactions per domain",
            Self::TransactionNodes => "nodes changed by a transaction",
            Self::NodePermissions => "permissions per node",
            Self::PathMax => "bytes of a path",
            Self::NodeSize => "bytes of a value",
        }
    }

    /// The item of this name, and whether the name is that of its soft quota.
    pub fn parse(name: &str) -> Option<(Self, bool)> {
        let (plain, soft) = name.strip_prefix(SOFT).map_or((name, false), |plain| (plain, true));
        // The documentation's name for what the daemons call node-permissions.
        let plain = if plain == "permissions" { "node-permissions" } else { plain };
        Self::ALL.into_iter().find(|i| i.name() == plain).map(|i| (i, soft))
    }
}

/// Hard and soft limits; 0 is none. A soft one is only told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    hard: [u32; ITEMS],
    soft: [u32; ITEMS],
}

impl Quota {
    /// For guests.
    pub const GUEST: Self = Self {
        hard: [1000, 128, 20, 2560 << 10, 10, 1024, 5, 2048, 2048],
        soft: [0, 0, 0, 2 << 20, 0, 0, 0, 0, 0],
    };

    /// For service domains: a driver domain has nodes and watches for every device it serves.
    pub const SERVICE: Self = Self {
        hard: [200_000, 16_384, 1000, 128 << 20, 256, 8192, 16, 2048, 2048],
        soft: [0, 0, 0, 96 << 20, 0, 0, 0, 0, 0],
    };

    /// A limit.
    pub fn get(&self, item: Item, soft: bool) -> u32 {
        if soft { self.soft[item as usize] } else { self.hard[item as usize] }
    }

    /// Sets a limit.
    pub fn set(&mut self, item: Item, soft: bool, value: u32) {
        if soft {
            self.soft[item as usize] = value;
        } else {
            self.hard[item as usize] = value;
        }
    }

    /// Whether a value is over the limit.
    pub fn exceeds(&self, item: Item, soft: bool, value: u64) -> bool {
        let limit = self.get(item, soft);
        limit != 0 && value > u64::from(limit)
    }

    /// The limit, or the greatest value there is.
    pub fn most(&self, item: Item) -> usize {
        match self.get(item, false) {
            0 => usize::MAX,
            limit => limit as usize,
        }
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        for value in self.hard.iter().chain(&self.soft) {
            out.u32(*value);
        }
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Option<Self> {
        let mut quota = Self { hard: [0; ITEMS], soft: [0; ITEMS] };
        for value in quota.hard.iter_mut().chain(&mut quota.soft) {
            *value = input.u32()?;
        }
        Some(quota)
    }
}

/// The limits that new domains get.
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

/// What a domain was seen to use, and what it was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    peak: [u32; ITEMS],
    refused: [u64; ITEMS],
    /// Of which hard and soft quotas the log was told, as bits.
    told: [u16; 2],
}

impl Account {
    /// The greatest value seen.
    pub fn peak(&self, item: Item) -> u32 {
        self.peak[item as usize]
    }

    /// Requests refused for it.
    pub fn refused(&self, item: Item) -> u64 {
        self.refused[item as usize]
    }

    pub(super) fn reset_peaks(&mut self) {
        self.peak = [0; ITEMS];
    }

    pub(super) fn seen(&mut self, item: Item, value: u64) {
        let peak = &mut self.peak[item as usize];
        *peak = (*peak).max(u32::try_from(value).unwrap_or(u32::MAX));
    }

    pub(super) fn refuse(&mut self, item: Item) {
        self.refused[item as usize] += 1;
    }

    /// True the first time.
    pub(super) fn tell(&mut self, item: Item, soft: bool) -> bool {
        let bit = 1 << item as u16;
        let told = &mut self.told[usize::from(soft)];
        let first = *told & bit == 0;
        *told |= bit;
        first
    }

    /// Below its soft quota again: the next time it is told of again.
    pub(super) fn below(&mut self, item: Item) {
        self.told[1] &= !(1 << item as u16);
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        for i in 0..ITEMS {
            out.u32(self.peak[i]);
            out.u64(self.refused[i]);
        }
        out.u16(self.told[0]);
        out.u16(self.told[1]);
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Option<Self> {
        let mut account = Self::default();
        for i in 0..ITEMS {
            account.peak[i] = input.u32()?;
            account.refused[i] = input.u64()?;
        }
        account.told = [input.u16()?, input.u16()?];
        Some(account)
    }
}

/// Something about quotas that the log is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// Who is over it.
    pub domid: u16,
    /// What.
    pub item: Item,
    /// Only the soft one: nothing was refused.
    pub soft: bool,
    /// The limit.
    pub limit: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values() {
        let mut quota = Quota::GUEST;
        for (i, item) in Item::ALL.into_iter().enumerate() {
            assert_eq!(item as usize, i);
            assert_eq!(Item::parse(item.name()), Some((item, false)));
            assert_eq!(Item::parse(&format!("soft-{}", item.name())), Some((item, true)));
            quota.set(item, i % 2 == 0, 7);
            assert_eq!(quota.get(item, i % 2 == 0), 7);
        }
        assert_eq!(Item::parse("permissions"), Some((Item::NodePermissions, false)));
        assert_eq!(Item::parse("soft-soft-nodes"), None);
        quota.set(Item::Nodes, false, 0);
        assert!(!quota.exceeds(Item::Nodes, false, u64::MAX));
        let mut out = Writer::default();
        quota.encode(&mut out);
        assert_eq!(Quota::decode(&mut Reader(&out.0)), Some(quota));
    }
}
