//! Xen's migration stream (docs/designs/xenstore-migration.md, versions 1 and 2): the store's state for other implementations,
//! and theirs for this one.
//!
//! A stream holds global data, quotas, connections with their unread bytes, watches, transactions, nodes (those of transactions
//! too) and domains. Nodes, quotas and features are good for everybody. A connection is its two ends as well: the socket, or the
//! ring page with its indices. Whoever reads a stream says which of them it has ([`Ends`]); at a live update those are all, and
//! nobody notices. Connections without an end are counted and left out, with their watches and transactions.
#![forbid(unsafe_code)]

mod export;
mod import;

pub use export::{Sources, export};
pub use import::{Ends, Imported, NoEnds, RingEnd, Waiting, import};

const IDENT: &[u8; 8] = b"xenstore";
/// The newest version.
pub const VERSION: u32 = 2;

const END: u32 = 0;
const GLOBAL_DATA: u32 = 1;
const CONNECTION_DATA: u32 = 2;
const WATCH_DATA: u32 = 3;
const TRANSACTION_DATA: u32 = 4;
const NODE_DATA: u32 = 5;
const GLOBAL_QUOTA_DATA: u32 = 6;
const DOMAIN_DATA: u32 = 7;
const WATCH_DATA_EXTENDED: u32 = 8;

/// DOMID_INVALID of xen.h.
const DOMID_INVALID: u16 = 0x7ff4;
/// A permission that is to be ignored.
const STALE: u8 = 1;
/// Access flags of a pending node.
const SEEN: u16 = 1;
const WRITTEN: u16 = 2;

/// The stream can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No stream, of another version, or of the other byte order.
    #[error("not a xenstore migration stream of version 1 or 2 in little-endian order")]
    Header,
    /// It ends before its END record.
    #[error("the stream ends at byte {0}, before its END record")]
    Short(usize),
    /// A record's content makes no sense.
    #[error("record of type {kind} at byte {at}: {why}")]
    Record {
        /// Its type.
        kind: u32,
        /// Where it begins.
        at: usize,
        /// What is wrong.
        why: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perms::{Perm, Perms, READ, WRITE};
    use crate::store::{Class, Event, Store};
    use crate::tree::{Lookup, View as _};

    /// Has every socket, and domain 5's ring.
    struct All;

    impl Ends for All {
        fn socket(&mut self, number: u32, fd: u32) -> bool {
            assert_eq!((number, fd), (1, 7));
            true
        }

        fn ring(&mut self, domid: u16) -> Option<RingEnd> {
            let class = Class::Guest;
            let end = RingEnd { instance: 3, gref: 8, port: 9, class, req_cons: 1, rsp_prod: 77, error: 0 };
            (domid == 5).then_some(end)
        }
    }

    fn stream_of(store: &Store, version: u32) -> Vec<u8> {
        let sources = Sources { input: &|_| b"in".to_vec(), socket: &|_| Some(7), listener: Some(4) };
        export(store, version, &sources)
    }

    fn filled() -> Store {
        let mut store = Store::new();
        let owner = |d| Perms::new(vec![Perm { domid: d, access: READ }, Perm { domid: 9, access: WRITE }]);
        for (path, domid) in [("/local", 0), ("/local/domain", 0), ("/local/domain/5", 5), ("/b", 0)] {
            store.tree.create(path.as_bytes(), path.as_bytes(), owner(domid).expect("perms"));
        }
        store.apply(&Event::Open { slot: 0 });
        store.apply(&Event::DomainUp {
            domid: 5,
            instance: 3,
            gref: 8,
            port: 9,
            class: Class::Guest,
            slot: 1,
        });
        for (conn, path) in [(1, "/b"), (2, "x"), (2, "@releaseDomain")] {
            let payload = format!("{path}\0token\0");
            let head = [4, 1, 0, payload.len() as u32].map(u32::to_ne_bytes).concat();
            let message = [&head[..], payload.as_bytes()].concat();
            store.apply(&Event::Request { conn: crate::store::ConnId(conn), consumed: 9, message: &message });
        }
        store
    }

    #[test]
    fn all_goes_round() {
        let store = filled();
        for version in [1, 2] {
            let stream = stream_of(&store, version);
            assert_eq!(stream.len() % 8, 0);
            let mut other = Store::new();
            let imported = import(&stream, &mut other, &mut All).expect("whole");
            assert_eq!(
                (imported.nodes, imported.kept, imported.left_out),
                (store.tree.len(), [2, 3, 0], [0; 3])
            );
            assert_eq!(imported.listener, Some(4));
            // A ring's positions are its page's, and go round at 4 GiB.
            let from = |i: usize| (imported.waiting[i].from, imported.waiting[i].sent);
            assert_eq!((from(0), from(1)), ((0, 0), ((1 << 32) - 1, 77)));
            let list = |s: &Store| -> Vec<_> {
                let tree = &s.tree;
                let node = |id| (tree.node(id).value.to_vec(), tree.node(id).perms.clone());
                tree.walk().map(|(d, name, id)| (d, name.to_vec(), node(id))).collect()
            };
            assert_eq!(list(&store), list(&other));
            other.check().expect("invariants");
            assert!(matches!(other.tree.find(b"/local/domain/5"), Lookup::Node(_)));
            for (id, conn) in store.conns() {
                let again = other.conn(id).expect("the same connection");
                assert_eq!((&conn.watches, conn.watch_bytes), (&again.watches, again.watch_bytes));
                assert_eq!(conn.out.pending().0, again.out.pending().0);
            }
            assert_eq!(other.domain(5).and_then(|d| d.ring), Some((8, 9)));
            // Nobody is there: what remains is the tree.
            let mut other = Store::new();
            let imported = import(&stream, &mut other, &mut NoEnds).expect("whole");
            assert_eq!((imported.kept, imported.left_out), ([0; 3], [2, 3, 0]));
            assert_eq!(list(&store), list(&other));
        }
    }

    #[test]
    fn damaged_streams_are_refused() {
        let stream = stream_of(&filled(), VERSION);
        for end in 0..stream.len() {
            let result = import(&stream[..end], &mut Store::new(), &mut NoEnds);
            assert!(result.is_err() || end > stream.len() - 8, "{end}");
        }
        for at in 0..stream.len() {
            let mut bad = stream.clone();
            bad[at] ^= 0xff;
            let mut store = Store::new();
            if import(&bad, &mut store, &mut NoEnds).is_ok() {
                store.check().expect("invariants");
            }
        }
    }
}
