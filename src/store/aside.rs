//! What was set aside, and might it have been acknowledged? A torn end is an append that was not acknowledged, unless a whole
//! group lies in it: then its last flush may have been over, and damage came later.

use super::error::StoreError;
use super::record::{Kind, RECORD_HEADER_BYTES, RECORD_MAGIC, RecordHeader, Salt};
use super::segment::Torn;
use super::state::Store;
use super::verify::VerifyReport;

impl Store {
    /// What torn ends cut off, in any order.
    pub fn torn(&self) -> Result<Vec<Torn>, StoreError> {
        self.handles.folder().torn().map_err(StoreError::io("list what was set aside"))
    }

    /// Discards what torn ends cut off.
    pub fn discard_torn(&self) -> Result<(), StoreError> {
        self.handles.folder().discard_torn().map_err(StoreError::io("remove what was set aside"))
    }

    pub(super) fn verify_set_aside(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        for torn in self.torn()? {
            report.set_aside_bytes += torn.bytes;
            if torn.whole {
                continue;
            }
            let bytes = self.handles.folder().read_torn(&torn).map_err(StoreError::io("read what was set aside"))?;
            if self.may_be_acknowledged(&torn, &bytes) {
                let problem = format!(
                    "{} bytes that were cut off segment {} at {} hold a whole group: it may have been acknowledged, append \
                     again what is missing, then let a repair discard them",
                    torn.bytes, torn.segment, torn.offset
                );
                report.fault(None, None, problem);
            }
        }
        for (torn, bytes) in self.handles.folder().passed_over() {
            if self.may_be_acknowledged(&torn, &bytes) {
                let problem = format!(
                    "the last {} bytes of segment {} are damaged and hold a whole group: it may have been acknowledged, open \
                     the directory for writing, which sets them aside, and append again what is missing",
                    torn.bytes, torn.segment
                );
                report.fault(None, None, problem);
            }
        }
        Ok(())
    }

    fn may_be_acknowledged(&self, torn: &Torn, bytes: &[u8]) -> bool {
        let salts = [Salt::of(self.handles.folder().directory(), torn.segment), Salt::NONE];
        salts.into_iter().any(|salt| ends_group(torn, bytes, salt))
    }
}

/// Whether the whole record that ends a group lies in the bytes.
fn ends_group(torn: &Torn, bytes: &[u8], salt: Salt) -> bool {
    bytes.windows(RECORD_HEADER_BYTES).enumerate().any(|(at, header)| {
        let Some(header) = header.starts_with(&RECORD_MAGIC).then(|| header.try_into().ok()).flatten() else {
            return false;
        };
        let Some(header) = RecordHeader::check(header, salt, torn.segment, torn.offset + at as u64) else {
            return false;
        };
        let is_end = header.commit && (salt == Salt::NONE || header.kind == Kind::Group);
        let record = usize::try_from(header.parts.record_bytes()).ok().and_then(|len| bytes.get(at..)?.get(..len));
        is_end && record.is_some_and(|record| header.damaged_part(salt, record).is_none())
    })
}
