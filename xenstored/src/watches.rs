//! Registered watches, found by path.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::path;
use crate::store::ConnId;

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

/// All watches of all connections.
#[derive(Debug, Default)]
pub struct WatchIndex {
    by_path: BTreeMap<Box<[u8]>, Vec<Watch>>,
    count: usize,
}

impl WatchIndex {
    /// Whether the connection has this path with this token.
    pub fn contains(&self, path: &[u8], conn: ConnId, token: &[u8]) -> bool {
        self.at(path).iter().any(|w| w.conn == conn && *w.token == *token)
    }

    /// Adds a watch.
    pub fn add(&mut self, path: &[u8], watch: Watch) {
        self.count += 1;
        match self.by_path.get_mut(path) {
            Some(list) => list.push(watch),
            None => {
                self.by_path.insert(path.into(), vec![watch]);
            }
        }
    }

    /// Removes one watch; false if there is none.
    pub fn remove(&mut self, path: &[u8], conn: ConnId, token: &[u8]) -> bool {
        let Some(list) = self.by_path.get_mut(path) else { return false };
        let Some(i) = list.iter().position(|w| w.conn == conn && *w.token == *token) else { return false };
        list.remove(i);
        if list.is_empty() {
            self.by_path.remove(path);
        }
        self.count -= 1;
        true
    }

    /// Removes all watches of a connection on these paths.
    pub fn remove_all<'a>(&mut self, conn: ConnId, paths: impl Iterator<Item = &'a [u8]>) {
        for path in paths {
            let Some(list) = self.by_path.get_mut(path) else { continue };
            let before = list.len();
            list.retain(|w| w.conn != conn);
            self.count -= before - list.len();
            if list.is_empty() {
                self.by_path.remove(path);
            }
        }
    }

    /// The watches on exactly this path.
    pub fn at(&self, path: &[u8]) -> &[Watch] {
        self.by_path.get(path).map_or(&[], |list| list)
    }

    /// The watches that a change of `path` concerns: (watched path, watch), from the root down.
    pub fn matching<'a>(&'a self, path: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a Watch)> {
        let levels = path.iter().filter(|b| **b == b'/').count();
        path::prefixes(path).flat_map(move |prefix| {
            let own = if prefix == b"/" { 0 } else { prefix.iter().filter(|b| **b == b'/').count() };
            let below = if path == b"/" { 0 } else { levels - own } as u32;
            let near = move |w: &&Watch| w.depth.is_none_or(|depth| below <= depth);
            self.at(prefix).iter().filter(near).map(move |w| (prefix, w))
        })
    }

    /// Watched paths strictly below `path`, the deepest of each branch first.
    pub fn paths_below(&self, path: &[u8]) -> Vec<Box<[u8]>> {
        let mut start = path.to_vec();
        if path != b"/" {
            start.push(b'/');
        }
        let from = (Bound::Excluded(&start[..]), Bound::Unbounded);
        let below = self.by_path.range::<[u8], _>(from).map(|(p, _)| p);
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

    /// Every watch with its path, in a fixed order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Watch)> {
        self.by_path.iter().flat_map(|(p, list)| list.iter().map(move |w| (&p[..], w)))
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
        let mut index = WatchIndex::default();
        index.add(b"/", watch(1, None));
        index.add(b"/a", watch(2, Some(1)));
        index.add(b"/a/b", watch(3, Some(0)));
        index.add(b"/ab", watch(4, None));
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
        let mut index = WatchIndex::default();
        index.add(b"/", watch(1, Some(1)));
        let hits = |p: &[u8]| index.matching(p).count();
        assert_eq!((hits(b"/"), hits(b"/a"), hits(b"/a/b")), (1, 1, 0));
    }

    #[test]
    fn removal_leaves_no_ghosts() {
        let mut index = WatchIndex::default();
        for conn in [1, 2] {
            index.add(b"/a", watch(conn, None));
            index.add(b"/b", watch(conn, None));
        }
        index.remove_all(ConnId(1), [&b"/a"[..], b"/b"].into_iter());
        assert_eq!(index.len(), 2);
        assert!(index.remove(b"/a", ConnId(2), b"t"));
        assert!(!index.remove(b"/a", ConnId(2), b"t"));
        assert_eq!(index.iter().count(), 1);
    }
}
