//! What an event takes from the arena, known before it runs, so that none fails in the middle.

use xen_abi::xs_wire::XsMsgType as Op;

use super::{Event, Store};
use crate::tree::{Change, NODE_LEN};
use crate::wire::{HEADER, Header};

/// For permissions, and for what ends with a domain.
const SMALL: u64 = 16 << 10;

impl Store {
    /// The most bytes that an event can take: quickly known, and mostly too many.
    pub fn most_growth(&self, event: &Event<'_>) -> u64 {
        match event {
            Event::Request { conn, message, .. } => {
                let head = message.split_first_chunk::<HEADER>().and_then(|(h, _)| Header::decode(h).ok());
                let Some(head) = head else { return 0 };
                match head.op() {
                    // A path of n bytes makes n/2 nodes of at most 64 bytes each.
                    Some(Op::Write | Op::Mkdir | Op::SetPerms | Op::Watch) => {
                        40 * message.len() as u64 + SMALL
                    }
                    Some(Op::TransactionEnd) => {
                        let tx = self.conns.get(conn).and_then(|c| c.txs.get(&head.tx_id));
                        SMALL + tx.map_or(0, |tx| 128 * tx.over.nodes as u64 + 2 * tx.bytes as u64)
                    }
                    Some(Op::Release) => SMALL,
                    _ => 0,
                }
            }
            Event::DomainDown(_) | Event::DomainUp { .. } => SMALL,
            _ => 0,
        }
    }

    /// The bytes that an event takes beyond what is free in the arena, for when there is hardly any room.
    pub fn least_growth(&self, event: &Event<'_>) -> u64 {
        let Event::Request { conn, message, .. } = event else { return 0 };
        let Some((head, payload)) = message.split_first_chunk::<HEADER>() else { return 0 };
        let Ok(head) = Header::decode(head) else { return 0 };
        let arena = self.tree.arena();
        match head.op() {
            Some(Op::Write | Op::Mkdir) => {
                let end = payload.iter().position(|b| *b == 0).unwrap_or(payload.len());
                let (path, value) = payload.split_at(end);
                // Every node on the way and its name; the last one's value; the same again below a relative path's home.
                let names = path.split(|b| *b == b'/').flat_map(|name| [NODE_LEN, name.len()]);
                let home = [NODE_LEN, 16].into_iter().cycle().take(6);
                let last = path.rsplit(|b| *b == b'/').next().map_or(0, <[u8]>::len) + value.len();
                arena.beyond_free(names.chain(home).chain([last, 128]))
            }
            Some(Op::SetPerms | Op::Watch) => arena.beyond_free([payload.len() * 2 + 64].into_iter()),
            Some(Op::TransactionEnd) => {
                let tx = self.conns.get(conn).and_then(|c| c.txs.get(&head.tx_id));
                let sizes = tx.into_iter().flat_map(|tx| tx.over.walk()).flat_map(|(_, name, node)| {
                    let value = match &node.change {
                        Change::Put { value, .. } => value.len(),
                        _ => 0,
                    };
                    [NODE_LEN, name.len() + value, 64]
                });
                arena.beyond_free(sizes)
            }
            _ => 0,
        }
    }
}
