//! The tree of nodes, and a transaction's view of it.
//!
//! Nodes live in a slab and are reached from a hidden root whose children are `/` (under the empty name)
//! and the two special nodes. Nothing here recurses: a path can be 1,536 levels deep (XSA-418).

mod overlay;
mod view;

use std::collections::BTreeMap;

pub use overlay::{Change, Overlay, OverlayNode, TxView};
pub use view::{Found, Lookup, View};

use crate::path;
use crate::perms::{DOMID_ANY, Perm, Perms, READ};

/// Index of a node in the slab.
pub type NodeId = u32;
/// The hidden root.
pub const HIDDEN_ROOT: NodeId = 0;

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Its octets.
    pub value: Box<[u8]>,
    /// Its permissions.
    pub perms: Perms,
    /// The tree's generation when the node or its list of children changed last.
    pub generation: u64,
    children: BTreeMap<Box<[u8]>, NodeId>,
}

/// All nodes.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    free: Vec<NodeId>,
    generation: u64,
    /// Nodes owned, by domid; no entry for zero.
    owned: BTreeMap<u16, u64>,
}

impl Tree {
    /// Only the hidden root: what a snapshot is loaded into.
    pub fn bare() -> Self {
        let root = Node {
            value: Box::default(),
            perms: Perms::private(0),
            generation: 0,
            children: BTreeMap::new(),
        };
        Self { nodes: vec![root], free: Vec::new(), generation: 0, owned: BTreeMap::new() }
    }

    /// A fresh store, with the nodes that Xen's daemon starts with.
    pub fn fresh() -> Self {
        let mut tree = Self::bare();
        for name in [&b"/"[..], b"/tool", b"/tool/xenstored", path::INTRODUCE] {
            tree.create(name, b"", Perms::private(0));
        }
        let anyone = vec![Perm { domid: 0, access: 0 }, Perm { domid: DOMID_ANY, access: READ }];
        let release = Perms::new(anyone).unwrap_or_else(|| Perms::private(0));
        tree.create(path::RELEASE, b"", release);
        tree
    }

    /// Counts up with every change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Sets the generation when a snapshot is loaded.
    pub fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// Sets the hidden root's generation when a snapshot is loaded.
    pub fn set_root_generation(&mut self, generation: u64) {
        self.nodes[HIDDEN_ROOT as usize].generation = generation;
    }

    /// Number of nodes, the hidden root excepted.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len() - 1
    }

    /// Whether there are no nodes at all (never so once a store is set up).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The counters of owned nodes.
    pub fn owners(&self) -> &BTreeMap<u16, u64> {
        &self.owned
    }

    /// A node by its index.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// A child by its name.
    pub fn child(&self, id: NodeId, name: &[u8]) -> Option<NodeId> {
        self.node(id).children.get(name).copied()
    }

    /// The node at `path`.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        path::names(path).try_fold(HIDDEN_ROOT, |id, name| self.child(id, name))
    }

    /// Adds a child; whoever calls has made sure that there is none of that name.
    pub fn add_child(&mut self, parent: NodeId, name: &[u8], value: &[u8], perms: Perms) -> NodeId {
        self.generation += 1;
        let generation = self.generation;
        *self.owned.entry(perms.owner()).or_default() += 1;
        let node = Node { value: value.into(), perms, generation, children: BTreeMap::new() };
        let id = match self.free.pop() {
            Some(id) => {
                self.nodes[id as usize] = node;
                id
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as NodeId
            }
        };
        let parent = &mut self.nodes[parent as usize];
        parent.generation = generation;
        parent.children.insert(name.into(), id);
        id
    }

    /// Adds a child as a snapshot recorded it.
    pub fn restore_child(
        &mut self,
        parent: NodeId,
        name: &[u8],
        value: &[u8],
        perms: Perms,
        generation: u64,
    ) -> NodeId {
        let (tree, above) = (self.generation, self.node(parent).generation);
        let id = self.add_child(parent, name, value, perms);
        self.nodes[id as usize].generation = generation;
        self.nodes[parent as usize].generation = above;
        self.generation = tree;
        id
    }

    /// Removes a child and everything below it.
    pub fn remove_child(&mut self, parent: NodeId, name: &[u8]) -> bool {
        let Some(id) = self.nodes[parent as usize].children.remove(name) else { return false };
        self.generation += 1;
        self.nodes[parent as usize].generation = self.generation;
        let mut work = vec![id];
        while let Some(id) = work.pop() {
            let node = &mut self.nodes[id as usize];
            work.extend(std::mem::take(&mut node.children).into_values());
            node.value = Box::default();
            let owner = node.perms.owner();
            node.perms = Perms::private(0);
            self.free.push(id);
            self.disown(owner);
        }
        true
    }

    fn disown(&mut self, owner: u16) {
        if let Some(count) = self.owned.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.owned.remove(&owner);
            }
        }
    }

    /// Replaces a node's value.
    pub fn set_value_of(&mut self, id: NodeId, value: &[u8]) {
        self.generation += 1;
        let node = &mut self.nodes[id as usize];
        node.generation = self.generation;
        if node.value.len() == value.len() {
            node.value.copy_from_slice(value);
        } else {
            node.value = value.into();
        }
    }

    /// Replaces a node's permissions.
    pub fn set_perms_of(&mut self, id: NodeId, perms: Perms) {
        self.generation += 1;
        let old = self.node(id).perms.owner();
        if old != perms.owner() {
            *self.owned.entry(perms.owner()).or_default() += 1;
            self.disown(old);
        }
        let node = &mut self.nodes[id as usize];
        node.generation = self.generation;
        node.perms = perms;
    }

    /// All nodes in pre-order: (depth below the hidden root, name, node). Names are sorted among siblings.
    pub fn walk(&self) -> impl Iterator<Item = (usize, &[u8], NodeId)> {
        self.walk_from(HIDDEN_ROOT)
    }

    /// The nodes below `top`, in pre-order, `top` excluded; depth 1 is a child of it.
    pub fn walk_from(&self, top: NodeId) -> impl Iterator<Item = (usize, &[u8], NodeId)> {
        let mut stack = vec![self.node(top).children.iter()];
        std::iter::from_fn(move || {
            loop {
                let depth = stack.len();
                match stack.last_mut()?.next() {
                    Some((name, id)) => {
                        stack.push(self.node(*id).children.iter());
                        return Some((depth, &name[..], *id));
                    }
                    None => {
                        stack.pop();
                    }
                }
            }
        })
    }

    /// Drops a dead domain's claims: nodes that it owns go with all below them, its entries in other nodes'
    /// permissions go too (XSA-322). Returns the paths removed, for watches.
    pub fn forget_domain(&mut self, domid: u16, mut before_remove: impl FnMut(&Tree, &[u8])) {
        let mut doomed: Vec<Vec<u8>> = Vec::new();
        let mut scrub: Vec<(NodeId, Perms)> = Vec::new();
        let mut trail: Vec<u8> = Vec::new();
        let mut ends: Vec<usize> = Vec::new();
        let mut skip_below = usize::MAX;
        for (depth, name, id) in self.walk() {
            if depth > skip_below {
                continue;
            }
            skip_below = usize::MAX;
            ends.truncate(depth - 1);
            trail.truncate(ends.last().copied().unwrap_or(0));
            if depth > 1 {
                trail.push(b'/');
            }
            trail.extend_from_slice(name);
            ends.push(trail.len());
            let node = self.node(id);
            // `/` and the special nodes stay, whoever owns them.
            if node.perms.owner() == domid && depth > 1 {
                doomed.push(trail.clone());
                skip_below = depth;
            } else if let Some(perms) = node.perms.without(domid) {
                scrub.push((id, perms));
            }
        }
        for (id, perms) in scrub {
            self.set_perms_of(id, perms);
        }
        for path in doomed {
            before_remove(self, &path);
            self.remove(&path);
        }
        for name in [&b"/"[..], path::INTRODUCE, path::RELEASE] {
            if let Some(id) = self.lookup(name)
                && self.node(id).perms.owner() == domid
                && domid != 0
            {
                let perms = self.node(id).perms.owned_by(0);
                self.set_perms_of(id, perms);
            }
        }
    }

    /// Counts owners anew and compares: what CONTROL check and tests ask for.
    pub fn check(&self) -> Result<(), String> {
        let mut owned: BTreeMap<u16, u64> = BTreeMap::new();
        let mut seen = 0;
        for (_, name, id) in self.walk() {
            seen += 1;
            let node = self.node(id);
            *owned.entry(node.perms.owner()).or_default() += 1;
            if node.generation > self.generation {
                return Err(format!("node {:?} is newer than the tree", String::from_utf8_lossy(name)));
            }
        }
        if seen != self.len() {
            return Err(format!("{seen} nodes reachable, {} allocated", self.len()));
        }
        if owned != self.owned {
            return Err(format!("owners {:?}, counted {owned:?}", self.owned));
        }
        Ok(())
    }
}

impl View for Tree {
    fn find(&self, path: &[u8]) -> Lookup<'_> {
        let mut id = HIDDEN_ROOT;
        for (existing, name) in path::names(path).enumerate() {
            match self.child(id, name) {
                Some(next) => id = next,
                None => return Lookup::Missing { existing, perms: &self.node(id).perms },
            }
        }
        let node = self.node(id);
        Lookup::Node(Found { value: &node.value, perms: &node.perms, generation: node.generation })
    }

    fn children(&self, path: &[u8]) -> Vec<&[u8]> {
        let Some(id) = self.lookup(path) else { return Vec::new() };
        self.node(id).children.keys().map(|k| &k[..]).collect()
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
