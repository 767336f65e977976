//! A node's record in the arena: 48 bytes, and a blob with its name and value.

use super::NodeId;
use crate::journal::arena::Arena;

/// No node, no blob.
pub const NONE: u32 = 0;

/// Fields that name another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Siblings with smaller names.
    Left = 0,
    /// Siblings with greater names.
    Right = 4,
    /// The treap of its children.
    Children = 8,
    /// The node above.
    Parent = 12,
    /// The next node with the same permissions.
    NextPeer = 32,
    /// The one before.
    PrevPeer = 36,
}

impl Link {
    /// Reads the field.
    #[inline]
    pub fn read(self, arena: &Arena, id: NodeId) -> NodeId {
        arena.u32(id, self as usize)
    }

    /// Writes the field.
    pub fn write(self, arena: &mut Arena, id: NodeId, to: NodeId) {
        arena.set_u32(id, self as usize, to);
    }
}

/// A record, copied out.
#[derive(Debug, Clone)]
pub struct Record {
    pub left: NodeId,
    pub right: NodeId,
    pub children: NodeId,
    pub parent: NodeId,
    /// Where name and value are.
    pub blob: u32,
    lens: [u16; 2],
    /// Which permissions.
    pub rights: u32,
    pub next_peer: NodeId,
    pub prev_peer: NodeId,
    /// The tree's generation when the node or its list of children changed last.
    pub generation: u64,
}

impl Record {
    /// Bytes in the arena.
    pub const LEN: usize = 48;
    const GENERATION: usize = 40;

    pub fn new(parent: NodeId, blob: u32, name_len: usize, value_len: usize) -> Self {
        Self {
            left: NONE,
            right: NONE,
            children: NONE,
            parent,
            blob,
            lens: [name_len as u16, value_len as u16],
            rights: 0,
            next_peer: NONE,
            prev_peer: NONE,
            generation: 0,
        }
    }

    pub fn name_len(&self) -> usize {
        usize::from(self.lens[0])
    }

    pub fn value_len(&self) -> usize {
        usize::from(self.lens[1])
    }

    pub fn set_value_len(&mut self, len: usize) {
        self.lens[1] = len as u16;
    }

    pub fn blob_len(&self) -> usize {
        self.name_len() + self.value_len()
    }

    #[inline]
    pub fn read(arena: &Arena, id: NodeId) -> Self {
        let bytes = arena.bytes(id, 0, Self::LEN);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            left: word(0),
            right: word(4),
            children: word(8),
            parent: word(12),
            blob: word(16),
            lens: [half(20), half(22)],
            rights: word(24),
            next_peer: word(Link::NextPeer as usize),
            prev_peer: word(Link::PrevPeer as usize),
            generation: u64::from(word(Self::GENERATION)) | u64::from(word(Self::GENERATION + 4)) << 32,
        }
    }

    pub fn write(&self, arena: &mut Arena, id: NodeId) {
        let mut bytes = [0; Self::LEN];
        let words = [self.left, self.right, self.children, self.parent, self.blob];
        for (at, word) in words.into_iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[20..22].copy_from_slice(&self.lens[0].to_le_bytes());
        bytes[22..24].copy_from_slice(&self.lens[1].to_le_bytes());
        bytes[24..28].copy_from_slice(&self.rights.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.next_peer.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.prev_peer.to_le_bytes());
        bytes[40..].copy_from_slice(&self.generation.to_le_bytes());
        arena.put(id, 0, &bytes);
    }

    /// The fields that a change of value or permissions sets.
    pub fn write_head(&self, arena: &mut Arena, id: NodeId) {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.blob.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.lens[0].to_le_bytes());
        bytes[6..8].copy_from_slice(&self.lens[1].to_le_bytes());
        bytes[8..].copy_from_slice(&self.rights.to_le_bytes());
        arena.put(id, 16, &bytes);
        Self::set_generation(arena, id, self.generation);
    }

    pub fn set_generation(arena: &mut Arena, id: NodeId, generation: u64) {
        arena.put(id, Self::GENERATION, &generation.to_le_bytes());
    }
}

/// A node's priority in its treap: as good as random, and the same after every restart.
#[inline]
pub fn priority(id: NodeId) -> u64 {
    // The multiplier of a well-known 64-bit finaliser; the id itself makes it unique.
    let mixed = (u64::from(id) ^ u64::from(id) << 29).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (mixed ^ mixed >> 33) & !0xffff_ffff | u64::from(id)
}
