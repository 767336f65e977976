//! Saving a QEMU guest into a file, and going on from one.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use dom0_supervisor::config::DomainFile;
use domain_kit::saved::Saved;
use proto::toolstack::{PauseGuestRequest, SaveGuestRequest};
use serde_json::{Value, json};

use crate::client::{Dom0, Failure};
use crate::commands::{destroy, guests, make, say};
use crate::{block, json as to_json};

/// How long a save may take.
const WITHIN: Duration = Duration::from_secs(960);
/// How long a guest may take to go on.
const GO_ON: Duration = Duration::from_secs(600);

/// What is to be saved, and what follows.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Name, domid or uuid.
    pub guest: String,
    /// The file; it must not be there yet.
    pub file: PathBuf,
    /// The guest goes on; without this it is removed when it was saved.
    #[arg(short = 'c', long, conflicts_with = "paused")]
    pub checkpoint: bool,
    /// The guest stays, stopped.
    #[arg(short = 'p', long)]
    pub paused: bool,
    /// In the same moment puts a new qcow2 image on top of a disk (VDEV=IMAGE, as block-snapshot): what it was stays as it was saved.
    #[arg(long, value_name = "VDEV=IMAGE")]
    pub snapshot: Vec<String>,
}

fn absolute(path: &Path) -> Result<(PathBuf, String), Failure> {
    let bad = |e: &dyn std::fmt::Display| Failure::Input(format!("{}: {e}", path.display()));
    let path = std::path::absolute(path).map_err(|e| bad(&e))?;
    let text = path.to_str().ok_or_else(|| bad(&"the path must be plain text"))?.to_owned();
    Ok((path, text))
}

pub async fn save(dom0: &Dom0, wanted: Wanted, json: bool) -> Result<(), Failure> {
    let Wanted { guest, file, checkpoint, paused, snapshot } = wanted;
    let (path, text) = absolute(&file)?;
    let snapshots: Vec<(&str, &str)> = snapshot
        .iter()
        .map(|s| s.split_once('=').ok_or_else(|| Failure::Input(format!("{s}: not VDEV=IMAGE"))))
        .collect::<Result<_, _>>()?;
    if path.exists() {
        return Err(Failure::Input(format!("{text}: is there already")));
    }
    // Made by who asks, with that one's rights. Under its name it is there only when it is whole.
    let part = format!("{text}.part");
    let made = File::options().write(true).create_new(true).mode(0o600).open(&part);
    let made = made.map_err(|e| Failure::Input(format!("{part}: {e}")))?;
    let request = SaveGuestRequest { guest: guest.clone(), path: part.clone() };
    let result = async {
        let saved = dom0.once(WITHIN, |mut c| async move { c.save_guest(request).await }).await?;
        for (vdev, image) in snapshots {
            block::snapshot(dom0, guest.clone(), vdev.to_owned(), Path::new(image), json).await?;
        }
        made.sync_all()?;
        std::fs::rename(&part, &path)?;
        // The name too.
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok::<_, Failure>(saved)
    };
    let saved = match result.await {
        Ok(saved) => saved,
        Err(why) => {
            // It may have been renamed already: then it is whole.
            let _renamed = std::fs::remove_file(&part);
            let lets_it_go_on = unpause(dom0, &guest).await;
            if let Err(error) = lets_it_go_on {
                writeln!(std::io::stderr(), "bh: guest {guest} may be stopped (bh unpause): {error}")?;
            }
            return Err(why);
        }
    };
    let what = match (checkpoint, paused) {
        (true, _) => unpause(dom0, &guest).await.map(|()| "it goes on")?,
        (_, true) => "it stays stopped",
        _ => destroy(dom0, guest.clone()).await.map(|()| "it is gone")?,
    };
    let words =
        format!("guest {guest} is saved in {text} ({} MiB, {} ms); {what}", saved.bytes >> 20, saved.took_ms);
    let value =
        json!({ "guest": guest, "file": text, "bytes": saved.bytes, "took_ms": saved.took_ms, "then": what });
    say(json, &words, value)
}

async fn unpause(dom0: &Dom0, guest: &str) -> Result<(), Failure> {
    let request = PauseGuestRequest { guest: guest.to_owned(), pause: false };
    let reply = dom0.call(|mut c| {
        let request = request.clone();
        async move { c.pause_guest(request).await }
    });
    reply.await.map(drop)
}

pub async fn restore(dom0: &Dom0, file: &Path, json: bool) -> Result<(), Failure> {
    let (path, text) = absolute(file)?;
    let bad = |e: &dyn std::fmt::Display| Failure::Input(format!("{text}: {e}"));
    let saved = File::open(&path).map_err(|e| bad(&e))?;
    let saved = Saved::open(&saved).map_err(|e| bad(&e))?;
    let description: Value = serde_json::from_str(&saved.description).map_err(|e| bad(&e))?;
    let config: DomainFile = serde_json::from_value(description["guest"].clone()).map_err(|e| bad(&e))?;
    let config = toml::to_string(&config).map_err(|e| bad(&e))?;
    let guest = make(dom0, config, text.clone(), text.clone()).await?;
    // It is made; whether QEMU can read its state is known when it runs.
    let end = Instant::now() + GO_ON;
    loop {
        let now = match guests(dom0, &guest.uuid).await {
            Ok(found) => found.into_iter().next(),
            Err(Failure::Status(s)) if s.code() == tonic::Code::NotFound => None,
            Err(e) => return Err(e),
        };
        match now {
            Some(now) if now.state == "running" => {
                let words = format!("guest {} goes on as domain {}", now.name, now.domid);
                return say(json, &words, to_json::guest(&now));
            }
            Some(now)
                if matches!(now.state.as_str(), "restoring" | "creating" | "paused")
                    && Instant::now() < end => {}
            other => {
                let state = other.map_or("gone".to_owned(), |now| now.state);
                let text = format!(
                    "{text}: the guest cannot go on and is {state}; see bh events and the log of qemu-{}",
                    guest.name
                );
                return Err(Failure::Status(tonic::Status::failed_precondition(text)));
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
