//! The different permissions that nodes have: each once, with the nodes that have it.
//!
//! In the arena an entry is: next and previous entry, number of nodes, index, first node, number of permissions, and
//! those. The entries are also held in ordinary memory, where they are found by index and by content.

use std::collections::HashMap;

use super::NodeId;
use super::node::{Link, NONE, Record};
use crate::journal::arena::{Arena, Unit};
use crate::perms::{Perm, Perms};

/// Header word of the arena: the first entry.
const FIRST_ENTRY: usize = 0;

const NEXT: usize = 0;
const PREV: usize = 4;
const COUNT: usize = 8;
const INDEX: usize = 12;
const FIRST_NODE: usize = 16;
const ENTRIES: usize = 20;
const LIST: usize = 24;

#[derive(Debug)]
struct Entry {
    perms: Perms,
    at: Unit,
}

/// See the module's description.
#[derive(Debug, Default)]
pub struct Rights {
    entries: Vec<Option<Entry>>,
    by_content: HashMap<Perms, u32>,
    free: Vec<u32>,
}

fn len(entries: usize) -> usize {
    LIST + 4 * entries
}

impl Rights {
    /// Those that an arena holds.
    pub fn open(arena: &Arena) -> Result<Self, String> {
        let mut rights = Self::default();
        let mut at = arena.root(FIRST_ENTRY);
        while at != NONE {
            let n = arena.u32(at, ENTRIES) as usize;
            let bytes = arena.bytes(at, LIST, 4 * n);
            let entry = |b: &[u8]| Perm { domid: u16::from_le_bytes([b[0], b[1]]), access: b[2] };
            let perms = Perms::new(bytes.chunks_exact(4).map(entry).collect()).ok_or("empty permissions")?;
            let index = arena.u32(at, INDEX) as usize;
            if rights.entries.len() <= index {
                rights.entries.resize_with(index + 1, || None);
            }
            rights.by_content.insert(perms.clone(), index as u32);
            rights.entries[index] = Some(Entry { perms, at });
            at = arena.u32(at, NEXT);
        }
        let unused = |i: &usize| rights.entries[*i].is_none();
        rights.free = (0..rights.entries.len()).rev().filter(unused).map(|i| i as u32).collect();
        Ok(rights)
    }

    fn at(&self, index: u32) -> Unit {
        self.entries.get(index as usize).and_then(Option::as_ref).map_or(NONE, |e| e.at)
    }

    /// The permissions with this index.
    pub fn get(&self, index: u32) -> &Perms {
        match self.entries.get(index as usize) {
            Some(Some(entry)) => &entry.perms,
            // Nodes hold what they name, and the arena's pages are verified.
            _ => unreachable!("a node without permissions"),
        }
    }

    /// The index of these permissions, for one more node, which is then to be linked.
    pub fn hold(&mut self, arena: &mut Arena, perms: &Perms) -> u32 {
        if let Some(index) = self.by_content.get(perms) {
            return *index;
        }
        let list = perms.entries();
        let at = arena.alloc(len(list.len()));
        let index = self.free.pop().unwrap_or(self.entries.len() as u32);
        let next = arena.root(FIRST_ENTRY);
        let mut bytes = Vec::with_capacity(len(list.len()));
        for word in [next, NONE, 0, index, NONE, list.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for perm in list {
            bytes.extend_from_slice(&perm.domid.to_le_bytes());
            bytes.extend_from_slice(&[perm.access, 0]);
        }
        arena.put(at, 0, &bytes);
        if next != NONE {
            arena.set_u32(next, PREV, at);
        }
        arena.set_root(FIRST_ENTRY, at);
        if self.entries.len() <= index as usize {
            self.entries.resize_with(index as usize + 1, || None);
        }
        self.entries[index as usize] = Some(Entry { perms: perms.clone(), at });
        self.by_content.insert(perms.clone(), index);
        index
    }

    /// Adds a node, whose record is written, to those with these permissions.
    pub fn link(&self, arena: &mut Arena, id: NodeId, index: u32) {
        let at = self.at(index);
        let (count, first) = (arena.u32(at, COUNT), arena.u32(at, FIRST_NODE));
        let mut links = [0; 8];
        links[..4].copy_from_slice(&first.to_le_bytes());
        arena.put(id, Link::NextPeer as usize, &links);
        if first != NONE {
            Link::PrevPeer.write(arena, first, id);
        }
        arena.set_u32(at, FIRST_NODE, id);
        arena.set_u32(at, COUNT, count + 1);
    }

    /// Takes a node away from those with its permissions; the last one takes the entry with it.
    pub fn unlink(&mut self, arena: &mut Arena, record: &Record) {
        let at = self.at(record.rights);
        if record.next_peer != NONE {
            Link::PrevPeer.write(arena, record.next_peer, record.prev_peer);
        }
        match record.prev_peer {
            NONE => arena.set_u32(at, FIRST_NODE, record.next_peer),
            prev => Link::NextPeer.write(arena, prev, record.next_peer),
        }
        let count = arena.u32(at, COUNT) - 1;
        arena.set_u32(at, COUNT, count);
        if count > 0 {
            return;
        }
        let (next, prev) = (arena.u32(at, NEXT), arena.u32(at, PREV));
        if next != NONE {
            arena.set_u32(next, PREV, prev);
        }
        match prev {
            NONE => arena.set_root(FIRST_ENTRY, next),
            prev => arena.set_u32(prev, NEXT, next),
        }
        if let Some(entry) = self.entries[record.rights as usize].take() {
            arena.free(at, len(entry.perms.entries().len()));
            self.by_content.remove(&entry.perms);
            self.free.push(record.rights);
        }
    }

    /// The permissions that name a domain, with their index.
    pub fn naming(&self, domid: u16) -> Vec<(u32, Perms)> {
        let all = self.entries.iter().enumerate();
        all.filter_map(|(i, e)| Some((i as u32, &e.as_ref()?.perms)))
            .filter(|(_, perms)| perms.entries().iter().any(|p| p.domid == domid))
            .map(|(i, perms)| (i, perms.clone()))
            .collect()
    }

    /// The nodes with these permissions.
    pub fn nodes<'a>(&self, arena: &'a Arena, index: u32) -> impl Iterator<Item = NodeId> + use<'a> {
        let mut next = arena.u32(self.at(index), FIRST_NODE);
        std::iter::from_fn(move || {
            let id = next;
            (id != NONE).then(|| {
                next = Link::NextPeer.read(arena, id);
                id
            })
        })
    }

    /// Checks the lists: every node is in the one that it names.
    pub fn check(&self, arena: &Arena, nodes: usize) -> Result<(), String> {
        let mut linked = 0;
        for (index, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            let mut count = 0;
            for id in self.nodes(arena, index as u32) {
                count += 1;
                if Record::read(arena, id).rights != index as u32 || count > nodes {
                    return Err(format!("a node is listed under permissions {index} and has others"));
                }
            }
            if count != arena.u32(entry.at, COUNT) as usize || count == 0 {
                return Err(format!("permissions {index}: {count} nodes listed"));
            }
            linked += count;
        }
        if linked != nodes {
            return Err(format!("{linked} nodes have permissions, of {nodes}"));
        }
        Ok(())
    }
}
