//! What is printed: answers on standard output, as human-readable tables or as JSON; everything else on
//! standard error.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use comfy_table::{Attribute, Cell, CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::error::{CliError, Exit};
use super::global::Global;

pub(super) use landmarkdb_lab::bench::{count, plural, size};

/// How comfy-table begins and ends bold letters.
const BOLD: &str = "\x1b[1m";
const NOT_BOLD: &str = "\x1b[0m";

/// Columns below which a table is not fitted to the terminal.
const NARROWEST_TERMINAL: u16 = 40;

/// What a command answers. Its fields are the `--json` of the command: names are stable, sizes carry their unit.
pub(super) trait Report: Serialize {
    /// The same, human-readable.
    fn human(&self, to: &mut dyn Write) -> io::Result<()>;
}

/// The human-readable form of a report.
pub(super) fn human(report: &impl Report) -> io::Result<String> {
    let mut text = Vec::new();
    report.human(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Where results, progress and questions go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    json: bool,
    quiet: bool,
}

/// The `--json` form of an error, on standard error.
#[derive(Serialize)]
struct ErrorReport<'a> {
    error: ErrorBody<'a>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    /// One word per exit code: see docs/cli.md.
    kind: &'a str,
    exit_code: u8,
    /// Human-readable.
    message: &'a str,
}

impl Output {
    pub(super) fn new(global: &Global) -> Self {
        Output { json: global.json, quiet: global.quiet }
    }

    /// For errors found before the command line could be read.
    pub(super) fn json() -> Self {
        Output { json: true, quiet: true }
    }

    /// Prints an answer: one line of JSON, or human-readable.
    pub(super) fn print(&self, report: &impl Report) -> Result<(), CliError> {
        let mut to = io::BufWriter::new(io::stdout().lock());
        let written = if self.json {
            write_json(&mut to, report)
        } else {
            human(report).and_then(|text| to.write_all(shown(&text).as_bytes()))
        };
        written.and_then(|()| to.flush()).map_err(|source| CliError::Io { what: "standard output", source })
    }

    /// Says what went wrong. A standard error that is closed leaves the exit code to tell.
    pub(super) fn error(&self, message: &str, exit: Exit) {
        if self.json {
            let body = ErrorBody { kind: exit.word(), exit_code: exit as u8, message };
            let _ = write_json(&mut io::stderr(), &ErrorReport { error: body });
        } else {
            let _ = writeln!(io::stderr(), "error: {}", shown(message));
        }
    }

    /// Prints a progress line on standard output; not with `--json`.
    pub(super) fn say(&self, line: &str) {
        if !self.quiet && !self.json {
            let _ = writeln!(io::stdout(), "{}", shown(line));
        }
    }

    /// Says how far a long command is, on standard error.
    pub(super) fn progress(&self, line: &str) {
        if !self.quiet && !self.json {
            let _ = writeln!(io::stderr(), "{}", shown(line));
        }
    }

    /// The same without bars and stories, for a command that runs others.
    pub(super) fn silenced(self) -> Self {
        Output { quiet: true, ..self }
    }

    /// Prints the next piece of a growing text; with `--json` it comes whole.
    pub(super) fn stream(&self, piece: &str) {
        if !self.json {
            let _ = write!(io::stdout(), "{}", shown(piece)).and_then(|()| io::stdout().flush());
        }
    }

    /// Ends what [`Output::stream`] printed.
    pub(super) fn stream_end(&self) {
        self.stream("\n");
    }

    /// Something turns while there is nothing to count.
    pub(super) fn spinner(&self, what: &str) -> ProgressBar {
        let spinner = self.bar(what, ProgressStyle::default_spinner());
        spinner.enable_steady_tick(std::time::Duration::from_millis(100));
        spinner
    }

    /// Asks on standard error and reads one line. `None` without a terminal.
    pub(super) fn confirm(&self, question: &str) -> Option<bool> {
        if self.json || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return None;
        }
        let mut answer = String::new();
        write!(io::stderr(), "{} [y/N] ", shown(question)).ok()?;
        io::stdin().read_line(&mut answer).ok()?;
        Some(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
    }

    /// A bar that counts bytes, on standard error; hidden with `--quiet`, with `--json`, and where no terminal is.
    pub(super) fn bytes_bar(&self, what: &str) -> ProgressBar {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {binary_bytes} of {binary_total_bytes} {eta:>4}");
        self.bar(what, style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    }

    /// A bar that counts percents of one part of the work after the other.
    pub(super) fn share_bar(&self) -> ProgressBar {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos:>3} %");
        let bar = self.bar("", style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_length(100);
        bar
    }

    /// A bar of the given style, hidden like every bar here.
    pub(super) fn bar(&self, what: &str, style: ProgressStyle) -> ProgressBar {
        let target = if self.quiet || self.json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        ProgressBar::with_draw_target(None, target).with_style(style).with_message(shown_line(what))
    }
}

/// One line of JSON. JSON leaves the controls behind ASCII as they are, of which U+009B begins an escape sequence too.
fn write_json(to: &mut dyn Write, report: &impl Serialize) -> io::Result<()> {
    struct Escaped;
    impl serde_json::ser::Formatter for Escaped {
        fn write_string_fragment<W: Write + ?Sized>(&mut self, to: &mut W, fragment: &str) -> io::Result<()> {
            for part in fragment.split_inclusive(is_control) {
                let control = part.chars().next_back().filter(|&last| is_control(last));
                to.write_all(&part.as_bytes()[..part.len() - control.map_or(0, char::len_utf8)])?;
                for unit in control.iter().flat_map(|control| control.encode_utf16(&mut [0; 2]).to_vec()) {
                    write!(to, "\\u{unit:04x}")?;
                }
            }
            Ok(())
        }
    }
    let mut line = Vec::new();
    report.serialize(&mut serde_json::Serializer::with_formatter(&mut line, Escaped)).map_err(io::Error::from)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Characters that a terminal obeys instead of showing (control characters, changes of direction), and invisible ones, which
/// make two names look alike. Joiners are kept: some scripts need them.
fn is_control(letter: char) -> bool {
    let turns =
        matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let shows_nothing = matches!(
        letter,
        '\u{ad}'
            | '\u{34f}'
            | '\u{115f}'
            | '\u{1160}'
            | '\u{17b4}'
            | '\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{e0000}'..='\u{e007f}'
    );
    letter.is_control() || turns || shows_nothing
}

/// A text with line ends and tabs, everything else that [`is_control`] as it is written in source code; our own bold letters
/// stay.
fn shown(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|letter| is_control(letter) && !matches!(letter, '\n' | '\t')) {
        return Cow::Borrowed(text);
    }
    let plain = |text: &str| escaped(text, &['\n', '\t']);
    if !styled() {
        return Cow::Owned(plain(text));
    }
    let parts = text.split(BOLD).map(|part| part.split(NOT_BOLD).map(plain).collect::<Vec<_>>().join(NOT_BOLD));
    Cow::Owned(parts.collect::<Vec<_>>().join(BOLD))
}

/// The same on one line: for names, and cells of tables.
pub(super) fn shown_line(text: &str) -> String {
    escaped(text, &[])
}

fn escaped(text: &str, kept: &[char]) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match is_control(letter) && !kept.contains(&letter) {
            true => shown.extend(letter.escape_default()),
            false => shown.push(letter),
        }
    }
    shown
}

/// Rows of a table, whose cells are lines.
pub(super) struct Rows(Table);

impl Rows {
    pub(super) fn add_row<C: Into<String>>(&mut self, cells: impl IntoIterator<Item = C>) -> &mut Self {
        self.0.add_row(cells.into_iter().map(|cell| shown_line(&cell.into())));
        self
    }
}

/// A table without lines, so that columns can be cut out of it. A heading that ends in `>` aligns its column right.
pub(super) fn table<const COLUMNS: usize>(headings: [&str; COLUMNS]) -> Rows {
    let mut table = columns(headings, styled());
    // A terminal that tells no width, or one too narrow for columns, gets lines as long as they are.
    if table.width().is_some_and(|columns| columns >= NARROWEST_TERMINAL) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    Rows(table)
}

/// The same in any terminal and in a file, for answers that a page quotes.
pub(super) fn plain_table<const COLUMNS: usize>(headings: [&str; COLUMNS]) -> Rows {
    Rows(columns(headings, false))
}

fn columns<const COLUMNS: usize>(headings: [&str; COLUMNS], bold: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headings.map(|heading| {
        let cell = Cell::new(heading.trim_end_matches('>'));
        if bold { cell.add_attribute(Attribute::Bold) } else { cell }
    }));
    for (column, heading) in table.column_iter_mut().zip(headings) {
        column.set_padding((0, 2));
        if heading.ends_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Writes a table and a line end.
pub(super) fn write_table(to: &mut dyn Write, rows: &Rows) -> io::Result<()> {
    writeln!(to, "{}", rows.0.trim_fmt())
}

/// Writes names and values one a line, values below each other.
pub(super) fn write_facts(to: &mut dyn Write, facts: &[(&str, String)]) -> io::Result<()> {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    facts.iter().try_for_each(|(name, value)| writeln!(to, "{name:width$}  {}", shown_line(value)))
}

/// The first `chars_max` characters of a source text on one line. The text may begin or end inside a character.
pub(super) fn excerpt(text: &[u8], chars_max: usize) -> String {
    let text = String::from_utf8_lossy(text);
    let words = text.split_whitespace().map(|word| word.trim_matches(char::REPLACEMENT_CHARACTER));
    let line = words.collect::<Vec<_>>().join(" ").replace(is_control, " ");
    if line.chars().count() <= chars_max {
        return line;
    }
    let kept: String = line.chars().take(chars_max.saturating_sub(1)).collect();
    format!("{}…", kept.trim_end())
}

fn styled() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A value shown by its `Display`, for JSON fields whose words are the ones typed on the command line.
pub(super) fn word(value: impl Display) -> String {
    value.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_one_line_of_whole_characters() {
        assert_eq!(excerpt(b"one\n\n two\tthree", 60), "one two three");
        assert_eq!(excerpt(b"one two three", 8), "one two…");
        assert_eq!(excerpt("né à".as_bytes(), 3), "né…");
        assert_eq!(excerpt(&"é-end".as_bytes()[1..], 60), "-end", "begins inside a character");
        assert_eq!(excerpt(b"a\x1b[31mb", 60), "a [31mb", "no escape reaches the terminal");
        assert_eq!(excerpt(b"", 60), "");
    }

    /// A log that was encoded coloured the terminal of whoever asked about it, and so did a model's name.
    #[test]
    fn no_control_character_reaches_a_terminal() {
        let text = "a\u{1b}[31mb\u{9b}2Jc\u{7f}\u{202e}d\ne\tf\r";
        let invisible = format!("{text}\u{e0041}");
        assert_eq!(shown(text), "a\\u{1b}[31mb\\u{9b}2Jc\\u{7f}\\u{202e}d\ne\tf\\r");
        assert_eq!(shown_line("a\nb"), "a\\nb");
        assert_eq!(shown_line("em\u{200b}ma\u{e0041}\u{feff}"), "em\\u{200b}ma\\u{e0041}\\u{feff}");
        assert_eq!(shown_line("\u{1f469}\u{200d}\u{1f680}"), "\u{1f469}\u{200d}\u{1f680}");
        assert_eq!(shown("plain é"), "plain é");
        let mut json = Vec::new();
        write_json(&mut json, &invisible).unwrap();
        let line = std::str::from_utf8(&json).unwrap().trim_end();
        assert!(!line.contains(is_control), "{line:?}");
        assert_eq!(serde_json::from_str::<String>(line).unwrap(), invisible);

        let mut table = table(["name"]);
        table.add_row(["\u{1b}]0;title\u{7}\nforged row"]);
        let mut rows = Vec::new();
        write_table(&mut rows, &table).unwrap();
        assert_eq!(String::from_utf8(rows).unwrap(), "name\n\\u{1b}]0;title\\u{7}\\nforged row\n");
    }

    #[test]
    fn a_table_is_plain_columns() {
        let mut table = table(["name", "tokens>"]);
        table.add_row(["emma", "7"]).add_row(["persuasion", "123,456"]);
        let mut text = Vec::new();
        write_table(&mut text, &table).unwrap();
        let expected = "name         tokens\nemma              7\npersuasion  123,456\n";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
