//! The control ring: hash configuration (netif.h, "Control ring").
//!
//! Every request sets or asks something, so running one twice does no harm: what a dead incarnation did not answer is run again.
//! The configuration itself is kept by the owner ([`CtrlWorld::changed`]).

use domain_kit::journal::{IDENTITY_WORDS, JournaledRing, MAX_ATTEMPTS, RingFormat, Shape, Slot};
use domain_kit::ring::{RingLayout, RingMem};
use xen_abi::PAGE_SIZE;
use xen_abi::io::netif::*;
use zerocopy::FromBytes;

use super::{Progress, QueueError};
use crate::hash::{HashConfig, MAX_KEY, MAX_MAPPING, Refused};

/// Requests and responses of the control ring: `status` is the response's, `aux` its data.
#[derive(Clone, Copy, Debug)]
pub struct CtrlFormat;

impl RingFormat for CtrlFormat {
    fn req_size(&self) -> usize {
        CTRL_ENTRY_SIZE
    }
    fn rsp_size(&self) -> usize {
        size_of::<XenNetifCtrlResponse>()
    }
    fn response(&self, request: &[u8], status: i16, aux: u32, out: &mut [u8]) {
        out[..4].copy_from_slice(&request[..4]);
        out[4..8].copy_from_slice(&u32::from(status as u16).to_le_bytes());
        out[8..].copy_from_slice(&aux.to_le_bytes());
    }
}

/// The ring's layout.
pub fn layout() -> RingLayout {
    RingLayout::new(1, CTRL_ENTRY_SIZE, size_of::<XenNetifCtrlResponse>())
}

/// The journal's shape for a ring of this layout.
pub fn shape(layout: &RingLayout) -> Shape {
    Shape { entries: layout.size, req_size: layout.req_size as u32, extra_size: 0, user_size: 0 }
}

/// What surrounds a control ring.
pub trait CtrlWorld {
    /// The first `into.len()` bytes (at most a page) of a granted page; false if it is not granted.
    fn read(&mut self, gref: u32, into: &mut [u8]) -> bool;
    /// How many queues there are.
    fn queues(&self) -> usize;
    /// The configuration.
    fn config(&self) -> HashConfig;
    /// A new one, to be kept before it is answered.
    fn changed(&mut self, config: HashConfig);
}

/// The control ring.
#[derive(Debug)]
pub struct CtrlQueue<R, J> {
    ring: JournaledRing<R, J, CtrlFormat>,
    pending: Vec<Slot>,
}

impl<R: RingMem, J: RingMem> CtrlQueue<R, J> {
    /// Starts on a ring that a frontend has just connected.
    ///
    /// # Errors
    /// [`JournaledRing::create`]'s.
    pub fn create(ring: R, journal: J, identity: [u32; IDENTITY_WORDS]) -> Result<Self, QueueError> {
        let layout = layout();
        let ring = JournaledRing::create(ring, layout, journal, shape(&layout), identity, CtrlFormat)?;
        Ok(CtrlQueue { ring, pending: Vec::new() })
    }

    /// Goes on where a dead incarnation stopped.
    ///
    /// # Errors
    /// [`JournaledRing::reattach`]'s.
    pub fn reattach(ring: R, journal: J, own_fault: bool) -> Result<Self, QueueError> {
        let layout = layout();
        let (ring, pending) =
            JournaledRing::reattach(ring, layout, journal, shape(&layout), CtrlFormat, own_fault)?;
        Ok(CtrlQueue { ring, pending })
    }

    /// Does what waits.
    ///
    /// # Errors
    /// [`QueueError`]; the ring must not be used any more.
    pub fn run(&mut self, world: &mut impl CtrlWorld) -> Result<Progress, QueueError> {
        let mut slots = std::mem::take(&mut self.pending);
        self.ring.take(usize::MAX, &mut slots)?;
        let worked = !slots.is_empty();
        for slot in slots {
            self.ring.start(slot);
            let refused = Err(Refused(XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED));
            let result = match XenNetifCtrlRequest::read_from_bytes(self.ring.request(slot)) {
                Ok(request) if self.ring.attempts(slot) < MAX_ATTEMPTS => serve(&request, world),
                _ => refused,
            };
            let (status, data) = match result {
                Ok(data) => (XEN_NETIF_CTRL_STATUS_SUCCESS, data),
                Err(Refused(status)) => (status, 0),
            };
            self.ring.respond(slot, status as i16, data);
        }
        Ok(Progress { worked, notify: self.ring.push(), ..Progress::default() })
    }

    /// To be asked before sleeping.
    ///
    /// # Errors
    /// As [`CtrlQueue::run`].
    pub fn final_check(&self) -> Result<bool, QueueError> {
        Ok(self.ring.final_check()?)
    }
}

fn serve(request: &XenNetifCtrlRequest, world: &mut impl CtrlWorld) -> Result<u32, Refused> {
    let mut config = world.config();
    let [a, b, c] = request.data;
    match request.r#type {
        XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS => return Ok(HashConfig::supported()),
        XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE => return Ok(MAX_MAPPING as u32),
        XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM => config.set_algorithm(a)?,
        XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS => config.set_flags(a)?,
        XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE => config.set_mapping_size(a)?,
        XEN_NETIF_CTRL_TYPE_SET_HASH_KEY => {
            let mut key = [0; MAX_KEY];
            let key = key.get_mut(..b as usize).ok_or(Refused(XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW))?;
            read(world, a, key)?;
            config.set_key(key)?;
        }
        XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING => {
            let mut bytes = [0; MAX_MAPPING * 4];
            const { assert!(MAX_MAPPING * 4 <= PAGE_SIZE) };
            let too_many = Refused(XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW);
            let len = (b as usize).checked_mul(4).ok_or(too_many)?;
            let bytes = bytes.get_mut(..len).ok_or(too_many)?;
            read(world, a, bytes)?;
            let entries: Vec<u32> =
                bytes.chunks_exact(4).map(|e| u32::from_le_bytes([e[0], e[1], e[2], e[3]])).collect();
            config.set_mapping(c, &entries, world.queues())?;
        }
        // Static grants among them: pages of frontends are never mapped here.
        _ => return Err(Refused(XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED)),
    }
    world.changed(config);
    Ok(0)
}

fn read(world: &mut impl CtrlWorld, gref: u32, into: &mut [u8]) -> Result<(), Refused> {
    if into.is_empty() || world.read(gref, into) {
        Ok(())
    } else {
        Err(Refused(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER))
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use domain_kit::ring::{FrontRing, HeapMem};
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    #[derive(Default)]
    struct Fake {
        config: HashConfig,
        pages: std::collections::HashMap<u32, Vec<u8>>,
    }

    impl CtrlWorld for Fake {
        fn read(&mut self, gref: u32, into: &mut [u8]) -> bool {
            assert!(into.len() <= PAGE_SIZE);
            let Some(page) = self.pages.get(&gref) else { return false };
            into.copy_from_slice(&page[..into.len()]);
            true
        }
        fn queues(&self) -> usize {
            2
        }
        fn config(&self) -> HashConfig {
            self.config.clone()
        }
        fn changed(&mut self, config: HashConfig) {
            self.config = config;
        }
    }

    type Mem = Rc<HeapMem>;

    fn pair() -> (FrontRing<Mem>, CtrlQueue<Mem, Mem>, Mem, Mem) {
        let ring = Rc::new(HeapMem::new(PAGE_SIZE));
        let journal = Rc::new(HeapMem::new(shape(&layout()).bytes()));
        let front = FrontRing::init(ring.clone(), layout());
        let queue = CtrlQueue::create(ring.clone(), journal.clone(), [0; 6]).unwrap();
        (front, queue, ring, journal)
    }

    fn ask(front: &mut FrontRing<Mem>, r#type: u16, data: [u32; 3]) {
        front.put(XenNetifCtrlRequest { id: 7, r#type, data }.as_bytes());
        front.push();
    }

    fn answer(front: &mut FrontRing<Mem>) -> (u32, u32) {
        assert!(front.unconsumed().unwrap() > 0);
        let mut bytes = [0; 12];
        front.take(&mut bytes);
        let response = XenNetifCtrlResponse::read_from_bytes(&bytes).unwrap();
        assert_eq!(response.id, 7);
        (response.status, response.data)
    }

    #[test]
    fn a_whole_configuration() {
        let (mut front, mut queue, ..) = pair();
        let mut world = Fake::default();
        world.pages.insert(5, [0, 0, 0, 0, 1, 0, 0, 0].repeat(512));
        let mut call = |r#type, data| {
            ask(&mut front, r#type, data);
            assert!(queue.run(&mut world).unwrap().worked);
            answer(&mut front)
        };
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS, [0; 3]), (0, 15));
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, [1, 0, 0]), (0, 0));
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, [15, 0, 0]), (0, 0));
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, [5, 40, 0]), (0, 0));
        assert_eq!(
            call(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, [5, 41, 0]).0,
            XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW
        );
        assert_eq!(
            call(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, [6, 40, 0]).0,
            XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        );
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE, [8, 0, 0]), (0, 0));
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, [5, 6, 2]), (0, 0));
        assert_eq!(call(XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING, [0; 3]).0, XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED);
        assert_eq!(world.config.mapping, [0, 0, 0, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn what_was_not_answered_is_run_again() {
        let (mut front, mut queue, ring, journal) = pair();
        ask(&mut front, XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, [1, 0, 0]);
        let mut slots = Vec::new();
        queue.ring.take(9, &mut slots).unwrap();
        queue.ring.start(slots[0]);
        drop(queue);
        let mut queue = CtrlQueue::reattach(ring, journal, false).unwrap();
        let mut world = Fake::default();
        queue.run(&mut world).unwrap();
        assert_eq!(answer(&mut front), (0, 0));
        assert!(world.config.toeplitz);
    }

    proptest! {
        /// Any requests: no panic, each is answered, and the configuration stays within its bounds.
        #[test]
        fn any_requests(requests in proptest::collection::vec((0u16..12, any::<[u32; 3]>(), any::<bool>()), 1..100)) {
            let (mut front, mut queue, ..) = pair();
            let mut world = Fake::default();
            world.pages.insert(1, vec![1; PAGE_SIZE]);
            for (kind, mut data, small) in requests {
                if small {
                    data = [data[0] % 3, data[1] % 140, data[2] % 140];
                }
                ask(&mut front, kind, data);
                queue.run(&mut world).unwrap();
                answer(&mut front);
                prop_assert!(world.config.key.len() <= MAX_KEY && world.config.mapping.len() <= MAX_MAPPING);
                prop_assert!(world.config.mapping.iter().all(|&q| q < 2));
            }
        }
    }
}
