//! Does an answer name what was read, and is what it names what was stored?

use landmarkdb_grpc::wire::v1;
use v1::Normalisation;

use crate::answers::{range, stored};
use crate::data::{Model, World, values_of};
use crate::definition::{Blocks, Definition};
use crate::harness::{Named, cases};
use crate::judge::{SUMS, close};
use crate::suite::Suite;

cases! {
    hits_are_what_attention_read;
    blocks_come_back_as_they_were_sent;
    listings_name_every_block_with_its_text;
}

/// Attention over the hits alone, as they are fetched by their ids: nothing else can have been read.
fn hits_are_what_attention_read(suite: &Suite) {
    let shared = suite.shared();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let (world, document, _) = stored(suite, &shared.client(), &model, 12);
        for (seed, normalisation) in
            [Normalisation::Plain, Normalisation::Grouped, Normalisation::Hidden].into_iter().enumerate()
        {
            let mut request = world.attend_question(seed as u64, vec![range(document, 1, 12)]);
            request.set_normalisation(normalisation);
            let reply = world.client.attend(request.clone()).expect("an attend");
            let lookup = request.lookup.clone().expect("a lookup");
            let hits = reply.hits.as_ref().expect("always present");
            let choices: Vec<Vec<usize>> =
                hits.indices.chunks(3).map(|row| row.iter().map(|&index| index as usize - 1).collect()).collect();
            assert!(hits.documents.iter().all(|&named| named == document));
            // Blocks that were not named are made of values that would show.
            let mut read: Blocks = world.fetched(&lookup).expect("the scope");
            for ((_, index), block) in &mut read {
                if !hits.indices.contains(index) {
                    block.k.iter_mut().chain(&mut block.v).for_each(|number| *number = 1e9);
                }
            }
            let (out, lse) = Definition::of(&world.model, &lookup, &read).attend(&request, &choices);
            close("out", &values_of(&reply.out), &out, SUMS);
            close("lse", &values_of(&reply.lse), &lse, SUMS);
        }
    }
}

fn blocks_come_back_as_they_were_sent(suite: &Suite) {
    let shared = suite.shared();
    for (name, model) in Model::all() {
        let _named = Named(name);
        let world = World::new(suite, &shared.client(), &model);
        let text = crate::data::Text::random(&model, 5 * model.block_tokens + 1, 3);
        let document = world.store("text", &text);
        world.judge_document(document, &text.all());
        for dtype in [v1::Dtype::F16, v1::Dtype::Bf16] {
            let request = v1::FetchRequest { document, blocks: vec![2, 5, 2], dtype: dtype.into() };
            let (blocks, refusal) = world.client.fetch_until(request);
            assert!(refusal.is_none(), "{refusal:?}");
            let indices: Vec<u32> = blocks.iter().filter_map(|block| Some(block.id?.index)).collect();
            assert_eq!(indices, [2, 5, 2], "the order of the request, repeats included");
            for tensor in blocks.iter().flat_map(|block| [&block.k, &block.v]).flatten() {
                let len: usize = tensor.shape.iter().map(|&axis| axis as usize).product();
                assert_eq!((tensor.dtype(), tensor.data.len()), (dtype, 2 * len));
            }
        }
    }
}

fn listings_name_every_block_with_its_text(suite: &Suite) {
    let shared = suite.shared();
    let world = World::new(suite, &shared.client(), &Model::small());
    let text = crate::data::Text::random(&world.model, 4 * 4 + 3, 8);
    let (document, sent) = (world.store("text", &text), text.all());
    let listed = world.client.blocks(document, 1, u32::MAX).expect("a listing that is cut at the end");
    assert_eq!(listed.len(), 4, "three blocks and the tail");
    for (info, block) in listed.iter().zip(&sent[1..]) {
        assert_eq!(info.id, Some(v1::BlockId { document, index: block.index }));
        assert_eq!((&info.token_ids, &info.text), (&block.token_ids, &block.text));
        assert!(info.stored_bytes > 0);
    }
    let info = world.client.info(document).expect("the document");
    let text_bytes: usize = sent.iter().flat_map(|block| &block.text).map(|text| text.text.len()).sum();
    assert_eq!(info.text_bytes, text_bytes as u64);
    assert!(info.stored_bytes >= listed.iter().map(|block| block.stored_bytes).sum::<u64>());
    assert!(world.client.blocks(document, 3, 2).expect("an empty range").is_empty());
}
