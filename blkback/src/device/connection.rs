//! What a frontend told of its connection, and how it is kept: the next incarnation needs no store to go on.
//!
//! Each ring has a journal of its own in the fd store, `vbd-FRONTEND-ID` for the first and `vbd-FRONTEND-ID.N` for the others.
//! The journal's identity says which connection it belongs to; the grants of the ring's pages are in the owner's area.

use std::sync::atomic::Ordering;

use domain_kit::hypercall::Hypercall;
use domain_kit::journal::{JournalError, JournaledRing, RingFormat, RingJournal, Shape};
use domain_kit::mem::SharedMem;
use domain_kit::ring::{Pages, RingLayout};
use domain_kit::xenbus::DeviceKey;
use nix::errno::Errno;
use xen_abi::io::blkif::Abi;

use super::AttachError;
use crate::limit::Limits;
use crate::pages::RECORDS_BYTES;
use crate::request::{BlkifFormat, MAX_INDIRECT_BYTES};

/// Most rings of a device.
pub const MAX_QUEUES: u32 = 8;
/// log2 of the most pages of a ring.
pub const MAX_PAGE_ORDER: u32 = 4;

/// A ring as its frontend described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingRefs {
    /// Grants of the ring's pages, a power of two of them.
    pub grefs: Vec<u32>,
    /// The frontend's port.
    pub remote_port: u32,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Which device.
    pub key: DeviceKey,
    /// Layout of its rings' entries.
    pub abi: Abi,
    /// Its grants may stay mapped.
    pub persistent: bool,
    /// Its writes are refused.
    pub read_only: bool,
    /// Which domain of that domid it is (low bits of hv-core's serial number): a domid can be used again.
    pub instance: u32,
    /// Its rings, all of as many pages.
    pub rings: Vec<RingRefs>,
}

/// The owner's area of a journal: a word that is set once the frontend knows of the connection; limits; the ring's grants; the
/// records of persistent grants.
const USER_BYTES: u32 = USER_RECORDS as u32 + RECORDS_BYTES;
/// Byte offset of the device's limits in the owner's area, of the first ring's journal.
const USER_LIMITS: usize = 8;
/// Byte offset of the ring's grants in the owner's area.
const USER_GREFS: usize = 64;
/// Byte offset of the records of persistent grants in the owner's area.
pub const USER_RECORDS: usize = USER_GREFS + 4 * (1 << MAX_PAGE_ORDER);

/// Name of a ring's journal in the fd store.
pub fn journal_name(key: DeviceKey, ring: u32) -> String {
    if ring == 0 { format!("vbd-{key}") } else { format!("vbd-{key}.{ring}") }
}

impl Connection {
    /// log2 of a ring's pages.
    fn order(&self) -> u32 {
        self.rings.first().map_or(0, |ring| ring.grefs.len().max(1).ilog2())
    }

    /// Layout of each ring.
    pub fn layout(&self) -> RingLayout {
        let format = BlkifFormat(self.abi);
        RingLayout::new(1 << self.order(), format.req_size(), format.rsp_size())
    }

    /// Shape of each ring's journal.
    pub fn shape(&self) -> Shape {
        JournaledRing::<Pages, Pages, BlkifFormat>::shape(
            &self.layout(),
            MAX_INDIRECT_BYTES as u32,
            USER_BYTES,
        )
    }

    /// Identity of a ring's journal.
    pub fn identity(&self, ring: u32) -> [u32; 6] {
        let flags = u32::from(self.abi == Abi::X86_32)
            | u32::from(self.persistent) << 1
            | u32::from(self.read_only) << 2;
        let sizes = ring | (self.rings.len() as u32) << 8 | self.order() << 16;
        let remote_port = self.rings[ring as usize].remote_port;
        [self.key.frontend.into(), self.key.id, sizes, remote_port, flags, self.instance]
    }

    /// A connection with this ring alone, its number, and the number of rings.
    fn from_identity(words: [u32; 6], grefs: impl Fn(usize) -> u32) -> Option<(Self, u32, u32)> {
        let [frontend, id, sizes, remote_port, flags, instance] = words;
        let (ring, rings, order) = (sizes & 0xff, sizes >> 8 & 0xff, sizes >> 16);
        if ring >= rings || rings > MAX_QUEUES || order > MAX_PAGE_ORDER {
            return None;
        }
        let connection = Connection {
            key: DeviceKey { frontend: frontend.try_into().ok()?, id },
            abi: if flags & 1 != 0 { Abi::X86_32 } else { Abi::X86_64 },
            persistent: flags & 2 != 0,
            read_only: flags & 4 != 0,
            instance,
            rings: vec![RingRefs { grefs: (0..1 << order).map(grefs).collect(), remote_port }],
        };
        Some((connection, ring, rings))
    }

    /// Writes what the identity has no room for. Before the journal is made, which is then valid with it.
    pub fn store_grefs(&self, ring: u32, memory: &SharedMem) {
        let at = user_area(&self.shape()) + USER_GREFS;
        for (i, &gref) in self.rings[ring as usize].grefs.iter().enumerate() {
            memory.store_u32(at + 4 * i, gref, Ordering::Release);
        }
    }
}

/// Keeps a device's limits in its first ring's journal, whose owner's area starts at `user`.
pub fn store_limits(journal: &SharedMem, user: usize, limits: &Limits) {
    let Limits { iops, iops_burst, bytes, bytes_burst } = *limits;
    for (i, value) in [iops, iops_burst, bytes, bytes_burst].into_iter().enumerate() {
        journal.store_u64(user + USER_LIMITS + 8 * i, value, Ordering::Release);
    }
}

fn load_limits(journal: &SharedMem, user: usize) -> Limits {
    let [iops, iops_burst, bytes, bytes_burst] =
        std::array::from_fn(|i| journal.load_u64(user + USER_LIMITS + 8 * i, Ordering::Acquire));
    Limits { iops, iops_burst, bytes, bytes_burst }
}

fn user_area(shape: &Shape) -> usize {
    shape.bytes() - shape.user_size as usize
}

/// A connection of which everything is kept.
#[derive(Debug)]
pub struct Kept {
    /// What it is.
    pub connection: Connection,
    /// Each ring's journal.
    pub journals: Vec<SharedMem>,
    /// The frontend knows that it is connected.
    pub known: bool,
    /// The device's limits.
    pub limits: Limits,
}

/// What is kept of a device; `None` if nothing is.
///
/// # Errors
/// The hypercalls'; a journal that is damaged or missing.
pub fn find(hv: &Hypercall, key: DeviceKey) -> Result<Option<Kept>, AttachError> {
    let Some((mut connection, first, rings)) = one(hv, key, 0)? else { return Ok(None) };
    let user = user_area(&connection.shape());
    let known = first.load_u32(user, Ordering::Acquire) != 0;
    let limits = load_limits(&first, user);
    let mut journals = vec![first];
    for ring in 1..rings {
        let (other, memory, _) = one(hv, key, ring)?.ok_or(AttachError::NothingKept)?;
        connection.rings.extend(other.rings);
        journals.push(memory);
    }
    if connection.rings.iter().any(|r| r.grefs.len() != connection.rings[0].grefs.len()) {
        return Err(JournalError::Header("rings of different sizes").into());
    }
    Ok(Some(Kept { connection, journals, known, limits }))
}

fn one(
    hv: &Hypercall,
    key: DeviceKey,
    ring: u32,
) -> Result<Option<(Connection, SharedMem, u32)>, AttachError> {
    let (_, fd) = match hv.fd_get(&journal_name(key, ring)) {
        Ok(found) => found,
        Err(e) if e.is(Errno::ENOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let len = nix::sys::stat::fstat(&fd).map_err(|e| AttachError::Os("fstat", e.into()))?.st_size as usize;
    let memory = SharedMem::map(&fd, len).map_err(|e| AttachError::Os("mapping the journal", e))?;
    let foreign = || JournalError::Header("not a journal of this service's");
    let (shape, identity) = RingJournal::peek(&memory)?;
    if shape.user_size != USER_BYTES || shape.bytes() > len {
        return Err(foreign().into());
    }
    let grefs = |i| memory.load_u32(user_area(&shape) + USER_GREFS + 4 * i, Ordering::Acquire);
    let found = Connection::from_identity(identity, grefs)
        .filter(|(c, number, _)| c.key == key && *number == ring && c.shape() == shape);
    let (connection, _, rings) = found.ok_or_else(foreign)?;
    Ok(Some((connection, memory, rings)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back() {
        let ring = |n: u32| RingRefs { grefs: (n..n + 4).collect(), remote_port: n };
        let whole = Connection {
            key: DeviceKey { frontend: 7, id: 51712 },
            abi: Abi::X86_32,
            persistent: true,
            read_only: false,
            instance: 99,
            rings: vec![ring(100), ring(200)],
        };
        assert_eq!(whole.layout().size, 128);
        for (i, refs) in whole.rings.iter().enumerate() {
            let grefs = |n: usize| refs.grefs[n];
            let (one, number, rings) = Connection::from_identity(whole.identity(i as u32), grefs).unwrap();
            assert_eq!((number, rings), (i as u32, 2));
            assert_eq!(one, Connection { rings: vec![refs.clone()], ..whole.clone() });
        }
        for sizes in [1 << 8 | 1, 9 << 8, 1 << 8 | 5 << 16] {
            let mut words = whole.identity(0);
            words[2] = sizes;
            assert_eq!(Connection::from_identity(words, |_| 0), None);
        }
    }
}
