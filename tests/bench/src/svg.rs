//! A report as a drawing: for each line the bars of ours and of all others, each line on a scale of its own, so that what differs in
//! it is seen.

use std::fmt::Write as _;

use crate::report::{Line, Report, figure};

/// Sizes in pixels.
const ROW: usize = 14;
const NAME: usize = 330;
const BARS: usize = 420;
const WIDTH: usize = NAME + BARS + 230;
const TOP: usize = 40;

/// The drawing. Lines without a figure are left out.
pub fn draw(report: &Report) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for line in report.lines.iter().filter(|l| l.ours.is_some()) {
        y = draw_line(&mut body, line, y);
    }
    let host = format!("{} x {}, Linux {}", report.host.cpus, report.host.cpu, report.host.kernel);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}{body}</svg>\n",
        y + ROW,
        text(8, 20, &format!("Medians, each line on its own scale. {host}"))
    )
}

fn draw_line(out: &mut String, line: &Line, top: usize) -> usize {
    let mut bars: Vec<(&str, f64, &str)> = vec![("ours", line.ours.unwrap_or(0.0), "#2b6cb0")];
    bars.extend(line.peers.iter().map(|(name, value)| (name.as_str(), *value, "#a0aec0")));
    if let Some(limit) = line.limit.filter(|l| !line.peers.values().any(|p| p == l)) {
        bars.push(("limit", limit, "#e2b35c"));
    }
    let most = bars.iter().map(|(_, value, _)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let verdict = match line.met {
        Some(true) => " (met)",
        Some(false) => " (missed)",
        None => "",
    };
    *out += &text(8, top + 10, &format!("{}, {}{verdict}", line.name, line.unit));
    let mut y = top;
    for (name, value, colour) in bars {
        let width = (value / most * BARS as f64).max(1.0).round();
        let _ = writeln!(
            out,
            "<rect x=\"{NAME}\" y=\"{}\" width=\"{width}\" height=\"{}\" fill=\"{colour}\"/>",
            y + 1,
            ROW - 3
        );
        *out += &text(NAME + width as usize + 6, y + 10, &format!("{} {name}", figure(value)));
        y += ROW;
    }
    y + ROW / 2
}

fn text(x: usize, y: usize, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x}\" y=\"{y}\">{words}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Goal, Host};
    use crate::stats::Series;

    #[test]
    fn bars_are_as_long_as_their_figures() {
        let series = |v: f64| Series::new(vec![v]);
        let line =
            Line::beside("a < b", "us", &series(50.0), ("x & y", &series(100.0)), Goal::RatioAtMost(1.0));
        let none = Line::missing("not there", "us", "", "why");
        let svg = draw(&Report { host: Host::here(), lines: vec![line, none] });
        assert!(svg.contains("a &lt; b, us (met)") && svg.contains("x &amp; y"), "{svg}");
        assert!(svg.contains("width=\"210\" height=\"11\" fill=\"#2b6cb0\""), "{svg}");
        assert!(svg.contains("width=\"420\" height=\"11\" fill=\"#a0aec0\""), "{svg}");
        assert!(!svg.contains("not there"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
