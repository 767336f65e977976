//! Lines for the outside: `BH: {json}` on a guest's console, each written whole. What a guest is decides where they go.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Where a guest's lines go.
pub trait Report: Send + Sync {
    /// Writes one line, its end included, whole. May wait as long as nobody takes it; nothing else waits with it but other reports.
    fn write(&self, line: &str);

    /// Writes one line with the time of day and since boot.
    fn line(&self, json: &Json) {
        // A leading newline would end a half line of the kernel's, but cost every reader an empty one; the reader looks for the
        // marker anywhere in a line instead.
        self.write(&format!(
            "BH: {{{},\"t_ms\":{},\"mono_ms\":{}}}\n",
            json.text,
            clock_ms(ClockId::CLOCK_REALTIME),
            clock_ms(ClockId::CLOCK_MONOTONIC)
        ));
    }

    /// Reports that something of the guest's own set-up failed.
    fn error(&self, part: &str, what: &dyn Display) {
        self.line(&Json::new("error").text("part", part).text("what", &what.to_string()));
    }
}

fn clock_ms(clock: ClockId) -> String {
    clock_gettime(clock).map_or_else(
        |_| "null".to_owned(),
        |t| format!("{}.{:03}", t.tv_sec() * 1000 + t.tv_nsec() / 1_000_000, t.tv_nsec() / 1000 % 1000),
    )
}

/// The members of a JSON object under construction.
#[derive(Clone, Debug)]
pub struct Json {
    text: String,
}

impl Json {
    /// An object whose `ev` says what happened.
    pub fn new(event: &str) -> Self {
        Self { text: String::new() }.text("ev", event)
    }

    /// An object to be nested.
    pub fn part() -> Self {
        Self { text: String::new() }
    }

    fn key(mut self, key: &str) -> Self {
        if !self.text.is_empty() {
            self.text.push(',');
        }
        write!(self.text, "\"{key}\":").ok();
        self
    }

    /// Adds a string.
    pub fn text(self, key: &str, value: &str) -> Self {
        let mut json = self.key(key);
        json.text.push('"');
        for c in value.chars() {
            match c {
                '"' | '\\' => {
                    json.text.push('\\');
                    json.text.push(c);
                }
                c if c < ' ' || c == '\x7f' => {
                    write!(json.text, "\\u{:04x}", u32::from(c)).ok();
                }
                c => json.text.push(c),
            }
        }
        json.text.push('"');
        json
    }

    /// Adds a number.
    pub fn number(self, key: &str, value: f64) -> Self {
        let mut json = self.key(key);
        write!(json.text, "{value}").ok();
        json
    }

    /// Adds a whole number.
    pub fn count(self, key: &str, value: u64) -> Self {
        let mut json = self.key(key);
        write!(json.text, "{value}").ok();
        json
    }

    /// Adds a duration in ms with three decimals.
    pub fn millis(self, key: &str, value: Duration) -> Self {
        let mut json = self.key(key);
        write!(json.text, "{:.3}", value.as_secs_f64() * 1000.0).ok();
        json
    }

    /// Adds true or false.
    pub fn flag(self, key: &str, value: bool) -> Self {
        let mut json = self.key(key);
        write!(json.text, "{value}").ok();
        json
    }

    /// Adds a string, or null.
    pub fn maybe(self, key: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.text(key, value),
            None => {
                let mut json = self.key(key);
                json.text.push_str("null");
                json
            }
        }
    }

    /// Adds a nested object.
    pub fn object(self, key: &str, value: &Json) -> Self {
        let mut json = self.key(key);
        write!(json.text, "{{{}}}", value.text).ok();
        json
    }
}

#[cfg(test)]
mod tests {
    use super::Json;

    #[test]
    fn text_is_escaped() {
        let json = Json::new("x").text("a", "q\"b\\c\nd").count("n", 3);
        assert_eq!(json.text, r#""ev":"x","a":"q\"b\\c\u000ad","n":3"#);
    }
}
