//! A conversation that outlives the backend: the frontend never hears of its death.
//!
//! The socket, what was said on it ([`Record`]) and the descriptors that came with it are kept where SIGKILL does not reach. A message is looked at
//! (MSG_PEEK), carried out, and only then taken from the socket:
//!
//! ```text
//!   look ──► carry out ──► store descriptors ──► record, with the answer ──► send ──► take ──► done
//!    ▲                                                  │                                        │
//!    │   killed before: looked at and carried out again │  killed after: only sent and taken     │
//!    └────────────────────────────────────────────────────────────────────────────────────────── ┘
//! ```
//! So each message is answered and taken once. It can be carried out twice, the second time by a new backend that was told all that was
//! said before it: that is what it was the first time. How far sending and taking came is known because the kernel
//! writes the count into kept memory inside the system call (sendmmsg, recvmmsg): two heads in turn, and one word
//! that says which of them counts and how much was done before it.

use std::collections::BTreeSet;

use super::record::{Message, Record};
use crate::journal::MAX_ATTEMPTS;
use crate::kept;
use crate::mem::{MMSGHDR, MSG_LEN};
use crate::ring::RingMem;

/// No call stores this count.
const UNSET: u32 = u32::MAX;

// Behind the record.
const CONTROL: usize = kept::BYTES.next_multiple_of(64);
/// Number of the last message that was answered and taken.
const DONE: usize = CONTROL;
/// Whether a message is being carried out, and how often that ended in a crash.
const TRIED: usize = CONTROL + 8;
/// See [`Progress`].
const SENT: usize = CONTROL + 16;
const TAKEN: usize = CONTROL + 24;
const HEADS: usize = CONTROL + 64;
/// Bytes of memory that a conversation takes.
pub const BYTES: usize = (HEADS + 4 * MMSGHDR).next_multiple_of(4096);

const BUSY: u32 = 1 << 8;

/// The outside of a conversation; its model test has another. The counts of [`Wire::send`] and [`Wire::take`] land in the kept memory.
pub trait Wire {
    /// A descriptor.
    type Fd;

    /// The next message and its descriptors, left where they are. Waits for it. `None`: the frontend hung up.
    ///
    /// # Errors
    /// What it says is no message, in one line.
    fn look(&mut self) -> Result<Option<Message<Self::Fd>>, String>;
    /// Sends; the head is at `head`. False: nobody is there.
    fn send(&mut self, head: usize, bytes: &[u8], fd: Option<&Self::Fd>) -> bool;
    /// Takes so many bytes from the socket and lets go of descriptors among them; the head is at `head`. False: there is nothing.
    fn take(&mut self, head: usize, len: usize) -> bool;
    /// Stores a descriptor. False: it cannot be stored.
    fn store(&mut self, number: u64, fd: &Self::Fd) -> bool;
    /// A stored descriptor.
    ///
    /// # Errors
    /// One line.
    fn fetch(&mut self, number: u64) -> Result<Self::Fd, String>;
    /// Numbers of the stored descriptors.
    fn stored(&mut self) -> Vec<u64>;
    /// Drops a stored descriptor.
    fn drop_stored(&mut self, number: u64);
    /// Nothing is kept any more: the frontend will hear of this process's end.
    fn let_go(&mut self);
}

/// How far a transfer came: the message's number, bytes before the call under way, and which of two heads it has.
#[derive(Clone, Copy)]
struct Progress {
    word: usize,
    heads: usize,
}

const SENDING: Progress = Progress { word: SENT, heads: HEADS };
const TAKING: Progress = Progress { word: TAKEN, heads: HEADS + 2 * MMSGHDR };

impl Progress {
    fn head(self, which: u64) -> usize {
        self.heads + MMSGHDR * (which & 1) as usize
    }

    fn count(self, mem: &impl RingMem, seq: u32) -> usize {
        let word = mem.load_u64(self.word);
        if (word >> 32) as u32 != seq {
            return 0;
        }
        let before = (word as u32 >> 1) as usize;
        match mem.load_u32(self.head(word) + MSG_LEN) {
            UNSET => before,
            count => before.saturating_add(count as usize),
        }
    }

    /// Makes ready for another call after `count` bytes; gives its head.
    fn arm(self, mem: &impl RingMem, seq: u32, count: usize) -> usize {
        let other = (mem.load_u64(self.word) & 1) ^ 1;
        let head = self.head(other);
        mem.store_u32(head + MSG_LEN, UNSET);
        mem.store_u64(self.word, u64::from(seq) << 32 | (count as u64) << 1 | other);
        head
    }
}

/// See the module.
#[derive(Debug)]
pub struct Conversation<W, M> {
    wire: W,
    mem: M,
    record: Record,
    kept: bool,
}

impl<W: Wire, M: RingMem> Conversation<W, M> {
    /// A new one with the frontend of that creation. The memory is zero, `kept` if it and the socket outlive this process.
    pub fn begin(wire: W, mem: M, instance: u64, kept: bool) -> Self {
        let mut this = Conversation { wire, mem, record: Record::new(instance), kept };
        this.save();
        this
    }

    /// Takes up what a predecessor left. `crashed`: it ended by its own fault.
    ///
    /// # Errors
    /// One line: there is nothing to take up, it is another frontend's, or its last message ended in too many crashes.
    pub fn take_up(wire: W, mem: M, instance: u64, crashed: bool) -> Result<Self, String> {
        let record: Option<Record> = kept::load(&mem);
        let record = record.filter(Record::is_sound).ok_or("no conversation is kept")?;
        if record.instance != instance {
            return Err("the conversation that is kept was another frontend's".into());
        }
        let tried = mem.load_u32(TRIED);
        let attempts = (tried & 0xff) + u32::from(crashed && tried & BUSY != 0);
        if attempts >= MAX_ATTEMPTS.into() {
            return Err(format!("poison message: {attempts} crashes of this process"));
        }
        mem.store_u32(TRIED, attempts | BUSY);
        let mut this = Conversation { wire, mem, record, kept: true };
        this.sweep();
        Ok(this)
    }

    /// What was said before, to be carried out again by a new backend without an answer.
    ///
    /// # Errors
    /// One line: a descriptor is missing.
    pub fn said(&mut self) -> Result<Vec<Message<W::Fd>>, String> {
        let wire = &mut self.wire;
        let with_fds = |message: Message<u64>| {
            let fds = message.fds.into_iter().map(|n| wire.fetch(n)).collect::<Result<_, _>>()?;
            Ok(Message { request: message.request, flags: message.flags, body: message.body, fds })
        };
        self.record.said().into_iter().map(with_fds).collect()
    }

    /// The next message; it is carried out, then [`Conversation::answer`] is called. `None`: the frontend hung up.
    ///
    /// # Errors
    /// What it said is no message.
    pub fn next_message(&mut self) -> Result<Option<Message<W::Fd>>, String> {
        // A predecessor may have stopped between record and end.
        if !self.finish()? {
            return Ok(None);
        }
        let tried = self.mem.load_u32(TRIED);
        self.mem.store_u32(TRIED, tried & !BUSY);
        let message = self.wire.look()?;
        self.mem.store_u32(TRIED, (tried & !BUSY) | BUSY);
        Ok(message)
    }

    /// The message was carried out: it is recorded, answered and taken. False: the frontend hung up.
    ///
    /// # Errors
    /// The answer has more than one descriptor.
    pub fn answer(
        &mut self,
        message: &Message<W::Fd>,
        reply: Option<&Message<W::Fd>>,
    ) -> Result<bool, String> {
        let mut record = self.record.clone();
        let reply_fds = reply.map_or(&[][..], |reply| &reply.fds);
        if reply_fds.len() > 1 {
            return Err("an answer with several descriptors".into());
        }
        let fds = if Record::keeps(message) { &message.fds[..] } else { &[] };
        let numbers = self.store_all(&mut record, fds);
        let reply_numbers = self.store_all(&mut record, reply_fds);
        record.reply_fd = reply_numbers.first().copied();
        record.note(message, numbers, reply, reply_numbers);
        record.seq = record.seq.wrapping_add(1);
        record.len = message.len() as u32;
        record.reply = reply.map(Message::bytes).unwrap_or_default();
        let former = std::mem::replace(&mut self.record, record);
        self.save();
        self.mem.store_u32(TRIED, 0);
        let there = self.finish_with(reply_fds.first())?;
        let needed: BTreeSet<u64> = self.record.fds().collect();
        for number in former.fds().filter(|number| self.kept && !needed.contains(number)) {
            self.wire.drop_stored(number);
        }
        Ok(there)
    }

    /// Whether the next incarnation can take it up.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Nothing is kept of it any more.
    pub fn let_go(&mut self) {
        self.kept = false;
        self.wire.let_go();
    }

    fn store_all(&mut self, record: &mut Record, fds: &[W::Fd]) -> Vec<u64> {
        let mut numbers = Vec::new();
        for fd in fds {
            let number = record.next_fd;
            record.next_fd += 1;
            numbers.push(number);
            if self.kept && !self.wire.store(number, fd) {
                tracing::warn!(
                    "a vhost-user frontend's descriptor cannot be kept: it will hear of a restart"
                );
                self.let_go();
            }
        }
        numbers
    }

    fn save(&mut self) {
        if !self.kept {
            return;
        }
        if let Err(error) = kept::save(&self.mem, &self.record) {
            tracing::warn!(%error, "what a vhost-user frontend said cannot be kept: it will hear of a restart");
            self.let_go();
        }
    }

    /// Finishes the last message. False: the frontend hung up.
    fn finish(&mut self) -> Result<bool, String> {
        if self.mem.load_u32(DONE) == self.record.seq {
            return Ok(true);
        }
        let fd = self.record.reply_fd.map(|number| self.wire.fetch(number)).transpose()?;
        self.finish_with(fd.as_ref())
    }

    fn finish_with(&mut self, fd: Option<&W::Fd>) -> Result<bool, String> {
        let Record { seq, len, reply, .. } = &self.record;
        let (seq, len) = (*seq, *len as usize);
        loop {
            let sent = SENDING.count(&self.mem, seq);
            let Some(rest) = reply.get(sent..).filter(|rest| !rest.is_empty()) else { break };
            let head = SENDING.arm(&self.mem, seq, sent);
            if !self.wire.send(head, rest, fd.filter(|_| sent == 0)) {
                return Ok(false);
            }
        }
        loop {
            let taken = TAKING.count(&self.mem, seq);
            if taken >= len {
                break;
            }
            let head = TAKING.arm(&self.mem, seq, taken);
            if !self.wire.take(head, len - taken) {
                return Ok(false);
            }
        }
        self.mem.store_u32(DONE, seq);
        Ok(true)
    }

    /// Drops descriptors that a predecessor stored and did not record, or no longer needed.
    fn sweep(&mut self) {
        let needed: BTreeSet<u64> = self.record.fds().collect();
        for number in self.wire.stored() {
            if !needed.contains(&number) {
                self.wire.drop_stored(number);
            }
        }
    }
}
