//! Lines of code of the hypervisor: hv-core, hv-vcpu and xen-abi, without tests, blank lines and comments.

use std::path::Path;

use anyhow::{Context, Result};

use crate::cases::{Settings, or_missing};
use crate::report::Line;

/// The goal: fewer than this.
const LIMIT: f64 = 12_000.0;
/// The crates that count.
const CRATES: [&str; 3] = ["hv-core", "hv-vcpu", "xen-abi"];

/// All lines of the case.
pub fn run(settings: &Settings) -> Vec<Line> {
    or_missing(&[("lines of code of the hypervisor", "lines", "< 12000 lines")], lines(settings))
}

fn lines(settings: &Settings) -> Result<Vec<Line>> {
    let mut total = 0;
    let mut parts = Vec::new();
    for name in CRATES {
        let count = count_folder(&settings.source.join(name).join("src"))?;
        parts.push(format!("{name} {count}"));
        total += count;
    }
    let note =
        format!("{}; without blank lines, comments, #[cfg(test)] items and test files", parts.join(", "));
    Ok(vec![Line::under("lines of code of the hypervisor", "lines", total as f64, LIMIT).note(note)])
}

fn count_folder(folder: &Path) -> Result<usize> {
    let mut total = 0;
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            // A folder `tests` holds test modules only.
            if name != "tests" {
                total += count_folder(&path)?;
            }
        } else if name.ends_with(".rs") && name != "tests.rs" {
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            total += count(&text);
        }
    }
    Ok(total)
}

/// Lines of code of a file.
///
/// Lines are counted after rustfmt, so a line that holds code beside a comment is one. A `#[cfg(test)]` item is left out up to the
/// brace or semicolon that ends it. Braces inside strings and comments do not count; a string over several lines does.
pub fn count(text: &str) -> usize {
    let mut lines = 0;
    let mut scan = Scan::default();
    // Depth of braces outside a test item, while in one.
    let mut test_item: Option<i64> = None;
    for line in text.lines() {
        let starts_test = test_item.is_none()
            && scan.in_code()
            && (line.trim_start().starts_with("#[cfg(test)]")
                || line.trim_start().starts_with("#[cfg(any(test"));
        let before = scan.depth;
        let code = scan.line(line);
        if starts_test {
            test_item = Some(before);
        }
        match test_item {
            Some(outside) => {
                let ends = code.trim_end();
                // The attribute's own line, and further attributes, end nothing.
                let attribute = ends.trim_start().starts_with("#[") && ends.ends_with(']');
                if !attribute
                    && scan.depth <= outside
                    && (ends.ends_with('}') || ends.ends_with(';') || ends.ends_with("},"))
                {
                    test_item = None;
                }
            }
            None if !code.trim().is_empty() => lines += 1,
            None => {}
        }
    }
    lines
}

/// Where in the grammar the scanner is.
#[derive(Default)]
struct Scan {
    depth: i64,
    comment: usize,
    /// Inside a string; `Some(n)` for a raw one that ends by a quote and n hashes.
    string: Option<Option<usize>>,
}

impl Scan {
    fn in_code(&self) -> bool {
        self.comment == 0 && self.string.is_none()
    }

    /// Takes one line and gives its code: comments are dropped, strings stand as they are.
    fn line(&mut self, line: &str) -> String {
        let chars: Vec<char> = line.chars().collect();
        let at = |i: usize| chars.get(i).copied().unwrap_or('\n');
        let mut code = String::new();
        let mut i = 0;
        while i < chars.len() {
            let c = chars[i];
            if self.comment > 0 {
                match (c, at(i + 1)) {
                    ('*', '/') => (self.comment, i) = (self.comment - 1, i + 1),
                    ('/', '*') => (self.comment, i) = (self.comment + 1, i + 1),
                    _ => {}
                }
            } else if let Some(raw) = self.string {
                code.push(c);
                match raw {
                    None if c == '\\' => i += 1,
                    None if c == '"' => self.string = None,
                    Some(hashes) if c == '"' && (1..=hashes).all(|n| at(i + n) == '#') => {
                        self.string = None;
                        i += hashes;
                    }
                    _ => {}
                }
            } else {
                match (c, at(i + 1)) {
                    ('/', '/') => break,
                    ('/', '*') => (self.comment, i) = (1, i + 1),
                    ('r', '"' | '#')
                        if !code.ends_with(|p: char| p.is_alphanumeric() && p != 'b' || p == '_') =>
                    {
                        let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
                        if at(i + 1 + hashes) == '"' {
                            self.string = Some(Some(hashes));
                            i += hashes + 1;
                        }
                        code.push(c);
                    }
                    ('"', _) => {
                        self.string = Some(None);
                        code.push(c);
                    }
                    // A character, not a lifetime.
                    ('\'', '\\') => {
                        code.push(c);
                        i += 2;
                        while i < chars.len() && chars[i] != '\'' {
                            i += 1;
                        }
                    }
                    ('\'', _) if at(i + 2) == '\'' => {
                        code.push(c);
                        i += 2;
                    }
                    _ => {
                        match c {
                            '{' => self.depth += 1,
                            '}' => self.depth -= 1,
                            _ => {}
                        }
                        code.push(c);
                    }
                }
            }
            i += 1;
        }
        code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_blanks_and_tests_do_not_count() {
        let text = r##"
//! Doc.

/* a /* nested */ comment
   over lines */
fn a() -> char { // remark
    let s = "// not a comment {";
    '{'
}
#[cfg(test)]
use std::fs;
const R: &str = r#"one
// two "#;
/// Doc.
#[cfg(test)]
#[expect(dead_code)]
mod tests {
    fn b() {
    }
}
#[cfg(test)]
mod other;
struct C;
"##;
        // fn a's four lines, R's two, C.
        assert_eq!(count(text), 7);
    }

    #[test]
    fn this_file_is_longer_than_its_code() {
        let text = include_str!("size.rs");
        let code = count(text);
        assert!(code > 100 && code < text.lines().count() - 40, "{code}");
    }
}
