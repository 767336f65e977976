//! What each command does.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dom0_supervisor::config::DomainFile;
use proto::toolstack::*;
use serde_json::{Value, json};

use crate::client::{Dom0, Failure, PATIENCE};
use crate::table::{Table, or_dash};
use crate::{Args, Command, Wait, block, console, json as to_json, network, save, usb};

/// How long dom0 may take to make a guest.
const CREATE: Duration = Duration::from_secs(120);

/// Runs the command.
pub async fn run(args: Args) -> Result<(), Failure> {
    let dom0 = Dom0::new(&args.socket);
    match args.command {
        Command::List { guest } => list(&dom0, guest, args.json).await,
        Command::Create { file } => create(&dom0, &file, args.json).await,
        Command::Shutdown { guest, wait } => shutdown(&dom0, guest, false, wait, args.json).await,
        Command::Reboot { guest, wait } => shutdown(&dom0, guest, true, wait, args.json).await,
        Command::Destroy { guest } => {
            destroy(&dom0, guest.clone()).await?;
            say(args.json, &format!("guest {guest} is gone"), json!({ "guest": guest, "result": "is gone" }))
        }
        Command::Pause { guest } => pause(&dom0, guest, true, args.json).await,
        Command::Unpause { guest } => pause(&dom0, guest, false, args.json).await,
        Command::Reset { guest } => reset(&dom0, guest, args.json).await,
        Command::Save { wanted } => save::save(&dom0, wanted, args.json).await,
        Command::Restore { file } => save::restore(&dom0, &file, args.json).await,
        Command::Screenshot { guest, file } => screenshot(&dom0, guest, &file, args.json).await,
        Command::UsbList { guest } => usb::list(&dom0, guest, args.json).await,
        Command::UsbAttach { guest, wanted } => usb::attach(&dom0, guest, wanted, args.json).await,
        Command::UsbDetach { guest, id } => usb::detach(&dom0, guest, id, args.json).await,
        Command::MemSet { guest, memory } => usb::resize(&dom0, guest, Some(memory), 0, args.json).await,
        Command::VcpuSet { guest, count } => usb::resize(&dom0, guest, None, count, args.json).await,
        Command::Vnc { guest, listen, viewer } => crate::vnc::run(&dom0, guest, listen, viewer).await,
        Command::Console { guest, log } => console::run(&dom0, guest, log).await,
        Command::BlockList { guest } => block::list(&dom0, guest, args.json).await,
        Command::BlockAttach { guest, disk } => block::attach(&dom0, guest, disk.join(","), args.json).await,
        Command::BlockDetach { guest, vdev, force } => {
            block::detach(&dom0, guest, vdev, force, args.json).await
        }
        Command::BlockResize { guest, vdev, size } => {
            block::resize(&dom0, guest, vdev, &size, args.json).await
        }
        Command::BlockCommit { guest, vdev } => block::commit(&dom0, guest, vdev, args.json).await,
        Command::BlockInsert { guest, vdev, medium } => {
            block::medium(&dom0, guest, vdev, Some(&medium), args.json).await
        }
        Command::BlockEject { guest, vdev } => block::medium(&dom0, guest, vdev, None, args.json).await,
        Command::BlockLimit { guest, vdev, iops, iops_burst, bandwidth, bandwidth_burst } => {
            let request = block::limits(guest, vdev, [iops, iops_burst], [bandwidth, bandwidth_burst])?;
            block::limit(&dom0, request, args.json).await
        }
        Command::BlockSnapshot { guest, vdev, image } => {
            block::snapshot(&dom0, guest, vdev, &image, args.json).await
        }
        Command::NetworkList { guest } => network::list(&dom0, guest, args.json).await,
        Command::NetworkAttach { guest, vif, wanted } => {
            network::attach(&dom0, guest, vif, wanted, args.json).await
        }
        Command::NetworkDetach { guest, vif, force } => {
            network::detach(&dom0, guest, vif, force, args.json).await
        }
        Command::NetworkMove { guest, vif, backend } => {
            network::change(&dom0, guest, vif, backend, args.json).await
        }
        Command::NetworkLink { guest, vif, link } => network::link(&dom0, guest, vif, link, args.json).await,
        Command::NetworkRules { wanted } => crate::rules::run(&dom0, wanted, args.json).await,
        Command::Capture { wanted } => crate::capture::run(&dom0, wanted).await,
        Command::Services { statistics, brief } => {
            services(&dom0, statistics || (args.json && !brief), args.json).await
        }
        Command::Reload => reload(&dom0, args.json).await,
        Command::Restart { service, timeout } => restart(&dom0, service, timeout, args.json).await,
        Command::Store { command } => crate::store::run(&dom0, command, args.json).await,
        Command::Info => info(&dom0, args.json).await,
        Command::Events { follow } => events(&dom0, follow, args.json).await,
    }
}

pub(crate) fn print_json(value: &Value) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

pub(crate) fn say(json: bool, text: &str, value: Value) -> Result<(), Failure> {
    if json { print_json(&value) } else { Ok(writeln!(std::io::stdout(), "{text}")?) }
}

pub async fn guests(dom0: &Dom0, guest: &str) -> Result<Vec<Guest>, Failure> {
    let request = ListGuestsRequest { guest: guest.to_owned() };
    let reply = dom0.call(|mut c| {
        let request = request.clone();
        async move { c.list_guests(request).await }
    });
    Ok(reply.await?.guests)
}

async fn list(dom0: &Dom0, guest: Option<String>, json: bool) -> Result<(), Failure> {
    let all = guests(dom0, guest.as_deref().unwrap_or_default()).await?;
    if json {
        return print_json(&json!({ "guests": all.iter().map(to_json::guest).collect::<Vec<_>>() }));
    }
    let mut table =
        Table::new(&["NAME", ">DOMID", "STATE", "TYPE", ">VCPUS", ">MEMORY", ">BOOTS", ">AGE", "NOTE"]);
    for g in &all {
        table.row(vec![
            g.name.clone(),
            or_dash(g.domid),
            g.state.clone(),
            g.r#type.clone(),
            or_dash(g.vcpus),
            if g.memory_bytes == 0 { "-".into() } else { format!("{} MiB", g.memory_bytes >> 20) },
            or_dash(g.boots),
            age(g.created_unix_ms),
            g.note.clone(),
        ]);
    }
    table.print()?;
    if guest.is_some() {
        let mut table =
            Table::new(&["DEVICE", ">ID", "BACKEND", ">BE-DOMID", "FRONTEND", "BACKEND STATE", "WHAT"]);
        for d in all.iter().flat_map(|g| &g.devices) {
            table.row(vec![
                format!("{} {}", d.r#type, d.name),
                d.id.to_string(),
                d.backend.clone(),
                d.backend_domid.to_string(),
                d.frontend_state.clone(),
                d.backend_state.clone(),
                or_dash(format!("{}{}", d.mac, d.path)),
            ]);
        }
        writeln!(std::io::stdout())?;
        table.print()?;
    }
    Ok(())
}

async fn create(dom0: &Dom0, file: &Path, json: bool) -> Result<(), Failure> {
    let source = file.display().to_string();
    let text = if source == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.map_err(|e| Failure::Input(format!("{source}: {e}")))?;
    // Refused here as well as there: without dom0 a mistake in the file is told too.
    let guest = make(dom0, text, source, String::new()).await?;
    let text = format!("guest {} is domain {}", guest.name, guest.domid);
    say(json, &text, to_json::guest(&guest))
}

/// Has dom0 make a guest; one that goes on from a file if there is one.
pub(crate) async fn make(
    dom0: &Dom0,
    text: String,
    source: String,
    restore: String,
) -> Result<Guest, Failure> {
    let name = DomainFile::parse(&text, &source).map_err(|e| Failure::Input(e.0))?.name.to_string();
    let request = CreateGuestRequest { domain_file: text, source, restore };
    let mut lost = false;
    let end = Instant::now() + CREATE;
    loop {
        let sent = request.clone();
        let result = dom0.once(CREATE, |mut c| async move { c.create_guest(sent).await }).await;
        let guest = match result {
            Ok(guest) => guest,
            // dom0 was killed while it worked: the next one finishes, undoes, or never heard of it.
            Err(e) if e.lost() && Instant::now() < end => {
                lost = true;
                match settled(dom0, &name, end).await? {
                    Some(guest) => guest,
                    None => continue,
                }
            }
            Err(Failure::Status(s)) if lost && s.code() == tonic::Code::AlreadyExists => {
                match settled(dom0, &name, end).await? {
                    Some(guest) => guest,
                    None => return Err(Failure::Status(s)),
                }
            }
            Err(e) => return Err(e),
        };
        return Ok(guest);
    }
}

/// The guest once nothing is under way with it; `None` if it is not there.
async fn settled(dom0: &Dom0, name: &str, end: Instant) -> Result<Option<Guest>, Failure> {
    loop {
        match guests(dom0, name).await {
            Ok(found) => match found.into_iter().next() {
                Some(g) if matches!(g.state.as_str(), "creating" | "destroying") && Instant::now() < end => {}
                other => return Ok(other),
            },
            Err(Failure::Status(s)) if s.code() == tonic::Code::NotFound => return Ok(None),
            Err(e) => return Err(e),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn shutdown(dom0: &Dom0, guest: String, reboot: bool, wait: Wait, json: bool) -> Result<(), Failure> {
    let request = ShutdownGuestRequest {
        guest: guest.clone(),
        reboot,
        wait: wait.wait,
        timeout_ms: wait.timeout.saturating_mul(1000),
    };
    let within = Duration::from_secs(u64::from(wait.timeout) + 10);
    let end = Instant::now() + within;
    let mut lost = false;
    loop {
        let sent = request.clone();
        match dom0.once(within, |mut c| async move { c.shutdown_guest(sent).await }).await {
            Ok(_) => break,
            Err(e) if e.lost() && Instant::now() < end => lost = true,
            // It was asked before dom0 went away, and is gone by now.
            Err(Failure::Status(s)) if lost && s.code() == tonic::Code::NotFound => break,
            Err(e) => return Err(e),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let what = match (reboot, wait.wait) {
        (false, false) => "was asked to power off",
        (true, false) => "was asked to reboot",
        (false, true) => "is off",
        (true, true) => "has rebooted",
    };
    say(json, &format!("guest {guest} {what}"), json!({ "guest": guest, "result": what }))
}

async fn pause(dom0: &Dom0, guest: String, pause: bool, json: bool) -> Result<(), Failure> {
    let request = PauseGuestRequest { guest: guest.clone(), pause };
    let reply = dom0
        .call(|mut c| {
            let request = request.clone();
            async move { c.pause_guest(request).await }
        })
        .await?;
    say(json, &format!("guest {guest} is {}", reply.state), json!({ "guest": guest, "state": reply.state }))
}

async fn screenshot(dom0: &Dom0, guest: String, file: &Path, json: bool) -> Result<(), Failure> {
    let reply = dom0
        .call(|c| {
            let guest = guest.clone();
            // A screen's worth is more than a message's usual size.
            async move { c.max_decoding_message_size(64 << 20).screenshot(GuestRef { guest }).await }
        })
        .await?;
    std::fs::write(file, &reply.png)?;
    let text = format!("{}: {} bytes", file.display(), reply.png.len());
    say(json, &text, json!({ "file": file.display().to_string(), "bytes": reply.png.len() }))
}

pub(crate) async fn destroy(dom0: &Dom0, guest: String) -> Result<(), Failure> {
    let end = Instant::now() + PATIENCE * 6;
    let mut lost = false;
    loop {
        let sent = GuestRef { guest: guest.clone() };
        match dom0.once(CREATE, |mut c| async move { c.destroy_guest(sent).await }).await {
            Ok(_) => return Ok(()),
            Err(e) if e.lost() && Instant::now() < end => lost = true,
            Err(Failure::Status(s)) if lost && s.code() == tonic::Code::NotFound => return Ok(()),
            Err(e) => return Err(e),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn reset(dom0: &Dom0, guest: String, json: bool) -> Result<(), Failure> {
    let sent = GuestRef { guest: guest.clone() };
    let within = PATIENCE;
    let reply = dom0.once(within, |mut c| async move { c.reset_guest(sent).await }).await?;
    let text = format!("guest {guest} was reset and is {}", reply.state);
    say(json, &text, json!({ "guest": guest, "state": reply.state }))
}

pub async fn list_services(dom0: &Dom0, statistics: bool) -> Result<Vec<ServiceInfo>, Failure> {
    let reply = dom0.call(|mut c| async move { c.list_services(ListServicesRequest { statistics }).await });
    Ok(reply.await?.services)
}

fn service_table(all: &[ServiceInfo]) -> Result<(), Failure> {
    let mut table =
        Table::new(&["NAME", "KIND", ">DOMID", "STATE", ">PID", ">GEN", ">RESTARTS", "LAST EXIT", "NOTE"]);
    for s in all {
        table.row(vec![
            s.name.clone(),
            s.kind.clone(),
            if s.state == "missing" { "-".into() } else { s.domid.to_string() },
            s.state.clone(),
            or_dash(s.host_pid),
            or_dash(s.generation),
            s.restarts.to_string(),
            or_dash(&s.last_exit),
            s.note.clone(),
        ]);
    }
    Ok(table.print()?)
}

async fn services(dom0: &Dom0, statistics: bool, json: bool) -> Result<(), Failure> {
    let all = list_services(dom0, statistics).await?;
    if json {
        return print_json(&json!({ "services": all.iter().map(to_json::service).collect::<Vec<_>>() }));
    }
    service_table(&all)?;
    if statistics {
        let mut table = Table::new(&["SERVICE", "SUBJECT", "COUNTER", ">VALUE", "UNIT"]);
        for s in &all {
            for c in &s.counters {
                table.row(vec![
                    s.name.clone(),
                    or_dash(&c.subject),
                    c.name.clone(),
                    c.value.to_string(),
                    c.unit.clone(),
                ]);
            }
        }
        writeln!(std::io::stdout())?;
        table.print()?;
    }
    Ok(())
}

async fn reload(dom0: &Dom0, json: bool) -> Result<(), Failure> {
    let reply = dom0.call(|mut c| async move { c.reload(ReloadRequest {}).await }).await?;
    if json {
        return print_json(
            &json!({ "services": reply.services.iter().map(to_json::service).collect::<Vec<_>>() }),
        );
    }
    service_table(&reply.services)
}

async fn restart(dom0: &Dom0, name: String, timeout: u32, json: bool) -> Result<(), Failure> {
    let request =
        RestartServiceRequest { name: name.clone(), timeout_ms: timeout.saturating_mul(1000).max(1) };
    let within = Duration::from_secs(u64::from(timeout) + 10);
    let end = Instant::now() + within;
    let mut service = dom0.once(within, |mut c| async move { c.restart_service(request).await }).await?;
    if service.kind == "dom0" {
        // It answered before it went.
        let before = service.generation;
        while service.generation <= before {
            if Instant::now() > end {
                let text = format!("dom0 is not back within {timeout} s; see hv-core's log");
                return Err(Failure::Status(tonic::Status::deadline_exceeded(text)));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            let all = list_services(dom0, false).await?;
            service = all.into_iter().find(|s| s.kind == "dom0").unwrap_or(service);
        }
    }
    let text =
        format!("{} runs as process {}, generation {}", service.name, service.host_pid, service.generation);
    say(json, &text, to_json::service(&service))
}

async fn info(dom0: &Dom0, json: bool) -> Result<(), Failure> {
    let i = dom0.call(|mut c| async move { c.info(InfoRequest {}).await }).await?;
    if json {
        return print_json(&to_json::info(&i));
    }
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let list = |items: &[String]| if items.is_empty() { "none".into() } else { items.join("; ") };
    let rows = [
        ("dom0", format!("{}, generation {}", i.version, i.dom0_generation)),
        ("hv-core", format!("{}, process {}", i.hvcore_version, i.hvcore_pid)),
        ("memory", format!("{} of {} free", mib(i.memory_free_bytes), mib(i.memory_total_bytes))),
        ("guests", i.guests.to_string()),
        ("services", i.services.to_string()),
        ("not running", list(&i.failed_services)),
        ("under way", list(&i.operations)),
        ("host file", i.host_file),
        ("state", i.state_dir),
    ];
    let mut out = std::io::stdout().lock();
    for (key, value) in rows {
        writeln!(out, "{key:<13} {value}")?;
    }
    for missing in &i.missing {
        writeln!(out, "{:<13} {missing}", "missing here")?;
    }
    for problem in &i.problems {
        writeln!(out, "{:<13} {problem}", "problem")?;
    }
    for f in &i.failures {
        writeln!(out, "{:<13} {} ago: guest {}: {}", "failed", age(f.unix_ms), f.guest, f.what)?;
    }
    Ok(())
}

async fn events(dom0: &Dom0, follow: bool, json: bool) -> Result<(), Failure> {
    // Each dom0 counts anew, so a stream that broke is taken up by time.
    let mut shown_ms = 0;
    loop {
        let from_ms = shown_ms;
        let request = WatchEventsRequest { after_seq: 0, kept_only: !follow };
        let mut client = dom0.connect().await?;
        let mut stream = match client.watch_events(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => {
                let failure = Failure::Status(status);
                if !failure.lost() {
                    return Err(failure);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        loop {
            match stream.message().await {
                Ok(Some(event)) if event.unix_ms <= from_ms => {}
                Ok(Some(event)) => {
                    shown_ms = shown_ms.max(event.unix_ms);
                    show_event(&event, json)?;
                }
                Ok(None) if !follow => return Ok(()),
                Ok(None) | Err(_) => break,
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn show_event(event: &Event, json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", to_json::event(event))?;
        return Ok(());
    }
    let seconds = event.unix_ms / 1000;
    let time = format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
        event.unix_ms % 1000
    );
    if event.lost > 0 {
        writeln!(out, "{time}  ({} earlier events are not kept)", event.lost)?;
    }
    let life = if event.generation > 0 {
        format!("d{}.{}", event.domid, event.generation)
    } else {
        format!("d{}", event.domid)
    };
    let line = format!("{time}  {:<12}  {life:<8}  {:<20}  {}", event.kind, event.name, event.detail);
    writeln!(out, "{}", line.trim_end())?;
    Ok(())
}

fn age(unix_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    let seconds = now.saturating_sub(unix_ms) / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}
