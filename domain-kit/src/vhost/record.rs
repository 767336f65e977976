//! What of a conversation must be known to take it up: of each kind of message, and for each queue, what was said last.
//!
//! Said again in [`Record::said`]'s order it makes a new backend what the former one was. Nothing is said twice by kind, so a record is
//! bounded by the number of queues, however long the conversation.

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::FrontendReq;

use super::session::MAX_QUEUES;

/// Bytes of a message's head: request, flags, length of the body.
pub const HEAD: usize = 12;
/// Longest body, bytes (the `vhost` crate's `MAX_MSG_SIZE`).
pub const MAX_BODY: usize = 0x1000;
/// Most descriptors of a message (the `vhost` crate's `MAX_ATTACHED_FD_ENTRIES`).
pub const MAX_FDS: usize = 32;
/// Flags of a message: protocol version 1.
const VERSION: u32 = 1;

/// A message, or a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<F> {
    /// A [`FrontendReq`], or none that is known.
    pub request: u32,
    /// Version, NEED_REPLY.
    pub flags: u32,
    /// What follows the head.
    pub body: Vec<u8>,
    /// Descriptors.
    pub fds: Vec<F>,
}

/// The word at a place of a body; 0 beyond its end.
fn word(body: &[u8], at: usize) -> u32 {
    let bytes = body.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

/// Bytes of a message's body, as its head says. `None`: more than may be.
pub fn body_len(head: &[u8; HEAD]) -> Option<usize> {
    Some(word(head, 8) as usize).filter(|len| *len <= MAX_BODY)
}

impl<F> Message<F> {
    /// Takes a whole message's bytes apart. `None`: they are not one.
    pub fn new(bytes: &[u8], fds: Vec<F>) -> Option<Self> {
        let (head, body) = bytes.split_first_chunk::<HEAD>()?;
        let whole = body_len(head) == Some(body.len());
        whole.then(|| Message { request: word(head, 0), flags: word(head, 4), body: body.to_vec(), fds })
    }

    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.body.len());
        for word in [self.request, self.flags, self.body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(&self.body);
        bytes
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        HEAD + self.body.len()
    }

    /// Never: it has a head.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether it is that request.
    pub fn is(&self, request: FrontendReq) -> bool {
        self.request == request as u32
    }

    /// Whether descriptors come with it, by what it says.
    pub fn brings_fds(&self) -> bool {
        use FrontendReq as R;
        const NO_FD: u32 = 1 << 8;
        let of_queue = [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR];
        let others = [
            R::SET_MEM_TABLE,
            R::SET_LOG_BASE,
            R::SET_LOG_FD,
            R::SET_INFLIGHT_FD,
            R::SET_BACKEND_REQ_FD,
            R::ADD_MEM_REG,
            R::SET_DEVICE_STATE_FD,
            R::GPU_SET_SOCKET,
        ];
        let queue = of_queue.into_iter().any(|r| self.is(r));
        queue && word(&self.body, 0) & NO_FD == 0 || others.into_iter().any(|r| self.is(r))
    }

    /// The queue and the wish, if it is SET_VRING_ENABLE.
    pub fn enable(&self) -> Option<(u32, bool)> {
        let is = self.is(FrontendReq::SET_VRING_ENABLE) && self.body.len() == 8;
        is.then(|| (word(&self.body, 0), word(&self.body, 4) == 1))
    }
}

/// One thing that was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    request: u32,
    queue: u32,
    body: Vec<u8>,
    /// Under which numbers its descriptors are stored.
    fds: Vec<u64>,
}

/// What is stored of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The frontend's creation.
    pub instance: u64,
    /// Messages so far. The last may be unfinished.
    pub seq: u32,
    /// Bytes of the last message.
    pub len: u32,
    /// The answer to it.
    pub reply: Vec<u8>,
    /// Under which number the answer's descriptor is stored.
    pub reply_fd: Option<u64>,
    /// The number of the next descriptor.
    pub next_fd: u64,
    said: Vec<Said>,
}

/// Requests of the device, then those of a queue, in the order in which they are said again.
const DEVICE: [FrontendReq; 7] = [
    // The `vhost` crate acknowledges messages only when it was asked for features.
    FrontendReq::GET_FEATURES,
    FrontendReq::SET_OWNER,
    FrontendReq::SET_PROTOCOL_FEATURES,
    FrontendReq::SET_FEATURES,
    FrontendReq::SET_INFLIGHT_FD,
    FrontendReq::SET_LOG_BASE,
    FrontendReq::SET_MEM_TABLE,
];
const QUEUE: [FrontendReq; 6] = [
    FrontendReq::SET_VRING_NUM,
    FrontendReq::SET_VRING_BASE,
    FrontendReq::SET_VRING_ADDR,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_KICK,
    FrontendReq::SET_VRING_ENABLE,
];

fn rank(said: &Said) -> (u32, usize) {
    let at = |list: &[FrontendReq]| list.iter().position(|r| *r as u32 == said.request);
    match at(&DEVICE) {
        Some(at) => (0, at),
        None => (1 + said.queue, at(&QUEUE).unwrap_or(QUEUE.len())),
    }
}

impl Record {
    /// Nothing was said yet.
    pub fn new(instance: u64) -> Self {
        Record { instance, ..Record::default() }
    }

    /// Notes a message that was carried out, and the answer to it. `fds`, `reply_fds`: under which numbers their descriptors are stored.
    pub fn note<F>(
        &mut self,
        message: &Message<F>,
        fds: Vec<u64>,
        reply: Option<&Message<F>>,
        reply_fds: Vec<u64>,
    ) {
        let is = |list: &[FrontendReq]| list.iter().any(|r| message.is(*r));
        if is(&DEVICE) {
            self.put(message.request, 0, &message.body, fds);
        } else if is(&QUEUE) {
            // These two say the queue in one byte beside a flag.
            let numbered = message.is(FrontendReq::SET_VRING_KICK) || message.is(FrontendReq::SET_VRING_CALL);
            let mask = if numbered { 0xff } else { u32::MAX };
            self.put(message.request, word(&message.body, 0) & mask, &message.body, fds);
        } else if message.is(FrontendReq::GET_VRING_BASE) {
            let queue = word(&message.body, 0);
            self.said.retain(|s| s.queue != queue || s.request != FrontendReq::SET_VRING_KICK as u32);
            if let Some(reply) = reply {
                self.put(FrontendReq::SET_VRING_BASE as u32, queue, &reply.body, Vec::new());
            }
        } else if message.is(FrontendReq::RESET_OWNER) || message.is(FrontendReq::RESET_DEVICE) {
            self.said.retain(|s| s.request != FrontendReq::SET_VRING_KICK as u32);
        } else if message.is(FrontendReq::GET_INFLIGHT_FD)
            && let Some(reply) = reply
        {
            self.put(FrontendReq::SET_INFLIGHT_FD as u32, 0, &reply.body, reply_fds);
        }
    }

    fn put(&mut self, request: u32, queue: u32, body: &[u8], fds: Vec<u64>) {
        if queue as usize >= MAX_QUEUES {
            return;
        }
        let said = Said { request, queue, body: body.to_vec(), fds };
        match self.said.iter_mut().find(|s| (s.request, s.queue) == (request, queue)) {
            Some(place) => *place = said,
            None => self.said.push(said),
        }
    }

    /// Whether a message's descriptors have to be stored.
    pub fn keeps<F>(message: &Message<F>) -> bool {
        DEVICE.iter().chain(&QUEUE).any(|r| message.is(*r))
    }

    /// All that was said, in the order in which it is to be said again. Descriptors by their numbers.
    pub fn said(&self) -> Vec<Message<u64>> {
        let mut said = self.said.clone();
        said.sort_by_key(rank);
        let message = |s: Said| Message { request: s.request, flags: VERSION, body: s.body, fds: s.fds };
        said.into_iter().map(message).collect()
    }

    /// Numbers of all descriptors that belong to it.
    pub fn fds(&self) -> impl Iterator<Item = u64> {
        self.said.iter().flat_map(|s| s.fds.iter().copied()).chain(self.reply_fd)
    }

    /// Whether it is one that [`Record::note`] can have made: anything else was written by nobody of us.
    pub fn is_sound(&self) -> bool {
        let known = |s: &Said| {
            let one = |list: &[FrontendReq]| list.iter().any(|r| *r as u32 == s.request);
            (one(&DEVICE) && s.queue == 0 || one(&QUEUE) && (s.queue as usize) < MAX_QUEUES)
                && s.body.len() <= MAX_BODY
                && s.fds.len() <= MAX_FDS
        };
        let mut keys: Vec<_> = self.said.iter().map(|s| (s.request, s.queue)).collect();
        keys.sort_unstable();
        let twice = keys.windows(2).any(|pair| pair[0] == pair[1]);
        self.said.iter().all(known)
            && !twice
            && self.len as usize <= HEAD + MAX_BODY
            && self.reply.len() <= HEAD + MAX_BODY
            && self.fds().all(|n| n < self.next_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: FrontendReq, words: &[u32], fds: Vec<u64>) -> Message<u64> {
        let body = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        Message { request: request as u32, flags: VERSION, body, fds }
    }

    fn note(record: &mut Record, message: &Message<u64>, reply: Option<&Message<u64>>) {
        record.next_fd = 100;
        let reply_fds = reply.map(|r| r.fds.clone()).unwrap_or_default();
        record.note(message, message.fds.clone(), reply, reply_fds);
    }

    #[test]
    fn what_was_said_last_is_said_again_in_order() {
        use FrontendReq as R;
        let mut record = Record::default();
        let said = [
            message(R::SET_VRING_ENABLE, &[1, 1], vec![]),
            message(R::SET_VRING_CALL, &[0x100, 0], vec![]),
            message(R::SET_VRING_KICK, &[1, 0], vec![7]),
            message(R::SET_VRING_KICK, &[0, 0], vec![8]),
            message(R::SET_MEM_TABLE, &[1, 0], vec![9]),
            message(R::SET_FEATURES, &[1, 0], vec![]),
            message(R::SET_FEATURES, &[2, 0], vec![]),
            message(R::GET_CONFIG, &[0, 0], vec![]),
            message(R::SET_VRING_NUM, &[64, 1], vec![]),
        ];
        for message in &said {
            note(&mut record, message, None);
        }
        let asked = message(R::GET_VRING_BASE, &[1, 0], vec![]);
        note(&mut record, &asked, Some(&message(R::GET_VRING_BASE, &[1, 77], vec![])));
        let asked = message(R::GET_INFLIGHT_FD, &[0; 6], vec![]);
        note(&mut record, &asked, Some(&message(R::GET_INFLIGHT_FD, &[5; 6], vec![11])));
        let expected = [
            message(R::SET_FEATURES, &[2, 0], vec![]),
            message(R::SET_INFLIGHT_FD, &[5; 6], vec![11]),
            message(R::SET_MEM_TABLE, &[1, 0], vec![9]),
            message(R::SET_VRING_CALL, &[0x100, 0], vec![]),
            message(R::SET_VRING_KICK, &[0, 0], vec![8]),
            message(R::SET_VRING_BASE, &[1, 77], vec![]),
            message(R::SET_VRING_ENABLE, &[1, 1], vec![]),
        ];
        assert_eq!(record.said(), expected);
        assert!(record.is_sound());
        note(&mut record, &message(R::RESET_OWNER, &[], vec![]), None);
        assert_eq!(record.fds().collect::<Vec<_>>(), [9, 11]);
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let mut good = Record { instance: 1, next_fd: 5, ..Record::default() };
        good.put(FrontendReq::SET_MEM_TABLE as u32, 0, &[], vec![4]);
        assert!(good.is_sound());
        let bad = |change: fn(&mut Record)| {
            let mut record = good.clone();
            change(&mut record);
            assert!(!record.is_sound(), "{record:?}");
        };
        bad(|r| r.next_fd = 4);
        bad(|r| r.said[0].request = 11);
        bad(|r| r.said[0].queue = 1);
        bad(|r| r.said[0].fds = vec![1; MAX_FDS + 1]);
        bad(|r| r.said[0].body = vec![0; MAX_BODY + 1]);
        bad(|r| r.said.push(r.said[0].clone()));
        bad(|r| r.len = 1 << 20);
        bad(|r| r.reply = vec![0; MAX_BODY + HEAD + 1]);
        bad(|r| r.reply_fd = Some(9));
    }

    #[test]
    fn heads_are_taken_apart() {
        let one = message(FrontendReq::SET_VRING_ENABLE, &[3, 1], vec![]);
        let bytes = one.bytes();
        assert_eq!(Message::new(&bytes, vec![]), Some(one.clone()));
        assert_eq!((one.enable(), one.len()), (Some((3, true)), bytes.len()));
        assert_eq!(Message::<u64>::new(&bytes[..bytes.len() - 1], vec![]), None);
        assert_eq!(Message::<u64>::new(&bytes[..5], vec![]), None);
        let mut long = [0xff; HEAD];
        assert_eq!(body_len(&long), None);
        long[8..].copy_from_slice(&(MAX_BODY as u32).to_ne_bytes());
        assert_eq!(body_len(&long), Some(MAX_BODY));
    }
}
