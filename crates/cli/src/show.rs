//! `landmarkdb show`: one document.

use std::io::{self, Write};

use serde::Serialize;

use super::Context;
use super::error::CliError;
use super::open::DocumentName;
use super::output::{Report, count, plural, size, write_facts};
use super::report::{CollectionReport, DocumentReport};

/// Describe one document and the collection it is in.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  landmarkdb show persuasion
  landmarkdb show books/persuasion
  landmarkdb show books/persuasion --json | jq .document.stored_bytes
")]
pub(super) struct Args {
    /// NAME in the collection given by --collection, or COLLECTION/NAME.
    doc: String,
}

/// One document and its collection.
#[derive(Debug, Serialize)]
struct Description {
    document: DocumentReport,
    collection: CollectionReport,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let memory = context.memory()?;
    let (collection, document) = DocumentName::new(&args.doc, &context.config).find(memory.as_ref())?;
    context.output.print(&Description {
        document: DocumentReport::new(&collection, &document),
        collection: CollectionReport::new(&collection),
    })
}

impl Report for Description {
    fn human(&self, to: &mut dyn Write) -> io::Result<()> {
        let Description { document, collection } = self;
        let per_token = match document.tokens {
            0 => String::new(),
            tokens => format!(" ({} a token)", size(document.stored_bytes / tokens)),
        };
        write_facts(
            to,
            &[
                ("document", format!("{}/{}", document.collection, document.name)),
                ("id", document.id.to_string()),
                ("state", document.state().into()),
                ("tokens", count(document.tokens)),
                (
                    "blocks",
                    format!(
                        "{} of {}, and a tail of {}",
                        count(document.blocks),
                        plural(collection.block_tokens.into(), "token"),
                        plural(document.tail_tokens.into(), "token"),
                    ),
                ),
                ("text", size(document.text_bytes)),
                ("on disk", format!("{}{per_token}", size(document.stored_bytes))),
                ("model", collection.model.clone()),
                (
                    "shape",
                    format!(
                        "{}, {}, {}, head dim {}",
                        plural(collection.layers.into(), "layer"),
                        plural(collection.query_heads.into(), "query head"),
                        plural(collection.kv_heads.into(), "KV head"),
                        collection.head_dim
                    ),
                ),
                ("keys", format!("{} in {}, engine {}", collection.key_rule, collection.key_dtype, collection.engine)),
                ("payload", collection.payload_dtype.clone()),
                ("fingerprint", collection.fingerprint.clone()),
            ],
        )
    }
}
