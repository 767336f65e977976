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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A store that knows READ, WRITE and WATCH (io/xs_wire.h), for one client.
    #[derive(Default)]
    struct Store {
        nodes: Mutex<BTreeMap<String, String>>,
        watches: Mutex<Vec<(String, String)>>,
        client: Mutex<Option<UnixStream>>,
    }

    impl Store {
        fn start(dir: &tempfile::TempDir) -> (Arc<Store>, XsClient) {
            let path = dir.path().join("store");
            let listener = UnixListener::bind(&path).unwrap();
            let store = Arc::new(Store::default());
            let server = Arc::clone(&store);
            std::thread::spawn(move || server.serve(listener.accept().unwrap().0));
            (store, XsClient::connect_socket(&path, SOON).unwrap())
        }

        fn say(&self, kind: u32, request: u32, payload: &[u8]) {
            let mut message = Vec::new();
            for word in [kind, request, 0, payload.len() as u32] {
                message.extend(word.to_le_bytes());
            }
            message.extend(payload);
            self.client.lock().unwrap().as_mut().unwrap().write_all(&message).unwrap();
        }

        fn serve(&self, mut stream: UnixStream) {
            *self.client.lock().unwrap() = Some(stream.try_clone().unwrap());
            let mut header = [0; 16];
            while stream.read_exact(&mut header).is_ok() {
                let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
                let mut payload = vec![0; word(12) as usize];
                stream.read_exact(&mut payload).unwrap();
                let text = String::from_utf8(payload).unwrap();
                let mut parts = text.split('\0');
                let path = parts.next().unwrap().to_owned();
                let rest = parts.next().unwrap_or_default().to_owned();
                match word(0) {
                    2 => match self.nodes.lock().unwrap().get(&path) {
                        Some(value) => self.say(2, word(4), value.as_bytes()),
                        None => self.say(16, word(4), b"ENOENT\0"),
                    },
                    4 => {
                        self.watches.lock().unwrap().push((path.clone(), rest.clone()));
                        self.say(4, word(4), b"OK\0");
                        self.say(15, 0, format!("{path}\0{rest}\0").as_bytes());
                    }
                    11 => {
                        self.nodes.lock().unwrap().insert(path, rest);
                        self.say(11, word(4), b"OK\0");
                    }
                    _ => self.say(16, word(4), b"EINVAL\0"),
                }
            }
        }

        /// The toolstack writes a node.
        fn set(&self, path: &str, value: &str) {
            self.nodes.lock().unwrap().insert(path.into(), value.into());
            let watches = self.watches.lock().unwrap();
            for (_, token) in watches.iter().filter(|(watched, _)| watched == path) {
                self.say(15, 0, format!("{path}\0{token}\0").as_bytes());
            }
        }

        fn get(&self, path: &str) -> Option<String> {
            self.nodes.lock().unwrap().get(path).cloned()
        }
    }

    #[test]
    fn the_nodes_are_waited_for_and_then_missed() {
        let dir = tempfile::tempdir().unwrap();
        let (store, xs) = Store::start(&dir);
        let error = wait_until_made(&xs, 7, Duration::from_millis(50)).unwrap_err();
        assert!(error.is_not_found(), "{error}");
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            store.set("/local/domain/7/vm", "/vm/x");
        });
        wait_until_made(&xs, 7, SOON).unwrap();
        later.join().unwrap();
        assert!(wait_until_made(&xs, 8, Duration::ZERO).is_err(), "another's are not its own");
    }

    #[test]
    fn wishes_are_acknowledged_before_they_are_acted_on() {
        const NODE: &str = "control/shutdown";
        let dir = tempfile::tempdir().unwrap();
        let (store, xs) = Store::start(&dir);
        let (told, wishes) = channel();
        let seen = Arc::clone(&store);
        watch_shutdown(&xs, move |reboot| {
            assert_eq!(seen.get(NODE).as_deref(), Some(""), "acknowledged");
            told.send(reboot).unwrap();
            // After the third there is nothing more to end.
            reboot || seen.get("again").is_none()
        })
        .unwrap();
        for (wish, reboot) in [("reboot", true), ("poweroff", false)] {
            store.set(NODE, wish);
            assert_eq!(wishes.recv_timeout(SOON), Ok(reboot), "{wish}");
        }
        // What is no wish to end is left for whoever understands it.
        for other in ["suspend", "", "nonsense"] {
            store.set(NODE, other);
        }
        assert!(wishes.recv_timeout(Duration::from_millis(100)).is_err());
        assert_eq!(store.get(NODE).as_deref(), Some("nonsense"));
        store.set("again", "no");
        store.set(NODE, "halt");
        assert_eq!(wishes.recv_timeout(SOON), Ok(false));
        assert!(matches!(wishes.recv_timeout(SOON), Err(std::sync::mpsc::RecvTimeoutError::Disconnected)));
    }
}
