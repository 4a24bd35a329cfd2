//! Messages of `Admin.Tune`.

use super::convert::{bytes_of_f32, f32_of_bytes, required};
use super::error::cut;
use super::spec::{engine, faiss_index};
use super::v1;
use landmarkdb::{
    CollectionId, Measured, MemoryError, Result, TuneIndex, TuneQuery, TuneReport, TuneRequest, TuneStep,
};

impl From<&TuneRequest> for v1::TuneRequest {
    fn from(request: &TuneRequest) -> Self {
        let query = |query: &TuneQuery| v1::TuneQuery {
            layer: query.layer,
            distance: query.distance,
            values: bytes_of_f32(&query.values),
        };
        let index = |index: &TuneIndex| v1::TuneIndex { factory: index.factory.clone(), effort: index.effort };
        v1::TuneRequest {
            collection: request.collection.0,
            queries: request.queries.iter().map(query).collect(),
            top_k: request.top_k,
            recall: request.recall,
            lookups: request.lookups,
            indexes: request.indexes.iter().map(index).collect(),
        }
    }
}

impl TryFrom<v1::TuneRequest> for TuneRequest {
    type Error = MemoryError;

    fn try_from(wire: v1::TuneRequest) -> Result<Self> {
        let query = |v1::TuneQuery { layer, distance, values }| {
            Ok(TuneQuery { layer, distance, values: f32_of_bytes("queries.values", &values)? })
        };
        let index = |v1::TuneIndex { factory, effort }| TuneIndex { factory, effort };
        Ok(TuneRequest {
            collection: CollectionId(wire.collection),
            queries: wire.queries.into_iter().map(query).collect::<Result<_>>()?,
            top_k: wire.top_k,
            recall: wire.recall,
            lookups: wire.lookups,
            indexes: wire.indexes.into_iter().map(index).collect(),
        })
    }
}

impl v1::TuneStep {
    /// The message of a step. `None` for a step that has none yet: a stream of replies may skip it.
    pub fn of(step: &TuneStep) -> Option<Self> {
        let (of, blocks, left_out) = match step {
            TuneStep::Measuring { engine, blocks } => (engine, *blocks, None),
            TuneStep::LeftOut { engine, reason } => (engine, 0, Some(cut(reason.clone()))),
            _ => return None,
        };
        Some(v1::TuneStep { engine: of.number(), faiss: faiss_index(of), blocks, left_out })
    }
}

impl TryFrom<v1::TuneStep> for TuneStep {
    type Error = MemoryError;

    fn try_from(wire: v1::TuneStep) -> Result<Self> {
        let engine = engine(wire.engine, wire.faiss)?;
        Ok(match wire.left_out {
            None => TuneStep::Measuring { engine, blocks: wire.blocks },
            Some(reason) => TuneStep::LeftOut { engine, reason },
        })
    }
}

impl From<TuneReport> for v1::TuneReport {
    fn from(report: TuneReport) -> Self {
        let measured = |of: Measured| v1::Measured {
            engine: of.engine.number(),
            faiss: faiss_index(&of.engine),
            recall: of.recall,
            p50_us: of.p50_us,
            p99_us: of.p99_us,
            index_bytes: of.index_bytes,
        };
        v1::TuneReport {
            document: Some(report.document.into()),
            engine: report.engine.number(),
            faiss: faiss_index(&report.engine),
            measured: report.measured.into_iter().map(measured).collect(),
        }
    }
}

impl TryFrom<v1::TuneReport> for TuneReport {
    type Error = MemoryError;

    fn try_from(wire: v1::TuneReport) -> Result<Self> {
        let measured = |of: v1::Measured| {
            Ok(Measured {
                engine: engine(of.engine, of.faiss)?,
                recall: of.recall,
                p50_us: of.p50_us,
                p99_us: of.p99_us,
                index_bytes: of.index_bytes,
            })
        };
        Ok(TuneReport {
            document: required("document", wire.document)?.into(),
            engine: engine(wire.engine, wire.faiss)?,
            measured: wire.measured.into_iter().map(measured).collect::<Result<_>>()?,
        })
    }
}
