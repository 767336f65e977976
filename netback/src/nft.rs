//! The one rule set that a domain in NAT mode needs: packets that leave by the uplink carry the uplink's address.
//!
//! The kernel does the translation and remembers connections; hv-core keeps the network namespace, so they outlive an
//! incarnation. Message layouts: linux/netfilter/nfnetlink.h, nf_tables.h.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use crate::netlink::NetlinkError;

const NFPROTO_INET: u8 = 1;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NESTED: u16 = 0x8000;
const HOOK_POSTROUTING: u32 = 4;
const PRIORITY_SRCNAT: u32 = 100;
const META_OIF: u32 = 5;
const TABLE: &str = "bulkhead";
const CHAIN: &str = "nat";

fn attr(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend((value.len() as u16 + 4).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn text(out: &mut Vec<u8>, kind: u16, value: &str) {
    attr(out, kind, &[value.as_bytes(), &[0]].concat());
}

fn number(out: &mut Vec<u8>, kind: u16, value: u32) {
    attr(out, kind, &value.to_be_bytes());
}

fn nested(out: &mut Vec<u8>, kind: u16, build: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    build(&mut inner);
    attr(out, kind | NESTED, &inner);
}

fn expression(out: &mut Vec<u8>, name: &str, build: impl FnOnce(&mut Vec<u8>)) {
    nested(out, 1, |element| {
        text(element, 1, name);
        nested(element, 2, build);
    });
}

fn message(out: &mut Vec<u8>, kind: u16, flags: u16, seq: u32, family: u8, res: u16, body: &[u8]) {
    out.extend((20 + body.len() as u32).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    out.extend(seq.to_ne_bytes());
    out.extend([0; 4]);
    out.extend([family, 0]);
    out.extend(res.to_be_bytes());
    out.extend(body);
}

/// Sends, and waits for the answer to `seq` or the first refusal.
fn ask(socket: &OwnedFd, bytes: &[u8], seq: u32, what: &str) -> Result<(), NetlinkError> {
    sendto(socket.as_raw_fd(), bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty()).map_err(io::Error::from)?;
    let mut answer = vec![0; 16 * 1024];
    loop {
        let got = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(io::Error::from)?;
        let mut rest = answer.get(..got).unwrap_or_default();
        while rest.len() >= 20 {
            let word = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
            let (len, kind, answers) = (word(0) as usize, word(4) as u16, word(8));
            let errno = if kind == NLMSG_ERROR { word(16) as i32 } else { 0 };
            if errno != 0 {
                let errno = Errno::from_raw(errno.wrapping_neg());
                return Err(NetlinkError::Refused { what: what.into(), errno });
            }
            if answers == seq {
                return Ok(());
            }
            rest = rest.get(len.max(20).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// Makes packets that leave by interface `uplink` (its index) carry its address. Does nothing if that is so already.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` or `ENOENT` if it has no nf_tables or no masquerading.
pub fn ensure_masquerade(uplink: u32) -> Result<(), NetlinkError> {
    let (raw, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let socket = socket(AddressFamily::Netlink, raw, flags, SockProtocol::NetlinkNetFilter)
        .map_err(io::Error::from)?;
    let mut name = Vec::new();
    text(&mut name, 1, TABLE);
    let mut get = Vec::new();
    message(&mut get, GET_TABLE, NLM_F_ACK, 1, NFPROTO_INET, 0, &name);
    match ask(&socket, &get, 1, "looking for the NAT table") {
        Ok(()) => return Ok(()),
        Err(e) if e.is(Errno::ENOENT) => {}
        Err(e) => return Err(e),
    }
    let mut chain = Vec::new();
    text(&mut chain, 1, TABLE);
    text(&mut chain, 3, CHAIN);
    nested(&mut chain, 4, |hook| {
        number(hook, 1, HOOK_POSTROUTING);
        number(hook, 2, PRIORITY_SRCNAT);
    });
    text(&mut chain, 7, "nat");
    let mut rule = Vec::new();
    text(&mut rule, 1, TABLE);
    text(&mut rule, 2, CHAIN);
    nested(&mut rule, 4, |list| {
        expression(list, "meta", |data| {
            number(data, 2, META_OIF);
            number(data, 1, 1);
        });
        expression(list, "cmp", |data| {
            number(data, 1, 1);
            number(data, 2, 0);
            nested(data, 3, |value| attr(value, 1, &uplink.to_ne_bytes()));
        });
        expression(list, "masq", |_| {});
    });
    let mut batch = Vec::new();
    message(&mut batch, BATCH_BEGIN, 0, 2, 0, SUBSYSTEM, &[]);
    message(&mut batch, NEW_TABLE, NLM_F_CREATE, 3, NFPROTO_INET, 0, &name);
    message(&mut batch, NEW_CHAIN, NLM_F_CREATE, 4, NFPROTO_INET, 0, &chain);
    message(&mut batch, NEW_RULE, NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK, 5, NFPROTO_INET, 0, &rule);
    message(&mut batch, BATCH_END, 0, 6, 0, SUBSYSTEM, &[]);
    // All of it or nothing: a table without its rule is never there.
    ask(&socket, &batch, 5, "setting up NAT (has the kernel nf_tables and nft_masq?)")
}
