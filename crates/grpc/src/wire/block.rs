//! Messages with blocks: append, fetch, list.

use super::convert::{FromNumber, required, tensor};
use super::v1;
use landmarkdb::{
    AppendRequest, BlockId, BlockInfo, BlockRange, BlockText, DType, DocumentId, FetchRequest, MemoryError, NewBlock,
    Result, StoredBlock,
};

impl From<BlockId> for v1::BlockId {
    fn from(id: BlockId) -> Self {
        v1::BlockId { document: id.document.0, index: id.index }
    }
}

impl From<v1::BlockId> for BlockId {
    fn from(wire: v1::BlockId) -> Self {
        BlockId { document: DocumentId(wire.document), index: wire.index }
    }
}

impl From<BlockRange> for v1::BlockRange {
    fn from(range: BlockRange) -> Self {
        v1::BlockRange { document: range.document.0, begin: range.blocks.start, end: range.blocks.end }
    }
}

impl From<v1::BlockRange> for BlockRange {
    fn from(wire: v1::BlockRange) -> Self {
        BlockRange { document: DocumentId(wire.document), blocks: wire.begin..wire.end }
    }
}

impl From<BlockText> for v1::BlockText {
    fn from(text: BlockText) -> Self {
        v1::BlockText { start: text.start, text: text.bytes.into(), offsets: text.offsets }
    }
}

impl From<v1::BlockText> for BlockText {
    fn from(wire: v1::BlockText) -> Self {
        BlockText { start: wire.start, bytes: wire.text.into(), offsets: wire.offsets }
    }
}

impl From<NewBlock> for v1::NewBlock {
    fn from(block: NewBlock) -> Self {
        v1::NewBlock {
            index: block.index,
            token_ids: block.token_ids,
            text: Some(block.text.into()),
            k: Some(block.k.into()),
            v: Some(block.v.into()),
        }
    }
}

impl TryFrom<v1::NewBlock> for NewBlock {
    type Error = MemoryError;

    fn try_from(wire: v1::NewBlock) -> Result<Self> {
        Ok(NewBlock {
            index: wire.index,
            token_ids: wire.token_ids,
            text: required("text", wire.text)?.into(),
            k: tensor("k", wire.k)?,
            v: tensor("v", wire.v)?,
        })
    }
}

impl From<AppendRequest> for v1::AppendRequest {
    fn from(request: AppendRequest) -> Self {
        let blocks = request.blocks.into_iter().map(v1::NewBlock::from).collect();
        v1::AppendRequest { document: request.document.0, blocks, expected_tokens: request.expected_tokens }
    }
}

impl TryFrom<v1::AppendRequest> for AppendRequest {
    type Error = MemoryError;

    fn try_from(wire: v1::AppendRequest) -> Result<Self> {
        let blocks = wire.blocks.into_iter().map(NewBlock::try_from).collect::<Result<_>>()?;
        Ok(AppendRequest { document: DocumentId(wire.document), blocks, expected_tokens: wire.expected_tokens })
    }
}

impl From<FetchRequest> for v1::FetchRequest {
    fn from(request: FetchRequest) -> Self {
        v1::FetchRequest {
            document: request.document.0,
            blocks: request.blocks,
            dtype: v1::Dtype::from(request.dtype).into(),
        }
    }
}

impl TryFrom<v1::FetchRequest> for FetchRequest {
    type Error = MemoryError;

    fn try_from(wire: v1::FetchRequest) -> Result<Self> {
        let dtype = DType::from_number("dtype", wire.dtype)?;
        Ok(FetchRequest { document: DocumentId(wire.document), blocks: wire.blocks, dtype })
    }
}

impl From<StoredBlock> for v1::FetchReply {
    fn from(block: StoredBlock) -> Self {
        v1::FetchReply {
            id: Some(block.id.into()),
            token_ids: block.token_ids,
            text: Some(block.text.into()),
            k: Some(block.k.into()),
            v: Some(block.v.into()),
        }
    }
}

impl TryFrom<v1::FetchReply> for StoredBlock {
    type Error = MemoryError;

    fn try_from(wire: v1::FetchReply) -> Result<Self> {
        Ok(StoredBlock {
            id: required("id", wire.id)?.into(),
            token_ids: wire.token_ids,
            text: required("text", wire.text)?.into(),
            k: tensor("k", wire.k)?,
            v: tensor("v", wire.v)?,
        })
    }
}

impl From<BlockInfo> for v1::BlockInfo {
    fn from(info: BlockInfo) -> Self {
        v1::BlockInfo {
            id: Some(info.id.into()),
            token_ids: info.token_ids,
            text: Some(info.text.into()),
            stored_bytes: info.stored_bytes,
        }
    }
}

impl TryFrom<v1::BlockInfo> for BlockInfo {
    type Error = MemoryError;

    fn try_from(wire: v1::BlockInfo) -> Result<Self> {
        Ok(BlockInfo {
            id: required("id", wire.id)?.into(),
            token_ids: wire.token_ids,
            text: required("text", wire.text)?.into(),
            stored_bytes: wire.stored_bytes,
        })
    }
}
