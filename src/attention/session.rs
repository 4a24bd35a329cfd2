//! The attention of one sequence over its window, its sink and a memory.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::api::{AttendRequest, BlockMemory, CollectionInfo, DocumentInfo, FetchRequest, LookupRequest, StoredBlock};
use crate::attention::at_hand::at_hand;
use crate::attention::cut::cut_block;
use crate::attention::lead::read_tails;
use crate::attention::local::{self, AtHand, HeadKv, HeadQueries, LocalAttention};
use crate::attention::settings::{CountedFrom, Retrieval, Window};
use crate::attention::trace::{Heads, Reads, Trace};
use crate::attention::window::{Lead, LocalWindow, Sink};
use crate::attention::writer::{NewTokens, Writer};
use crate::attention::{AttentionError, SequenceAttention};
use crate::shape::{ModelShape, Rotation};
use crate::types::{BlockRange, CollectionId, DType, DocumentId, KeyRule, Normalisation, Placement};

/// Attention of all layers of one sequence. The constructor decides what it sees:
///
/// | constructor | window | memory |
/// |---|---|---|
/// | [`full`](Self::full) | everything | none |
/// | [`window_only`](Self::window_only) | slides | none |
/// | [`write`](Self::write) | slides | appends the sequence's blocks to a document; retrieves from it if asked to |
/// | [`read`](Self::read) | begins with the end of the last document and grows; the tails of other open documents lie beside it | retrieves from the documents |
///
/// A window begins with a block, so every token is in the window or retrievable. [`CountedFrom`] says where it slides, and
/// whether that depends on how tokens are grouped into calls.
pub struct BlockAttention {
    shape: ModelShape,
    window: LocalWindow,
    /// How the window slides; `None`: everything from its base on stays visible.
    sliding: Option<Sliding>,
    normalisation: Normalisation,
    sink: Option<Sink>,
    /// Blocks of the text that the sink begins, if it is another than the window continues.
    sink_blocks: Option<u32>,
    lead: Lead,
    /// Tokens by which the longest tail of the lead begins before the window.
    overhang: usize,
    /// Tokens of each block at hand, in the order of [`local::AtHand`]; none where they are not told apart.
    segments: Vec<usize>,
    link: Option<Link>,
    pub(super) writer: Option<Writer>,
    /// Tokens that all layers have seen.
    position: usize,
    group: Group,
    trace: Trace,
}

/// The memory that blocks are retrieved from.
struct Link {
    memory: Arc<dyn BlockMemory>,
    collection: CollectionId,
    retrieval: Retrieval,
    /// Eligible blocks of documents that do not grow.
    fixed: Vec<BlockRange>,
    /// The document that is written, and its first eligible block.
    growing: Option<(DocumentId, u32)>,
}

/// See [`Window`].
#[derive(Clone, Copy)]
struct Sliding {
    /// Full blocks that are visible before the one counted from.
    blocks: usize,
    counted_from: CountedFrom,
}

/// The tokens that the layers are being called with.
#[derive(Default)]
struct Group {
    tokens: usize,
    /// `(T)`: rotation by each token's position.
    rotations: Vec<Rotation>,
    next_layer: usize,
}

/// Query tokens that share one window start: indices into the group.
#[derive(Clone)]
struct Run {
    tokens: Range<usize>,
    /// Position of the first visible token.
    start: usize,
    /// A hidden landmark, alone: it reads its own block and asks the memory for nothing.
    hidden: bool,
}

impl BlockAttention {
    /// Causal attention over the whole sequence, without a memory: the baseline.
    pub fn full(shape: &ModelShape, normalisation: Normalisation) -> Self {
        Self::new(shape, 0, None, normalisation, None)
    }

    /// A sliding window, a sink where `window` has one, and no memory.
    pub fn window_only(shape: &ModelShape, window: Window) -> Self {
        let sink = window.sink.then(|| Sink::empty(shape));
        Self::new(shape, 0, Some(Sliding::new(shape, window)), window.normalisation, sink)
    }

    /// Continues an open document and appends to it. With `retrieval`, each query also attends to blocks that have left its
    /// window.
    ///
    /// # Errors
    /// [`AttentionError::Memory`] when the document's sink, window or tail cannot be read back.
    pub fn write(
        memory: Arc<dyn BlockMemory>,
        collection: &CollectionInfo,
        document: &DocumentInfo,
        window: Window,
        retrieval: Option<Retrieval>,
    ) -> Result<Self, AttentionError> {
        let (shape, rule) = (&collection.spec.shape, collection.spec.key_rule);
        let sliding = Some(Sliding::new(shape, window));
        let (mut session, tail) = Self::load(memory.as_ref(), (shape, rule), &[document], window, sliding)?;
        let tail = tail.as_ref().map(|tail| (&tail.token_ids[..], &tail.text));
        session.writer = Some(Writer::resume(memory.clone(), document, tail));
        session.link = retrieval.map(|retrieval| Link {
            memory,
            collection: collection.id,
            retrieval,
            fixed: Vec::new(),
            growing: Some((document.id, window.sink as u32)),
        });
        Ok(session)
    }

    /// Continues the text of the last of `documents` and retrieves from all of them. It writes nothing. The sink is the first
    /// block of the first document, or its tail if it has no other. The tail of a sealed document is retrieved like a block; that of
    /// the last one is in the window. Those that cannot be looked up ([`DocumentInfo::eligible_blocks`]) lie beside the window.
    ///
    /// # Errors
    /// [`AttentionError::Memory`] when the sink, the tails beside the window or the last document's end cannot be read back,
    /// [`AttentionError::Invalid`] without documents, or with more tokens of tails beside the window than
    /// [`TAIL_TOKENS_MAX`](crate::limits::TAIL_TOKENS_MAX).
    pub fn read(
        memory: Arc<dyn BlockMemory>,
        collection: &CollectionInfo,
        documents: &[DocumentInfo],
        window: Window,
        retrieval: Retrieval,
    ) -> Result<Self, AttentionError> {
        let (shape, rule) = (&collection.spec.shape, collection.spec.key_rule);
        let documents: Vec<&DocumentInfo> = documents.iter().collect();
        let Some((last, earlier)) = documents.split_last() else {
            return Err(AttentionError::Invalid {
                field: "documents",
                expected: "at least one".into(),
                found: "none".into(),
            });
        };
        let (mut session, _) = Self::load(memory.as_ref(), (shape, rule), &documents, window, None)?;
        let (lead, longest) = read_tails(memory.as_ref(), shape, rule, earlier, session.position)?;
        session.lead = lead;
        // What is as far as it is makes no room for the tails.
        if retrieval.placement == Placement::Slots {
            session.overhang = longest.saturating_sub(session.position - session.window.base());
        }
        session.sink_blocks = (documents[0].id != last.id).then_some(documents[0].blocks);
        let windowed = (session.window.base() / shape.block_tokens as usize) as u32;
        let (at_hand, segments) = at_hand(&documents, rule, session.has_sink(), windowed, shape.block_tokens);
        session.segments = segments;
        session.trace = Trace::new(at_hand);
        let eligible = documents.iter().enumerate().map(|(index, document)| {
            let end = if document.id == last.id { windowed } else { document.eligible_blocks(rule) };
            let first = (window.sink && index == 0) as u32;
            retrieval.newest(BlockRange { document: document.id, blocks: first.min(end)..end })
        });
        let fixed = eligible.collect();
        session.link = Some(Link { memory, collection: collection.id, retrieval, fixed, growing: None });
        Ok(session)
    }

    fn new(
        shape: &ModelShape,
        base: usize,
        sliding: Option<Sliding>,
        normalisation: Normalisation,
        sink: Option<Sink>,
    ) -> Self {
        BlockAttention {
            shape: shape.clone(),
            window: LocalWindow::new(shape, base),
            sliding,
            normalisation,
            sink,
            sink_blocks: None,
            lead: Lead::default(),
            overhang: 0,
            segments: Vec::new(),
            link: None,
            writer: None,
            position: base,
            group: Group::default(),
            trace: Trace::default(),
        }
    }

    pub(super) fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Reads back what is at hand at the end of the last document: its window, its tail, and the sink.
    fn load(
        memory: &dyn BlockMemory,
        (shape, rule): (&ModelShape, KeyRule),
        documents: &[&DocumentInfo],
        window: Window,
        sliding: Option<Sliding>,
    ) -> Result<(Self, Option<StoredBlock>), AttentionError> {
        let (first, last) = (documents[0], documents[documents.len() - 1]);
        let block_tokens = shape.block_tokens as usize;
        let from = (last.blocks as usize).saturating_sub(Sliding::new(shape, window).blocks);
        let mut session = Self::new(shape, from * block_tokens, sliding, window.normalisation, None);

        let fetch = |document, blocks| memory.fetch(&FetchRequest { document, blocks, dtype: DType::F32 });
        let at_hand = from as u32..last.blocks + (last.tail_tokens > 0) as u32;
        let mut tail = None;
        for block in fetch(last.id, at_hand.collect())? {
            let start = block.id.index as usize * block_tokens;
            let block = cut_block(block, (last.tokens as usize).saturating_sub(start));
            session.window.push_block(&block.k.to_f32()?, &block.v.to_f32()?, &shape.rope.rotation(start as i64));
            session.position = start + block.token_ids.len();
            if block.token_ids.len() < block_tokens {
                tail = Some(block);
            }
        }
        if window.sink {
            // A text that still begins in the window fills the sink itself as it grows.
            let is_apart = if first.id == last.id { from > 0 } else { first.eligible_blocks(rule) > 0 };
            let stored = is_apart.then(|| fetch(first.id, vec![0]));
            session.sink = match stored.transpose()?.as_deref() {
                Some([block]) => Some(Sink::from_block(shape, &block.k.to_f32()?, &block.v.to_f32()?)),
                // The window of another document must not fill it: what is in the window is seen there.
                _ => (first.id == last.id).then(|| Sink::empty(shape)),
            };
            for layer in 0..shape.layers as usize {
                session.fill_sink(layer);
            }
        }
        Ok((session, tail))
    }

    /// Names the tokens of the last group and makes the blocks that they fill durable. A sequence that writes commits every
    /// group before the next; others ignore the call.
    ///
    /// # Errors
    /// [`AttentionError::Invalid`] for another number of tokens than the group had, [`AttentionError::Memory`] from the
    /// append.
    pub fn commit(&mut self, tokens: NewTokens) -> Result<(), AttentionError> {
        if let Some(writer) = &mut self.writer {
            let attended = self.position - writer.tokens(self.shape.block_tokens as usize);
            if tokens.ids.len() != attended {
                return Err(AttentionError::Invalid {
                    field: "ids",
                    expected: format!("the {attended} tokens that were attended to since the last commit"),
                    found: tokens.ids.len().to_string(),
                });
            }
            writer.commit(tokens, &self.window, &self.shape)?;
        }
        Ok(())
    }

    /// Makes committed tokens after the last full block durable, as the document's tail. Sequences that do not write ignore
    /// the call.
    ///
    /// # Errors
    /// [`AttentionError::Memory`] from the append.
    pub fn flush(&mut self) -> Result<(), AttentionError> {
        if let Some(writer) = &mut self.writer {
            writer.flush(&self.window, &self.shape)?;
        }
        Ok(())
    }

    /// Where attention went since the last call.
    pub fn take_reads(&mut self) -> Reads {
        self.trace.take()
    }

    /// Checks that layers come in order, and at the first one prepares for the group.
    fn begin_layer(&mut self, layer: usize, tokens: usize, sizes: [usize; 3]) -> Result<(), AttentionError> {
        let invalid = |field, expected: String, found: String| AttentionError::Invalid { field, expected, found };
        let shape = &self.shape;
        let row = |heads: u32| tokens * (heads * shape.head_dim) as usize;
        let expected = [row(shape.query_heads), row(shape.kv_heads), row(shape.kv_heads)];
        for ((field, expected), found) in ["q", "k", "v"].into_iter().zip(expected).zip(sizes) {
            if expected != found {
                return Err(invalid(field, format!("{expected} numbers"), found.to_string()));
            }
        }
        if layer != self.group.next_layer || (layer > 0 && tokens != self.group.tokens) {
            let (expected, tokens_expected) = (self.group.next_layer, self.group.tokens);
            return Err(invalid(
                "layer",
                format!("layer {expected} of a group of {tokens_expected} tokens"),
                format!("layer {layer} of {tokens}"),
            ));
        }
        if layer == 0 {
            self.begin_group(tokens)?;
        }
        self.group.next_layer = (layer + 1) % self.shape.layers as usize;
        Ok(())
    }

    fn begin_group(&mut self, tokens: usize) -> Result<(), AttentionError> {
        let invalid = |field, expected: String, found: String| AttentionError::Invalid { field, expected, found };
        let block_tokens = self.shape.block_tokens as usize;
        if let Some(writer) = &self.writer {
            if writer.tokens(block_tokens) != self.position {
                let expected = format!("a commit of the {} tokens before", self.position);
                return Err(invalid("commit", expected, writer.tokens(block_tokens).to_string()));
            }
            // A larger group could push blocks out of the window that are not in the memory yet.
            let most = match self.sliding {
                Some(Sliding { blocks, counted_from: CountedFrom::Query }) => blocks * block_tokens,
                _ => usize::MAX,
            };
            if tokens > most {
                return Err(invalid("tokens", format!("at most the window, {most}"), tokens.to_string()));
            }
        }
        self.window.forget_before(self.window_start(self.position));
        let positions = self.position..self.position + tokens;
        self.group =
            Group { tokens, rotations: positions.map(|p| self.shape.rope.rotation(p as i64)).collect(), next_layer: 0 };
        Ok(())
    }

    /// Position of the first token that the query at `position` sees.
    fn window_start(&self, position: usize) -> usize {
        let block_tokens = self.shape.block_tokens as usize;
        let start = self.sliding.map_or(0, |sliding| {
            let from = match sliding.counted_from {
                CountedFrom::Query => position,
                CountedFrom::Chunk => self.position,
            };
            (from / block_tokens).saturating_sub(sliding.blocks)
        });
        (start * block_tokens).max(self.window.base())
    }

    /// The group's tokens, cut where the window start changes and around hidden landmarks.
    fn runs(&self) -> Vec<Run> {
        let closes_block = |position: usize| (position + 1).is_multiple_of(self.shape.block_tokens as usize);
        let mut runs: Vec<Run> = Vec::new();
        for token in 0..self.group.tokens {
            let position = self.position + token;
            let start = self.window_start(position);
            let hidden = self.normalisation == Normalisation::Hidden && closes_block(position);
            match runs.last_mut() {
                Some(run) if run.start == start && !run.hidden && !hidden => run.tokens.end = token + 1,
                _ => runs.push(Run { tokens: token..token + 1, start, hidden }),
            }
        }
        runs
    }

    fn fill_sink(&mut self, layer: usize) {
        if let Some(sink) = &mut self.sink {
            sink.fill(layer, &self.window, self.shape.block_tokens as usize);
        }
    }

    /// What may be retrieved for the queries of a run; `None` if nothing or not in this layer.
    fn request(&self, layer: usize, run: &Run, q: &[f32]) -> Option<AttendRequest> {
        let link = self.link.as_ref().filter(|link| link.retrieval.layers.include(layer) && !run.hidden)?;
        let mut scope = link.fixed.clone();
        if let Some((document, first)) = link.growing {
            let mut blocks = (run.start / self.shape.block_tokens as usize) as u32;
            if let Some(writer) = &self.writer {
                blocks = blocks.min(writer.blocks() as u32);
            }
            scope.push(link.retrieval.newest(BlockRange { document, blocks: first.min(blocks)..blocks }));
        }
        if scope.iter().all(|range| range.blocks.is_empty()) {
            return None;
        }
        let row = (self.shape.query_heads * self.shape.head_dim) as usize;
        Some(AttendRequest {
            lookup: LookupRequest {
                collection: link.collection,
                layer: layer as u32,
                queries: q[run.tokens.start * row..run.tokens.end * row].to_vec(),
                distances: run.tokens.clone().map(|token| self.distance(run, token) as u32).collect(),
                scope,
                top_k: link.retrieval.top_k,
                block_score: link.retrieval.block_score,
                granularity: link.retrieval.granularity,
            },
            normalisation: self.normalisation,
            placement: link.retrieval.placement,
            without_first_tokens: self.has_the_sink(),
        })
    }

    /// Tokens from the sink's first token to a query; `slots` are those of the run.
    fn sink_distance(&self, run: &Run, token: usize, slots: u32) -> u64 {
        let placement = self.link.as_ref().map_or(Placement::Slots, |link| link.retrieval.placement);
        let blocks = self.sink_blocks.unwrap_or((run.start / self.shape.block_tokens as usize) as u32);
        placement.sink_distance(slots, self.distance(run, token) as u32, blocks, self.shape.block_tokens)
    }

    /// Attention of one run and KV head over window and sink, rows `(T, G)`.
    fn attend_head(&self, layer: usize, kv_head: usize, run: &Run, slots: u32, q: &[f32]) -> LocalAttention {
        let shape = &self.shape;
        let (group, d, block_tokens) = (shape.group(), shape.head_dim as usize, shape.block_tokens as usize);
        let row = shape.query_heads as usize * d;
        let sink = match &self.sink {
            // Until the window has left the first block of the text, the sink is in the window.
            Some(sink) if run.start > 0 || self.has_sink() => sink.head(layer * shape.kv_heads as usize + kv_head),
            _ => HeadKv { k: &[], v: &[] },
        };
        let mut queries = Vec::with_capacity(run.tokens.len() * group * d);
        for token in run.tokens.clone() {
            queries.extend(q[token * row + kv_head * group * d..][..group * d].iter().map(|x| x * shape.softmax_scale));
        }
        let mut sink_queries = if sink.k.is_empty() { Vec::new() } else { queries.clone() };
        let rotated = if shape.rope_of(layer as u32).frequencies.is_empty() { 0..0 } else { run.tokens.clone() };
        for (index, token) in rotated.enumerate() {
            let of_token = index * group * d..(index + 1) * group * d;
            queries[of_token.clone()].chunks_exact_mut(d).for_each(|head| self.group.rotations[token].apply(head));
            if !sink_queries.is_empty() {
                let rotation = shape.rope.rotation(self.sink_distance(run, token, slots) as i64);
                sink_queries[of_token].chunks_exact_mut(d).for_each(|head| rotation.apply(head));
            }
        }
        let visible = self.position + run.tokens.start - run.start + 1;
        let window = self.window.rows_from(layer, kv_head, run.start);
        let queries = HeadQueries { window: &queries, sink: &sink_queries, group, head_dim: d };
        let rule = local::Rule { normalisation: self.normalisation, block_tokens };
        let lead = self.lead.head(layer * shape.kv_heads as usize + kv_head);
        // One sink is enough: that of another text is at hand.
        let hidden = (run.start == 0 && self.has_the_sink()) as usize;
        local::attend(&queries, AtHand { lead, sink, window, hidden }, visible, rule, &self.segments)
    }

    /// Tokens from the first position at hand to a query.
    fn distance(&self, run: &Run, token: usize) -> usize {
        self.position + token - run.start + self.overhang
    }

    /// Whether first tokens of other texts are left out: the sink is here, and no landmark stands for them.
    fn has_the_sink(&self) -> bool {
        self.has_sink() && self.normalisation == Normalisation::Plain
    }

    /// Whether the sink is another text than the window begins with.
    fn has_sink(&self) -> bool {
        self.sink.as_ref().is_some_and(|sink| sink.is_stored())
    }

    /// Attention of each run over window and sink, rows `(T, Hq)`.
    fn attend_at_hand(&self, layer: usize, runs: &[Run], slots: &[u32], q: &[f32]) -> Vec<LocalAttention> {
        let (kv_heads, group) = (self.shape.kv_heads as usize, self.shape.group());
        let (query_heads, d) = (kv_heads * group, self.shape.head_dim as usize);
        let head = |task: usize| {
            let run = task / kv_heads;
            self.attend_head(layer, task % kv_heads, &runs[run], slots[run], q)
        };
        // One token is too little work to hand to other threads.
        let heads: Vec<_> = match self.group.tokens {
            1 => (0..runs.len() * kv_heads).map(head).collect(),
            _ => (0..runs.len() * kv_heads).into_par_iter().map(head).collect(),
        };
        let join = |(run, heads): (&Run, &[LocalAttention])| {
            let mut out = vec![0.0; run.tokens.len() * query_heads * d];
            let mut lse = vec![0.0; run.tokens.len() * query_heads];
            let segments = self.segments.len();
            let mut shares = vec![0.0; run.tokens.len() * query_heads * segments];
            for (kv_head, head) in heads.iter().enumerate() {
                for token in 0..run.tokens.len() {
                    let first = token * query_heads + kv_head * group;
                    let from = token * group..(token + 1) * group;
                    out[first * d..(first + group) * d].copy_from_slice(&head.out[from.start * d..from.end * d]);
                    let of_segments = from.start * segments..from.end * segments;
                    shares[first * segments..(first + group) * segments].copy_from_slice(&head.shares[of_segments]);
                    lse[first..first + group].copy_from_slice(&head.lse[from]);
                }
            }
            LocalAttention { out, lse, shares }
        };
        runs.iter().zip(heads.chunks_exact(kv_heads)).map(join).collect()
    }

    /// Attention of the group over everything: `(T, Hq, D)`.
    fn attend_group(&mut self, layer: usize, q: &[f32]) -> Result<Vec<f32>, AttentionError> {
        let runs = self.runs();
        let requests: Vec<_> = runs.iter().map(|run| self.request(layer, run, q)).collect();
        let slots: Vec<u32> =
            requests.iter().map(|request| request.as_ref().map_or(0, |request| request.lookup.slots())).collect();
        let mut partials = self.attend_at_hand(layer, &runs, &slots, q);
        let mut retrieved: Vec<Vec<f32>> = partials.iter().map(|partial| vec![0.0; partial.lse.len()]).collect();
        if let Some(link) = &self.link {
            let asking = requests.into_iter().enumerate().filter_map(|(run, request)| Some((run, request?)));
            let (asking, requests): (Vec<usize>, Vec<AttendRequest>) = asking.unzip();
            let heads = Heads { query: self.shape.query_heads as usize, kv: self.shape.kv_heads as usize };
            for (run, attended) in asking.into_iter().zip(link.memory.attend_all(&requests)) {
                let attended = attended?;
                let shares = local::merge(&mut partials[run], &attended.out, &attended.lse);
                self.trace.add(layer, &attended.hits, link.retrieval.granularity, &shares, heads);
                retrieved[run] = shares;
            }
        }
        for (partial, retrieved) in partials.iter().zip(&retrieved) {
            self.trace.add_local(&partial.shares, retrieved);
        }
        Ok(partials.into_iter().flat_map(|partial| partial.out).collect())
    }
}

impl SequenceAttention for BlockAttention {
    fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Result<Vec<f32>, AttentionError> {
        self.begin_layer(layer, tokens, [q.len(), k.len(), v.len()])?;
        self.window.push(layer, k, v, &self.group.rotations);
        self.fill_sink(layer);
        let out = self.attend_group(layer, q)?;
        if layer + 1 == self.shape.layers as usize {
            self.position += tokens;
        }
        Ok(out)
    }

    fn position(&self) -> usize {
        self.position
    }
}

impl Sliding {
    fn new(shape: &ModelShape, window: Window) -> Self {
        let blocks = window.tokens.div_ceil(shape.block_tokens as usize);
        // Counted from each query, no chunk could be written without a block of window.
        let least = (window.counted_from == CountedFrom::Query) as usize;
        Sliding { blocks: blocks.max(least), counted_from: window.counted_from }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Rope;
    use rand::{RngExt, SeedableRng};

    const TOKENS: usize = 100;

    fn shape() -> ModelShape {
        ModelShape {
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            block_tokens: 8,
            rope: Rope::from_base(10_000.0, 8),
            unrotated_layers: Vec::new(),
            softmax_scale: 8f32.powf(-0.5),
        }
    }

    /// Runs `TOKENS` tokens with random q, k, v through all layers in groups of the given sizes: `(L, T, Hq, D)`.
    fn run(mut session: BlockAttention, groups: &[usize]) -> Vec<Vec<f32>> {
        let shape = shape();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let mut values = |heads: u32| -> Vec<f32> {
            (0..TOKENS * (heads * shape.head_dim) as usize).map(|_| rng.random_range(-2.0..2.0)).collect()
        };
        let layers: Vec<_> = (0..2).map(|_| (values(4), values(2), values(2))).collect();
        let mut outs = vec![Vec::new(); 2];
        let mut from = 0;
        for &tokens in groups.iter().cycle() {
            let to = (from + tokens).min(TOKENS);
            for (layer, (q, k, v)) in layers.iter().enumerate() {
                let part = |x: &[f32], heads: usize| x[from * heads * 8..to * heads * 8].to_vec();
                let out = session.attend(layer, to - from, &part(q, 4), &part(k, 2), &part(v, 2)).unwrap();
                outs[layer].extend(out);
            }
            from = to;
            if from == TOKENS {
                return outs;
            }
        }
        outs
    }

    fn assert_close(a: &[Vec<f32>], b: &[Vec<f32>]) {
        for (index, (a, b)) in a.concat().iter().zip(b.concat()).enumerate() {
            assert!((a - b).abs() < 2e-5, "number {index}: {a} {b}");
        }
    }

    #[test]
    fn grouping_of_tokens_changes_nothing() {
        for (tokens, sink) in [(16, true), (24, false)] {
            let window = Window { tokens, sink, ..Window::default() };
            let whole = run(BlockAttention::window_only(&shape(), window), &[TOKENS]);
            for groups in [&[1][..], &[16], &[3, 7, 11]] {
                assert_close(&whole, &run(BlockAttention::window_only(&shape(), window), groups));
            }
        }
    }

    #[test]
    fn a_window_that_holds_everything_is_full_attention() {
        let window = Window { tokens: 128, ..Window::default() };
        let full = run(BlockAttention::full(&shape(), Normalisation::Plain), &[9]);
        assert_close(&full, &run(BlockAttention::window_only(&shape(), window), &[9]));
        let short = run(BlockAttention::window_only(&shape(), Window { tokens: 16, ..Window::default() }), &[9]);
        assert_eq!(full[0][..24 * 32], short[0][..24 * 32], "the first tokens see the same");
        assert!(full[0][40 * 32..].iter().zip(&short[0][40 * 32..]).any(|(a, b)| (a - b).abs() > 1e-3));
    }

    #[test]
    fn a_layer_without_rotation_is_one_of_a_model_without_and_leaves_the_others_alone() {
        let window = Window { tokens: 16, ..Window::default() };
        let outs = |rope: Rope, unrotated_layers: Vec<u32>| {
            let shape = ModelShape { rope, unrotated_layers, ..shape() };
            run(BlockAttention::window_only(&shape, window), &[5])
        };
        let (rotated, still) = (outs(shape().rope, vec![]), outs(Rope { frequencies: vec![] }, vec![]));
        assert_eq!(outs(shape().rope, vec![1]), [rotated[0].clone(), still[1].clone()]);
        assert!(rotated[1] != still[1], "the rotation tells them apart");
    }

    #[test]
    fn layers_out_of_order_and_wrong_sizes_are_refused() {
        let mut session = BlockAttention::full(&shape(), Normalisation::Plain);
        let field = |result: Result<Vec<f32>, AttentionError>| match result {
            Err(AttentionError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(session.attend(1, 1, &[0.0; 32], &[0.0; 16], &[0.0; 16])), "layer");
        assert_eq!(field(session.attend(0, 1, &[0.0; 31], &[0.0; 16], &[0.0; 16])), "q");
        assert_eq!(field(session.attend(0, 1, &[0.0; 32], &[0.0; 16], &[0.0; 8])), "v");
        session.attend(0, 1, &[0.0; 32], &[0.0; 16], &[0.0; 16]).unwrap();
        assert_eq!(field(session.attend(1, 2, &[0.0; 64], &[0.0; 32], &[0.0; 32])), "layer");
    }
}
