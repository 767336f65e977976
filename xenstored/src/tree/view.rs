//! What an operation on nodes needs, whether it works on the tree or inside a transaction.

use crate::perms::Perms;

/// A node that exists.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// Its octets.
    pub value: &'a [u8],
    /// Its permissions.
    pub perms: &'a Perms,
    /// Changes whenever the node or its list of children does.
    pub generation: u64,
}

/// The answer to a search.
#[derive(Debug, Clone, Copy)]
pub enum Lookup<'a> {
    /// It exists.
    Node(Found<'a>),
    /// It does not.
    Missing {
        /// How many of the path's names exist, from the top (see [`crate::path::names`]).
        existing: usize,
        /// Permissions of the nearest ancestor that exists.
        perms: &'a Perms,
    },
}

/// Access to nodes by absolute path.
pub trait View {
    /// Searches a node.
    fn find(&self, path: &[u8]) -> Lookup<'_>;
    /// Names of a node's children, sorted; empty if there is no such node.
    fn children(&self, path: &[u8]) -> Vec<&[u8]>;
    /// Adds a node that is missing below a parent that exists.
    fn create(&mut self, path: &[u8], value: &[u8], perms: Perms);
    /// Replaces the value of a node that exists.
    fn set_value(&mut self, path: &[u8], value: &[u8]);
    /// Replaces the permissions of a node that exists.
    fn set_perms(&mut self, path: &[u8], perms: Perms);
    /// Removes a node that exists (neither `/` nor a special one), and all below it.
    fn remove(&mut self, path: &[u8]);
    /// How many nodes a domain owns.
    fn owned(&self, domid: u16) -> u64;
}
