//! A store without transports: requests in, replies and events out.

use std::collections::BTreeSet;

use xenstored::store::{Class, ConnId, Event, Loaded, Loader, Store, write_snapshot};

#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    Ok(Vec<u8>),
    Error(&'static str),
}

impl Reply {
    pub fn is_ok(&self) -> bool {
        matches!(self, Self::Ok(_))
    }
}

const ERRORS: [&str; 11] = [
    "EINVAL", "EACCES", "EEXIST", "ENOENT", "ENOSPC", "ENOSYS", "EBUSY", "EAGAIN", "E2BIG", "EPERM", "ENOMEM",
];

pub struct Lab {
    pub store: Store,
    held: BTreeSet<ConnId>,
    events: Vec<(ConnId, String)>,
    instance: u64,
    req_id: u32,
}

impl Lab {
    pub fn new() -> Self {
        Self { store: Store::new(), held: BTreeSet::new(), events: Vec::new(), instance: 0, req_id: 0 }
    }

    pub fn apply(&mut self, event: &Event<'_>) {
        self.store.apply(event);
        self.collect(None);
    }

    pub fn socket(&mut self) -> ConnId {
        let id = self.store.next_conn();
        self.apply(&Event::Open { slot: id.0 as u32 });
        id
    }

    pub fn guest(&mut self, domid: u16) -> ConnId {
        self.domain(domid, Class::Guest)
    }

    pub fn domain(&mut self, domid: u16, class: Class) -> ConnId {
        let id = self.store.next_conn();
        self.instance += 1;
        let slot = id.0 as u32;
        self.apply(&Event::DomainUp { domid, instance: self.instance, gref: 1, port: 1, class, slot });
        id
    }

    /// The client stops reading.
    pub fn hold(&mut self, id: ConnId) {
        self.held.insert(id);
    }

    /// It reads again.
    pub fn release(&mut self, id: ConnId) {
        self.held.remove(&id);
        self.collect(None);
    }

    pub fn unread(&self, id: ConnId) -> u64 {
        self.store.conn(id).map_or(0, |c| c.out.end() - c.out.base())
    }

    /// Takes all output; returns the reply that carries `wanted` as its id.
    fn collect(&mut self, wanted: Option<u32>) -> Option<Reply> {
        let mut found = None;
        let ids: Vec<ConnId> =
            self.store.conns().map(|(id, _)| id).filter(|id| !self.held.contains(id)).collect();
        for id in ids {
            let conn = self.store.conn(id).expect("listed");
            let (a, b) = conn.out.pending();
            let bytes = [a, b].concat();
            let end = conn.out.end();
            let note = conn.wants_drain_note(end);
            self.store.drop_output(id, end);
            if note {
                self.store.apply(&Event::Drained { conn: id, upto: end });
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let word = |i: usize| u32::from_ne_bytes(rest[4 * i..4 * i + 4].try_into().expect("header"));
                let (kind, req, len) = (word(0), word(1), word(3) as usize);
                assert!(len <= 4096, "a reply of {len} bytes");
                let payload = &rest[16..16 + len];
                if kind == 15 {
                    let path = payload.split(|b| *b == 0).next().expect("path");
                    self.events.push((id, String::from_utf8_lossy(path).into_owned()));
                } else if Some(req) == wanted {
                    assert!(found.is_none(), "two replies");
                    found = Some(match kind {
                        16 => Reply::Error(
                            ERRORS
                                .into_iter()
                                .find(|e| payload.strip_suffix(b"\0") == Some(e.as_bytes()))
                                .expect("a known error"),
                        ),
                        _ => Reply::Ok(payload.to_vec()),
                    });
                }
                rest = &rest[16 + len..];
            }
        }
        found
    }

    pub fn ask(&mut self, id: ConnId, op: u32, payload: &str) -> Reply {
        self.ask_in(id, 0, op, payload)
    }

    pub fn ask_in(&mut self, id: ConnId, tx: u32, op: u32, payload: &str) -> Reply {
        self.req_id += 1;
        let mut message = Vec::new();
        for word in [op, self.req_id, tx, payload.len() as u32] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend_from_slice(payload.as_bytes());
        // As the engine does it.
        let privileged = self.store.conn(id).is_some_and(|c| c.privileged());
        match self.store.look(payload.as_bytes()).filter(|_| op == 0 && privileged) {
            Some((error, text)) => {
                let message = &message[..16];
                self.store.apply(&Event::Answer { conn: id, consumed: 0, message, error, text: &text })
            }
            None => self.store.apply(&Event::Request { conn: id, consumed: 0, message: &message }),
        };
        let reply = self.collect(Some(self.req_id));
        // RELEASE of the caller's own domain leaves nobody to answer.
        if self.store.conn(id).is_none() {
            Reply::Error("ENOENT")
        } else {
            reply.expect("every request is answered")
        }
    }

    pub fn write(&mut self, id: ConnId, path: &str, value: &str) {
        assert_eq!(self.ask(id, 11, &format!("{path}\0{value}")), Reply::Ok(b"OK\0".to_vec()), "{path}");
    }

    pub fn start(&mut self, id: ConnId) -> u32 {
        match self.ask(id, 6, "\0") {
            Reply::Ok(text) => {
                std::str::from_utf8(&text[..text.len() - 1]).expect("text").parse().expect("id")
            }
            Reply::Error(e) => panic!("{e}"),
        }
    }

    /// Paths of the events that a client got since the last call.
    pub fn events(&mut self, id: ConnId) -> Vec<String> {
        let (mine, others) = std::mem::take(&mut self.events).into_iter().partition(|(who, _)| *who == id);
        self.events = others;
        let mine: Vec<(ConnId, String)> = mine;
        mine.into_iter().map(|(_, path)| path).collect()
    }

    pub fn check(&self) {
        self.store.check().expect("invariants");
    }

    /// Through a snapshot and back.
    pub fn reload(&mut self) {
        let mut records = Vec::new();
        let sink = |record: &[u8]| {
            records.push(record.to_vec());
            Ok::<(), &str>(())
        };
        write_snapshot(&self.store, &[], |conn| conn.out.end(), sink).expect("snapshot");
        let store = std::mem::take(&mut self.store);
        let mut loader = Loader::new(store.tree.into_arena());
        let mut last = Loaded::Part;
        for record in records {
            last = loader.record(&record).expect("whole");
        }
        assert_eq!(last, Loaded::Complete);
        self.store = loader.finish();
        self.check();
    }
}
