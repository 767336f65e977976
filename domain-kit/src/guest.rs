//! What a guest without a kernel of its own does with its nodes in the store.

use std::time::{Duration, Instant};

use crate::xs::{XsClient, XsError, XsOps};

/// Waits until the toolstack has made this domain's nodes. It learns the domid by making the domain, so this process can be ahead of them. They
/// come all at once.
///
/// # Errors
/// The store's, if they are not there after `patience`.
pub fn wait_until_made(xs: &XsClient, domid: u16, patience: Duration) -> Result<(), XsError> {
    let deadline = Instant::now() + patience;
    loop {
        match xs.read(&format!("/local/domain/{domid}/vm")) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Hands the toolstack's wishes to `end`, in a thread of its own, as guests do: read, acknowledge by an empty value, act. `end` is told whether it
/// shall be a reboot, and says whether to go on watching.
///
/// # Errors
/// The store's; no thread could be made.
pub fn watch_shutdown(
    xs: &XsClient,
    mut end: impl FnMut(bool) -> bool + Send + 'static,
) -> Result<(), XsError> {
    const NODE: &str = "control/shutdown";
    let watches = xs.watch_set()?;
    watches.watch(NODE, "shutdown")?;
    let xs = xs.clone();
    std::thread::Builder::new().name("shutdown".into()).spawn(move || {
        loop {
            watches.next_timeout(Duration::from_secs(3600));
            let reboot = match xs.read_opt(NODE).ok().flatten().as_deref() {
                Some("poweroff" | "halt") => false,
                Some("reboot") => true,
                _ => continue,
            };
            if let Err(error) = xs.write(NODE, "") {
                tracing::warn!(%error, "the request to end could not be acknowledged");
            }
            if !end(reboot) {
                return;
            }
        }
    })?;
    Ok(())
}
