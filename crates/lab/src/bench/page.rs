//! The page: what every command printed, and sentences that are derived from its figures.

use std::collections::BTreeSet;

use serde::Serialize;

use super::decode::DecodeReport;
use super::first_token::FirstToken;
use super::lookup::{LookupReport, LookupResult};
use super::machine::Machine;
use super::payload::PayloadReport;
use super::peers::{Peer, PeerResult, RECALL};
use super::readable::{count, plural, size};

const ABOUT: &str = "\
Written by `landmarkdb bench report`: change the benchmarks, not this page. Every table is the output of the command above it, other
programs in the same minute; times are medians unless a heading says P99. Machines are shared and memory gives more at one minute
than at another, so the read bandwidth is measured between the lookups of every row: take ratios. [performance.md](performance.md)
tells why some of the figures are what they are, and what was tried.
";

const QUICK: &str = "\
**Measured with `--quick`: tiny sizes, to see that everything works. The figures mean nothing.**
";

/// What was measured on one machine on one day.
#[derive(Debug, Serialize)]
pub struct Benchmarks {
    /// UTC, `2025-01-31`.
    pub date: String,
    /// With sizes so tiny that the figures mean nothing.
    pub quick: bool,
    /// What they were measured on.
    pub machine: Machine,
    /// In the order of the page.
    pub sections: Vec<Section>,
}

/// One benchmark, measured.
#[derive(Debug, Serialize)]
pub struct Section {
    /// The heading.
    pub title: &'static str,
    /// What is asked, true on any machine and for any size.
    #[serde(skip)]
    pub about: &'static str,
    /// The last one printed the figures.
    pub commands: Vec<String>,
    /// What it printed.
    #[serde(skip)]
    pub printed: String,
    /// What the last command measured.
    pub figures: Figures,
    /// Operations per second that the matrix kernel reaches in the caches, where products are what counts.
    pub peak_flops: Option<f64>,
}

/// What a benchmark measured.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Figures {
    /// Of [`lookup`](super::lookup()).
    Lookup(LookupReport),
    /// Of [`decode`](super::decode()).
    Decode(DecodeReport),
    /// Of [`payload`](super::payload()).
    Payload(PayloadReport),
}

/// The page in Markdown.
pub fn page(benchmarks: &Benchmarks) -> String {
    let quick = if benchmarks.quick { format!("{QUICK}\n") } else { String::new() };
    let facts = facts(benchmarks).into_iter().map(|(name, value)| format!("| {name} | {value} |\n"));
    let facts: String = facts.collect();
    let sections: String = benchmarks.sections.iter().map(section).collect();
    format!("# Benchmarks\n\n{ABOUT}\n{quick}| | |\n|---|---|\n{facts}{sections}")
}

fn facts(benchmarks: &Benchmarks) -> Vec<(&'static str, String)> {
    let machine = &benchmarks.machine;
    let peers: BTreeSet<String> = benchmarks.sections.iter().flat_map(peers_of).collect();
    let peers: Vec<String> =
        peers.into_iter().chain([machine.python.clone()]).filter(|peer| !peer.is_empty()).collect();
    vec![
        ("date", benchmarks.date.clone()),
        ("processor", format!("{}, {}", machine.processor, plural(machine.threads as u64, "thread"))),
        ("instructions", machine.instructions.join(", ")),
        ("memory", size(machine.memory_bytes)),
        ("system", machine.system.clone()),
        ("landmarkdb", format!("{}, built by {}", machine.landmarkdb, machine.rustc)),
        ("others", peers.join(", ")),
    ]
}

/// `faiss-flat 1.15.1`, of every peer that was measured.
fn peers_of(section: &Section) -> Vec<String> {
    match &section.figures {
        Figures::Lookup(report) => measured(&report.peers),
        Figures::Payload(report) => measured(&report.peers),
        Figures::Decode(report) => measured(&report.peers),
    }
}

fn measured<F>(peers: &[Peer<F>]) -> Vec<String> {
    let measured = peers.iter().filter(|peer| peer.skipped.is_none());
    measured.map(|peer| format!("{} {}", peer.peer, peer.version)).collect()
}

fn section(section: &Section) -> String {
    let Section { title, about, commands, printed, figures, peak_flops } = section;
    let commands: String = commands.iter().map(|command| format!("$ {command}\n")).collect();
    let sentences = match figures {
        Figures::Lookup(report) => lookup(report, *peak_flops),
        Figures::Payload(report) => payload(report),
        Figures::Decode(report) => decode(report),
    };
    let sentences: String = sentences.iter().map(|sentence| format!("- {sentence}\n")).collect();
    format!("\n## {title}\n\n{about}\n\n```console\n{commands}{printed}```\n\n{sentences}")
}

/// `1.25`, `4.8`, `25`: three digits at most.
fn ratio(ratio: f64) -> String {
    match ratio {
        ratio if ratio < 2.0 => format!("{ratio:.2}"),
        ratio if ratio < 20.0 => format!("{ratio:.1}"),
        ratio => format!("{ratio:.0}"),
    }
}

impl LookupResult {
    /// `f16 keys, flat`
    fn name(&self) -> String {
        format!("{} keys, {}", self.key_dtype, self.engine)
    }

    fn is_same_but_for_the_way(&self, other: &LookupResult) -> bool {
        (self.what, &self.key_dtype, &self.engine) == (other.what, &other.key_dtype, &other.engine)
    }
}

fn lookup(report: &LookupReport, peak_flops: Option<f64>) -> Vec<String> {
    let (in_process, remote): (Vec<_>, Vec<_>) = report.results.iter().partition(|result| result.way == "in-process");
    let ours: Vec<_> = in_process.iter().copied().filter(|result| result.what == "lookup").collect();
    let mut sentences: Vec<String> = ours.iter().filter_map(|result| floor(report, result, peak_flops)).collect();
    for result in ours.iter().filter(|result| result.recall < 1.0) {
        let found = 100.0 * result.recall;
        sentences.push(format!("{}: finds {found:.2} % of the blocks that f32 keys choose.", result.name()));
    }
    for attend in in_process.iter().filter(|result| result.what == "attend") {
        let of = ours.iter().find(|of| (&of.key_dtype, &of.engine) == (&attend.key_dtype, &attend.engine));
        if let Some(of) = of {
            let more_us = attend.p50_us - of.p50_us;
            sentences.push(format!("{}: attending to the chosen blocks takes {more_us:.0} us more.", attend.name()));
        }
    }
    let more = remote.iter().filter_map(|result| {
        Some(result.p50_us - in_process.iter().find(|of| of.is_same_but_for_the_way(result))?.p50_us)
    });
    if let Some((least, most)) = extremes(more) {
        sentences.push(format!("Through a service on the same machine a call takes {least:.0} to {most:.0} us more."));
    }
    let ours: Vec<_> = ours.iter().map(|result| (result.name(), result.p50_us)).collect();
    sentences.extend(searches(&report.peers, &ours));
    sentences
}

/// A lookup beside what the machine could do at best; nothing where an index says what is compared.
fn floor(report: &LookupReport, result: &LookupResult, peak_flops: Option<f64>) -> Option<String> {
    let scanned_bytes = result.scanned_bytes?;
    let name = result.name();
    if let Some(peak) = peak_flops {
        let flops = 2.0 * report.multiply_adds as f64 / result.p50_us * 1e6;
        return Some(format!(
            "{name}: {:.0} GFLOP/s, {:.0} % of the {:.0} that the matrix kernel reaches in the caches of {} threads.",
            flops / 1e9,
            100.0 * flops / peak,
            peak / 1e9,
            report.threads
        ));
    }
    let floor_us = scanned_bytes as f64 / result.read_bandwidth_bytes_per_s * 1e6;
    Some(format!(
        "{name}: reading {} once takes {floor_us:.0} us at {}/s, a lookup {} times that.",
        size(scanned_bytes),
        size(result.read_bandwidth_bytes_per_s as u64),
        ratio(result.p50_us / floor_us)
    ))
}

fn extremes(values: impl Iterator<Item = f64> + Clone) -> Option<(f64, f64)> {
    let (least, most) = (values.clone().reduce(f64::min)?, values.reduce(f64::max)?);
    Some((least, most))
}

/// The fastest setting of every peer that finds enough, as a multiple of what is ours: names and microseconds.
fn searches(peers: &[PeerResult], ours: &[(String, f64)]) -> Vec<String> {
    let mut names: Vec<&str> = peers.iter().map(|peer| peer.peer.as_str()).collect();
    names.dedup();
    let sentence = |name: &str| {
        let settings = peers.iter().filter(|peer| peer.peer == name && peer.skipped.is_none());
        let fastest = settings
            .clone()
            .filter(|peer| peer.figures.recall >= RECALL)
            .min_by(|a, b| a.figures.p50_us.total_cmp(&b.figures.p50_us));
        if let Some(peer) = fastest {
            let times = ours.iter().map(|(name, p50_us)| format!("{} ({name})", ratio(peer.figures.p50_us / p50_us)));
            return format!(
                "{} {} ({}, {}) takes this many times as long: {}.",
                peer.peer,
                peer.version,
                peer.setting,
                plural(peer.threads.into(), "thread"),
                times.collect::<Vec<_>>().join(", ")
            );
        }
        match settings.max_by(|a, b| a.figures.recall.total_cmp(&b.figures.recall)) {
            Some(peer) => format!(
                "{} {} does not find {RECALL} of the right blocks: at its best {:.4}, in {:.0} us ({}).",
                peer.peer, peer.version, peer.figures.recall, peer.figures.p50_us, peer.setting
            ),
            None => format!("{name} was not measured."),
        }
    };
    names.into_iter().map(sentence).collect()
}

fn payload(report: &PayloadReport) -> Vec<String> {
    let find = |what, pages, threads| {
        report.results.iter().find(|result| (result.what, result.pages, result.threads) == (what, pages, threads))
    };
    let mut sentences = Vec::new();
    for store in report.results.iter().filter(|result| result.what == "store") {
        if let Some(pread) = find("pread", store.pages, store.threads) {
            sentences.push(format!(
                "{} pages, {}: the store takes {} times as long as plain reads, {:.1} us a piece.",
                store.pages,
                plural(store.threads as u64, "thread"),
                ratio(store.p50_us / pread.p50_us),
                store.p50_us / report.batch as f64
            ));
        }
    }
    for peer in report.peers.iter().filter(|peer| peer.skipped.is_none()) {
        if let Some(store) = find("store", "warm", 1) {
            let times = ratio(peer.figures.p50_us / store.p50_us);
            let (name, version, setting) = (&peer.peer, &peer.version, &peer.setting);
            sentences.push(format!("{name} {version} ({setting}) takes {times} times as long as the store, warm."));
        }
    }
    sentences
}

fn decode(report: &DecodeReport) -> Vec<String> {
    let memories: Vec<_> = report.steps.iter().filter(|step| step.attention == "memory").collect();
    let full = report.steps.iter().find(|step| step.attention == "full attention");
    let longest = memories.iter().max_by_key(|step| step.tokens);
    let shortest = memories.iter().min_by_key(|step| step.tokens);
    let mut sentences = Vec::new();
    if let (Some(longest), Some(shortest)) = (longest, shortest)
        && longest.tokens > shortest.tokens
    {
        sentences.push(format!(
            "A step with {} tokens in the memory takes {} times as long as one with {}.",
            count(longest.tokens),
            ratio(longest.step_ms / shortest.step_ms),
            count(shortest.tokens)
        ));
    }
    if let (Some(longest), Some(full)) = (longest, full) {
        sentences.push(format!(
            "Full attention over {} tokens takes {} times as long as a step with {} in the memory.",
            count(full.tokens),
            ratio(full.step_ms / longest.step_ms),
            count(longest.tokens)
        ));
    }
    let encoding = ratio(report.encode_ratio);
    sentences
        .push(format!("Encoding takes {encoding} times as long as prefill with the same window that keeps nothing."));
    let ours: Vec<_> = report.first_tokens.iter().map(|row| ("a document".to_string(), row)).collect();
    sentences.extend(first_tokens(&ours));

    let speeds = report.peers.iter().filter_map(|peer| Some((peer, peer.figures.speed?)));
    let step = speeds.clone().min_by(|(_, a), (_, b)| a.step_ms.total_cmp(&b.step_ms));
    if let (Some((peer, speed)), Some(longest)) = (step, longest) {
        sentences.push(format!(
            "{}: a step over {} tokens takes {} times as long as ours with {} in the memory{}.",
            peer.label(),
            count(speed.step_tokens),
            ratio(speed.step_ms / longest.step_ms),
            count(longest.tokens),
            full.map(|full| format!(", and {} times ours with full attention", ratio(speed.step_ms / full.step_ms)))
                .unwrap_or_default()
        ));
    }
    if let Some((peer, speed)) =
        speeds.max_by(|(_, a), (_, b)| a.prefill_tokens_per_s.total_cmp(&b.prefill_tokens_per_s))
    {
        sentences.push(format!(
            "{}: prefill of {} tokens is {} times as fast as ours with full attention.",
            peer.label(),
            count(speed.prefill_tokens),
            ratio(speed.prefill_tokens_per_s / report.full_prefill_tokens_per_s)
        ));
    }
    let states = report.peers.iter().filter_map(|peer| Some((peer.label(), peer.figures.first_token.as_ref()?)));
    let states: Vec<_> = states.collect();
    sentences.extend(first_tokens(&states));
    sentences.extend(longest_of_both(&ours, &states));
    let skipped = report.peers.iter().filter(|peer| peer.skipped.is_some());
    sentences.extend(skipped.map(|peer| format!("{} was not measured.", peer.peer)));
    sentences
}

/// One sentence for each length, of which there is a row with warm pages and then one with cold ones. Rows come with what
/// was reopened.
fn first_tokens(rows: &[(String, &FirstToken)]) -> Vec<String> {
    let sentence = |pair: &[(String, &FirstToken)]| {
        let [(what, warm), (_, cold)] = pair else { return None };
        Some(format!(
            "{} tokens, {what}: {} on disk. The first token after opening it comes after {:.0} ms, after {:.0} ms when no file is in the \
             page cache; reading and keeping the text took {} and {} times as long.",
            count(warm.tokens),
            size(warm.stored_bytes),
            warm.first_token_ms,
            cold.first_token_ms,
            ratio(warm.gain()),
            ratio(cold.gain())
        ))
    };
    rows.chunks(2).filter_map(sentence).collect()
}

/// The peer's fastest first token beside ours, at the greatest length that both have, with warm pages.
fn longest_of_both(ours: &[(String, &FirstToken)], theirs: &[(String, &FirstToken)]) -> Option<String> {
    let fastest = |tokens: u64| {
        let rows = theirs.iter().filter(|(_, row)| row.tokens == tokens && row.pages == "warm");
        rows.min_by(|(_, a), (_, b)| a.first_token_ms.total_cmp(&b.first_token_ms))
    };
    let warm = ours.iter().filter(|(_, row)| row.pages == "warm");
    let pairs = warm.filter_map(|(_, ours)| Some((ours, fastest(ours.tokens)?)));
    let (ours, (who, theirs)) = pairs.max_by_key(|(ours, _)| ours.tokens)?;
    Some(format!(
        "{} tokens: the first token after loading a state ({who}) takes {} times as long as after opening a document, and its file {} \
         times the bytes.",
        count(ours.tokens),
        ratio(theirs.first_token_ms / ours.first_token_ms),
        ratio(theirs.stored_bytes as f64 / ours.stored_bytes as f64)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_have_three_digits_at_most() {
        let cases = [(0.068, "0.07"), (1.254, "1.25"), (4.84, "4.8"), (24.6, "25"), (2497.3, "2497")];
        cases.iter().for_each(|&(number, text)| assert_eq!(ratio(number), text));
    }
    #[test]
    fn a_peer_is_told_by_the_fastest_setting_that_finds_enough() {
        let lines = r#"[
            {"peer": "a", "version": "1", "setting": "fast", "threads": 1, "p50_us": 10.0, "recall": 0.9},
            {"peer": "a", "version": "1", "setting": "right", "threads": 2, "p50_us": 300.0, "recall": 0.99},
            {"peer": "a", "version": "1", "setting": "slow", "threads": 1, "p50_us": 400.0, "recall": 1.0},
            {"peer": "b", "version": "2", "setting": "x", "threads": 1, "p50_us": 20.0, "recall": 0.5},
            {"peer": "c", "skipped": "not installed"}
        ]"#;
        let ours = [("f16 keys, flat".to_string(), 100.0), ("int8 keys, flat".to_string(), 200.0)];
        let told = searches(&serde_json::from_str::<Vec<PeerResult>>(lines).unwrap(), &ours);
        let expected = [
            "a 1 (right, 2 threads) takes this many times as long: 3.0 (f16 keys, flat), 1.50 (int8 keys, flat).",
            "b 2 does not find 0.99 of the right blocks: at its best 0.5000, in 20 us (x).",
            "c was not measured.",
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn first_tokens_are_compared_at_the_longest_common_length() {
        let row = |tokens, pages: &str, first_token_ms| FirstToken {
            tokens,
            pages: pages.into(),
            stored_bytes: tokens * 1024,
            prefill_s: 9.0,
            save_s: Some(1.0),
            reopen_ms: 1.0,
            first_token_ms,
        };
        let ours = [row(4, "warm", 100.0), row(4, "cold", 200.0), row(8, "warm", 100.0), row(8, "cold", 500.0)];
        let slow = [row(4, "warm", 600.0), row(4, "cold", 700.0)];
        let fast = [row(4, "warm", 300.0), row(4, "cold", 300.0), row(6, "warm", 900.0), row(6, "cold", 900.0)];
        let named = |name: &'static str| move |row| (name.to_string(), row);
        let theirs: Vec<_> = slow.iter().map(named("slow")).chain(fast.iter().map(named("fast"))).collect();
        let ours: Vec<_> = ours.iter().map(named("a document")).collect();
        let told = first_tokens(&ours);
        assert_eq!(told.len(), 2);
        assert!(told[0].ends_with("reading and keeping the text took 100 and 50 times as long."), "{}", told[0]);
        let told = longest_of_both(&ours, &theirs).unwrap();
        let expected = "4 tokens: the first token after loading a state (fast) takes 3.0 times as long";
        assert!(told.starts_with(expected), "{told}");
        assert_eq!(longest_of_both(&ours, &[]), None);
    }
}
