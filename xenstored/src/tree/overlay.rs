//! A transaction's changes, laid over the tree.
//!
//! Reads of untouched nodes fall through to the tree as it is *now*; whether that was consistent is judged
//! at commit (`store/transaction.rs`). So an open transaction costs its own changes, never a copy.

use std::collections::BTreeMap;

use super::{Found, HIDDEN_ROOT, Lookup, NodeId, Tree, View};
use crate::path;
use crate::perms::Perms;

/// What the transaction did to one node.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Change {
    /// Nothing; only below it.
    #[default]
    None,
    /// Removed, with all that the tree has below it.
    Removed,
    /// Written or created.
    Put {
        /// New value.
        value: Box<[u8]>,
        /// New permissions.
        perms: Perms,
        /// Created here: the tree's children of that path do not shine through.
        fresh: bool,
    },
}

/// A node of the overlay.
#[derive(Debug, Default)]
pub struct OverlayNode {
    /// What was done to it.
    pub change: Change,
    /// Serial number of the last change to it or its list of children; 0 for none.
    pub touched: u64,
    /// Changes below, by name.
    pub children: BTreeMap<Box<[u8]>, OverlayNode>,
}

impl OverlayNode {
    /// Drops all below, without recursion.
    fn clear_below(&mut self) {
        let mut gone = vec![std::mem::take(&mut self.children)];
        while let Some(children) = gone.pop() {
            gone.extend(children.into_values().map(|mut node| std::mem::take(&mut node.children)));
        }
    }
}

/// All changes of one transaction.
#[derive(Debug, Default)]
pub struct Overlay {
    /// Stands over the tree's hidden root.
    pub root: OverlayNode,
    /// Difference in owned nodes by domid.
    pub owned: BTreeMap<u16, i64>,
    /// Last serial number given.
    pub serial: u64,
    /// Overlay nodes, for the quota.
    pub nodes: usize,
}

/// Marks a generation that exists inside a transaction only.
const PRIVATE: u64 = 1 << 63;

impl Overlay {
    fn entry(&mut self, path: &[u8]) -> &mut OverlayNode {
        let mut node = &mut self.root;
        for name in path::names(path) {
            if !node.children.contains_key(name) {
                self.nodes += 1;
                node.children.insert(name.into(), OverlayNode::default());
            }
            node = node.children.get_mut(name).expect("inserted above");
        }
        node
    }

    fn touch_parent(&mut self, path: &[u8]) {
        self.serial += 1;
        let serial = self.serial;
        if let Some(parent) = path::parent(path) {
            self.entry(parent).touched = serial;
        }
    }

    fn own(&mut self, domid: u16, by: i64) {
        *self.owned.entry(domid).or_default() += by;
    }

    /// Whether the transaction changed nothing.
    pub fn is_empty(&self) -> bool {
        self.root.children.is_empty()
    }

    /// Carries the changes out. The overlay must fit the tree as it is.
    pub fn apply(&self, tree: &mut Tree) {
        let mut work: Vec<(NodeId, &OverlayNode)> = vec![(HIDDEN_ROOT, &self.root)];
        while let Some((id, over)) = work.pop() {
            for (name, child) in &over.children {
                let existing = tree.child(id, name);
                let next = match &child.change {
                    Change::None => existing,
                    Change::Removed => {
                        tree.remove_child(id, name);
                        None
                    }
                    Change::Put { value, perms, fresh } => match existing.filter(|_| !fresh) {
                        Some(node) => {
                            if *tree.node(node).value != **value {
                                tree.set_value_of(node, value);
                            }
                            if *tree.node(node).perms != *perms {
                                tree.set_perms_of(node, perms.clone());
                            }
                            Some(node)
                        }
                        None => {
                            tree.remove_child(id, name);
                            Some(tree.add_child(id, name, value, perms.clone()))
                        }
                    },
                };
                if let Some(next) = next {
                    work.push((next, child));
                }
            }
        }
    }

    /// All overlay nodes in pre-order: (depth, name, node).
    pub fn walk(&self) -> impl Iterator<Item = (usize, &[u8], &OverlayNode)> {
        let mut stack = vec![self.root.children.iter()];
        std::iter::from_fn(move || {
            loop {
                let depth = stack.len();
                match stack.last_mut()?.next() {
                    Some((name, node)) => {
                        stack.push(node.children.iter());
                        return Some((depth, &name[..], node));
                    }
                    None => {
                        stack.pop();
                    }
                }
            }
        })
    }
}

impl Drop for Overlay {
    /// Without recursion: a chain of nodes can be as deep as a path is long.
    fn drop(&mut self) {
        self.root.clear_below();
    }
}

/// The tree as a transaction sees it.
pub struct TxView<'a> {
    /// The tree, untouched.
    pub base: &'a Tree,
    /// The transaction's changes.
    pub over: &'a mut Overlay,
}

/// Where a path leads: its node in the tree, and its node in the overlay.
struct Spot<'a> {
    base: Option<NodeId>,
    over: Option<&'a OverlayNode>,
}

impl TxView<'_> {
    /// Follows a path; `Err` tells how many names exist and the last spot that does.
    fn walk(&self, path: &[u8]) -> Result<Spot<'_>, (usize, Spot<'_>)> {
        let mut at = Spot { base: Some(HIDDEN_ROOT), over: Some(&self.over.root) };
        for (existing, name) in path::names(path).enumerate() {
            let over = at.over.and_then(|o| o.children.get(name));
            let below = at.base.and_then(|id| self.base.child(id, name));
            let next = match over.map(|o| &o.change) {
                Some(Change::Removed) => None,
                Some(Change::Put { fresh, .. }) => Some(Spot { base: below.filter(|_| !fresh), over }),
                Some(Change::None) | None => below.map(|id| Spot { base: Some(id), over }),
            };
            match next {
                Some(next) => at = next,
                None => return Err((existing, at)),
            }
        }
        Ok(at)
    }

    fn found<'a>(&'a self, spot: &Spot<'a>) -> Found<'a> {
        let base = self.base.node(spot.base.unwrap_or(HIDDEN_ROOT));
        let touched = spot.over.map_or(0, |o| o.touched);
        let generation = if touched > 0 { PRIVATE | touched } else { base.generation };
        match spot.over.map(|o| &o.change) {
            Some(Change::Put { value, perms, .. }) => Found { value, perms, generation },
            _ => Found { value: base.value, perms: base.perms, generation },
        }
    }

    fn children_of<'a>(&'a self, spot: &Spot<'a>) -> Vec<&'a [u8]> {
        let hidden = |name: &[u8]| spot.over.is_some_and(|o| o.children.contains_key(name));
        let base = spot.base.into_iter().flat_map(|id| self.base.children_of(id));
        let mut names: Vec<&[u8]> = base.map(|(name, _)| name).filter(|k| !hidden(k)).collect();
        for (name, child) in spot.over.into_iter().flat_map(|o| &o.children) {
            let shown = match child.change {
                Change::Removed => false,
                Change::Put { .. } => true,
                Change::None => spot.base.and_then(|id| self.base.child(id, name)).is_some(),
            };
            if shown {
                names.push(name);
            }
        }
        names.sort_unstable();
        names
    }

    fn put(&mut self, path: &[u8], value: Option<&[u8]>, perms: Option<Perms>) {
        let Lookup::Node(now) = self.find(path) else { return };
        let new_value: Box<[u8]> = value.unwrap_or(now.value).into();
        let old_owner = now.perms.owner();
        let new_perms = perms.unwrap_or_else(|| now.perms.clone());
        if old_owner != new_perms.owner() {
            self.over.own(old_owner, -1);
            self.over.own(new_perms.owner(), 1);
        }
        self.over.serial += 1;
        let serial = self.over.serial;
        let entry = self.over.entry(path);
        entry.touched = serial;
        let fresh = matches!(entry.change, Change::Put { fresh: true, .. });
        entry.change = Change::Put { value: new_value, perms: new_perms, fresh };
    }
}

impl View for TxView<'_> {
    fn find(&self, path: &[u8]) -> Lookup<'_> {
        match self.walk(path) {
            Ok(spot) => Lookup::Node(self.found(&spot)),
            Err((existing, spot)) => Lookup::Missing { existing, perms: self.found(&spot).perms },
        }
    }

    fn children(&self, path: &[u8]) -> Vec<&[u8]> {
        self.walk(path).map_or_else(|_| Vec::new(), |spot| self.children_of(&spot))
    }

    fn create(&mut self, path: &[u8], value: &[u8], perms: Perms) {
        self.over.own(perms.owner(), 1);
        self.over.touch_parent(path);
        let serial = self.over.serial;
        let entry = self.over.entry(path);
        entry.touched = serial;
        entry.change = Change::Put { value: value.into(), perms, fresh: true };
        // Own changes below a node that others removed meanwhile do not come back with it.
        entry.clear_below();
    }

    fn set_value(&mut self, path: &[u8], value: &[u8]) {
        self.put(path, Some(value), None);
    }

    fn set_perms(&mut self, path: &[u8], perms: Perms) {
        self.put(path, None, Some(perms));
    }

    fn remove(&mut self, path: &[u8]) {
        let mut owners: Vec<u16> = Vec::new();
        let mut work = vec![path.to_vec()];
        while let Some(path) = work.pop() {
            let Ok(spot) = self.walk(&path) else { continue };
            owners.push(self.found(&spot).perms.owner());
            work.extend(self.children_of(&spot).into_iter().map(|name| path::join(&path, name)));
        }
        for owner in owners {
            self.over.own(owner, -1);
        }
        self.over.touch_parent(path);
        let serial = self.over.serial;
        let entry = self.over.entry(path);
        entry.touched = serial;
        entry.change = Change::Removed;
        // They count towards the quota until the transaction ends, as their removal does.
        entry.clear_below();
    }

    fn owned(&self, domid: u16) -> u64 {
        self.base.owned(domid).saturating_add_signed(self.over.owned.get(&domid).copied().unwrap_or(0))
    }
}
