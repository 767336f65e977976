//! Registered watches, found by path. Each is also kept in the arena, so that a snapshot need not write them all.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use crate::journal::arena::{Arena, Unit};
use crate::path;
use crate::store::ConnId;

/// Header words of the arena: the first and the last watch.
const FIRST: usize = 1;
const LAST: usize = 2;

// A watch in the arena: next, previous, connection (u64), depth, strip, lengths of path and token, path, token.
const NEXT: usize = 0;
const PREV: usize = 4;
const HEAD: usize = 28;
/// Depth of a watch without one.
const ALL: u32 = u32::MAX;

/// One watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// Whose.
    pub conn: ConnId,
    /// Given back in each event.
    pub token: Box<[u8]>,
    /// Levels below the path that count; `None` for all.
    pub depth: Option<u32>,
    /// Bytes of `/local/domain/<domid>/` to cut from event paths: the watch was set relative. Else 0.
    pub strip: usize,
}

#[derive(Debug)]
struct Kept {
    watch: Watch,
    at: Unit,
}

/// All watches of all connections.
#[derive(Debug, Default)]
pub struct WatchIndex {
    by_path: HashMap<Arc<[u8]>, Vec<Kept>>,
    /// The same paths in order.
    paths: BTreeSet<Arc<[u8]>>,
    count: usize,
}

fn keep(arena: &mut Arena, path: &[u8], watch: &Watch) -> Unit {
    let last = arena.root(LAST);
    let mut bytes = Vec::with_capacity(HEAD + path.len() + watch.token.len());
    for word in [0, last, watch.conn.0 as u32, (watch.conn.0 >> 32) as u32, watch.depth.unwrap_or(ALL)] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for half in [watch.strip, 0, path.len(), watch.token.len()] {
        bytes.extend_from_slice(&(half as u16).to_le_bytes());
    }
    bytes.extend_from_slice(path);
    bytes.extend_from_slice(&watch.token);
    let at = arena.alloc(bytes.len());
    arena.put(at, 0, &bytes);
    match last {
        0 => arena.set_root(FIRST, at),
        last => arena.set_u32(last, NEXT, at),
    }
    arena.set_root(LAST, at);
    at
}

fn forget(arena: &mut Arena, at: Unit, len: usize) {
    let (next, prev) = (arena.u32(at, NEXT), arena.u32(at, PREV));
    match prev {
        0 => arena.set_root(FIRST, next),
        prev => arena.set_u32(prev, NEXT, next),
    }
    match next {
        0 => arena.set_root(LAST, prev),
        next => arena.set_u32(next, PREV, prev),
    }
    arena.free(at, len);
}

impl WatchIndex {
    /// Those that an arena holds.
    pub fn open(arena: &Arena) -> Self {
        let mut index = Self::default();
        let mut at = arena.root(FIRST);
        while at != 0 {
            let lens = arena.u32(at, 24);
            let (path_len, token_len) = (lens as usize & 0xffff, lens as usize >> 16);
            let bytes = arena.bytes(at, HEAD, path_len + token_len);
            let depth = arena.u32(at, 16);
            let watch = Watch {
                conn: ConnId(u64::from(arena.u32(at, 8)) | u64::from(arena.u32(at, 12)) << 32),
                token: bytes[path_len..].into(),
                depth: (depth != ALL).then_some(depth),
                strip: arena.u32(at, 20) as usize & 0xffff,
            };
            index.insert(&bytes[..path_len], watch, at);
            at = arena.u32(at, NEXT);
        }
        index
    }

    fn insert(&mut self, path: &[u8], watch: Watch, at: Unit) -> Arc<[u8]> {
        self.count += 1;
        if let Some((known, _)) = self.by_path.get_key_value(path) {
            let known = Arc::clone(known);
            if let Some(list) = self.by_path.get_mut(path) {
                list.push(Kept { watch, at });
            }
            return known;
        }
        let path: Arc<[u8]> = path.into();
        self.paths.insert(Arc::clone(&path));
        self.by_path.insert(Arc::clone(&path), vec![Kept { watch, at }]);
        path
    }

    /// Adds a watch. Returns its path, shared.
    pub fn add(&mut self, arena: &mut Arena, path: &[u8], watch: Watch) -> Arc<[u8]> {
        let at = keep(arena, path, &watch);
        self.insert(path, watch, at)
    }

    /// Removes the watches of a connection on a path for which `which` holds; returns how many.
    fn retain(&mut self, arena: &mut Arena, path: &[u8], which: impl Fn(&Watch) -> bool) -> usize {
        let Some(list) = self.by_path.get_mut(path) else { return 0 };
        let before = list.len();
        list.retain(|kept| {
            let goes = which(&kept.watch);
            if goes {
                forget(arena, kept.at, HEAD + path.len() + kept.watch.token.len());
            }
            !goes
        });
        let gone = before - list.len();
        self.count -= gone;
        if list.is_empty() {
            self.by_path.remove(path);
            self.paths.remove(path);
        }
        gone
    }

    /// Removes one watch; false if there is none.
    pub fn remove(&mut self, arena: &mut Arena, path: &[u8], conn: ConnId, token: &[u8]) -> bool {
        self.retain(arena, path, |w| w.conn == conn && *w.token == *token) > 0
    }

    /// Removes all watches of a connection on these paths.
    pub fn remove_all<'a>(&mut self, arena: &mut Arena, conn: ConnId, paths: impl Iterator<Item = &'a [u8]>) {
        for path in paths {
            self.retain(arena, path, |w| w.conn == conn);
        }
    }

    /// The watches on exactly this path.
    pub fn at(&self, path: &[u8]) -> impl Iterator<Item = &Watch> {
        self.by_path.get(path).into_iter().flatten().map(|kept| &kept.watch)
    }

    /// The watches that a change of `path` concerns: (watched path, watch), from the root down.
    pub fn matching<'a>(&'a self, path: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a Watch)> {
        let levels = path.iter().filter(|b| **b == b'/').count();
        path::prefixes(path).flat_map(move |prefix| {
            let own = if prefix == b"/" { 0 } else { prefix.iter().filter(|b| **b == b'/').count() };
            let below = if path == b"/" { 0 } else { levels - own } as u32;
            let near = move |w: &&Watch| w.depth.is_none_or(|depth| below <= depth);
            self.at(prefix).filter(near).map(move |w| (prefix, w))
        })
    }

    /// Whether any watch hears of a change of `path`.
    pub fn concern(&self, path: &[u8]) -> bool {
        !self.is_empty() && self.matching(path).next().is_some()
    }

    /// Watched paths strictly below `path`, the deepest of each branch first.
    pub fn paths_below(&self, path: &[u8]) -> Vec<Arc<[u8]>> {
        let mut start = path.to_vec();
        if path != b"/" {
            start.push(b'/');
        }
        let from = (Bound::Excluded(&start[..]), Bound::Unbounded);
        let below = self.paths.range::<[u8], _>(from);
        let mut found: Vec<_> = below.take_while(|p| p.starts_with(&start)).cloned().collect();
        found.reverse();
        found
    }

    /// Number of watches.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Every watch with its path, in the order of the paths.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<[u8]>, &Watch)> {
        self.paths.iter().flat_map(|p| self.at(p).map(move |w| (p, w)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(conn: u64, depth: Option<u32>) -> Watch {
        Watch { conn: ConnId(conn), token: b"t".as_slice().into(), depth, strip: 0 }
    }

    #[test]
    fn matching_by_prefix_and_depth() {
        let (mut index, arena) = (WatchIndex::default(), &mut Arena::heap());
        index.add(arena, b"/", watch(1, None));
        index.add(arena, b"/a", watch(2, Some(1)));
        index.add(arena, b"/a/b", watch(3, Some(0)));
        index.add(arena, b"/ab", watch(4, None));
        let hits = |p: &[u8]| index.matching(p).map(|(_, w)| w.conn.0).collect::<Vec<_>>();
        assert_eq!(hits(b"/a/b"), [1, 2, 3]);
        assert_eq!(hits(b"/a/b/c"), [1]);
        assert_eq!(hits(b"/a"), [1, 2]);
        assert_eq!(hits(b"/"), [1]);
        assert_eq!(hits(b"@releaseDomain"), [0u64; 0]);
        assert_eq!(index.paths_below(b"/a"), [b"/a/b".as_slice().into()]);
        assert_eq!(index.paths_below(b"/").len(), 3);
    }

    #[test]
    fn depth_from_the_root() {
        let (mut index, arena) = (WatchIndex::default(), &mut Arena::heap());
        index.add(arena, b"/", watch(1, Some(1)));
        let hits = |p: &[u8]| index.matching(p).count();
        assert_eq!((hits(b"/"), hits(b"/a"), hits(b"/a/b")), (1, 1, 0));
    }

    #[test]
    fn removal_leaves_no_ghosts() {
        let (mut index, arena) = (WatchIndex::default(), &mut Arena::heap());
        for conn in [1, 2] {
            index.add(arena, b"/a", watch(conn, None));
            index.add(arena, b"/b", watch(conn, None));
        }
        index.remove_all(arena, ConnId(1), [&b"/a"[..], b"/b"].into_iter());
        assert_eq!(index.len(), 2);
        assert!(index.remove(arena, b"/a", ConnId(2), b"t"));
        assert!(!index.remove(arena, b"/a", ConnId(2), b"t"));
        assert_eq!(index.iter().count(), 1);
        let again = WatchIndex::open(arena);
        assert_eq!(again.len(), 1);
        assert_eq!(again.iter().collect::<Vec<_>>(), index.iter().collect::<Vec<_>>());
    }
}
