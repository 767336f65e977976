//! What can happen to the store. The store's state is a function of the sequence of these events: each is one
//! journal record, and running them again from the last snapshot gives the same tree, the same replies and the
//! same watch events.

use super::{Class, ConnId, Item, Limits};
use crate::codec::{Reader, Writer};
use crate::store::Quota;

/// One step of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A socket client connected and has this slot.
    Open {
        /// Where its input is kept.
        slot: u32,
    },
    /// A connection is gone, with its watches and transactions.
    Close(ConnId),
    /// A ring is in its error state: nothing is read or sent until the client resets it.
    Ignore {
        /// Which.
        conn: ConnId,
        /// XENSTORE_ERROR_* code for the ring page.
        error: u32,
    },
    /// A client reset its ring (xenstore-ring.txt, ring reconnection).
    Reset(ConnId),
    /// A request, complete and at most 4,112 bytes long.
    Request {
        /// Whose.
        conn: ConnId,
        /// Input position after it.
        consumed: u64,
        /// Header and payload.
        message: &'a [u8],
    },
    /// A request that is answered without the store: there is no memory for it, or it concerns the process.
    Answer {
        /// Whose.
        conn: ConnId,
        /// Input position after it.
        consumed: u64,
        /// Its header.
        message: &'a [u8],
        /// The answer is an error.
        error: bool,
        /// The answer.
        text: &'a [u8],
    },
    /// The output up to here has been handed over.
    Drained {
        /// Whose.
        conn: ConnId,
        /// Output position.
        upto: u64,
    },
    /// A domain with a ring appeared.
    DomainUp {
        /// Which.
        domid: u16,
        /// Its creation's serial number: a domid used again has another.
        instance: u64,
        /// Grant of its ring page.
        gref: u32,
        /// Its event-channel port.
        port: u32,
        /// Which quota it gets.
        class: Class,
        /// Where its input is kept.
        slot: u32,
    },
    /// A domain is gone.
    DomainDown(u16),
    /// A domain shut itself down; it still exists.
    DomainShutdown(u16),
    /// The limits were set.
    Limits(Limits),
    /// A quota was set, not by a client.
    SetQuota {
        /// Whose; `None` for the global one.
        domid: Option<u16>,
        /// Which.
        item: Item,
        /// The soft one.
        soft: bool,
        /// The limit; 0 for none.
        value: u32,
    },
}

impl Event<'_> {
    /// Appends the record's body.
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::Open { slot } => {
                out.u8(1);
                out.u32(*slot);
            }
            Self::Close(conn) => {
                out.u8(2);
                out.u64(conn.0);
            }
            Self::Ignore { conn, error } => {
                out.u8(3);
                out.u64(conn.0);
                out.u32(*error);
            }
            Self::Reset(conn) => {
                out.u8(4);
                out.u64(conn.0);
            }
            Self::Request { conn, consumed, message } => {
                out.u8(5);
                out.u64(conn.0);
                out.u64(*consumed);
                out.bytes(message);
            }
            Self::SetQuota { domid, item, soft, value } => {
                out.u8(12);
                out.u8(u8::from(domid.is_some()));
                out.u16(domid.unwrap_or(0));
                out.u8(*item as u8);
                out.u8(u8::from(*soft));
                out.u32(*value);
            }
            Self::Answer { conn, consumed, message, error, text } => {
                out.u8(11);
                out.u64(conn.0);
                out.u64(*consumed);
                out.bytes(message);
                out.u8(u8::from(*error));
                out.bytes(text);
            }
            Self::Drained { conn, upto } => {
                out.u8(6);
                out.u64(conn.0);
                out.u64(*upto);
            }
            Self::DomainUp { domid, instance, gref, port, class, slot } => {
                out.u8(7);
                out.u16(*domid);
                out.u64(*instance);
                out.u32(*gref);
                out.u32(*port);
                out.u8(*class as u8);
                out.u32(*slot);
            }
            Self::DomainDown(domid) => {
                out.u8(8);
                out.u16(*domid);
            }
            Self::DomainShutdown(domid) => {
                out.u8(9);
                out.u16(*domid);
            }
            Self::Limits(limits) => {
                out.u8(10);
                limits.guest.encode(out);
                limits.service.encode(out);
            }
        }
    }

    /// Whether it can wait until there is room in the journal; the end of something can't.
    pub fn can_wait(&self) -> bool {
        matches!(
            self,
            Self::Open { .. }
                | Self::Request { .. }
                | Self::Answer { .. }
                | Self::DomainUp { .. }
                | Self::Limits(_)
                | Self::SetQuota { .. }
        )
    }

    /// Takes a record's body apart; `None` if it is none.
    pub fn decode<'a>(input: &mut Reader<'a>) -> Option<Event<'a>> {
        Some(match input.u8()? {
            1 => Event::Open { slot: input.u32()? },
            2 => Event::Close(ConnId(input.u64()?)),
            3 => Event::Ignore { conn: ConnId(input.u64()?), error: input.u32()? },
            4 => Event::Reset(ConnId(input.u64()?)),
            5 => {
                Event::Request { conn: ConnId(input.u64()?), consumed: input.u64()?, message: input.bytes()? }
            }
            6 => Event::Drained { conn: ConnId(input.u64()?), upto: input.u64()? },
            7 => Event::DomainUp {
                domid: input.u16()?,
                instance: input.u64()?,
                gref: input.u32()?,
                port: input.u32()?,
                class: Class::from_raw(input.u8()?)?,
                slot: input.u32()?,
            },
            8 => Event::DomainDown(input.u16()?),
            9 => Event::DomainShutdown(input.u16()?),
            10 => Event::Limits(Limits { guest: Quota::decode(input)?, service: Quota::decode(input)? }),
            11 => Event::Answer {
                conn: ConnId(input.u64()?),
                consumed: input.u64()?,
                message: input.bytes()?,
                error: input.u8()? != 0,
                text: input.bytes()?,
            },
            12 => {
                let (some, domid) = (input.u8()? != 0, input.u16()?);
                let item = *Item::ALL.get(usize::from(input.u8()?))?;
                let (soft, value) = (input.u8()? != 0, input.u32()?);
                Event::SetQuota { domid: some.then_some(domid), item, soft, value }
            }
            _ => return None,
        })
    }
}
