//! What a store does with the requests of the only one who writes to a subtree. Written apart from the daemon's code.

use std::collections::BTreeMap;

/// Bytes of a value above which an unprivileged domain is refused.
pub const NODE_SIZE: usize = 2048;
/// Nodes that an unprivileged domain may own.
pub const NODES: usize = 1000;

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its value.
    pub value: Vec<u8>,
    /// Its permissions as in the protocol, the owner first.
    pub perms: Vec<String>,
}

/// The nodes of a subtree by path.
pub type Nodes = BTreeMap<String, Node>;

/// What watches are told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Watches on this path and above it.
    At(String),
    /// All below this path went with it: watches below that are on a node that was there, each with its own path.
    Below(String, Vec<String>),
}

/// A reply's payload, or an error's name.
pub type Reply = Result<Vec<u8>, &'static str>;

/// A request on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// READ.
    Read,
    /// DIRECTORY.
    Directory,
    /// WRITE of a value.
    Write(Vec<u8>),
    /// MKDIR.
    Mkdir,
    /// RM.
    Rm,
    /// GET_PERMS.
    GetPerms,
    /// SET_PERMS.
    SetPerms(Vec<String>),
}

/// A subtree with its owner.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its root, which always exists.
    pub base: String,
    /// The owner, if it is an unprivileged domain, which quotas apply to.
    pub guest: Option<u16>,
    /// The nodes.
    pub nodes: Nodes,
}

fn ok() -> Reply {
    Ok(b"OK\0".to_vec())
}

/// The path above.
pub fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Whether `other` lies strictly below `path`.
pub fn below(path: &str, other: &str) -> bool {
    other.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
}

impl Model {
    /// A subtree that is its root alone.
    pub fn new(base: &str, guest: Option<u16>) -> Self {
        let perms = vec![format!("n{}", guest.unwrap_or(0))];
        let root = Node { value: Vec::new(), perms };
        Model { base: base.into(), guest, nodes: [(base.to_owned(), root)].into() }
    }

    /// Carries out a request of the owner's on `nodes`, which are this subtree's, outside or inside a transaction.
    pub fn apply(
        &self,
        nodes: &mut Nodes,
        path: &str,
        request: &Request,
        changes: &mut Vec<Change>,
    ) -> Reply {
        match request {
            Request::Read => nodes.get(path).map(|n| n.value.clone()).ok_or("ENOENT"),
            Request::GetPerms => {
                let node = nodes.get(path).ok_or("ENOENT")?;
                Ok(node.perms.iter().flat_map(|p| [p.as_bytes(), b"\0"].concat()).collect())
            }
            Request::Directory => {
                nodes.get(path).ok_or("ENOENT")?;
                let children = nodes.keys().filter(|p| parent(p) == path);
                Ok(children.flat_map(|p| [&p.as_bytes()[path.len() + 1..], b"\0"].concat()).collect())
            }
            Request::Write(value) => self.write(nodes, path, Some(value), changes),
            Request::Mkdir => self.write(nodes, path, None, changes),
            Request::Rm => {
                if !nodes.contains_key(path) {
                    return if nodes.contains_key(parent(path)) { ok() } else { Err("ENOENT") };
                }
                let gone: Vec<String> = nodes.keys().filter(|p| below(path, p)).cloned().collect();
                nodes.retain(|p, _| p != path && !below(path, p));
                changes.push(Change::Below(path.into(), gone));
                changes.push(Change::At(path.into()));
                ok()
            }
            Request::SetPerms(perms) => {
                nodes.get_mut(path).ok_or("ENOENT")?.perms.clone_from(perms);
                changes.push(Change::At(path.into()));
                ok()
            }
        }
    }

    fn write(&self, nodes: &mut Nodes, path: &str, value: Option<&[u8]>, changes: &mut Vec<Change>) -> Reply {
        if let Some(node) = nodes.get_mut(path) {
            let Some(value) = value else { return ok() };
            if self.guest.is_some() && value.len() > NODE_SIZE {
                return Err("ENOSPC");
            }
            node.value = value.to_vec();
            changes.push(Change::At(path.into()));
            return ok();
        }
        if self.guest.is_some() && value.is_some_and(|v| v.len() > NODE_SIZE) {
            return Err("ENOSPC");
        }
        let mut new = vec![path.to_owned()];
        while !nodes.contains_key(parent(&new[new.len() - 1])) {
            new.push(parent(&new[new.len() - 1]).to_owned());
        }
        if self.guest.is_some() && nodes.len() + new.len() > NODES {
            return Err("ENOSPC");
        }
        let perms = nodes.get(parent(&new[new.len() - 1])).map(|n| n.perms.clone()).unwrap_or_default();
        for step in new {
            let own = if step == path { value.unwrap_or_default() } else { b"" };
            nodes.insert(step, Node { value: own.to_vec(), perms: perms.clone() });
        }
        changes.push(Change::At(path.into()));
        ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_removal_tells() {
        let model = Model::new("/b", None);
        let mut nodes = model.nodes.clone();
        let mut changes = Vec::new();
        assert_eq!(model.apply(&mut nodes, "/b/x/y", &Request::Write(b"1".to_vec()), &mut changes), ok());
        assert_eq!(changes, [Change::At("/b/x/y".into())]);
        changes.clear();
        assert_eq!(model.apply(&mut nodes, "/b/x", &Request::Rm, &mut changes), ok());
        assert_eq!(changes, [Change::Below("/b/x".into(), vec!["/b/x/y".into()]), Change::At("/b/x".into())]);
        assert_eq!(model.apply(&mut nodes, "/b/x", &Request::Rm, &mut changes), ok());
        assert_eq!(model.apply(&mut nodes, "/b/x/y", &Request::Rm, &mut changes), Err("ENOENT"));
    }

    #[test]
    fn a_guest_has_quotas() {
        let model = Model::new("/g", Some(7));
        let mut nodes = model.nodes.clone();
        let mut write =
            |path: &str, len| model.apply(&mut nodes, path, &Request::Write(vec![0; len]), &mut Vec::new());
        assert_eq!(write("/g/a", NODE_SIZE + 1), Err("ENOSPC"));
        for i in 1..NODES {
            assert_eq!(write(&format!("/g/{i}"), 1), ok());
        }
        assert_eq!(write("/g/b", 1), Err("ENOSPC"));
        assert_eq!(write("/g/1", 2), ok());
    }
}
