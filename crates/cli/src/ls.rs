//! `landmarkdb ls`: what exists.

use std::io::{self, Write};

use serde::Serialize;

use landmarkdb::{Entity, MemoryError};

use super::Context;
use super::error::CliError;
use super::output::{Report, count, plural, size, table, write_table};
use super::report::{CollectionReport, DocumentReport};

/// List collections and documents.
///
/// --collection NAME lists one collection only.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb ls
  landmarkdb ls --collection books
  landmarkdb ls --json | jq '.documents[] | select(.sealed | not) | .name'
")]
pub(super) struct Args {}

/// What exists.
#[derive(Debug, Serialize)]
struct Listing {
    collections: Vec<CollectionReport>,
    /// Of all listed collections, by name within each.
    documents: Vec<DocumentReport>,
}

pub(super) fn run(_: &Args, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let mut collections = memory.collections()?;
    if context.config.collection_typed {
        let name = &context.config.collection;
        collections.retain(|collection| collection.spec.name == *name);
        if collections.is_empty() {
            return Err(MemoryError::NotFound { entity: Entity::Collection, id: name.clone() }.into());
        }
    }
    let mut listing = Listing { collections: Vec::new(), documents: Vec::new() };
    for collection in &collections {
        let documents = memory.documents(collection.id)?;
        listing.collections.push(CollectionReport::new(collection));
        listing.documents.extend(documents.iter().map(|document| DocumentReport::new(collection, document)));
    }
    context.output.print(&listing)
}

impl Report for Listing {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        if self.collections.is_empty() {
            return writeln!(to, "no collections yet: `landmarkdb encode` makes one");
        }
        let mut collections = table(["COLLECTION", "MODEL", "KEYS", "ENGINE", "PAYLOAD", "BLOCK>", "DOCUMENTS>"]);
        for collection in &self.collections {
            collections.add_row([
                collection.name.clone(),
                collection.model.clone(),
                format!("{} {}", collection.key_rule, collection.key_dtype),
                collection.engine.clone(),
                collection.payload_dtype.clone(),
                plural(collection.block_tokens.into(), "token"),
                count(collection.documents),
            ]);
        }
        write_table(to, &collections)?;
        if self.documents.is_empty() {
            return Ok(());
        }
        let mut documents = table(["DOCUMENT", "STATE", "BLOCKS>", "TOKENS>", "TEXT>", "ON DISK>"]);
        for document in &self.documents {
            documents.add_row([
                format!("{}/{}", document.collection, document.name),
                document.state().into(),
                count(document.blocks),
                count(document.tokens),
                size(document.text_bytes),
                size(document.stored_bytes),
            ]);
        }
        writeln!(to)?;
        write_table(to, &documents)
    }
}
