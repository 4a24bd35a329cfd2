//! The last conversation: what `landmarkdb ask --continue` continues.
//!
//! It is a small file in the user's folder of program state. Data directories are never written to by a question, and a service has
//! no conversations: a follow-up reads what was said before as a part of its prompt.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use landmarkdb::{CollectionInfo, DocumentInfo};

use super::config::Config;
use super::error::CliError;
use super::target::Target;

const FOLDER_NAME: &str = "landmarkdb";
const FILE_NAME: &str = "conversation.json";

/// A conversation about documents. Its fields are those of the file.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Conversation {
    pub(super) place: Target,
    /// As `--model` takes it.
    pub(super) model: String,
    pub(super) collection: String,
    pub(super) documents: Vec<Document>,
    pub(super) system: Option<String>,
    /// Questions, each with its answer.
    pub(super) turns: Vec<(String, String)>,
}

/// A document as it was when the conversation was last about it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Document {
    name: String,
    id: u64,
    tokens: u64,
    sealed: bool,
}

impl Conversation {
    /// The last one.
    pub(super) fn last() -> Result<Self, CliError> {
        let path = path().ok_or(CliError::NoConversation)?;
        Self::read(&path)
    }

    fn read(path: &Path) -> Result<Self, CliError> {
        let bytes = std::fs::read(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CliError::NoConversation,
            _ => CliError::ReadText { path: path.into(), source },
        })?;
        serde_json::from_slice(&bytes).map_err(|_| CliError::DamagedConversation { path: path.into() })
    }

    /// Keeps it as the last one. Without a folder to keep it in there is none to continue.
    pub(super) fn keep(&self) -> io::Result<()> {
        match path() {
            Some(path) => self.write(&path),
            None => Ok(()),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        // Such a file is its owner's alone to read, as questions and answers should be.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.persist(path)?;
        Ok(())
    }

    /// The settings that are typed, at the place of the conversation.
    pub(super) fn config(&self, typed: &Config) -> Result<Config, CliError> {
        if typed.target_typed && typed.target()?.absolute() != self.place {
            return Err(CliError::ConversationElsewhere { place: self.place.clone() });
        }
        Ok(typed.at(self.place.clone()))
    }

    /// One question more, of documents as they are now.
    pub(super) fn add(&mut self, question: &str, answer: &str, documents: &[DocumentInfo]) {
        self.documents = documents.iter().map(Document::new).collect();
        self.turns.push((question.trim().into(), answer.into()));
    }

    /// The documents as they are typed.
    pub(super) fn names(&self) -> Vec<String> {
        self.documents.iter().map(|document| format!("{}/{}", self.collection, document.name)).collect()
    }

    /// Refuses documents that are others now, whatever their names say: the conversation was not about these.
    pub(super) fn check(&self, found: &[DocumentInfo]) -> Result<(), CliError> {
        let same = |(was, is): (&Document, &DocumentInfo)| {
            // An encoding that goes on makes a document longer and leaves what was read as it was.
            was.id == is.id.0 && (was.tokens == is.tokens || (!was.sealed && is.tokens > was.tokens))
        };
        match self.documents.iter().zip(found).find(|pair| !same(*pair)) {
            Some((was, _)) => {
                let document = format!("{}/{}", self.collection, was.name);
                Err(CliError::DocumentReplaced { document })
            }
            None => Ok(()),
        }
    }
}

impl Document {
    fn new(document: &DocumentInfo) -> Self {
        Document { name: document.name.clone(), id: document.id.0, tokens: document.tokens, sealed: document.sealed }
    }
}

/// A conversation without a question yet.
pub(super) fn begin(place: &Target, model: &str, collection: &CollectionInfo, system: Option<&str>) -> Conversation {
    // A path means the same from elsewhere; a name of a model that is none stays.
    let of_path = landmarkdb_llm::resolve(model).is_ok_and(|path| path == Path::new(model));
    let absolute = std::fs::canonicalize(model).ok().filter(|_| of_path);
    let absolute = absolute.and_then(|path| path.to_str().map(str::to_string));
    Conversation {
        place: place.absolute(),
        model: absolute.unwrap_or_else(|| model.into()),
        collection: collection.spec.name.clone(),
        documents: Vec::new(),
        system: system.map(str::to_string),
        turns: Vec::new(),
    }
}

/// Where the last conversation is kept; none where the system names no such folder of the user.
fn path() -> Option<PathBuf> {
    let folder = dirs::state_dir().or_else(dirs::cache_dir)?;
    Some(folder.join(FOLDER_NAME).join(FILE_NAME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::{CollectionId, DocumentId};

    fn document(id: u64, tokens: u64, sealed: bool) -> DocumentInfo {
        DocumentInfo {
            id: DocumentId(id),
            collection: CollectionId(1),
            name: "emma".into(),
            sealed,
            blocks: 0,
            tail_tokens: tokens as u32,
            tokens,
            text_bytes: 0,
            stored_bytes: 0,
            state_tokens: None,
        }
    }

    fn conversation(document: &DocumentInfo) -> Conversation {
        Conversation {
            place: Target::Data("/d".into()),
            model: "smollm2".into(),
            collection: "books".into(),
            documents: vec![Document::new(document)],
            system: None,
            turns: vec![("Who?".into(), "Emma.".into())],
        }
    }

    #[test]
    fn a_conversation_is_the_same_after_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/conversation.json");
        assert!(matches!(Conversation::read(&path), Err(CliError::NoConversation)));
        let conversation = conversation(&document(3, 9, true));
        conversation.write(&path).unwrap();
        assert_eq!(Conversation::read(&path).unwrap(), conversation);
        assert_eq!(conversation.names(), ["books/emma"]);
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(Conversation::read(&path), Err(CliError::DamagedConversation { .. })));
    }

    #[test]
    fn a_document_that_is_another_now_is_refused() {
        let same = |was: DocumentInfo, is: DocumentInfo| conversation(&was).check(&[is]).is_ok();
        assert!(same(document(3, 9, true), document(3, 9, true)));
        assert!(!same(document(3, 9, true), document(4, 9, true)));
        assert!(!same(document(3, 9, true), document(3, 10, true)));
        assert!(same(document(3, 9, false), document(3, 10, true)), "its encoding went on");
        assert!(!same(document(3, 9, false), document(3, 8, false)));
    }
}
