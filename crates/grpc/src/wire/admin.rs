//! Messages of the Admin service: statistics, health, verification, deletion.

use super::error::cut;
use super::v1;
use super::v1::health::State;
use landmarkdb::{Deleted, DocumentId, Fault, Health, Stats, VerifyReport};

/// Both sides have the same fields under the same names; behind the semicolon, those that are messages.
macro_rules! same_fields {
    ($type:ident, $wire:path, $($field:ident),+ $(; $message:ident)?) => {
        impl From<$type> for $wire {
            fn from(value: $type) -> Self {
                Self { $($field: value.$field.into(),)+ $($message: Some(value.$message.into()))? }
            }
        }

        impl From<$wire> for $type {
            fn from(wire: $wire) -> Self {
                Self { $($field: wire.$field.into(),)+ $($message: wire.$message.unwrap_or_default().into())? }
            }
        }
    };
}

same_fields!(Deleted, v1::DeleteDocumentReply, blocks, freed_bytes);

same_fields!(
    Stats,
    v1::Stats,
    collections,
    documents,
    blocks,
    tokens,
    live_bytes,
    segment_bytes,
    segments,
    catalog_bytes,
    set_aside_bytes,
    index_bytes,
    index_bytes_max,
    index_loads,
    index_evictions,
    lookups,
    attends,
    appended_blocks,
    fetched_blocks;
    health
);

impl From<Health> for v1::Health {
    fn from(health: Health) -> Self {
        let (state, reason) = match health {
            Health::Serving => (State::Serving, String::new()),
            Health::ReadOnly { reason } => (State::ReadOnly, reason),
            Health::Failed { reason } => (State::Failed, reason),
            // It is unknown what a state without a number serves.
            other => (State::Failed, format!("{other:?}")),
        };
        v1::Health { state: state.into(), reason: cut(reason) }
    }
}

/// A service that says nothing is one of before there was anything to say.
impl From<v1::Health> for Health {
    fn from(wire: v1::Health) -> Self {
        match wire.state() {
            State::Unspecified | State::Serving => Health::Serving,
            State::ReadOnly => Health::ReadOnly { reason: wire.reason },
            State::Failed => Health::Failed { reason: wire.reason },
        }
    }
}

impl From<Fault> for v1::verify_report::Fault {
    fn from(fault: Fault) -> Self {
        v1::verify_report::Fault {
            document: fault.document.map(|document| document.0),
            block: fault.block.map(v1::BlockId::from),
            problem: fault.problem,
        }
    }
}

impl From<v1::verify_report::Fault> for Fault {
    fn from(wire: v1::verify_report::Fault) -> Self {
        Fault { document: wire.document.map(DocumentId), block: wire.block.map(Into::into), problem: wire.problem }
    }
}

impl From<VerifyReport> for v1::VerifyReport {
    fn from(report: VerifyReport) -> Self {
        let faults = report.faults.into_iter().map(Into::into).collect();
        let VerifyReport { documents, blocks, bytes, set_aside_bytes, .. } = report;
        v1::VerifyReport { documents, blocks, bytes, faults, set_aside_bytes }
    }
}

impl From<v1::VerifyReport> for VerifyReport {
    fn from(wire: v1::VerifyReport) -> Self {
        let faults = wire.faults.into_iter().map(Into::into).collect();
        let v1::VerifyReport { documents, blocks, bytes, set_aside_bytes, .. } = wire;
        VerifyReport { documents, blocks, bytes, set_aside_bytes, faults }
    }
}
