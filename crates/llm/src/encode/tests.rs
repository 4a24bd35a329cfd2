//! Texts that grow, and texts that others take the place of, with models of each kind: plain, with sliding layers, with landmarks.

use std::path::Path;

use super::*;
use crate::golden_families::folder;
use landmarkdb::{CollectionSpec, DType, FetchRequest, LocalMemory, StoredBlock};

const TEXT: &str = "Monday. The ferry leaves at nine, and the bell rings twice.\nTuesday. Nobody rang; the keeper, Harald, \
    was away \u{2014} where to, he did not say.\n\nWednesday. He is back, with a dog that is oldish and deaf. It sleeps.\n";

/// A tiny model of a family, with a tokenizer.
fn of_family(case: &str) -> LoadedModel {
    let (to, from) = (tempfile::tempdir().unwrap(), folder().join(case));
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/folder/tokenizer.json");
    std::fs::copy(tokenizer, to.path().join("tokenizer.json")).unwrap();
    LoadedModel::open(to.path()).unwrap()
}

fn models() -> [(&'static str, LoadedModel); 3] {
    let austen = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen");
    let austen = LoadedModel::open(&austen).unwrap();
    [("plain", of_family("qwen3")), ("sliding layers", of_family("gemma3-4b")), ("landmarks", austen)]
}

/// A memory of its own, and a collection for the model.
struct Setup<'a> {
    model: &'a LoadedModel,
    memory: Arc<dyn BlockMemory>,
    collection: CollectionInfo,
    window: Window,
    _folder: tempfile::TempDir,
}

impl<'a> Setup<'a> {
    fn new(model: &'a LoadedModel) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(folder.path()).unwrap());
        let config = model.config();
        let block_tokens = if config.landmark.is_some() { config.block_tokens() } else { 8 };
        let collection = memory.open_collection(&CollectionSpec {
            name: "texts".into(),
            shape: model.shape(block_tokens).unwrap(),
            key_rule: config.key_rule(),
            payload_dtype: DType::F32,
            key_dtype: DType::F16,
            model_digest: model.model_digest,
            tokenizer_digest: model.tokenizer_digest(),
            model_name: model.name.clone(),
        });
        let window = match config.landmark {
            Some(_) => config.window(),
            None => Window { tokens: 16, chunk_tokens: 16, ..config.window() },
        };
        Setup { model, memory, collection: collection.unwrap(), window, _folder: folder }
    }

    fn encoding<'t>(&self, name: &'t str, text: &'t str, stays_open: bool) -> Encoding<'t> {
        Encoding { name, text, window: self.window, retrieval: self.model.config().encode_retrieval(), stays_open }
    }

    /// The document, and the tokens that were there before.
    fn encode(&self, name: &str, text: &str, stays_open: bool) -> Result<(DocumentInfo, u64), RememberError> {
        let (mut resumed, encoding) = (0, self.encoding(name, text, stays_open));
        let mut progress = |step: EncodeProgress| resumed = step.resumed_tokens;
        let document = encode(self.model, &self.memory, &self.collection, &encoding, &mut progress)?;
        Ok((document, resumed))
    }

    fn replace(&self, name: &str, text: &str) -> Result<(DocumentInfo, bool), RememberError> {
        let (mut replaced, encoding) = (false, self.encoding(name, text, false));
        let mut progress = |step: EncodeProgress| replaced = step.replaces;
        let document = encode_replacing(self.model, &self.memory, &self.collection, &encoding, &mut progress)?;
        Ok((document, replaced))
    }

    fn blocks(&self, document: &DocumentInfo) -> Vec<StoredBlock> {
        let blocks = (0..document.blocks + (document.tail_tokens > 0) as u32).collect();
        self.memory.fetch(&FetchRequest { document: document.id, blocks, dtype: DType::F32 }).unwrap()
    }

    fn text(&self, document: &DocumentInfo) -> String {
        let bytes: Vec<u8> = self.blocks(document).into_iter().flat_map(|block| block.text.bytes).collect();
        assert_eq!(bytes.len() as u64, document.text_bytes);
        String::from_utf8(bytes).unwrap()
    }
}

fn ids(blocks: &[StoredBlock]) -> Vec<u32> {
    blocks.iter().flat_map(|block| block.token_ids.iter().copied()).collect()
}

fn difference(result: Result<(DocumentInfo, u64), RememberError>) -> Difference {
    match result {
        Err(RememberError::OtherText { difference, .. }) => difference,
        other => panic!("{other:?}"),
    }
}

/// Cut anywhere, inside of a word too: the document has the whole text in the end, and every token of it once.
#[test]
fn a_text_that_grows_is_read_on_where_its_document_ends() {
    for (kind, model) in models() {
        let setup = Setup::new(&model);
        let (whole, _) = setup.encode("whole", TEXT, false).unwrap();
        let ends = (1..TEXT.len()).filter(|&end| TEXT.is_char_boundary(end));
        for end in ends.step_by(7) {
            let (name, context) = (format!("cut at {end}"), format!("{kind}, cut at {end}"));
            let (begun, _) = setup.encode(&name, &TEXT[..end], true).unwrap();
            assert!(!begun.sealed && setup.text(&begun) == TEXT[..end], "{context}: {begun:?}");
            let (again, resumed) = setup.encode(&name, &TEXT[..end], true).unwrap();
            assert_eq!((again.tokens, resumed), (begun.tokens, begun.tokens), "{context}: nothing is new");
            let middle = (end + 40..TEXT.len()).find(|&to| TEXT.is_char_boundary(to)).unwrap_or(TEXT.len());
            let (grown, resumed) = setup.encode(&name, &TEXT[..middle], true).unwrap();
            assert_eq!(resumed, begun.tokens, "{context}");
            assert_eq!(setup.text(&grown), TEXT[..middle], "{context}");
            let (sealed, resumed) = setup.encode(&name, TEXT, false).unwrap();
            assert!(sealed.sealed && resumed == grown.tokens && setup.text(&sealed) == TEXT, "{context}: {sealed:?}");
            let (same, resumed) = setup.encode(&name, TEXT, false).unwrap();
            assert_eq!((&same, resumed), (&sealed, sealed.tokens), "{context}: already whole");
            let longer = format!("{TEXT}Thursday.");
            for stays_open in [false, true] {
                let refused = difference(setup.encode(&name, &longer, stays_open));
                assert_eq!(refused, Difference::Longer, "{context}: it is sealed");
            }
            setup.memory.delete(sealed.id).unwrap();
        }
        // Cut between lines it has the very tokens of the text at once, and their numbers but for rounding.
        let end = TEXT.find("Tuesday").unwrap();
        setup.encode("lines", &TEXT[..end], true).unwrap();
        let (lines, _) = setup.encode("lines", TEXT, false).unwrap();
        let (lines, whole) = (setup.blocks(&lines), setup.blocks(&whole));
        assert_eq!(ids(&lines), ids(&whole), "{kind}");
        for (a, b) in lines.iter().zip(&whole) {
            let (one, other) = (a.k.to_f32().unwrap(), b.k.to_f32().unwrap());
            let off = one.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-3, "{kind}, block {}: keys are off by {off}", a.id.index);
        }
    }
}

#[test]
fn another_text_is_no_longer_one() {
    for (kind, model) in models() {
        let setup = Setup::new(&model);
        let (begun, _) = setup.encode("text", TEXT, true).unwrap();
        let edited = TEXT.replacen("nine", "nein", 1) + "More.";
        for other in [&edited, &TEXT[..TEXT.len() - 20]] {
            let refused = difference(setup.encode("text", other, true));
            assert!(matches!(refused, Difference::Block(_)), "{kind}, {other:?}: {refused:?}");
        }
        assert_eq!(setup.memory.document(begun.id).unwrap(), begun, "{kind}: refused texts change nothing");
    }
}

#[test]
fn a_text_takes_the_place_of_another_when_it_is_whole() {
    for (kind, model) in models() {
        let setup = Setup::new(&model);
        let (first, _) = setup.encode("text", TEXT, false).unwrap();
        assert_eq!(setup.replace("text", TEXT).unwrap(), (first.clone(), false), "{kind}: the same text");
        let other = "Thursday. It rained all day, and the roof of the old tower leaks again, says the keeper.";
        let longest = format!("{TEXT}{other}");
        for text in [other, &longest, TEXT] {
            let before = setup.memory.documents(setup.collection.id).unwrap();
            let (replaced, replaces) = setup.replace("text", text).unwrap();
            assert!(replaces && replaced.sealed && replaced.name == "text", "{kind}: {replaced:?}");
            assert_eq!(setup.text(&replaced), text, "{kind}");
            assert_eq!(setup.memory.documents(setup.collection.id).unwrap(), [replaced], "{kind}, before: {before:?}");
        }
        let (new, replaces) = setup.replace("new", other).unwrap();
        assert!(!replaces && setup.text(&new) == other, "{kind}: of no document it is an encoding");
    }
}

/// A replacement of a text that is not wanted any more is no beginning of another.
#[test]
fn what_is_left_of_a_replacement_is_gone_on_with_or_goes() {
    for (kind, model) in models() {
        let setup = Setup::new(&model);
        let (old, _) = setup.encode("text", "The first text, which others take the place of.", false).unwrap();
        let beside = old.id.replacement_name();
        let (part, _) = setup.encode(&beside, &TEXT[..90], true).unwrap();
        let (replaced, _) = setup.replace("text", TEXT).unwrap();
        assert_eq!((replaced.id, setup.text(&replaced)), (part.id, TEXT.to_string()), "{kind}: gone on with");

        let beside = replaced.id.replacement_name();
        let (left, _) =
            setup.encode(&beside, "A text of yesterday, of which nobody wants to know any more.", true).unwrap();
        let (third, _) = setup.replace("text", "The third text is this one, and the last.").unwrap();
        assert!(third.id > left.id, "{kind}");
        assert_eq!(setup.memory.documents(setup.collection.id).unwrap(), [third], "{kind}");
    }
}
