//! TOML with errors of one line.

use serde::de::DeserializeOwned;

use super::ConfigError;

/// Longest file taken, bytes.
const MAX_FILE: usize = 256 * 1024;

/// Parses `text`; `source` is named in errors as `source:line:column: what`.
pub fn parse<T: DeserializeOwned>(text: &str, source: &str) -> Result<T, ConfigError> {
    if text.len() > MAX_FILE {
        return Err(ConfigError::new(format!("{source}: longer than {} KiB", MAX_FILE / 1024)));
    }
    toml::from_str(text).map_err(|e| {
        let mut what = e.message().split_whitespace().collect::<Vec<_>>().join(" ");
        if what.starts_with("missing field") {
            what.push_str("; add it");
        }
        match e.span() {
            Some(span) => {
                let (line, column) = position(text, span.start);
                ConfigError::new(format!("{source}:{line}:{column}: {what}"))
            }
            None => ConfigError::new(format!("{source}: {what}")),
        }
    })
}

/// Line and column, both from 1, of a byte offset.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = &text[..end];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    (line, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[expect(dead_code, reason = "only parsed")]
        a: u32,
    }

    #[test]
    fn errors_name_line_and_column() {
        let e = parse::<Sample>("a = 1\n  b = 2\n", "f.toml").unwrap_err().0;
        assert!(e.starts_with("f.toml:2:3: unknown field `b`"), "{e}");
        assert!(!e.contains('\n'));
        let e = parse::<Sample>("a = \"x\"", "f.toml").unwrap_err().0;
        assert!(e.starts_with("f.toml:1:5: "), "{e}");
        let e = parse::<Sample>("", "f.toml").unwrap_err().0;
        assert!(e.contains("missing field `a`"), "{e}");
        assert_eq!(position("é\nüx", 100), (2, 3));
    }
}
