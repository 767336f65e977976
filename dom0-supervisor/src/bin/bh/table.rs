//! Aligned columns.

use std::io::{self, IsTerminal, Write};

/// How a column is aligned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}
use Align::{Left, Right};

/// Rows under a headline.
pub struct Table {
    head: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these columns; a name that begins with `>` is aligned right.
    pub fn new(columns: &[&'static str]) -> Table {
        let head = columns.iter().map(|c| match c.strip_prefix('>') {
            Some(name) => (name, Right),
            None => (*c, Left),
        });
        Table { head: head.collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// As text.
    pub fn render(&self, bold_head: bool) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|i| {
                let cells = self.rows.iter().map(|r| r[i].chars().count());
                cells.chain([self.head[i].0.len()]).max().unwrap_or(0)
            })
            .collect();
        let line = |cells: &[&str]| {
            let mut out = String::new();
            for (i, cell) in cells.iter().enumerate() {
                let pad = " ".repeat(widths[i] - cell.chars().count());
                match self.head[i].1 {
                    Left => out.extend([cell, pad.as_str()]),
                    Right => out.extend([pad.as_str(), cell]),
                }
                out.push_str("  ");
            }
            out.truncate(out.trim_end().len());
            out
        };
        let head = line(&self.head.iter().map(|h| h.0).collect::<Vec<_>>());
        let mut out = if bold_head { format!("\x1b[1m{head}\x1b[0m\n") } else { format!("{head}\n") };
        for row in &self.rows {
            out.push_str(&line(&row.iter().map(String::as_str).collect::<Vec<_>>()));
            out.push('\n');
        }
        out
    }

    /// To standard output; the headline is bold on a terminal.
    pub fn print(&self) -> io::Result<()> {
        let bold = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        io::stdout().lock().write_all(self.render(bold).as_bytes())
    }
}

/// `-` for nothing.
pub fn or_dash(text: impl ToString) -> String {
    let text = text.to_string();
    if text.is_empty() || text == "0" { "-".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let mut table = Table::new(&["NAME", ">ID", "STATE"]);
        table.row(vec!["a-long-name".into(), "7".into(), "running".into()]);
        table.row(vec!["ü".into(), "123".into(), String::new()]);
        assert_eq!(
            table.render(false),
            "NAME          ID  STATE\na-long-name    7  running\nü            123\n"
        );
        assert!(table.render(true).starts_with("\x1b[1mNAME"));
    }
}
