//! `xenstored --export` and `--import`: a journal that nobody uses, to and from Xen's migration stream.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use xenstored::engine::{Engine, Options};
use xenstored::migrate::{self, NoEnds, Sources};

use crate::standalone::open_state;

/// Writes the state as a stream.
pub fn export(state: &Path, file: &Path, salvage: bool, half_size: u64) -> anyhow::Result<()> {
    if !state.exists() {
        bail!("{}: no such file", state.display());
    }
    let (mem, _lock) = open_state(state, half_size, None)?;
    let options = Options { half_size, salvage, ..Options::default() };
    let (engine, opened) =
        Engine::open(Rc::new(mem), &options).with_context(|| state.display().to_string())?;
    if let Some(dropped) = &opened.dropped {
        tracing::error!(dropped, "the journal was damaged; the stream is older than the store was");
    }
    let sources = Sources { input: &|id| engine.unread_input(id), socket: &|_| None, listener: None };
    let stream = migrate::export(&engine.store, migrate::VERSION, &sources);
    std::fs::write(file, &stream).with_context(|| format!("{}: can't be written", file.display()))?;
    println!("{} nodes, {} bytes", engine.store.tree.len(), stream.len());
    Ok(())
}

/// Makes a state of a stream.
pub fn import(state: &Path, file: &Path, half_size: u64) -> anyhow::Result<()> {
    let stream = std::fs::read(file).with_context(|| format!("{}: can't be read", file.display()))?;
    if std::fs::metadata(state).is_ok_and(|m| m.len() > 0) {
        bail!("{}: exists; a stream is imported into a new state only", state.display());
    }
    let (mem, _lock) = open_state(state, half_size, None)?;
    let options = Options { half_size, ..Options::default() };
    let imported = match Engine::import(Rc::new(mem), &options, &stream, &mut NoEnds) {
        Ok((_, imported)) => imported,
        Err(e) => {
            let _ = std::fs::remove_file(state);
            return Err(e).with_context(|| file.display().to_string());
        }
    };
    let [connections, watches, transactions] = imported.left_out;
    println!(
        "{} nodes, {} domains; left out, as their clients are not here: {connections} connections, {watches} watches, \
         {transactions} transactions",
        imported.nodes, imported.domains
    );
    Ok(())
}
