//! The report as a folder to read: Markdown, charts, and the numbers as JSON.

use std::fmt::{self, Write};
use std::io;
use std::path::Path;

use super::chart::{Line, line_chart};
use super::paper::{FIGURE_3, TABLE_1, TABLE_2};
use super::{Method, PasskeyRow, PerplexityRow, Report};

/// Writes `report.md`, `report.json`, `perplexity.svg` and `passkey-*.svg` into a folder.
///
/// # Errors
/// Those of writing files.
pub fn write_report(report: &Report, command: &str, folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("report.json"), serde_json::to_string_pretty(report)? + "\n")?;
    std::fs::write(folder.join("report.md"), Markdown { report, command }.to_string())?;
    let perplexities = report.perplexity.iter().map(|row| row.perplexity);
    let lowest = perplexities.clone().fold(f64::INFINITY, f64::min);
    let highest = perplexities.fold(0.0, f64::max);
    if lowest.is_finite() {
        let y = lowest * 0.98..highest * 1.02;
        let lines = lines(&report.perplexity, |row| (row.label(), row.length_tokens, row.perplexity));
        let chart =
            line_chart(&folder.join("perplexity.svg"), "Perplexity by evaluation length", "perplexity", y, &lines);
        chart.map_err(io::Error::other)?;
    }
    for haystack in report.haystacks() {
        let rows = report.passkey.iter().filter(|row| row.haystack == haystack);
        let lines = lines(rows, |row| (row.label(), row.tokens, row.percent()));
        let path = folder.join(format!("passkey-{haystack}.svg"));
        let title = format!("Pass keys found among {haystack}");
        line_chart(&path, &title, "found, %", -2.0..104.0, &lines).map_err(io::Error::other)?;
    }
    Ok(())
}

/// One line per label, in the order in which labels first appear.
fn lines<'a, R: 'a>(rows: impl IntoIterator<Item = &'a R>, point: impl Fn(&R) -> (String, usize, f64)) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let (label, x, y) = point(row);
        let at = lines.iter().position(|line| line.label == label).unwrap_or_else(|| {
            lines.push(Line { label, points: Vec::new() });
            lines.len() - 1
        });
        lines[at].points.push((x as f64, y));
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

impl Report {
    /// Each once, in order.
    fn haystacks(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.passkey.iter().map(|row| row.haystack.as_str()).collect();
        names.dedup();
        names
    }
}

impl Method {
    fn words(self) -> &'static str {
        match self {
            Method::Memory => "memory",
            Method::RecentBlocks => "last k blocks, no retrieval",
            Method::LocalOnly => "local only",
            Method::Full => "full attention",
            Method::PlainTrained => "plain twin, full attention",
            Method::PlainWindow => "plain twin, window",
            Method::Recurrent => "recurrent cache",
        }
    }
}

impl PerplexityRow {
    fn label(&self) -> String {
        let kept = if self.method == Method::Memory && self.blocks.is_some() { ", newest half" } else { "" };
        match self.top_k {
            Some(k) => format!("{}, k = {k}{kept}", self.method.words()),
            None => self.method.words().into(),
        }
    }
}

impl PasskeyRow {
    fn label(&self) -> String {
        match self.top_k {
            Some(k) => format!("{}, k = {k}", self.method.words()),
            None => self.method.words().into(),
        }
    }

    fn percent(&self) -> f64 {
        100.0 * self.correct as f64 / self.samples.max(1) as f64
    }
}

/// `report.md`.
struct Markdown<'a> {
    report: &'a Report,
    command: &'a str,
}

impl fmt::Display for Markdown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.report;
        writeln!(f, "# Evaluation of {} as in the Landmark Attention paper\n", report.model)?;
        writeln!(f, "Made by\n\n```sh\n{}\n```\n", self.command)?;
        writeln!(
            f,
            "Blocks of {} tokens{}. The model was trained with contexts of up to {} tokens. Perplexity is measured on {} tokens of \
             held-out text. Figures of the paper (Mohtashami and Jaggi 2023) come from larger models on PG-19: compare differences \
             between rows, not levels.\n",
            report.block_tokens,
            if report.landmarks { ", landmark included" } else { ", all token keys indexed" },
            report.context_tokens,
            report.text_tokens
        )?;
        self.perplexity(f)?;
        self.granularity(f)?;
        self.repetition(f)?;
        self.passkey(f)
    }
}

/// A number, or a dash.
fn or_dash<N: fmt::Display>(number: Option<N>) -> String {
    number.map_or("-".into(), |number| number.to_string())
}

impl Markdown<'_> {
    fn perplexity(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Perplexity by evaluation length (the paper's Table 1)\n\n![perplexity](perplexity.svg)\n")?;
        writeln!(f, "| length | method | k | blocks kept | attends to | perplexity | tokens/s |")?;
        writeln!(f, "|---:|---|---:|---:|---:|---:|---:|")?;
        for row in &self.report.perplexity {
            writeln!(
                f,
                "| {} | {} | {} | {} | {} | {:.3} | {:.0} |",
                row.length_tokens,
                row.method.words(),
                or_dash(row.top_k),
                row.blocks
                    .map_or_else(|| if row.top_k.is_some() { "all".into() } else { "-".into() }, |b| b.to_string()),
                row.attention_tokens,
                row.perplexity,
                row.tokens_per_s
            )?;
        }
        writeln!(f, "\nThe paper, on PG-19:\n\n| length | method | k | blocks kept | attends to | perplexity |")?;
        writeln!(f, "|---:|---|---:|---:|---:|---:|")?;
        for row in &TABLE_1 {
            let (k, blocks) = (or_dash(row.top_k), or_dash(row.blocks));
            let (length, method) = (row.length_tokens, row.method);
            writeln!(f, "| {length} | {method} | {k} | {blocks} | {} | {:.2} |", row.attention_tokens, row.perplexity)?;
        }
        f.write_char('\n')
    }

    fn granularity(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Who chooses together (the paper's Table 2)\n")?;
        writeln!(f, "| granularity | length | k | choices per chunk and layer | perplexity | tokens/s | the paper |")?;
        writeln!(f, "|---|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.report.granularity {
            let same = |paper: &&(&str, usize, u32, f64)| {
                (paper.0, paper.1, paper.2) == (row.granularity.as_str(), row.length_tokens, row.top_k)
            };
            let paper = TABLE_2.iter().find(same).map(|paper| format!("{:.2}", paper.3));
            writeln!(
                f,
                "| {} | {} | {} | {} | {:.3} | {:.0} | {} |",
                row.granularity,
                row.length_tokens,
                row.top_k,
                row.choices,
                row.perplexity,
                row.tokens_per_s,
                or_dash(paper)
            )?;
        }
        f.write_char('\n')
    }

    fn repetition(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Does far text help? A passage read again\n")?;
        writeln!(
            f,
            "A passage, other text, and the passage again: perplexity of the second reading. Only what is far away can help.\n"
        )?;
        writeln!(f, "| tokens between | method | k | texts | perplexity |\n|---:|---|---:|---:|---:|")?;
        for row in &self.report.repetition {
            let (k, method) = (or_dash(row.top_k), row.method.words());
            writeln!(f, "| {} | {method} | {k} | {} | {:.3} |", row.gap_tokens, row.texts, row.perplexity)?;
        }
        f.write_char('\n')
    }

    fn passkey(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## Pass keys by length (the paper's Figure 3)\n")?;
        for haystack in self.report.haystacks() {
            writeln!(f, "![pass keys among {haystack}](passkey-{haystack}.svg)\n")?;
        }
        writeln!(f, "| among | method | tokens | k | found | bytes/token | encode tokens/s | first token |")?;
        writeln!(f, "|---|---|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.report.passkey {
            writeln!(
                f,
                "| {} | {} | {} | {} | {} of {} | {} | {} | {:.3} s |",
                row.haystack,
                row.method.words(),
                row.tokens,
                or_dash(row.top_k),
                row.correct,
                row.samples,
                or_dash(row.bytes_per_token.map(|bytes| format!("{bytes:.0}"))),
                or_dash(row.encode_tokens_per_s.map(|speed| format!("{speed:.0}"))),
                row.first_token_s
            )?;
        }
        writeln!(f, "\n{}{}.", FIGURE_3[..1].to_uppercase(), &FIGURE_3[1..])
    }
}
