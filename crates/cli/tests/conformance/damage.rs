//! Is damage ever an answer? Bytes are changed under the stopped service; what it says then is right, or DATA_LOSS.
//!
//! A service may also refuse to start. What it may not do is to say something else: other blocks, an older tail, a document
//! that was deleted, or that one does not exist which does. Only a rebuild may have lost all traces of a document; then Verify has
//! to report faults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landmarkdb_grpc::wire::v1;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use tonic::Code;

use crate::answers::any_question;
use crate::client::{Answer, Client, Refusal};
use crate::data::{Model, Text, World, seeded};
use crate::harness::{Named, cases};
use crate::judge::same_reply;
use crate::suite::{Alone, Suite, rounds};

cases! {
    flipped_bits_are_never_an_answer needs [Data, Rebuild];
    flipped_bits_are_never_an_answer_after_a_rebuild needs [Data, Rebuild];
    a_damaged_record_never_gives_way_to_an_older_one needs [Data, Rebuild];
    a_damaged_document_keeps_its_name needs [Data, Rebuild];
    damage_to_what_can_be_derived_loses_nothing needs [Data, Rebuild];
    truncated_files_are_never_an_answer needs [Data, Rebuild];
    swapped_pieces_are_never_an_answer needs [Data, Rebuild];
    files_of_another_directory_are_never_an_answer needs [Data, Rebuild];
    a_damaged_block_that_is_sent_again_is_whole needs [Data];
}

/// Where a file of the service lies below its folder, and what is in it.
type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Marks in texts, by which aimed damage finds its place where files hold text as it is.
const NEW: &[u8] = b"the tail that came last";
const DELETED: &[u8] = b"the text that was deleted";

fn read_below(folder: &Path, at: &Path, into: &mut Files) {
    for entry in std::fs::read_dir(folder.join(at)).into_iter().flatten().flatten() {
        let path = at.join(entry.file_name());
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => read_below(folder, &path, into),
            _ => {
                let bytes = std::fs::read(folder.join(&path)).expect("a readable file");
                // Room that is kept for later: there is nothing in it to damage.
                if bytes.is_empty() || bytes.iter().any(|byte| *byte != 0) {
                    into.insert(path, bytes);
                }
            }
        }
    }
}

fn read(folder: &Path) -> Files {
    let mut files = Files::new();
    read_below(folder, Path::new(""), &mut files);
    files
}

/// Makes a folder hold these files and nothing else.
fn write(folder: &Path, files: &Files) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.expect("a file that can be removed");
    }
    for (path, bytes) in files {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().expect("below the folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file that can be written");
    }
}

/// A stopped service over a folder whose content is known.
struct Exhibit<'a> {
    service: Alone<'a>,
    world: World,
    /// What was in the folder before the test.
    before: Files,
    /// What is in it undamaged.
    files: Files,
    /// Every document with its blocks, how it says it is, and what an attend over it answers.
    documents: Vec<(v1::DocumentInfo, Vec<v1::NewBlock>, v1::AttendReply)>,
    deleted: u64,
}

impl Drop for Exhibit<'_> {
    fn drop(&mut self) {
        self.service.kill_or_stop();
        write(&self.service.data(), &self.before);
        if matches!(self.service, Alone::Foreign { .. }) {
            // Nothing is left to do if it refuses.
            let _ = self.service.try_start();
        }
    }
}

/// A text whose last block says `mark`.
fn marked(text: &Text, mark: &'static [u8]) -> Vec<v1::NewBlock> {
    let mut blocks = text.all();
    if let Some(text) = blocks.last_mut().and_then(|block| block.text.as_mut()) {
        text.text = mark.into();
        text.offsets.fill(0);
    }
    blocks
}

/// Three documents: one in many appends, one whose tail was replaced twice, one sealed. One that was deleted. The last record
/// belongs to a document that nobody asks for, because the end of a log cannot be told from a write that was torn.
fn exhibit(suite: &Suite, seed: u64) -> Exhibit<'_> {
    let mut service = suite.alone();
    service.stop();
    let before = read(&service.data());
    write(&service.data(), &Files::new());
    service.start();
    let client = service.client();
    let world = World::new(suite, &client, &Model::small());
    let deleted = world.open("deleted");
    client.append(deleted, marked(&world.text(3, seed), DELETED)).expect("an append");

    let many = world.text(8, seed + 1);
    let document = world.open("many appends");
    many.all().into_iter().for_each(|block| drop(client.append(document, vec![block]).expect("an append")));
    let mut documents = vec![(document, many.all())];

    let (old, new) = (Text::random(&world.model, 11, seed + 2), Text::random(&world.model, 10, seed + 3));
    let document = world.open("replaced");
    client.append(document, old.all()).expect("an append");
    let mut blocks = old.cut(0..8);
    blocks.extend(marked(&new, NEW).pop());
    client.append(document, blocks[2..].to_vec()).expect("another tail");
    documents.push((document, blocks));

    client.delete(deleted).expect("a deletion");
    let sealed = world.text(4, seed + 4);
    documents.push((world.store("sealed", &sealed), sealed.all()));
    client.seal(documents[2].0).expect("a seal");
    world.store("last", &world.text(2, seed + 5));

    // As a service says it that has just been opened.
    service.stop();
    let files = read(&service.data());
    service.start();
    let world = World { client: service.client(), ..world };
    let known = |(document, blocks): (u64, Vec<v1::NewBlock>)| {
        world.judge_document(document, &blocks);
        let info = world.client.info(document).expect("the document");
        let reply = world.client.attend(any_question(&world, document, info.blocks)).expect("an attend");
        (info, blocks, reply)
    };
    let documents = documents.into_iter().map(known).collect();
    service.stop();
    Exhibit { service, world, before, files, documents, deleted }
}

/// Right, or DATA_LOSS.
fn allowed<T>(what: &str, answer: Answer<T>, right: impl FnOnce(T) -> Result<(), String>) -> Result<bool, String> {
    match answer {
        Ok(answer) => right(answer).map(|()| true).map_err(|problem| format!("{what}: {problem}")),
        Err(Refusal { code: Code::DataLoss, .. }) => Ok(false),
        Err(refusal) => Err(format!("{what}: {refusal:?}")),
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("expected {expected:?}, found {found:?}")) }
}

/// What of a document's description follows from its appends.
fn essence(info: &v1::DocumentInfo) -> (u64, u32, String, bool, u32, u32, u64, u64) {
    let v1::DocumentInfo { id, collection, name, sealed, blocks, tail_tokens, tokens, text_bytes, .. } = info.clone();
    (id, collection, name, sealed, blocks, tail_tokens, tokens, text_bytes)
}

impl Exhibit<'_> {
    /// Starts over these files, discarding what is derived if asked to, and asks everything. How many answers were right and
    /// how many DATA_LOSS; none if it refuses to start.
    #[track_caller]
    fn judge(&mut self, files: &Files, rebuild: bool) -> Option<(usize, usize)> {
        write(&self.service.data(), files);
        if rebuild {
            self.service.discard_derived();
        }
        self.judge_started(rebuild)
    }

    /// `rebuilt`: whether it had to forget what it derived.
    #[track_caller]
    fn judge_started(&mut self, rebuilt: bool) -> Option<(usize, usize)> {
        let started = self.service.try_start();
        let judged = started.is_ok().then(|| self.ask(&self.service.client(), rebuilt));
        self.service.kill_or_stop();
        let answers = judged?.unwrap_or_else(|wrong| panic!("damage became an answer: {wrong}"));
        let right = answers.iter().filter(|&&right| right).count();
        Some((right, answers.len() - right))
    }

    fn ask(&self, client: &Client, rebuilt: bool) -> Result<Vec<bool>, String> {
        let mut answers = Vec::new();
        let world = World { client: client.clone(), ..self.world.clone() };
        for (info, blocks, reply) in &self.documents {
            if rebuilt && client.info(info.id).is_err_and(|refusal| refusal.code == Code::NotFound) {
                if client.verify(None).is_ok_and(|report| report.faults.is_empty()) {
                    return Err(format!("{:?} is gone, and Verify finds no fault", info.name));
                }
                answers.push(false);
                continue;
            }

            let (document, name) = (info.id, &info.name);
            let same = |found: v1::DocumentInfo| equal(essence(&found), essence(info));
            answers.push(allowed(&format!("info of {name:?}"), client.info(document), same)?);
            for block in blocks {
                let expected = (&block.token_ids, &block.text, &block.k, &block.v);
                let same = |found: Vec<v1::FetchReply>| match &found[..] {
                    [found] => equal((&found.token_ids, &found.text, &found.k, &found.v), expected),
                    _ => Err(format!("{} blocks", found.len())),
                };
                let what = format!("fetch of block {} of {name:?}", block.index);
                answers.push(allowed(&what, client.fetch(document, [block.index]), same)?);
            }
            let attend = client.attend(any_question(&world, document, info.blocks));
            answers.push(allowed(&format!("attend over {name:?}"), attend, |found| same_reply(&found, reply))?);
            let listed = client.blocks(document, 0, 99);
            let same = |found: Vec<v1::BlockInfo>| {
                let texts = |found: Vec<(Vec<u32>, Option<v1::BlockText>)>| found;
                equal(
                    texts(found.into_iter().map(|block| (block.token_ids, block.text)).collect()),
                    texts(blocks.iter().map(|block| (block.token_ids.clone(), block.text.clone())).collect()),
                )
            };
            answers.push(allowed(&format!("blocks of {name:?}"), listed, same)?);
        }
        let gone = |found: v1::DocumentInfo| Err(format!("{found:?} was deleted"));
        match client.info(self.deleted) {
            Err(Refusal { code: Code::NotFound, .. }) => answers.push(true),
            other => answers.push(allowed("info of the deleted document", other, gone)?),
        }
        Ok(answers)
    }

    /// Whether a name that was given out is still its document's. One in damage may not be given to a new document, which
    /// would be empty where the old one was not.
    fn ask_names(&self, client: &Client) -> Result<(), String> {
        for (info, ..) in &self.documents {
            if client.info(info.id).is_err_and(|refusal| refusal.code == Code::NotFound) {
                continue;
            }
            let same = |found: v1::DocumentInfo| equal(found.id, info.id);
            let found = client.document(self.world.collection, &info.name);
            allowed(&format!("the name {:?}", info.name), found, same)?;
        }
        Ok(())
    }

    /// Judges many damaged copies. At least one of them has to show, or nothing was tried.
    #[track_caller]
    fn judge_all(&mut self, seed: u64, rebuild: bool, damage: impl Fn(&mut Files, &mut ChaCha8Rng) -> String) {
        let mut shown = 0;
        for round in 0..rounds() {
            let mut rng = seeded(seed + round);
            let mut files = self.files.clone();
            let what = damage(&mut files, &mut rng);
            let _named = Named(format!("round {round}: {what}{}", if rebuild { ", then a rebuild" } else { "" }));
            shown += self.judge(&files, rebuild).is_none_or(|(_, lost)| lost > 0) as u32;
        }
        assert!(shown > 0, "no damage showed: the files of LANDMARK_DATA are not what answers come from");
    }
}

/// A file that holds something, large ones more often.
fn any_but(files: &Files, without: &[PathBuf], rng: &mut ChaCha8Rng) -> PathBuf {
    let files = || files.iter().filter(|(path, _)| !without.contains(path));
    let total: usize = files().map(|(_, bytes)| bytes.len()).sum();
    let mut at = rng.random_range(0..total);
    for (path, bytes) in files() {
        if at < bytes.len() {
            return path.clone();
        }
        at -= bytes.len();
    }
    unreachable!("a place below the total")
}

fn flip(files: &mut Files, rng: &mut ChaCha8Rng) -> String {
    flip_in(files, &[], rng)
}

fn flip_in(files: &mut Files, without: &[PathBuf], rng: &mut ChaCha8Rng) -> String {
    let path = any_but(files, without, rng);
    let bytes = files.get_mut(&path).expect("a file that is there");
    let (at, bit) = (rng.random_range(0..bytes.len()), rng.random_range(0..8));
    bytes[at] ^= 1 << bit;
    format!("bit {bit} of byte {at} of {}", path.display())
}

fn flipped_bits_are_never_an_answer(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    exhibit.judge_all(1_000, false, |files, rng| flip_in(files, &derived, rng));
}

fn flipped_bits_are_never_an_answer_after_a_rebuild(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    exhibit.judge_all(2_000, true, |files, rng| {
        files.retain(|path, _| !derived.contains(path));
        flip(files, rng)
    });
}

fn a_damaged_record_never_gives_way_to_an_older_one(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    exhibit.judge_all(3_000, true, |files, rng| {
        files.retain(|path, _| !derived.contains(path));
        let mark = [NEW, DELETED][rng.random_range(0..2)];
        let found = files.iter_mut().find_map(|(path, bytes)| {
            let at = bytes.windows(mark.len()).position(|window| window == mark)?;
            Some((path.clone(), bytes, at))
        });
        // Where text is not kept as it is, anything is a target.
        let Some((path, bytes, at)) = found else { return flip(files, rng) };
        let near = (at as i64 + rng.random_range(-250..1500)).clamp(0, bytes.len() as i64 - 1) as usize;
        bytes[near] ^= 0x10;
        format!("byte {near} of {}, near {:?}", path.display(), String::from_utf8_lossy(mark))
    });
}

fn a_damaged_document_keeps_its_name(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    for round in 0..rounds() {
        let mut files = exhibit.files.clone();
        files.retain(|path, _| !derived.contains(path));
        let what = flip(&mut files, &mut seeded(8_000 + round));
        let _named = Named(what);
        write(&exhibit.service.data(), &files);
        if exhibit.service.try_start().is_ok() {
            exhibit
                .ask_names(&exhibit.service.client())
                .unwrap_or_else(|wrong| panic!("a name was given away: {wrong}"));
        }
        exhibit.service.kill_or_stop();
    }
}

fn damage_to_what_can_be_derived_loses_nothing(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    for round in 0..rounds() {
        let mut rng = seeded(4_000 + round);
        let mut of_derived = exhibit.files.clone();
        of_derived.retain(|path, _| derived.contains(path));
        if of_derived.values().all(Vec::is_empty) {
            return;
        }
        let what = flip(&mut of_derived, &mut rng);
        let _named = Named(what);
        let mut files = exhibit.files.clone();
        files.extend(of_derived);
        let (right, lost) = exhibit.judge(&files, false).expect("it starts, since what is damaged can be derived");
        assert_eq!(lost, 0, "{right} answers were right");
    }
}

/// While what is derived is kept: without it, a log that was cut between two appends is the log of an earlier day.
fn truncated_files_are_never_an_answer(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    exhibit.judge_all(5_000, false, |files, rng| {
        let path = any_but(files, &derived, rng);
        let bytes = files.get_mut(&path).expect("a file that is there");
        bytes.truncate(rng.random_range(0..bytes.len()));
        format!("{} cut to {} bytes", path.display(), bytes.len())
    });
}

fn swapped_pieces_are_never_an_answer(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    for rebuild in [false, true] {
        exhibit.judge_all(6_000, rebuild, |files, rng| {
            let path = any_but(files, &derived, rng);
            let bytes = files.get_mut(&path).expect("a file that is there");
            let size = [16, 64, 132, 512][rng.random_range(0..4)].min(bytes.len() / 2).max(1);
            let (a, b) = (rng.random_range(0..=bytes.len() - size), rng.random_range(0..=bytes.len() - size));
            let (of_a, of_b) = (bytes[a..a + size].to_vec(), bytes[b..b + size].to_vec());
            bytes[a..a + size].copy_from_slice(&of_b);
            bytes[b..b + size].copy_from_slice(&of_a);
            format!("{size} bytes at {a} and {b} of {} swapped", path.display())
        });
    }
}

/// The same names and shapes in another directory, and other values: a backup that was mixed up.
fn files_of_another_directory_are_never_an_answer(suite: &Suite) {
    let other = exhibit(suite, 900).files.clone();
    let mut exhibit = exhibit(suite, 100);
    let derived = exhibit.derived();
    let mut tried = 0;
    for (path, bytes) in other.iter().filter(|(path, bytes)| !derived.contains(*path) && !bytes.is_empty()) {
        for rebuild in [false, true] {
            let _named = Named(format!("{} of another directory, rebuilt: {rebuild}", path.display()));
            let mut files = exhibit.files.clone();
            files.insert(path.clone(), bytes.clone());
            write(&exhibit.service.data(), &files);
            if rebuild {
                exhibit.service.discard_derived();
            }
            // By a file that says whose directory it is, what was derived for another is none of its own.
            exhibit.judge_started(true);
            tried += 1;
        }
    }
    assert!(tried > 0, "no file to mix up");
}

/// The client that has a block sends it again. A store that skips what it has by its index acknowledged it and stayed unreadable.
fn a_damaged_block_that_is_sent_again_is_whole(suite: &Suite) {
    let mut exhibit = exhibit(suite, 100);
    let (info, blocks, _) = exhibit.documents[0].clone();
    let mut mended = 0;
    for round in 0..rounds() * 5 {
        let mut files = exhibit.files.clone();
        let what = flip(&mut files, &mut seeded(7_000 + round));
        let _named = Named(what);
        write(&exhibit.service.data(), &files);
        if exhibit.service.try_start().is_ok() {
            let client = exhibit.service.client();
            let lost = |block: &&v1::NewBlock| {
                client.fetch(info.id, [block.index]).is_err_and(|refusal| refusal.code == Code::DataLoss)
            };
            if let Some(block) = blocks.iter().find(lost) {
                client.append(info.id, vec![block.clone()]).expect("a block that is sent again");
                let world = World { client: client.clone(), ..exhibit.world.clone() };
                world.judge_document(info.id, &blocks);
                mended += 1;
            }
        }
        exhibit.service.kill_or_stop();
        if mended == 5 {
            return;
        }
    }
    assert!(mended > 0, "no damage met a block");
}

impl Exhibit<'_> {
    /// The files that a rebuild does without.
    fn derived(&mut self) -> Vec<PathBuf> {
        write(&self.service.data(), &self.files);
        self.service.discard_derived();
        let left = read(&self.service.data());
        let derived: Vec<PathBuf> = self.files.keys().filter(|path| !left.contains_key(*path)).cloned().collect();
        self.judge(&left, false).expect("it starts without what can be derived");
        derived
    }
}
