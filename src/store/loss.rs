//! What did damage take away that a rebuild cannot see? A manifest or a tombstone that is gone leaves an older record in
//! charge: an answer that looks right and is not. So a rebuild works out which records are missing, and marks the
//! documents that they may concern; those are not read until `repair` settles them.
//!
//! Groups are numbered without gaps and name their manifests, tombstones and collections. A record that is named and not
//! there is lost. A number that is not there is a lost end of a group: what lies before it usually says all that the group
//! held; if not, any document may be concerned. Segments of formats 1 to 3 say less: there only blocks that are newer than
//! their document's manifest betray a lost one.

use std::collections::BTreeMap;

use super::catalog::{self, Catalog, key};
use super::document::Manifest;
use super::error::StoreError;
use super::ledger::{Damage, Doubt, Entry, NAMES};
use super::place;
use super::record::{CollectionEntry, Content, DocumentEntry, GroupEntry, Locator, Named, Tombstone};
use crate::types::{BlockId, CollectionId, DocumentId};

/// Something that was written, acknowledged, and is not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    Record(Named),
    /// Records of groups below this number, of any document.
    Any {
        before: u64,
    },
}

/// What lies between the ends of two groups that are there.
#[derive(Default)]
struct Stretch<'a> {
    entries: Vec<&'a Entry>,
    gap_bytes: u64,
}

/// What a segment has lost of the groups between number `before`, if that is known, and `following`, the first number of
/// the next segment.
pub(super) fn of_segment(
    entries: &[Entry],
    damages: &[Damage],
    is_salted: bool,
    before: Option<u64>,
    following: Option<u64>,
) -> Vec<Loss> {
    let mut losses = Vec::new();
    if !is_salted {
        return losses;
    }
    let (mut before, mut stretch) = (before, Stretch::default());
    // A damaged header takes no record away.
    let mut gaps = damages.iter().filter(|gap| gap.offset > 0).peekable();
    for entry in entries {
        while let Some(gap) = gaps.next_if(|gap| gap.offset < entry.locator.offset) {
            stretch.gap_bytes += gap.bytes;
        }
        let Content::Group(end) = &entry.content else {
            stretch.entries.push(entry);
            continue;
        };
        stretch.losses(before, end, &mut losses);
        (before, stretch) = (Some(end.number), Stretch::default());
    }
    stretch.gap_bytes += gaps.map(|gap| gap.bytes).sum::<u64>();
    if let Some(number) = following {
        stretch.losses(before, &GroupEntry { number, named: Vec::new() }, &mut losses);
    } else if stretch.gap_bytes > 0 {
        losses.push(Loss::Any { before: u64::MAX });
    }
    losses
}

impl Stretch<'_> {
    /// `end` is the end of a group that is there.
    fn losses(&self, before: Option<u64>, end: &GroupEntry, losses: &mut Vec<Loss>) {
        let named = |entry: &&Entry| entry.content.named(entry.locator.sequence);
        let found: Vec<Named> = self.entries.iter().filter_map(named).collect();
        let lost = end.named.iter().filter(|named| !found.contains(named));
        losses.extend(lost.copied().map(Loss::Record));

        let Some(before) = before else {
            if self.gap_bytes > 0 {
                losses.push(Loss::Any { before: end.number });
            }
            return;
        };
        match end.number.saturating_sub(before + 1) {
            0 => {}
            1 => losses.extend(self.without_end(before + 1, end, &found)),
            _ => losses.push(Loss::Any { before: end.number }),
        }
    }

    /// What the one group is known to have lost whose end is gone.
    fn without_end(&self, number: u64, following: &GroupEntry, found: &[Named]) -> Option<Loss> {
        // First written there, and so of one thing: a manifest with its blocks, one other record, or the two of a replacement.
        let first_written = self.entries.iter().filter(|entry| entry.locator.sequence == number);
        let first_written: Vec<&Content> = first_written.map(|entry| &entry.content).collect();
        let of_it = match first_written[..] {
            [Content::Block(id), ..] => {
                let has_manifest = first_written.iter().any(|content| !matches!(content, Content::Block(_)));
                return (!has_manifest).then_some(Loss::Record(Named::Document(id.document, number)));
            }
            // Alone it may be half of a replacement.
            [half @ (Content::Document(_) | Content::Tombstone(_))] => half.named(number).into_iter().collect(),
            [] => found.iter().filter(|named| !following.named.contains(named)).copied().collect(),
            _ => return None,
        };
        let end = GroupEntry { number, named: of_it };
        (self.gap_bytes != end.record_bytes()).then_some(Loss::Any { before: following.number })
    }
}

/// How the reason of a doubt ends.
pub(super) const ADVICE: &str = ": repair the directory";

/// Why things are in doubt.
#[derive(Default)]
struct Doubts(BTreeMap<DocumentId, Doubt>);

impl Doubts {
    fn document(&mut self, document: DocumentId, lost: &str) {
        let reason =
            format!("{lost} of document {document} is lost to damage, so what is left of it may be outdated{ADVICE}");
        self.0.entry(document).or_insert(Doubt { document, reason });
    }

    /// What is left of a document is older than what is lost. One under a replacement's name may have had another by then.
    fn outdated(&mut self, manifest: &Manifest) {
        self.document(manifest.id, "the newest manifest");
        if DocumentId::of_replacement_name(&manifest.name).is_some() {
            self.names(&format!("the newest manifest of document {}", manifest.id));
        }
    }

    fn names(&mut self, lost: &str) {
        let reason = format!("{lost} is lost to damage, so a name that is not found may have been given out{ADVICE}");
        self.0.entry(NAMES).or_insert(Doubt { document: NAMES, reason });
    }
}

/// Which documents `losses` put in doubt, and which blocks do that are newer than the manifest of their document and not
/// covered by it, given what the catalog knows when all that was found is entered. And whether they put names in doubt: what
/// had one of which no record is left.
pub(super) fn doubts(catalog: &dyn Catalog, losses: &[Loss], blocks: &[&Entry]) -> Result<Vec<Doubt>, StoreError> {
    let mut doubts = Doubts::default();
    let manifest = |document| catalog::get::<(Locator, DocumentEntry)>(catalog, &key::document(document));
    let collection = |id: CollectionId| catalog::get::<(Locator, CollectionEntry)>(catalog, &key::collection(id));
    for loss in losses {
        match *loss {
            Loss::Record(Named::Document(document, sequence)) => {
                let found = manifest(document)?;
                if found.is_none() && !is_deleted(catalog, document)? {
                    doubts.document(document, "the manifest");
                    doubts.names(&format!("the manifest of document {document}"));
                } else if let Some((_, left)) = found.filter(|(found, _)| found.sequence < sequence) {
                    doubts.outdated(&left.manifest);
                }
            }
            Loss::Record(Named::Tombstone(document, sequence)) => {
                // Repair gives a document that may have been deleted a newer manifest.
                if manifest(document)?.is_some_and(|(found, _)| found.sequence < sequence) {
                    doubts.document(document, "the deletion");
                }
            }
            // An older record of a collection differs in the engine at most, which changes no answer.
            Loss::Record(Named::Collection(id, _)) => {
                if collection(id)?.is_none() {
                    doubts.names(&format!("the record of collection {id}"));
                }
            }
            Loss::Any { before } => {
                doubts.names("perhaps the record of a document or a collection");
                for pair in catalog::scan::<(Locator, DocumentEntry)>(catalog, key::DOCUMENTS) {
                    let (_, (found, entry)) = pair?;
                    if found.sequence < before {
                        doubts.document(entry.manifest.id, "perhaps a newer manifest or the deletion");
                    }
                }
            }
        }
    }
    for entry in blocks {
        let Content::Block(id) = entry.content else { continue };
        match manifest(id.document)? {
            Some((found, document))
                if entry.locator.sequence > found.sequence
                    && !document.accepts(id.index, entry.locator.tokens, entry.locator.sequence) =>
            {
                doubts.outdated(&document.manifest);
            }
            None if !is_deleted(catalog, id.document)? => {
                doubts.document(id.document, "the manifest");
                doubts.names(&format!("the manifest of document {}", id.document));
            }
            _ => {}
        }
    }
    Ok(doubts.0.into_values().collect())
}

/// Whether a record is a part of a state that a newer manifest does not have: nothing may have come in its place.
fn is_of_earlier_state(locator: &Locator, place: BlockId, manifest: Option<(Locator, DocumentEntry)>) -> bool {
    let is_outdated = |(newest, entry): (Locator, DocumentEntry)| {
        newest.sequence >= locator.sequence && !entry.accepts(place.index, locator.tokens, locator.sequence)
    };
    place::part_at(place.index).is_some() && manifest.is_some_and(is_outdated)
}

fn is_deleted(catalog: &dyn Catalog, document: DocumentId) -> Result<bool, StoreError> {
    Ok(catalog::get::<(Locator, Tombstone)>(catalog, &key::tombstone(document))?.is_some())
}

/// Whether the catalog can tell that a record which it does not refer to is not needed any more.
pub(super) fn is_superseded(catalog: &dyn Catalog, entry: &Entry) -> Result<bool, StoreError> {
    let manifest = |document| catalog::get::<(Locator, DocumentEntry)>(catalog, &key::document(document));
    Ok(match &entry.content {
        Content::Group(_) | Content::Tombstone(_) | Content::Collection(..) => true,
        Content::Document(old) => {
            let document = old.manifest.id;
            is_deleted(catalog, document)?
                || manifest(document)?.is_some_and(|(now, _)| now.age() > entry.locator.age())
        }
        Content::Block(id) => {
            let in_doubt = catalog::get::<Doubt>(catalog, &key::doubt(id.document))?.is_some();
            is_deleted(catalog, id.document)?
                || !in_doubt
                    && (catalog::get::<Locator>(catalog, &key::block(*id))?.is_some()
                        || is_of_earlier_state(&entry.locator, *id, manifest(id.document)?))
        }
    })
}
