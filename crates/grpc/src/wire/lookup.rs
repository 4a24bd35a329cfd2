//! Messages of lookup and attend. Requests go out by reference, since a caller may have to send one twice.

use super::convert::{FromNumber, bytes_of_f32, f32_of_bytes, invalid, required};
use super::v1;
use super::v1::attend_outcome::Outcome;
use landmarkdb::{
    AttendRequest, Attended, BlockId, BlockRange, BlockScore, CollectionId, DocumentId, Granularity, Hits,
    LookupRequest, MemoryError, Normalisation, Placement, Result,
};

impl From<&LookupRequest> for v1::LookupRequest {
    fn from(request: &LookupRequest) -> Self {
        v1::LookupRequest {
            collection: request.collection.0,
            layer: request.layer,
            queries: bytes_of_f32(&request.queries),
            distances: request.distances.clone(),
            scope: request.scope.iter().cloned().map(v1::BlockRange::from).collect(),
            top_k: request.top_k,
            block_score: v1::BlockScore::from(request.block_score).into(),
            granularity: v1::Granularity::from(request.granularity).into(),
        }
    }
}

impl TryFrom<v1::LookupRequest> for LookupRequest {
    type Error = MemoryError;

    fn try_from(wire: v1::LookupRequest) -> Result<Self> {
        Ok(LookupRequest {
            collection: CollectionId(wire.collection),
            layer: wire.layer,
            queries: f32_of_bytes("queries", &wire.queries)?,
            distances: wire.distances,
            scope: wire.scope.into_iter().map(BlockRange::from).collect(),
            top_k: wire.top_k,
            block_score: BlockScore::from_number("block_score", wire.block_score)?,
            granularity: Granularity::from_number("granularity", wire.granularity)?,
        })
    }
}

impl From<&AttendRequest> for v1::AttendRequest {
    fn from(request: &AttendRequest) -> Self {
        v1::AttendRequest {
            lookup: Some((&request.lookup).into()),
            normalisation: v1::Normalisation::from(request.normalisation).into(),
            original_within_tokens: match request.placement {
                Placement::Original { within_tokens } => Some(within_tokens),
                _ => None,
            },
            without_first_tokens: request.without_first_tokens,
        }
    }
}

impl TryFrom<v1::AttendRequest> for AttendRequest {
    type Error = MemoryError;

    fn try_from(wire: v1::AttendRequest) -> Result<Self> {
        Ok(AttendRequest {
            lookup: required("lookup", wire.lookup)?.try_into()?,
            normalisation: Normalisation::from_number("normalisation", wire.normalisation)?,
            placement: match wire.original_within_tokens {
                Some(within_tokens) => Placement::Original { within_tokens },
                None => Placement::Slots,
            },
            without_first_tokens: wire.without_first_tokens,
        })
    }
}

impl From<Hits> for v1::LookupReply {
    fn from(hits: Hits) -> Self {
        v1::LookupReply {
            rows: hits.rows,
            k: hits.k,
            documents: hits.blocks.iter().map(|block| block.document.0).collect(),
            indices: hits.blocks.iter().map(|block| block.index).collect(),
            scores: bytes_of_f32(&hits.scores),
        }
    }
}

impl TryFrom<v1::LookupReply> for Hits {
    type Error = MemoryError;

    fn try_from(wire: v1::LookupReply) -> Result<Self> {
        let scores = f32_of_bytes("scores", &wire.scores)?;
        let hits = wire.rows as u64 * wire.k as u64;
        for (field, count) in
            [("documents", wire.documents.len()), ("indices", wire.indices.len()), ("scores", scores.len())]
        {
            if count as u64 != hits {
                return Err(invalid(field, format!("rows x k = {hits} entries"), count));
            }
        }
        let blocks = wire.documents.into_iter().zip(wire.indices);
        let blocks = blocks.map(|(document, index)| BlockId { document: DocumentId(document), index }).collect();
        Ok(Hits { rows: wire.rows, k: wire.k, blocks, scores })
    }
}

impl From<Attended> for v1::AttendReply {
    fn from(attended: Attended) -> Self {
        v1::AttendReply {
            out: bytes_of_f32(&attended.out),
            lse: bytes_of_f32(&attended.lse),
            hits: Some(attended.hits.into()),
        }
    }
}

impl From<Result<Attended>> for v1::AttendOutcome {
    fn from(outcome: Result<Attended>) -> Self {
        let outcome = match outcome {
            Ok(attended) => Outcome::Reply(attended.into()),
            Err(error) => Outcome::Error((&error).into()),
        };
        v1::AttendOutcome { outcome: Some(outcome) }
    }
}

/// An outcome is an answer, or the error that the memory gave.
impl TryFrom<v1::AttendOutcome> for Attended {
    type Error = MemoryError;

    fn try_from(wire: v1::AttendOutcome) -> Result<Self> {
        match required("outcome", wire.outcome)? {
            Outcome::Reply(reply) => reply.try_into(),
            Outcome::Error(error) => Err(error.try_into()?),
        }
    }
}

impl TryFrom<v1::AttendReply> for Attended {
    type Error = MemoryError;

    fn try_from(wire: v1::AttendReply) -> Result<Self> {
        Ok(Attended {
            out: f32_of_bytes("out", &wire.out)?,
            lse: f32_of_bytes("lse", &wire.lse)?,
            hits: required("hits", wire.hits)?.try_into()?,
        })
    }
}
