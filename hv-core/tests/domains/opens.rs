//! What a domain is made of and opens: specifications that change, and files whose open(2) does not come back.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use domain_kit::Hypercall;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::hvcore::*;

use crate::system::System;

/// A FUSE mount without a server: whoever looks at what is in it waits until this is dropped.
struct Unserved {
    dir: PathBuf,
    device: Option<File>,
}

impl Unserved {
    fn new(dir: String) -> Unserved {
        std::fs::create_dir(&dir).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let kind = Some("fuse");
        mount(Some("bulkhead-test"), dir.as_str(), kind, MsFlags::empty(), Some(options.as_str())).unwrap();
        Unserved { dir: dir.into(), device: Some(device) }
    }
}

impl Drop for Unserved {
    fn drop(&mut self) {
        // The connection ends, and with it every wait.
        drop(self.device.take());
        if let Err(e) = umount2(&self.dir, MntFlags::MNT_DETACH) {
            eprintln!("umount {}: {e}", self.dir.display());
        }
    }
}

fn disk(path: &str) -> Resource {
    Resource { name: "disk".into(), kind: resource::Kind::FileRw.into(), path: path.into(), mode: 0 }
}

/// An open that hangs in the kernel holds up neither the restart of its domain, nor others, nor hv-core.
pub fn hung_opens_hold_up_nobody() {
    let mut system = System::start();
    let (link, plain) = (system.path("link"), system.path("plain"));
    File::create(&plain).unwrap().set_len(4096).unwrap();
    symlink(&plain, &link).unwrap();
    let mut request = System::request("blk", &[Role::Backend]);
    request.resources = vec![disk(&link)];
    let dom = system.create(request.clone());
    let hung = Unserved::new(system.path("fuse"));
    let file = format!("{}/disk", hung.dir.display());
    std::fs::remove_file(&link).unwrap();
    symlink(&file, &link).unwrap();

    let mut worst = Duration::ZERO;
    for _ in 0..12 {
        // On a channel of its own: the agent keeps the socket that it has.
        let hv: Hypercall = dom.hv().new_channel().unwrap();
        let opening = std::thread::spawn(move || hv.resource_open("disk").map(drop));
        std::thread::sleep(Duration::from_millis(30));
        let start = Instant::now();
        system.kill(&dom);
        worst = worst.max(start.elapsed());
        assert!(opening.join().unwrap().is_err());
    }
    assert!(worst < Duration::from_secs(1), "the next incarnation came after {worst:?}");
    println!("NOTE the longest restart beside an open that hangs {worst:?}");

    // A new domain with such a file is refused in time, and others are made meanwhile.
    let mut other = request.clone();
    (other.name, other.resources) = ("other".into(), vec![disk(&file)]);
    let quick = System::request("quick", &[Role::Backend]);
    let start = Instant::now();
    let asked = system.call(|c| async move {
        let (mut first, mut second) = (c.clone(), c);
        let asked = tokio::spawn(async move { first.create_domain(other).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        second.create_domain(quick).await?;
        Ok(tonic::Response::new(asked))
    });
    let asked = asked.unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "another creation took {:?}", start.elapsed());
    let refused = system.call(|_| async move { asked.await.unwrap() }).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert!(refused.message().contains("file system"), "{refused}");

    // Served again, the domain has its disk.
    drop(hung);
    std::fs::remove_file(&link).unwrap();
    symlink(&plain, &link).unwrap();
    crate::system::until("the disk opens", || dom.hv().resource_open("disk").is_ok());
}

/// Another specification holds from the next incarnation on; ports, store and number stay; what is for life is refused.
pub fn a_specification_changes_in_a_life() {
    let mut system = System::start();
    let (old, new) = (system.path("old.sock"), system.path("new.sock"));
    let listener = |path: &str| Resource {
        name: "socket".into(),
        kind: resource::Kind::Listener.into(),
        path: path.into(),
        mode: 0o600,
    };
    let mut request = System::request("xs", &[Role::Xenstore]);
    request.uuid = "0a0a0a0a-0000-4000-8000-000000000001".into();
    request.resources = vec![listener(&old)];
    let dom = system.create(request.clone());
    let port = dom.hv().port_alloc_unbound(0).unwrap().port;
    let reference = || Some(DomainRef { domid: dom.id.into(), instance: dom.instance });
    let update = |system: &mut System, spec: CreateDomainRequest| {
        let request = UpdateDomainRequest { domain: reference(), spec: Some(spec) };
        system.call(|mut c| async move { c.update_domain(request).await })
    };
    for (field, change) in [
        ("roles", (|r| r.roles = vec![Role::Backend.into()]) as fn(&mut CreateDomainRequest)),
        ("name", |r| r.name = "other".into()),
        ("netdevs", |r| r.netdevs = vec!["eth9".into()]),
        ("limits", |r| r.limits = Some(Limits { ports: 7, ..Default::default() })),
        ("resources", |r| r.resources.push(disk("/etc/passwd"))),
        ("program", |r| r.program = "/no/such".into()),
    ] {
        let mut other = request.clone();
        change(&mut other);
        let status = update(&mut system, other).unwrap_err();
        assert!(status.message().contains(field), "{field}: {status}");
    }
    request.resources = vec![listener(&new)];
    request.args.push("exit".into());
    request.restart = Some(RestartPolicy::default());
    let told = update(&mut system, request).unwrap();
    assert_eq!((told.generation, told.state()), (1, DomainState::Running), "nothing happens to this life");
    assert!(!std::path::Path::new(&old).exists() && std::path::Path::new(&new).exists());
    assert_eq!(dom.hv().port_list().unwrap()[0].port, port);
    let request = KillRequest { domain: reference(), signal: 9 };
    system.call(|mut c| async move { c.kill_process(request).await }).unwrap();
    // The new policy has no restart; started by hand, it is the new program line, which exits with 7.
    let failed = |system: &mut System, text: &str| {
        crate::system::until(text, || system.get(&dom).is_some_and(|d| d.last_exit.contains(text)));
    };
    failed(&mut system, "SIGKILL");
    let reference = reference().unwrap();
    system.call(|mut c| async move { c.start_process(reference).await }).unwrap();
    failed(&mut system, "exited with status 7");
}
