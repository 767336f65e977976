//! A guest's console, whoever runs the guest.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A program with a guest's console on its standard input and output. Ended when dropped.
pub struct Terminal {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    /// Starts `command`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Result<Terminal> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let input = child.stdin.take().context("no standard input")?;
        let (sender, output) = channel();
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(child.stdout.take().context("no standard output")?),
            Box::new(child.stderr.take().context("no standard error")?),
        ];
        for mut stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if sender.send(buffer[..n].to_vec()).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Terminal { child, input, output, text: String::new() })
    }

    /// Waits until `mark` was seen; gives the text up to its end. What came after it stays for the next call.
    ///
    /// # Errors
    /// It did not come in time, or the program ended; with the last lines.
    pub fn expect(&mut self, mark: &str, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let end = loop {
            if let Some(at) = self.text.find(mark) {
                break at + mark.len();
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(why) => {
                    let why = match why {
                        RecvTimeoutError::Timeout => "did not come in time",
                        RecvTimeoutError::Disconnected => "did not come before the end",
                    };
                    let tail: Vec<&str> = self.text.lines().rev().take(8).collect();
                    let tail: Vec<&str> = tail.into_iter().rev().collect();
                    bail!("{mark:?} on the guest's console {why}:\n{}", tail.join("\n"));
                }
            }
        };
        let rest = self.text.split_off(end);
        Ok(std::mem::replace(&mut self.text, rest))
    }

    /// Types a line.
    ///
    /// # Errors
    /// The console is gone.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.input.write_all(line.as_bytes())?;
        self.input.write_all(b"\n")?;
        Ok(self.input.flush()?)
    }

    /// Runs a command in the guest's shell and gives what it prints.
    ///
    /// # Errors
    /// As [`Terminal::expect`].
    pub fn run(&mut self, command: &str, timeout: Duration) -> Result<String> {
        self.text.clear();
        // The mark is put together by the shell, so that the echo of the line is not taken for it.
        self.type_line(&format!("{command}; echo do''ne"))?;
        self.expect("done", timeout)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_answers() {
        let mut terminal = Terminal::start(Command::new("sh")).unwrap();
        let said = terminal.run("echo $((6 * 7))", Duration::from_secs(10)).unwrap();
        assert!(said.contains("42"), "{said}");
        let error = terminal.expect("nothing", Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("in time"));
    }
}
