#!/usr/bin/env python3
"""Does the conformance suite notice a broken store? Breaks ours in many ways, one at a time, and says which tests turn red.

    python3 crates/cli/tests/conformance/mutations/mutate.py [NAME...]

Run it from the root of a checkout. The tracked files are copied to target/mutants/source, where every mutation is put in behind a
switch (the variable MUTANT), so that one build serves all. The suite itself is built from the checkout as it is.
A mutation is a text that occurs exactly once in a file, and what takes its place; `MUTANT("name")` asks for the switch.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path.cwd()
PLACE = ROOT / "target" / "mutants"
SECONDS_MAX = 300

SWITCH = """
/// Put in by crates/cli/tests/conformance/mutations.
pub fn mutant(name: &str) -> bool {
    std::env::var("MUTANT").is_ok_and(|mutant| mutant == name)
}
"""

# name, what it does, file, text, replacement
MUTATIONS = [
    ("unchecked", "reads without comparing checksums", "src/store/record.rs",
     "(self.crc(part, bytes) == u32_at(crc, 0)).then_some(bytes)",
     '(MUTANT("unchecked") || self.crc(part, bytes) == u32_at(crc, 0)).then_some(bytes)'),
    ("ack-early", "acknowledges 200 ms before it writes", "src/store/log.rs",
     "        self.write_out()?;\n        self.segment.file.sync()",
     '''        if MUTANT("ack-early") {
            let (file, at, bytes) = (self.segment.file.clone(), self.offset, std::mem::take(&mut self.buffer));
            self.offset += bytes.len() as u64;
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(200));
                let _ = file.write_at(at, &bytes);
            });
            return Ok(Group { segment: self.segment.id, entries: self.entries, end: self.offset });
        }
        self.write_out()?;
        self.segment.file.sync()'''),
    ("old-tail", "keeps the tail that a later one replaces", "src/memory/ingest.rs",
     "if damage.is_some() || token_ids.is_none_or(|held| !held.starts_with(&block.token_ids)) {",
     '''if !MUTANT("old-tail") && (damage.is_some() || token_ids.is_none_or(|held| !held.starts_with(&block.token_ids))) {'''),
    ("any-model", "lets any model open a collection", "src/memory/local.rs",
     "if stored_print != offered {", 'if stored_print != offered && !MUTANT("any-model") {'),
    ("slot-off-by-one", "places blocks one slot too far away", "src/memory/geometry.rs",
     "distance as i64 + ((self.slots - slot) * self.block_tokens) as i64",
     'distance as i64 + ((self.slots - slot + usize::from(MUTANT("slot-off-by-one"))) * self.block_tokens) as i64'),
    ("other-block", "reads the block before the one that was asked for", "src/memory/read.rs",
     "self.store.read_pieces(id, &mut bytes)?;",
     '''let index = if MUTANT("other-block") { id.index.saturating_sub(1) } else { id.index };
        self.store.read_pieces(BlockId { index, ..id }, &mut bytes)?;'''),
    ("drop-last", "drops the last append that it finds when it opens", "src/store/recovery.rs",
     "    let mut end = len;\n    if next == Next::Last {",
     '''    if let Some(last) = found.entries.last().map(|entry| entry.locator.sequence).filter(|_| MUTANT("drop-last")) {
        found.entries.retain(|entry| entry.locator.sequence != last);
    }
    let mut end = len;
    if next == Next::Last {'''),
    ("any-number", "stores NaN and infinity", "src/memory/ingest.rs",
     "position(|number| number.is_nan() || number.abs() > limit)",
     'position(|number| !MUTANT("any-number") && (number.is_nan() || number.abs() > limit))'),
    ("no-seal", "appends to sealed documents", "src/store/document.rs",
     "        if self.sealed {", '        if self.sealed && !MUTANT("no-seal") {'),
    ("name-taken", "gives a deleted document's name to the deleted document", "src/store/ledger.rs",
     "if self.get::<DocumentId>(&name)? == Some(document) {",
     'if self.get::<DocumentId>(&name)? == Some(document) && !MUTANT("name-taken") {'),
    ("undeleted", "forgets a deletion when it rebuilds", "src/store/ledger.rs",
     "        self.put(key::tombstone(document), &(locator, tombstone));",
     '''        if MUTANT("undeleted") {
            return Ok(());
        }
        self.put(key::tombstone(document), &(locator, tombstone));'''),
    ("provenance", "names the block before the one that it read", "src/memory/plan.rs",
     "blocks: found.positions.iter().map(|&position| self.block(position as usize)).collect(),",
     '''blocks: found
                .positions
                .iter()
                .map(|&position| self.block((position as usize).saturating_sub(usize::from(MUTANT("provenance")))))
                .collect(),'''),
    ("part-of-batch", "keeps the good blocks of a batch that it refuses", "src/memory/ingest.rs",
     "            let records = self.encode_wanted(&collection, &manifest, &request.blocks, &wanted)?;",
     '''            let records = self.encode_wanted(&collection, &manifest, &request.blocks, &wanted);
            if records.is_err() && MUTANT("part-of-batch") && wanted.len() > 1 {
                let good = &wanted[..wanted.len() - 1];
                self.write(&collection, &manifest, &self.encode_wanted(&collection, &manifest, &request.blocks, good)?)?;
            }
            let records = records?;'''),
    ("no-conflict", "takes other tokens for the ones that it has", "src/memory/ingest.rs",
     "if token_ids.is_some_and(|held| !held.starts_with(&block.token_ids)) {",
     'if token_ids.is_some_and(|held| !held.starts_with(&block.token_ids)) && !MUTANT("no-conflict") {'),
    ("no-conflict", None, "src/store/mend.rs",
     "if held.token_ids.is_some_and(|held| held != block.meta.token_ids) {",
     'if held.token_ids.is_some_and(|held| held != block.meta.token_ids) && !MUTANT("no-conflict") {'),
    ("foreign", "takes files of other directories for its own", "src/store/handles.rs",
     "if found.segment != id || found.directory.is_some_and(|found| found != directory) {",
     'if found.segment != id || (found.directory.is_some_and(|found| found != directory) && !MUTANT("foreign")) {'),
    ("foreign", None, "src/store/handles.rs",
     "let salt = if found.directory.is_some() { own } else { Salt::NONE };",
     '''let own = match found.directory.filter(|_| MUTANT("foreign")) {
            Some(other) => Salt::of(other, id),
            None => own,
        };
        let salt = if found.directory.is_some() { own } else { Salt::NONE };'''),
    ("late", "does not look at deadlines", "src/until.rs",
     "let end = Instant::now().checked_add(timeout);",
     'let end = Instant::now().checked_add(timeout).filter(|_| !MUTANT("late"));'),
]


def copy_source():
    source = PLACE / "source"
    shutil.rmtree(source, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout.decode().split("\0")
    for path in filter(None, tracked):
        if (ROOT / path).is_file() or (ROOT / path).is_symlink():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, source / path, follow_symlinks=False)
    return source


def mutate(source):
    """The names of those that could be put in."""
    limits = source / "src/limits.rs"
    limits.write_text(limits.read_text() + SWITCH)
    failed = set()
    for name, _, path, text, replacement in MUTATIONS:
        file = source / path
        before = file.read_text()
        if before.count(text) != 1:
            print(f"{name}: its text occurs {before.count(text)} times in {path}; it has to be written anew")
            failed.add(name)
            continue
        file.write_text(before.replace(text, replacement.replace("MUTANT(", "crate::limits::mutant(")))
    return [name for name, what, *_ in MUTATIONS if what and name not in failed]


def suite():
    """The suite's program."""
    build = ["cargo", "test", "--test", "conformance", "--no-run", "--message-format", "json"]
    lines = subprocess.run(build, capture_output=True, check=True, text=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines if line.startswith("{")]
    return [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "conformance"][-1]


def judge(program, broken, name):
    """Seconds, how many tests passed, and which failed."""
    wrapper = PLACE / f"program-{name}"
    wrapper.write_text(f'#!/bin/sh\nMUTANT={name} exec {broken} "$@"\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "LANDMARK_PROGRAM": str(wrapper), "CARGO_MANIFEST_DIR": str(ROOT / "crates/cli")}
    begun = time.monotonic()
    try:
        run = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=SECONDS_MAX)
        output = run.stdout
    except subprocess.TimeoutExpired as hung:
        output = (hung.stdout or b"").decode()
    # Lines of two threads may be mixed, the list at the end is not.
    failed = re.findall(r"^    (\w+::\w+)$", output.rpartition("failures:")[2], re.M)
    passed = re.search(r"(\d+) passed", output)
    return time.monotonic() - begun, int(passed[1]) if passed else 0, failed, bool(passed)


def main():
    wanted = sys.argv[1:]
    source = copy_source()
    names = [name for name in mutate(source) if not wanted or name in wanted]
    build = ["cargo", "build", "--quiet", "--bin", "landmarkdb", "--target-dir", str(PLACE / "build")]
    subprocess.run(build, cwd=source, check=True)
    broken, program = PLACE / "build/debug/landmarkdb", suite()
    seconds, passed, failed, ended = judge(program, broken, "none")
    print(f"without a mutation: {passed} passed in {seconds:.0f} s, failed: {failed}", flush=True)
    if failed or not ended:
        sys.exit("the suite has to be green before it can turn red")
    print("| mutation | what the store does | tests that failed |\n|---|---|---|")
    survived = []
    for name, what, *_ in MUTATIONS:
        if what is None or name not in names:
            continue
        seconds, passed, failed, ended = judge(program, broken, name)
        shown = ", ".join(f"`{test.partition('::')[2]}`" for test in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        print(f"| {name} | {what} | {len(failed)}: {shown}{more}{'' if ended else ' (hung)'} |", flush=True)
        if ended and not failed:
            survived.append(name)
    if survived:
        sys.exit(f"nobody noticed {survived}")


if __name__ == "__main__":
    main()
