//! Features and quotas: GET_FEATURE, SET_FEATURE, GET_QUOTA, SET_QUOTA, CONTROL, as docs/misc/xenstore.txt has them.

#[path = "hazards/lab.rs"]
#[allow(dead_code)]
mod lab;

use lab::{Lab, Reply};
use xenstored::store::{Class, Event, Item, Notice};

const GET_FEATURE: u32 = 23;
const SET_FEATURE: u32 = 24;
const GET_QUOTA: u32 = 25;
const SET_QUOTA: u32 = 26;

fn text(s: &str) -> Reply {
    Reply::Ok([s.as_bytes(), b"\0"].concat())
}

fn ok() -> Reply {
    text("OK")
}

#[test]
fn features_are_set_before_the_domain_comes() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    assert_eq!(lab.ask(dom0, GET_FEATURE, "\0"), text("15"));
    assert_eq!(lab.ask(dom0, GET_FEATURE, "5\0"), Reply::Error("ENOENT"));
    assert_eq!(lab.ask(dom0, SET_FEATURE, "5\x0064\0"), Reply::Error("EINVAL"));
    assert_eq!(lab.ask(dom0, SET_FEATURE, "5\x003\0"), ok());
    assert_eq!(lab.ask(dom0, GET_FEATURE, "5\0"), text("3"));
    lab.reload();
    let guest = lab.guest(5);
    assert_eq!(lab.ask(dom0, SET_FEATURE, "5\x007\0"), Reply::Error("EBUSY"));
    assert_eq!(lab.ask(guest, GET_FEATURE, "\0"), text("3"));
    assert_eq!(lab.ask(guest, GET_FEATURE, "5\0"), Reply::Error("EACCES"));
    // No WATCH with depth, no DOMID_ANY.
    assert_eq!(lab.ask(guest, 4, "x\0t\x001\0"), Reply::Error("EINVAL"));
    assert_eq!(lab.ask(guest, 4, "x\0t\0"), ok());
    lab.write(dom0, "/local/domain/5/n", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5/n\0n5\0"), ok());
    lab.guest(6);
    assert_eq!(lab.ask(guest, 14, "n\0n5\0r32757\0r6\0"), ok());
    assert_eq!(lab.ask(guest, 3, "n\0"), Reply::Ok(b"n5\0r6\0".to_vec()));
    // The next domain of that number has what all have.
    lab.apply(&Event::DomainDown(5));
    let guest = lab.guest(5);
    assert_eq!(lab.ask(guest, GET_FEATURE, "\0"), text("15"));
    assert_eq!(lab.ask(guest, 4, "x\0t\x001\0"), ok());
}

#[test]
fn quotas_are_copied_at_introduction() {
    let mut lab = Lab::new();
    let (dom0, old) = (lab.socket(), lab.guest(5));
    let Reply::Ok(names) = lab.ask(dom0, GET_QUOTA, "") else { panic!("names") };
    let names = String::from_utf8(names).expect("text");
    for name in ["nodes", "watches", "transactions", "node-size", "node-permissions", "soft-memory"] {
        assert!(names.trim_end_matches('\0').split(' ').any(|n| n == name), "{name} in {names}");
    }
    assert_eq!(lab.ask(dom0, GET_QUOTA, "watches\0"), text("128"));
    assert_eq!(lab.ask(dom0, SET_QUOTA, "watches\x002\0"), ok());
    assert_eq!(lab.ask(dom0, GET_QUOTA, "watches\0"), text("2"));
    assert_eq!(lab.ask(dom0, GET_QUOTA, "5\0watches\0"), text("128"));
    assert_eq!(lab.ask(dom0, GET_QUOTA, "6\0watches\0"), Reply::Error("ENOENT"));
    assert_eq!(lab.ask(dom0, SET_QUOTA, "7\0watches\x001\0"), ok());
    for bad in ["nothing\x001\0", "5\0soft-soft-nodes\x001\0", "watches\0x\0", "watches\0"] {
        assert_eq!(lab.ask(dom0, SET_QUOTA, bad), Reply::Error("EINVAL"), "{bad:?}");
    }
    lab.reload();
    let (new, own) = (lab.guest(6), lab.guest(7));
    let set = |lab: &mut Lab, who, n: u32| -> Vec<bool> {
        (0..n).map(|i| lab.ask(who, 4, &format!("x\0{i}\0")) == ok()).collect()
    };
    assert_eq!(set(&mut lab, old, 4), [true; 4]);
    assert_eq!(set(&mut lab, new, 4), [true, true, false, false]);
    assert_eq!(set(&mut lab, own, 4), [true, false, false, false]);
    // 0 is no limit.
    assert_eq!(lab.ask(dom0, SET_QUOTA, "7\0watches\x000\0"), ok());
    assert!(set(&mut lab, own, 300)[1..].iter().all(|set| *set));
    // CONTROL says the same.
    let Reply::Ok(said) = lab.ask(dom0, 0, "quota\x007\0") else { panic!("quota") };
    let said = String::from_utf8(said).expect("text");
    assert!(said.contains("watches          :      300 (max      300) refused 3"), "{said}");
    assert_eq!(lab.ask(dom0, 0, "quota\0set\0nodes\x000\0"), Reply::Error("EINVAL"));
    assert_eq!(lab.ask(dom0, 0, "quota\0set\0nodes\x0012\0"), ok());
    assert_eq!(lab.ask(dom0, 0, "quota-soft\0set\0nodes\x006\0"), ok());
    assert_eq!(lab.ask(dom0, GET_QUOTA, "soft-nodes\0"), text("6"));
}

#[test]
fn refusals_are_told_once_and_counted() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    assert_eq!(lab.ask(dom0, SET_QUOTA, "5\0nodes\x0010\0"), ok());
    assert_eq!(lab.ask(dom0, SET_QUOTA, "5\0soft-nodes\x005\0"), ok());
    let guest = lab.guest(5);
    lab.write(dom0, "/local/domain/5", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5\0n5\0"), ok());
    lab.store.take_notices();
    let mut notices = Vec::new();
    for i in 0..30 {
        let reply = lab.ask(guest, 11, &format!("n{i}\0x"));
        assert_eq!(reply, if i < 9 { ok() } else { Reply::Error("ENOSPC") }, "{i}");
        notices.extend(lab.store.take_notices());
    }
    let notice = |soft, limit| Notice { domid: 5, item: Item::Nodes, soft, limit };
    assert_eq!(notices, [notice(true, 5), notice(false, 10)]);
    let refused = |lab: &Lab| lab.store.domain(5).expect("domain").account.refused(Item::Nodes);
    assert_eq!(refused(&lab), 21);
    // A restart forgets neither the count nor that it was told.
    lab.reload();
    assert_eq!(lab.ask(guest, 11, "more\0x"), Reply::Error("ENOSPC"));
    assert_eq!((refused(&lab), lab.store.take_notices()), (22, vec![]));
    // Nobody else feels it, also not through the guest's home.
    lab.write(dom0, "/local/domain/5/by-dom0", "x");
    assert_eq!(lab.ask(guest, 13, "n1\0"), ok());
    assert_eq!(lab.ask(guest, 11, "n0\0still written"), ok());
}

#[test]
fn memory_has_a_limit() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    assert_eq!(lab.ask(dom0, SET_QUOTA, "5\0memory\x0020000\0"), ok());
    let guest = lab.guest(5);
    lab.write(dom0, "/local/domain/5", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5\0n5\0"), ok());
    let value = "v".repeat(2000);
    let made = (0..20).filter(|i| lab.ask(guest, 11, &format!("n{i}\0{value}")) == ok()).count();
    assert_eq!(made, 9, "of 2,048 bytes and what they cost");
    assert_eq!(lab.ask(guest, 11, &format!("n0\0{value}")), Reply::Error("ENOMEM"));
    // In a transaction too, whose own bytes count.
    let tx = lab.start(guest);
    assert_eq!(lab.ask_in(guest, tx, 11, &format!("n0\0{value}")), Reply::Error("ENOMEM"));
    assert_eq!(lab.ask_in(guest, tx, 13, "n0\0"), ok());
    assert_eq!(lab.ask_in(guest, tx, 7, "T\0"), ok());
    assert!(lab.store.memory_of(5) < 19_000);
    assert_eq!(lab.ask(guest, 4, &format!("x\0{}\0", "t".repeat(3900))), Reply::Error("ENOMEM"));
    assert_eq!(lab.ask(guest, 4, "x\0t\0"), ok());
    lab.reload();
    let before = lab.store.memory_of(5);
    assert_eq!(lab.ask(guest, 5, "x\0t\0"), ok());
    assert!(lab.store.memory_of(5) < before);
    lab.apply(&Event::DomainDown(5));
    assert_eq!(lab.store.memory_of(5), 0);
    lab.check();
}

#[test]
fn control_answers_as_documented() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    lab.domain(4, Class::Service);
    assert_eq!(lab.ask(dom0, 0, "check\0"), ok());
    assert_eq!(lab.ask(dom0, 0, "print\0hello\0"), ok());
    for (switch, on) in [("+io", true), ("-io", false), ("on", true), ("off", false)] {
        assert_eq!(lab.ask(dom0, 0, &format!("log\0{switch}\0")), ok());
        let Reply::Ok(said) = lab.ask(dom0, 0, "log\0") else { panic!("log") };
        let said = String::from_utf8(said).expect("text");
        assert_eq!(said.contains("io      : on"), on, "{said}");
    }
    for command in [
        "help\0",
        "memreport\0",
        "quota\0",
        "quota-soft\0",
        "quota\0max\0",
        "quota\0max\0-r\0",
        "quota\x004\0",
    ] {
        assert!(lab.ask(dom0, 0, command).is_ok(), "{command:?}");
    }
    for bad in ["nothing\0", "quota\0max\0x\0", "quota\0set\0nodes\0", "log\0x\0", "\0", ""] {
        assert_eq!(lab.ask(dom0, 0, bad), Reply::Error("EINVAL"), "{bad:?}");
    }
    assert_eq!(lab.ask(dom0, 0, "quota\x0099\0"), Reply::Error("ENOENT"));
}

/// What the toolstack sets is an event too.
#[test]
fn quotas_set_by_the_process() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    let event = |domid, value| Event::SetQuota { domid, item: Item::Watches, soft: false, value };
    lab.apply(&event(None, 3));
    lab.apply(&event(Some(5), 4));
    assert_eq!(lab.ask(dom0, GET_QUOTA, "watches\0"), text("3"));
    assert_eq!(lab.ask(dom0, GET_QUOTA, "5\0watches\0"), text("4"));
    lab.guest(6);
    assert_eq!(lab.ask(dom0, GET_QUOTA, "6\0watches\0"), text("3"));
    let mut out = xenstored::codec::Writer::default();
    event(Some(5), 9).encode(&mut out);
    assert_eq!(Event::decode(&mut xenstored::codec::Reader(&out.0)), Some(event(Some(5), 9)));
}
