//! The classes of bugs that xenstored daemons had, each under its Xen Security Advisory. See the project's hazards list.

#[path = "hazards/lab.rs"]
mod lab;

use lab::{Lab, Reply};
use xenstored::store::{Class, Event};

fn ok() -> Reply {
    Reply::Ok(b"OK\0".to_vec())
}

/// XSA-72: a directory listing around the largest reply.
#[test]
fn xsa_72_oversized_reply() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    // 64 children of 64 bytes with their nul fill a reply to the byte.
    for i in 0..64 {
        lab.write(dom0, &format!("/d/{i:063}"), "");
    }
    let Reply::Ok(full) = lab.ask(dom0, 1, "/d\0") else { panic!("listing") };
    assert_eq!(full.len(), 4096);
    lab.write(dom0, "/d/x", "");
    assert_eq!(lab.ask(dom0, 1, "/d\0"), Reply::Error("E2BIG"));
    let mut names = Vec::new();
    loop {
        let Reply::Ok(part) = lab.ask(dom0, 22, &format!("/d\0{}\0", names.len())) else { panic!("part") };
        assert!(part.len() <= 4096);
        let start = part.iter().position(|b| *b == 0).expect("generation") + 1;
        names.extend_from_slice(&part[start..]);
        if names.ends_with(b"\0\0") {
            break;
        }
    }
    assert_eq!(names.len(), 4096 + 2 + 1);
}

/// XSA-115: watch `/` as a guest and see nothing that one may not read.
#[test]
fn xsa_115_watch_permissions() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    lab.write(dom0, "/local/domain/5", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5\0n5\0"), ok());
    assert_eq!(lab.ask(guest, 4, "/\0t\0"), ok());
    assert_eq!(lab.ask(guest, 4, "@releaseDomain\0t\0"), ok());
    assert_eq!(lab.ask(guest, 4, "@introduceDomain\0t\0"), ok());
    lab.events(guest);
    lab.write(dom0, "/local/domain/6/secret", "x");
    assert_eq!(lab.ask(dom0, 13, "/local/domain/6/secret\0"), ok());
    assert_eq!(lab.ask(dom0, 14, "/local/domain/6\0n6\0"), ok());
    let tx = lab.start(dom0);
    assert_eq!(lab.ask_in(dom0, tx, 11, "/local/domain/6/more\0x"), ok());
    assert_eq!(lab.ask_in(dom0, tx, 7, "T\0"), ok());
    lab.guest(6);
    assert_eq!(lab.events(guest), [""; 0]);
    lab.write(dom0, "/local/domain/5/mine", "x");
    assert_eq!(lab.events(guest), ["/local/domain/5/mine"]);
    // A node that the guest may not read, in a directory that it may: its removal is the directory's matter.
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5/mine\0n0\0"), ok());
    assert_eq!(lab.ask(dom0, 13, "/local/domain/5/mine\0"), ok());
    assert_eq!(lab.events(guest).len(), 2);
    // Everybody may hear of domains that go (Xen's default), only dom0 of those that come.
    lab.apply(&Event::DomainDown(6));
    assert_eq!(lab.events(guest), ["@releaseDomain"]);
}

/// XSA-206: a client that keeps conflicting does not keep others from committing.
#[test]
fn xsa_206_conflict_storm() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    lab.write(dom0, "/shared", "0");
    assert_eq!(lab.ask(dom0, 14, "/shared\0b5\0"), ok());
    for i in 0..100 {
        let tx = lab.start(dom0);
        assert_eq!(lab.ask_in(dom0, tx, 11, &format!("/tool/n{i}\0x")), ok());
        assert_eq!(lab.ask_in(dom0, tx, 11, "/shared\0dom0"), ok());
        // The guest writes the very node that the toolstack writes, before each commit.
        assert_eq!(lab.ask(guest, 11, "/shared\0guest"), ok());
        assert_eq!(lab.ask_in(dom0, tx, 7, "T\0"), ok(), "a write that was not read conflicts with nothing");
    }
    // What was read does conflict. (The daemon then holds the others back for a moment, see turns.rs and the daemon.)
    let tx = lab.start(dom0);
    assert_eq!(lab.ask_in(dom0, tx, 2, "/shared\0"), Reply::Ok(b"dom0".to_vec()));
    assert_eq!(lab.ask_in(dom0, tx, 11, "/shared\0seen"), ok());
    assert_eq!(lab.ask(guest, 11, "/shared\0other"), ok());
    assert_eq!(lab.ask_in(dom0, tx, 7, "T\0"), Reply::Error("EAGAIN"));
    assert_eq!(lab.ask(dom0, 2, "/shared\0"), Reply::Ok(b"other".to_vec()));
}

/// XSA-322: a domid used again inherits nothing.
#[test]
fn xsa_322_reused_domid() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    let old = lab.guest(5);
    lab.write(dom0, "/local/domain/5", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5\0n5\0"), ok());
    assert_eq!(lab.ask(old, 11, "data/own\0secret"), ok());
    lab.write(dom0, "/shared", "s");
    assert_eq!(lab.ask(dom0, 14, "/shared\0n0\0b5\0r7\0"), ok());
    assert_eq!(lab.ask(old, 2, "/shared\0"), Reply::Ok(b"s".to_vec()));
    lab.apply(&Event::DomainDown(5));
    assert_eq!(lab.ask(dom0, 3, "/shared\0"), Reply::Ok(b"n0\0r7\0".to_vec()));
    let new = lab.guest(5);
    assert_eq!(lab.ask(new, 2, "/shared\0"), Reply::Error("EACCES"));
    assert_eq!(lab.ask(new, 2, "data/own\0"), Reply::Error("EACCES"));
    assert_eq!(lab.store.tree.owners().get(&5), None);
    lab.check();
}

/// XSA-324: a watch token that leaves no room in the event.
#[test]
fn xsa_324_huge_token() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    for token_len in [4000usize, 4089, 4090, 4091] {
        let token = "t".repeat(token_len);
        let reply = lab.ask(dom0, 4, &format!("/a\0{token}\0"));
        assert_eq!(reply, ok(), "the request itself fits");
        lab.events(dom0);
        lab.write(dom0, "/a/a-longer-path-than-fits-beside-the-token", "x");
        // Told, by the path that fits.
        let events = lab.events(dom0);
        assert!(events.iter().all(|e| e == "/a" || e.starts_with("/a/")) && !events.is_empty());
        lab.ask(dom0, 21, "\0");
    }
}

/// XSA-326: a client that never reads. Its memory is bounded, and it still learns that something changed.
#[test]
fn xsa_326_client_that_never_drains() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    lab.write(dom0, "/local/domain/5", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5\0b5\0"), ok());
    assert_eq!(lab.ask(guest, 4, "/local/domain/5\0t\0"), ok());
    lab.events(guest);
    lab.hold(guest);
    for i in 0..100_000 {
        lab.write(dom0, &format!("/local/domain/5/n{}", i % 50), "x");
    }
    let unread = lab.unread(guest);
    assert!(unread < 300 << 10, "{unread} bytes wait for a client that does not read");
    // Once it reads, it hears of later changes again.
    lab.release(guest);
    lab.events(guest);
    lab.write(dom0, "/local/domain/5/n1", "y");
    assert_eq!(lab.events(guest), ["/local/domain/5/n1"]);
    // Quotas: watches, nodes, transactions.
    for i in 0..200 {
        let reply = lab.ask(guest, 4, &format!("x\0{i}\0"));
        assert_eq!(reply, if i < 127 { ok() } else { Reply::Error("ENOSPC") }, "watch {i}");
    }
    for i in 0..20 {
        let reply = lab.ask(guest, 6, "\0");
        assert_eq!(matches!(reply, Reply::Ok(_)), i < 10, "transaction {i}");
    }
    let mut made = 0;
    while lab.ask(guest, 11, &format!("q/{made}\0")) == ok() {
        made += 1;
        assert!(made < 2000);
    }
    // "/local/domain/5" and what dom0 made below inherited the guest as owner.
    assert_eq!(lab.store.tree.owners()[&5], 1000);
}

/// XSA-330: a reset of watches leaves no ghosts, in memory or after a restart.
#[test]
fn xsa_330_reset_watches() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    for i in 0..20 {
        assert_eq!(lab.ask(dom0, 4, &format!("/a/{i}\0t\0")), ok());
        assert_eq!(lab.ask(dom0, 4, &format!("/a\0{i}\0")), ok());
    }
    let tx = lab.start(dom0);
    lab.events(dom0);
    assert_eq!(lab.ask(dom0, 21, "\0"), ok());
    lab.write(dom0, "/a/3", "x");
    assert_eq!(lab.events(dom0), [""; 0]);
    assert_eq!(lab.ask_in(dom0, tx, 7, "T\0"), Reply::Error("ENOENT"));
    lab.reload();
    assert_eq!(lab.store.watches.len(), 0);
    lab.write(dom0, "/a/4", "x");
    assert_eq!(lab.events(dom0), [""; 0]);
    lab.check();
}

/// XSA-352 and XSA-353: operation by node by caller, with `/` among the nodes.
#[test]
fn xsa_352_353_permission_matrix() {
    // Node permissions, and what domain 5 may do there: read, write, change permissions.
    let cases = [
        ("n0", false, false, false),
        ("r0", true, false, false),
        ("w0", false, true, false),
        ("b0", true, true, false),
        ("n5", true, true, true),
        ("n0 r5", true, false, false),
        ("n0 w5", false, true, false),
        ("b0 n5", false, false, false),
        ("n0 r6 b5", true, true, false),
    ];
    for node in ["/", "/n", "/n/m"] {
        for (perms, read, write, own) in cases {
            let mut lab = Lab::new();
            let (dom0, guest) = (lab.socket(), lab.guest(5));
            lab.write(dom0, "/n/m", "v");
            let set = format!("{node}\0{}\0", perms.replace(' ', "\0"));
            assert_eq!(lab.ask(dom0, 14, &set), ok());
            let allowed = |reply: Reply, yes: bool, what: &str| {
                assert_eq!(!matches!(reply, Reply::Error(_)), yes, "{what} {node} with {perms}: {reply:?}");
            };
            allowed(lab.ask(guest, 2, &format!("{node}\0")), read, "READ");
            allowed(lab.ask(guest, 1, &format!("{node}\0")), read, "DIRECTORY");
            allowed(lab.ask(guest, 22, &format!("{node}\x000\0")), read, "DIRECTORY_PART");
            allowed(lab.ask(guest, 3, &format!("{node}\0")), read, "GET_PERMS");
            allowed(lab.ask(guest, 11, &format!("{node}\0w")), write, "WRITE");
            allowed(lab.ask(guest, 12, &format!("{node}\0")), write, "MKDIR");
            // Owners may give rights, not the node.
            let owner = &perms[1..2];
            allowed(lab.ask(guest, 14, &format!("{node}\0b{owner}\0r9\0")), own, "SET_PERMS");
            assert!(matches!(lab.ask(guest, 14, &format!("{node}\0b6\0")), Reply::Error("EPERM" | "EACCES")));
            // A transaction is judged the same way.
            let tx = lab.start(guest);
            assert_eq!(lab.ask(dom0, 14, &set), ok());
            allowed(lab.ask_in(guest, tx, 2, &format!("{node}\0")), read, "READ in a transaction");
            allowed(lab.ask_in(guest, tx, 11, &format!("{node}\0t")), write, "WRITE in a transaction");
            let expected = if node == "/" { false } else { write };
            allowed(lab.ask(guest, 13, &format!("{node}\0")), expected, "RM");
            lab.check();
        }
    }
}

/// XSA-415 and XSA-421: whatever fails, a transaction is all or nothing and the counters stay exact.
#[test]
fn xsa_415_421_all_or_nothing() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    lab.write(dom0, "/local/domain/5/d", "");
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5/d\0n5\0"), ok());
    for round in 0..50 {
        let tx = lab.start(guest);
        // Runs into the node quota somewhere, and into a missing permission.
        for i in 0..40 {
            lab.ask_in(guest, tx, 11, &format!("d/{round}/{i}\0x"));
        }
        assert_eq!(lab.ask_in(guest, tx, 11, "/tool/x\0x"), Reply::Error("EACCES"));
        let before = lab.store.tree.owners()[&5];
        let end = match round % 3 {
            0 => "F\0",
            1 => "T\0",
            _ => {
                assert!(lab.ask_in(guest, tx, 1, "d\0").is_ok());
                lab.write(dom0, &format!("/local/domain/5/d/other{round}"), "");
                "T\0"
            }
        };
        let before = if round % 3 == 2 { lab.store.tree.owners()[&5] } else { before };
        let reply = lab.ask_in(guest, tx, 7, end);
        let after = lab.store.tree.owners()[&5];
        match (round % 3, &reply) {
            (0, Reply::Ok(_)) | (2, Reply::Error("EAGAIN")) => assert_eq!(after, before, "nothing"),
            (1, Reply::Ok(_)) => assert!(after >= before && after <= 1000, "all, within the quota"),
            other => panic!("{other:?}"),
        }
        lab.check();
    }
    assert_eq!(lab.ask(guest, 13, "d/1\0"), ok());
    lab.check();
}

/// XSA-417: a guest's grant to a domid that nobody has is not kept for whoever gets it; the toolstack's is, as it prepares
/// a domain's nodes before its ring is known.
#[test]
fn xsa_417_absent_domains() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    lab.guest(6);
    for name in ["a", "b"] {
        lab.write(dom0, &format!("/local/domain/5/{name}"), "x");
        assert_eq!(lab.ask(dom0, 14, &format!("/local/domain/5/{name}\0n5\0")), ok());
    }
    assert_eq!(lab.ask(guest, 14, "a\0n5\0r7\0r6\0b7\0"), ok());
    assert_eq!(lab.ask(guest, 3, "a\0"), Reply::Ok(b"n5\0r6\0".to_vec()));
    let tx = lab.start(guest);
    assert_eq!(lab.ask_in(guest, tx, 14, "b\0n5\0r7\0r6\0"), ok());
    assert_eq!(lab.ask_in(guest, tx, 7, "T\0"), ok());
    assert_eq!(lab.ask(guest, 3, "b\0"), Reply::Ok(b"n5\0r6\0".to_vec()));
    let new = lab.guest(7);
    for path in ["/local/domain/5/a\0", "/local/domain/5/b\0"] {
        assert_eq!(lab.ask(new, 2, path), Reply::Error("EACCES"));
    }
    assert_eq!(lab.ask(dom0, 14, "/local/domain/5/a\0n5\0r8\0"), ok());
    let next = lab.guest(8);
    assert_eq!(lab.ask(next, 2, "/local/domain/5/a\0"), Reply::Ok(b"x".to_vec()));
    lab.check();
}

/// XSA-418: a tree of the greatest depth is made, listed, saved, loaded and removed without recursion.
#[test]
fn xsa_418_deep_tree() {
    // A small stack shows recursion at once.
    let run = || {
        let mut lab = Lab::new();
        let dom0 = lab.socket();
        let deep = "/a".repeat(1536);
        assert_eq!(deep.len(), 3072);
        lab.write(dom0, &deep, "bottom");
        assert_eq!(lab.ask(dom0, 2, &format!("{deep}\0")), Reply::Ok(b"bottom".to_vec()));
        let tx = lab.start(dom0);
        assert_eq!(lab.ask_in(dom0, tx, 11, &format!("{deep}\0again")), ok());
        assert_eq!(lab.ask_in(dom0, tx, 13, "/a\0"), ok());
        assert_eq!(lab.ask_in(dom0, tx, 11, &format!("{deep}\0made")), ok());
        lab.reload();
        assert_eq!(lab.ask_in(dom0, tx, 7, "T\0"), ok());
        lab.check();
        let tx = lab.start(dom0);
        assert_eq!(lab.ask_in(dom0, tx, 11, &format!("{deep}\0left open")), ok());
        assert_eq!(lab.ask(dom0, 13, "/a\0"), ok());
        lab.check();
        lab.apply(&Event::Close(dom0));
    };
    std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(run)
        .expect("thread")
        .join()
        .expect("no overflow");
}

/// A large removal is over at once for its client; its memory comes back with later requests, also after a restart in between
/// and when the owner goes meanwhile.
#[test]
fn large_removals_in_parts() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    for round in 0..3 {
        lab.write(dom0, "/local/domain/5", "");
        assert_eq!(lab.ask(dom0, 14, "/local/domain/5\0n5\0"), ok());
        for i in 0..3000 {
            lab.write(dom0, &format!("/big/{}/{i}", i % 7), "value");
        }
        let kept = (0..900).filter(|i| lab.ask(guest, 11, &format!("d/{i}\0x")) == ok()).count();
        assert_eq!(kept, if round == 0 { 900 } else { 0 });
        let used = lab.store.tree.arena().used();
        assert_eq!(lab.ask(dom0, 13, "/big\0"), ok());
        assert_eq!(lab.ask(dom0, 2, "/big\0"), Reply::Error("ENOENT"));
        lab.check();
        lab.reload();
        lab.check();
        if round == 0 {
            assert_eq!(lab.ask(dom0, 13, "/local/domain/5\0"), ok());
            lab.apply(&Event::DomainDown(5));
            assert_eq!(lab.store.tree.owners().get(&5), None);
        }
        lab.check();
        for i in 0..300 {
            lab.write(dom0, &format!("/other/{i}"), "value");
        }
        assert!(lab.store.tree.arena().used() <= used, "round {round}: what was removed is used again");
        assert_eq!(lab.ask(dom0, 13, "/other\0"), ok());
        lab.check();
    }
}

/// XSA-419 and XSA-483: 10,000 domains come, use their quota in part, and go; nothing is left.
#[test]
fn xsa_419_483_counters_after_teardown() {
    let mut lab = Lab::new();
    let dom0 = lab.socket();
    let nodes = lab.store.tree.len();
    for i in 0..10_000u32 {
        let domid = 1 + (i % 7) as u16;
        let guest = lab.guest(domid);
        let home = format!("/local/domain/{domid}");
        lab.write(dom0, &home, "");
        assert_eq!(lab.ask(dom0, 14, &format!("{home}\0n{domid}\0")), ok());
        assert_eq!(lab.ask(guest, 4, "data\0t\0"), ok());
        assert_eq!(lab.ask(guest, 11, "data/x\0y"), ok());
        let tx = lab.start(guest);
        assert_eq!(lab.ask_in(guest, tx, 11, "data/z\0y"), ok());
        if i % 2 == 0 {
            assert_eq!(lab.ask(dom0, 9, &format!("{domid}\0")), ok());
        } else {
            lab.apply(&Event::DomainDown(domid));
        }
        assert_eq!(lab.store.tree.owners().get(&domid), None);
    }
    assert_eq!(lab.ask(dom0, 13, "/local\0"), ok());
    assert_eq!((lab.store.tree.len(), lab.store.watches.len()), (nodes, 0));
    assert_eq!(lab.store.conns().count(), 1);
    lab.check();
}

/// XSA-481 and XSA-484: strange paths after any request, and teardown done twice.
#[test]
fn xsa_481_484_strange_paths_and_double_teardown() {
    let mut lab = Lab::new();
    let (dom0, guest) = (lab.socket(), lab.guest(5));
    let strange = [
        "",
        "\0",
        "\0\0",
        "\0\0\0\0",
        "/",
        "//\0",
        "/local/domain/\0",
        "/local/domain//\0",
        "@\0",
        "@releaseDomain\0",
        "/local/domain/5\0",
        "/local/domain/99999/x\0",
        "/local/domain/5/\0",
        "x",
        "5",
        "-1\0",
        "65536\0",
        "5\x005\0",
        "\x005\0",
    ];
    for op in 0..30 {
        for payload in strange {
            for who in [guest, dom0] {
                // RELEASE of domain 5 would end the guest's connection.
                if lab.store.conn(who).is_some() {
                    lab.ask(who, op, payload);
                }
            }
        }
        lab.check();
    }
    let guest = lab.guest(7);
    assert_eq!(lab.ask(dom0, 9, "7\0"), ok());
    assert_eq!(lab.ask(dom0, 9, "7\0"), Reply::Error("ENOENT"));
    lab.apply(&Event::DomainDown(7));
    lab.apply(&Event::Close(guest));
    lab.apply(&Event::Close(guest));
    lab.apply(&Event::Reset(guest));
    lab.check();
}

/// SET_TARGET: a domain may do for another what that one may, until either goes.
#[test]
fn target_ends_with_the_domain() {
    let mut lab = Lab::new();
    let (dom0, helper) = (lab.socket(), lab.guest(5));
    lab.guest(6);
    lab.write(dom0, "/t", "x");
    assert_eq!(lab.ask(dom0, 14, "/t\0n6\0"), ok());
    assert_eq!(lab.ask(helper, 2, "/t\0"), Reply::Error("EACCES"));
    assert_eq!(lab.ask(dom0, 19, "5\x006\0"), ok());
    assert_eq!(lab.ask(helper, 2, "/t\0"), Reply::Ok(b"x".to_vec()));
    lab.apply(&Event::DomainDown(6));
    lab.guest(6);
    lab.write(dom0, "/t2", "x");
    assert_eq!(lab.ask(dom0, 14, "/t2\0n6\0"), ok());
    assert_eq!(lab.ask(helper, 2, "/t2\0"), Reply::Error("EACCES"));
}

/// dom0 alone may use the administrative operations.
#[test]
fn administrative_operations_are_dom0s() {
    let mut lab = Lab::new();
    let service = lab.domain(4, Class::Service);
    for op in [0, 8, 9, 17, 18, 19, 24, 25, 26] {
        assert_eq!(lab.ask(service, op, "5\x001\x002\0"), Reply::Error("EACCES"), "operation {op}");
    }
    for op in [15, 16, 20, 27, 65535] {
        assert_eq!(lab.ask(service, op, "\0"), Reply::Error("ENOSYS"), "operation {op}");
    }
}
