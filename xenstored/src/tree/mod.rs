//! The tree of nodes, and a transaction's view of it.
//!
//! Nodes live in the arena (`journal/arena.rs`), so the tree needs no loading after a restart. They are reached from a
//! hidden root whose children are `/` (under the empty name) and the two special nodes. A node's children are a treap by
//! name, whose priorities follow from the nodes' addresses. Nodes with the same permissions share one entry and are
//! linked, so that what a dead domain leaves is found without a search. Nothing here recurses: a path can be 1,536
//! levels deep (XSA-418).
#![forbid(unsafe_code)]

mod node;
mod overlay;
mod rights;
mod view;

use std::collections::BTreeMap;

pub use overlay::{Change, Overlay, OverlayNode, TxView};
pub use view::{Found, Lookup, View};

use crate::journal::arena::{Arena, FIRST};
use crate::path;
use crate::perms::{DOMID_ANY, Perm, Perms, READ};
use node::{Link, NONE, Record};
use rights::Rights;

/// Address of a node in the arena.
pub type NodeId = u32;
/// The hidden root: the first thing that is put into an arena.
pub const HIDDEN_ROOT: NodeId = FIRST;

/// Bytes of a node in the arena, its name and value not counted.
pub const NODE_LEN: usize = Record::LEN;

/// All nodes.
#[derive(Debug)]
pub struct Tree {
    arena: Arena,
    rights: Rights,
    generation: u64,
    /// Nodes, the hidden root included.
    count: usize,
    /// Nodes owned, by domid; no entry for zero.
    owned: BTreeMap<u16, u64>,
    /// Bytes of those.
    bytes: BTreeMap<u16, u64>,
    /// Nodes that were removed and whose memory was not taken back yet.
    buried: u64,
}

/// Header word of the arena: the first of those nodes, linked by their parent field.
const BURIED: usize = 3;
/// So many nodes are dropped at once.
const AT_ONCE: usize = 4;

/// What a snapshot says of a tree besides the arena's pages.
#[derive(Debug, Default, Clone)]
pub struct Totals {
    /// The tree's generation.
    pub generation: u64,
    /// Nodes, the hidden root excepted.
    pub nodes: u64,
    /// Nodes owned, by domid.
    pub owned: BTreeMap<u16, u64>,
    /// Bytes of those.
    pub bytes: BTreeMap<u16, u64>,
    /// Removed nodes whose memory is still to be taken back.
    pub buried: u64,
}

impl Tree {
    /// A fresh store in an empty arena, with the nodes that Xen's daemon starts with.
    pub fn fresh(arena: Arena) -> Self {
        let (owned, bytes) = (BTreeMap::new(), BTreeMap::new());
        let mut tree =
            Self { arena, rights: Rights::default(), generation: 0, count: 0, owned, bytes, buried: 0 };
        tree.make_node(b"", b"", NONE, Perms::private(0));
        // The hidden root is nobody's.
        tree.owned.clear();
        tree.bytes.clear();
        for name in [&b"/"[..], b"/tool", b"/tool/xenstored", path::INTRODUCE] {
            tree.create(name, b"", Perms::private(0));
        }
        let anyone = vec![Perm { domid: 0, access: 0 }, Perm { domid: DOMID_ANY, access: READ }];
        let release = Perms::new(anyone).unwrap_or_else(|| Perms::private(0));
        tree.create(path::RELEASE, b"", release);
        tree
    }

    /// The tree that an arena holds.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(arena: Arena, totals: Totals) -> Result<Self, String> {
        let rights = Rights::open(&arena)?;
        let count = totals.nodes as usize + 1;
        let (owned, bytes) = (totals.owned, totals.bytes);
        let (generation, buried) = (totals.generation, totals.buried);
        Ok(Self { arena, rights, generation, count, owned, bytes, buried })
    }

    /// For a snapshot.
    pub fn totals(&self) -> Totals {
        let (owned, bytes) = (self.owned.clone(), self.bytes.clone());
        Totals { generation: self.generation, nodes: self.len() as u64, owned, bytes, buried: self.buried }
    }

    /// The arena, for others that keep things in it.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The arena, for others that keep things in it.
    pub fn arena_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// Gives the arena back.
    pub fn into_arena(self) -> Arena {
        self.arena
    }

    /// Counts up with every change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Number of nodes, the hidden root excepted.
    pub fn len(&self) -> usize {
        self.count - 1
    }

    /// Whether there are no nodes at all (never so once a store is set up).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The counters of owned nodes.
    pub fn owners(&self) -> &BTreeMap<u16, u64> {
        &self.owned
    }

    /// Bytes of the nodes that a domain owns.
    pub fn bytes_of(&self, domid: u16) -> u64 {
        self.bytes.get(&domid).copied().unwrap_or(0)
    }

    /// A node by its address.
    pub fn node(&self, id: NodeId) -> Found<'_> {
        let record = self.record(id);
        Found {
            value: self.arena.bytes(record.blob, record.name_len(), record.value_len()),
            perms: self.rights.get(record.rights),
            generation: record.generation,
        }
    }

    fn name(&self, id: NodeId) -> &[u8] {
        let record = self.record(id);
        self.arena.bytes(record.blob, 0, record.name_len())
    }

    fn record(&self, id: NodeId) -> Record {
        Record::read(&self.arena, id)
    }

    /// A child by its name.
    pub fn child(&self, id: NodeId, name: &[u8]) -> Option<NodeId> {
        let mut at = Link::Children.read(&self.arena, id);
        while at != NONE {
            match name.cmp(self.name(at)) {
                std::cmp::Ordering::Equal => return Some(at),
                std::cmp::Ordering::Less => at = Link::Left.read(&self.arena, at),
                std::cmp::Ordering::Greater => at = Link::Right.read(&self.arena, at),
            }
        }
        None
    }

    /// A node's children in the order of their names.
    pub fn children_of(&self, id: NodeId) -> Children<'_> {
        let mut children = Children { tree: self, stack: Vec::new() };
        children.down(Link::Children.read(&self.arena, id));
        children
    }

    /// The node at `path`.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        path::names(path).try_fold(HIDDEN_ROOT, |id, name| self.child(id, name))
    }

    /// The generation in which the node at `path`, or the list of children in which it is missing, changed last.
    pub fn last_change(&self, path: &[u8]) -> u64 {
        let mut id = HIDDEN_ROOT;
        for name in path::names(path) {
            match self.child(id, name) {
                Some(next) => id = next,
                None => break,
            }
        }
        self.record(id).generation
    }

    /// A node's path.
    pub fn path_of(&self, id: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = id;
        while at != HIDDEN_ROOT {
            names.push(self.name(at));
            at = Link::Parent.read(&self.arena, at);
        }
        names.reverse();
        if names.len() == 1 && names[0].is_empty() {
            return b"/".to_vec();
        }
        names.join(&b"/"[..])
    }

    fn make_node(&mut self, name: &[u8], value: &[u8], parent: NodeId, perms: Perms) -> NodeId {
        let id = self.arena.alloc(Record::LEN);
        let blob = self.make_blob(name, value);
        let mut record = Record::new(parent, blob, name.len(), value.len());
        record.generation = self.generation;
        record.rights = self.rights.hold(&mut self.arena, &perms);
        record.write(&mut self.arena, id);
        self.rights.link(&mut self.arena, id, record.rights);
        self.own(perms.owner(), name.len() + value.len());
        self.count += 1;
        id
    }

    fn own(&mut self, owner: u16, blob_len: usize) {
        *self.owned.entry(owner).or_default() += 1;
        *self.bytes.entry(owner).or_default() += (Record::LEN + blob_len) as u64;
    }

    fn make_blob(&mut self, name: &[u8], value: &[u8]) -> u32 {
        if name.is_empty() && value.is_empty() {
            return NONE;
        }
        let blob = self.arena.alloc(name.len() + value.len());
        let mut bytes = [0u8; 128];
        match bytes.get_mut(..name.len() + value.len()) {
            Some(bytes) => {
                bytes[..name.len()].copy_from_slice(name);
                bytes[name.len()..].copy_from_slice(value);
                self.arena.put(blob, 0, bytes);
            }
            None => {
                self.arena.put(blob, 0, name);
                self.arena.put(blob, name.len(), value);
            }
        }
        blob
    }

    fn set_generation_of(&mut self, id: NodeId) {
        Record::set_generation(&mut self.arena, id, self.generation);
    }

    /// Adds a child; whoever calls has made sure that there is none of that name.
    pub fn add_child(&mut self, parent: NodeId, name: &[u8], value: &[u8], perms: Perms) -> NodeId {
        self.generation += 1;
        let id = self.make_node(name, value, parent, perms);
        self.set_generation_of(parent);
        let (mut hook, mut link) = (parent, Link::Children);
        let mut at = link.read(&self.arena, hook);
        let priority = node::priority(id);
        while at != NONE && node::priority(at) > priority {
            (hook, link) = (at, if name < self.name(at) { Link::Left } else { Link::Right });
            at = link.read(&self.arena, hook);
        }
        link.write(&mut self.arena, hook, id);
        // What was there is divided into what comes before and after the new one.
        let (mut before, mut after) = ((id, Link::Left), (id, Link::Right));
        while at != NONE {
            if self.name(at) < name {
                before.1.write(&mut self.arena, before.0, at);
                before = (at, Link::Right);
            } else {
                after.1.write(&mut self.arena, after.0, at);
                after = (at, Link::Left);
            }
            at = if before.0 == at { Link::Right } else { Link::Left }.read(&self.arena, at);
        }
        before.1.write(&mut self.arena, before.0, NONE);
        after.1.write(&mut self.arena, after.0, NONE);
        id
    }

    /// Removes a child and everything below it.
    pub fn remove_child(&mut self, parent: NodeId, name: &[u8]) -> bool {
        let (mut hook, mut link) = (parent, Link::Children);
        let id = loop {
            let at = link.read(&self.arena, hook);
            if at == NONE {
                return false;
            }
            match name.cmp(self.name(at)) {
                std::cmp::Ordering::Equal => break at,
                std::cmp::Ordering::Less => (hook, link) = (at, Link::Left),
                std::cmp::Ordering::Greater => (hook, link) = (at, Link::Right),
            }
        };
        self.generation += 1;
        self.set_generation_of(parent);
        let (mut left, mut right) = (Link::Left.read(&self.arena, id), Link::Right.read(&self.arena, id));
        while left != NONE && right != NONE {
            if node::priority(left) > node::priority(right) {
                link.write(&mut self.arena, hook, left);
                (hook, link) = (left, Link::Right);
                left = link.read(&self.arena, left);
            } else {
                link.write(&mut self.arena, hook, right);
                (hook, link) = (right, Link::Left);
                right = link.read(&self.arena, right);
            }
        }
        link.write(&mut self.arena, hook, if left == NONE { right } else { left });
        self.drop_detached(id);
        true
    }

    /// Drops a node that nothing leads to any more, and all below it. They count no longer from here on; if they are many,
    /// their memory is taken back bit by bit ([`Tree::reap`]), so that nobody waits for a large removal.
    fn drop_detached(&mut self, id: NodeId) {
        let mut all = vec![id];
        // Neighbours mostly have the same owner.
        let mut owner = (0, 0, 0);
        let mut done = 0;
        while let Some(next) = all.get(done) {
            let (is_top, record) = (done == 0, self.record(*next));
            done += 1;
            let siblings = if is_top { [NONE, NONE] } else { [record.left, record.right] };
            all.extend(siblings.into_iter().chain([record.children]).filter(|n| *n != NONE));
            let domid = self.rights.get(record.rights).owner();
            if owner.0 != domid {
                self.disown(owner);
                owner = (domid, 0, 0);
            }
            owner.1 += 1;
            owner.2 += (Record::LEN + record.blob_len()) as u64;
        }
        self.disown(owner);
        self.count -= all.len();
        if all.len() <= AT_ONCE {
            for id in all {
                let record = self.record(id);
                self.free_node(id, &record);
            }
            return;
        }
        self.buried += all.len() as u64;
        Link::Left.write(&mut self.arena, id, NONE);
        Link::Right.write(&mut self.arena, id, NONE);
        self.bury(id);
    }

    /// Puts a node on the list of those whose memory is to be taken back.
    fn bury(&mut self, id: NodeId) {
        let first = self.arena.root(BURIED);
        Link::Parent.write(&mut self.arena, id, first);
        self.arena.set_root(BURIED, id);
    }

    /// Takes back the memory of up to `most` removed nodes.
    pub fn reap(&mut self, most: usize) {
        for _ in 0..most {
            if self.buried == 0 {
                return;
            }
            let id = self.arena.root(BURIED);
            let record = self.record(id);
            self.arena.set_root(BURIED, record.parent);
            for below in [record.left, record.right, record.children] {
                if below != NONE {
                    self.bury(below);
                }
            }
            self.free_node(id, &record);
            self.buried -= 1;
        }
    }

    fn free_node(&mut self, id: NodeId, record: &Record) {
        self.rights.unlink(&mut self.arena, record);
        if record.blob != NONE {
            self.arena.free(record.blob, record.blob_len());
        }
        self.arena.free(id, Record::LEN);
    }

    /// Owner, number and bytes of nodes that it no longer owns.
    fn disown(&mut self, (owner, nodes, bytes): (u16, u64, u64)) {
        for (counts, less) in [(&mut self.owned, nodes), (&mut self.bytes, bytes)] {
            if let Some(count) = counts.get_mut(&owner) {
                *count -= less;
                if *count == 0 {
                    counts.remove(&owner);
                }
            }
        }
    }

    /// Replaces a node's value.
    pub fn set_value_of(&mut self, id: NodeId, value: &[u8]) {
        self.generation += 1;
        let mut record = self.record(id);
        let (name_len, old) = (record.name_len(), record.blob_len());
        if record.blob != NONE && Arena::fits(old, name_len + value.len()) {
            self.arena.put(record.blob, name_len, value);
        } else {
            let name = self.name(id).to_vec();
            let blob = self.make_blob(&name, value);
            if record.blob != NONE {
                self.arena.free(record.blob, old);
            }
            record.blob = blob;
        }
        record.set_value_len(value.len());
        if let Some(bytes) = self.bytes.get_mut(&self.rights.get(record.rights).owner()) {
            *bytes = *bytes + record.blob_len() as u64 - old as u64;
        }
        record.generation = self.generation;
        record.write_head(&mut self.arena, id);
    }

    /// Replaces a node's permissions.
    pub fn set_perms_of(&mut self, id: NodeId, perms: Perms) {
        self.generation += 1;
        let mut record = self.record(id);
        let old = self.rights.get(record.rights).owner();
        if old != perms.owner() {
            self.own(perms.owner(), record.blob_len());
            self.disown((old, 1, (Record::LEN + record.blob_len()) as u64));
        }
        self.rights.unlink(&mut self.arena, &record);
        record.rights = self.rights.hold(&mut self.arena, &perms);
        record.generation = self.generation;
        record.write_head(&mut self.arena, id);
        self.rights.link(&mut self.arena, id, record.rights);
    }

    /// All nodes in pre-order: (depth below the hidden root, name, node). Names are sorted among siblings.
    pub fn walk(&self) -> impl Iterator<Item = (usize, &[u8], NodeId)> {
        self.walk_from(HIDDEN_ROOT)
    }

    /// The nodes below `top`, in pre-order, `top` excluded; depth 1 is a child of it.
    pub fn walk_from(&self, top: NodeId) -> impl Iterator<Item = (usize, &[u8], NodeId)> {
        let mut stack = vec![self.children_of(top)];
        std::iter::from_fn(move || {
            loop {
                let depth = stack.len();
                match stack.last_mut()?.next() {
                    Some((name, id)) => {
                        stack.push(self.children_of(id));
                        return Some((depth, name, id));
                    }
                    None => {
                        stack.pop();
                    }
                }
            }
        })
    }

    /// Drops a dead domain's claims: nodes that it owns go with all below them, its entries in other nodes'
    /// permissions go too (XSA-322). `before_remove` sees each path that goes, for watches.
    pub fn forget_domain(&mut self, domid: u16, mut before_remove: impl FnMut(&Tree, &[u8])) {
        // What was removed before has no path, and is in the lists below all the same.
        self.reap(usize::MAX);
        let mut doomed: Vec<Vec<u8>> = Vec::new();
        let mut scrub: Vec<(NodeId, Perms)> = Vec::new();
        for (index, perms) in self.rights.naming(domid) {
            for id in self.rights.nodes(&self.arena, index) {
                let parent = Link::Parent.read(&self.arena, id);
                if perms.owner() != domid {
                    scrub.extend(perms.without(domid).map(|perms| (id, perms)));
                } else if parent != HIDDEN_ROOT && parent != NONE {
                    doomed.push(self.path_of(id));
                } else {
                    // `/` and the special nodes stay, whoever owns them.
                    let perms = perms.without(domid).unwrap_or(perms.clone());
                    scrub.push((id, if domid == 0 { perms } else { perms.owned_by(0) }));
                }
            }
        }
        for (id, perms) in scrub {
            self.set_perms_of(id, perms);
        }
        doomed.sort_unstable();
        for path in doomed {
            // Gone already with its ancestor?
            if self.lookup(&path).is_some() {
                before_remove(self, &path);
                self.remove(&path);
            }
        }
    }

    /// Counts owners anew and compares: what CONTROL check and tests ask for.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<(), String> {
        let mut owned: BTreeMap<u16, u64> = BTreeMap::new();
        let mut bytes: BTreeMap<u16, u64> = BTreeMap::new();
        let mut seen = 0;
        for (_, name, id) in self.walk() {
            seen += 1;
            let node = self.node(id);
            *owned.entry(node.perms.owner()).or_default() += 1;
            let len = Record::LEN + name.len() + node.value.len();
            *bytes.entry(node.perms.owner()).or_default() += len as u64;
            if node.generation > self.generation {
                return Err(format!("node {:?} is newer than the tree", String::from_utf8_lossy(name)));
            }
            let (left, right) = (Link::Left.read(&self.arena, id), Link::Right.read(&self.arena, id));
            for (side, below) in [(left, true), (right, false)] {
                if side != NONE
                    && ((self.name(side) < name) != below || node::priority(side) > node::priority(id))
                {
                    return Err(format!(
                        "the children beside {:?} are not in order",
                        String::from_utf8_lossy(name)
                    ));
                }
            }
        }
        if seen != self.len() {
            return Err(format!("{seen} nodes reachable, {} counted", self.len()));
        }
        if bytes != self.bytes {
            return Err(format!("bytes {:?}, counted {bytes:?}", self.bytes));
        }
        if owned != self.owned {
            return Err(format!("owners {:?}, counted {owned:?}", self.owned));
        }
        self.rights.check(&self.arena, self.count + self.buried as usize)
    }
}

/// See [`Tree::children_of`].
pub struct Children<'a> {
    tree: &'a Tree,
    stack: Vec<NodeId>,
}

impl Children<'_> {
    fn down(&mut self, mut at: NodeId) {
        while at != NONE {
            self.stack.push(at);
            at = Link::Left.read(&self.tree.arena, at);
        }
    }
}

impl<'a> Iterator for Children<'a> {
    type Item = (&'a [u8], NodeId);

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.stack.pop()?;
        self.down(Link::Right.read(&self.tree.arena, id));
        Some((self.tree.name(id), id))
    }
}

impl View for Tree {
    fn find(&self, path: &[u8]) -> Lookup<'_> {
        let mut id = HIDDEN_ROOT;
        for (existing, name) in path::names(path).enumerate() {
            match self.child(id, name) {
                Some(next) => id = next,
                None => return Lookup::Missing { existing, perms: self.node(id).perms },
            }
        }
        Lookup::Node(self.node(id))
    }

    fn children(&self, path: &[u8]) -> Vec<&[u8]> {
        let Some(id) = self.lookup(path) else { return Vec::new() };
        self.children_of(id).map(|(name, _)| name).collect()
    }

    fn create(&mut self, path: &[u8], value: &[u8], perms: Perms) {
        let mut id = HIDDEN_ROOT;
        let mut names = path::names(path).peekable();
        while let Some(name) = names.next() {
            match (self.child(id, name), names.peek()) {
                (Some(next), _) => id = next,
                (None, None) => {
                    self.add_child(id, name, value, perms);
                    return;
                }
                // A missing parent: callers create from the top down.
                (None, Some(_)) => return,
            }
        }
    }

    fn set_value(&mut self, path: &[u8], value: &[u8]) {
        if let Some(id) = self.lookup(path) {
            self.set_value_of(id, value);
        }
    }

    fn set_perms(&mut self, path: &[u8], perms: Perms) {
        if let Some(id) = self.lookup(path) {
            self.set_perms_of(id, perms);
        }
    }

    fn remove(&mut self, path: &[u8]) {
        if let (Some(parent), Some(name)) = (path::parent(path), path::names(path).last())
            && let Some(parent) = self.lookup(parent)
        {
            self.remove_child(parent, name);
        }
    }

    fn owned(&self, domid: u16) -> u64 {
        self.owned.get(&domid).copied().unwrap_or(0)
    }
}
