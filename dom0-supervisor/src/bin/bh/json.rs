//! The JSON of `--json`: stable names, documented in `docs/bh.md`.

use proto::toolstack::{Counter, Device, Event, Guest, InfoReply, ServiceInfo};
use serde_json::{Value, json};

/// A guest.
pub fn guest(g: &Guest) -> Value {
    json!({
        "name": g.name, "uuid": g.uuid, "domid": g.domid, "instance": g.instance, "state": g.state,
        "type": g.r#type, "generation": g.generation, "restarts": g.restarts, "host_pid": g.host_pid,
        "vcpus": g.vcpus, "memory_bytes": g.memory_bytes, "created_unix_ms": g.created_unix_ms,
        "boots": g.boots, "note": g.note, "devices": g.devices.iter().map(device).collect::<Vec<_>>(),
    })
}

fn device(d: &Device) -> Value {
    json!({
        "type": d.r#type, "name": d.name, "id": d.id, "backend": d.backend, "backend_domid": d.backend_domid,
        "frontend_state": d.frontend_state, "backend_state": d.backend_state, "mac": d.mac, "path": d.path,
    })
}

/// A service.
pub fn service(s: &ServiceInfo) -> Value {
    json!({
        "name": s.name, "kind": s.kind, "domid": s.domid, "instance": s.instance, "state": s.state,
        "generation": s.generation, "restarts": s.restarts, "host_pid": s.host_pid, "last_exit": s.last_exit,
        "uuid": s.uuid, "note": s.note, "guest": s.guest, "created_unix_ms": s.created_unix_ms,
        "counters": s.counters.iter().map(counter).collect::<Vec<_>>(),
    })
}

fn counter(c: &Counter) -> Value {
    json!({ "name": c.name, "value": c.value, "subject": c.subject, "unit": c.unit })
}

/// The host.
pub fn info(i: &InfoReply) -> Value {
    json!({
        "version": i.version, "hvcore_version": i.hvcore_version, "hvcore_pid": i.hvcore_pid, "missing": i.missing,
        "memory_total_bytes": i.memory_total_bytes, "memory_free_bytes": i.memory_free_bytes, "guests": i.guests,
        "services": i.services, "failed_services": i.failed_services, "host_file": i.host_file,
        "state_dir": i.state_dir, "dom0_generation": i.dom0_generation, "operations": i.operations,
        "problems": i.problems,
        "failures": i.failures.iter().map(|f| json!({ "unix_ms": f.unix_ms, "guest": f.guest, "what": f.what })).collect::<Vec<_>>(),
    })
}

/// An event.
pub fn event(e: &Event) -> Value {
    json!({
        "seq": e.seq, "unix_ms": e.unix_ms, "kind": e.kind, "domid": e.domid, "generation": e.generation,
        "name": e.name, "detail": e.detail, "lost": e.lost,
    })
}
