//! The real memory refuses the same requests with the same error in process and behind the service.

use std::sync::Arc;

use landmarkdb::limits;
use landmarkdb::{LocalMemory, *};

use crate::requests;
use crate::service::Service;

/// Blocks whose K and V are a model's: the wire's have any bits.
fn append_of(document: DocumentId, indices: std::ops::Range<u32>) -> AppendRequest {
    let mut request = requests::append(document, indices);
    request.blocks.iter_mut().for_each(|block| block.v = block.k.clone());
    request
}

type Ask<'a> = Box<dyn Fn(&dyn BlockMemory) -> Option<MemoryError> + 'a>;

/// "None is a question" said the contract of an append without blocks, which was refused; and `attend_all` had a limit behind the
/// service and none in process (finding 24).
#[test]
fn both_transports_refuse_the_same_requests_with_the_same_error() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Arc::new(LocalMemory::open(folder.path()).unwrap());
    let collection = memory.open_collection(&requests::spec()).unwrap().id;
    let document = memory.open_document(collection, "d").unwrap().id;
    memory.append(append_of(document, 0..3)).unwrap();
    let service = Service::start(&memory);
    let remote = service.connect();

    let scope = vec![BlockRange { document, blocks: 0..3 }];
    let good = LookupRequest { collection, scope, ..requests::lookup(2, Granularity::TokenHead) };
    assert_eq!(remote.lookup(&good), memory.lookup(&good), "the request that is changed");
    let append = |change: &dyn Fn(&mut AppendRequest)| -> Ask {
        let mut request = append_of(document, 3..5);
        change(&mut request);
        Box::new(move |memory| memory.append(request.clone()).err())
    };
    let attend = |change: &dyn Fn(&mut LookupRequest)| -> [Ask; 3] {
        let mut lookup = good.clone();
        change(&mut lookup);
        let request = AttendRequest {
            lookup: lookup.clone(),
            normalisation: Normalisation::Plain,
            placement: Placement::Slots,
            without_first_tokens: false,
        };
        let all = vec![request.clone()];
        [
            Box::new(move |memory| memory.lookup(&lookup).err()),
            Box::new(move |memory| memory.attend(&request).err()),
            Box::new(move |memory| memory.attend_all(&all).pop()?.err()),
        ]
    };
    let mut asks: Vec<Ask> = vec![
        append(&|request| request.blocks.clear()),
        append(&|request| request.document = DocumentId(99)),
        append(&|request| request.blocks[1].index = 9),
        append(&|request| request.blocks.remove(0).index = 0),
        append(&|request| request.blocks[1].token_ids.clear()),
        append(&|request| request.blocks[0].token_ids.truncate(2)),
        append(&|request| request.blocks[0].k = Tensor::from_f32(vec![3, 2, 4, 8], &[0.5; 192])),
        append(&|request| request.blocks[0].k = Tensor::from_f32(vec![2, 2, 4, 8], &[f32::NAN; 128])),
        append(&|request| request.blocks[1].v = Tensor::from_f32(vec![2, 2, 4, 8], &[3e38; 128])),
        append(&|request| request.expected_tokens = Some(7)),
        Box::new(|memory| memory.open_document(CollectionId(99), "d").err()),
        Box::new(|memory| memory.open_document(collection, "").err()),
        Box::new(|memory| memory.documents(CollectionId(99)).err()),
        Box::new(|memory| memory.document(DocumentId(99)).err()),
        Box::new(|memory| memory.seal(DocumentId(99)).err()),
        Box::new(|memory| memory.replace(DocumentId(99), document).err()),
        Box::new(|memory| memory.replace(document, DocumentId(99)).err()),
        Box::new(|memory| memory.replace(document, document).err()),
        Box::new(|memory| memory.delete(DocumentId(99)).err()),
        Box::new(|memory| memory.blocks(&BlockRange { document: DocumentId(99), blocks: 0..1 }).err()),
        Box::new(|memory| memory.verify(Some(DocumentId(99)), &mut |_, _| ()).err()),
        Box::new(|memory| {
            memory.set_engine(collection, Engine::Faiss(FaissIndex { factory: "x".into(), effort: 0 })).err()
        }),
        Box::new(|memory| memory.fetch(&FetchRequest { document, blocks: vec![0, 7], dtype: DType::F16 }).err()),
        Box::new(|memory| memory.fetch(&FetchRequest { document, blocks: vec![0], dtype: DType::Int8 }).err()),
        Box::new(|memory| memory.fetch(&FetchRequest { document, blocks: vec![0; 4097], dtype: DType::F16 }).err()),
    ];
    asks.extend(attend(&|lookup| lookup.collection = CollectionId(99)));
    asks.extend(attend(&|lookup| lookup.layer = 2));
    asks.extend(attend(&|lookup| lookup.top_k = 0));
    asks.extend(attend(&|lookup| lookup.distances.clear()));
    asks.extend(attend(&|lookup| lookup.queries.truncate(1)));
    asks.extend(attend(&|lookup| lookup.queries[40] = 3e38));
    asks.extend(attend(&|lookup| lookup.queries[40] = f32::NAN));
    asks.extend(attend(&|lookup| lookup.scope[0].blocks = 0..4));
    asks.extend(attend(&|lookup| lookup.scope[0].blocks = std::ops::Range { start: 2, end: 1 }));
    asks.extend(attend(&|lookup| lookup.scope[0].document = DocumentId(99)));
    asks.extend(attend(&|lookup| lookup.scope = vec![lookup.scope[0].clone(); limits::SCOPE_DOCUMENTS_MAX + 1]));
    let nothing = AttendRequest {
        lookup: LookupRequest { scope: Vec::new(), ..good.clone() },
        normalisation: Normalisation::Plain,
        placement: Placement::Slots,
        without_first_tokens: false,
    };
    let nowhere = AttendRequest { placement: Placement::Original { within_tokens: 0 }, ..nothing.clone() };
    asks.push(Box::new(move |memory| memory.attend(&nowhere).err()));
    let many = vec![nothing; limits::ATTEND_REQUESTS_MAX + 1];
    asks.push(Box::new(move |memory| memory.attend_all(&many).pop()?.err()));

    for (i, ask) in asks.iter().enumerate() {
        let here = ask(&*memory);
        assert!(here.is_some(), "request {i} is not refused");
        assert_eq!(ask(&remote), here, "request {i}");
    }
    assert_eq!(memory.document(document).unwrap().blocks, 3, "nothing of them is there");
}
