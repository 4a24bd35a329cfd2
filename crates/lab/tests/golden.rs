//! What the paper's own code and Hugging Face computed, in process and through the service (`docs/golden.md`).

#[path = "../../grpc/tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::sync::Arc;

use common::Served;
use landmarkdb::{BlockMemory, LocalMemory};
use landmarkdb_lab::eval::{GoldenError, golden};

fn check(memory: Arc<dyn BlockMemory>) {
    let outputs =
        golden(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"), &memory, None, &mut |_| {}).unwrap();
    let names: Vec<String> = outputs.iter().map(|output| format!("{} {}", output.case, output.output)).collect();
    let all = ["small-k4", "tiny-k2"].iter().flat_map(|case| {
        ["logits_full", "logits_per_token_and_head", "logits_per_head_max_over_tokens"]
            .map(|name| format!("{case} {name}"))
    });
    let softmax = ["probs", "grad_scores"].map(|name| format!("softmax-b8 {name}"));
    let (small, tiny): (Vec<_>, Vec<_>) = all.partition(|name| name.starts_with("small"));
    assert_eq!(names, [small, softmax.to_vec(), tiny].concat());
    for output in outputs {
        assert!(output.agrees(), "{output:?}");
    }
    for collection in memory.collections().unwrap() {
        assert_eq!(memory.documents(collection.id).unwrap(), vec![], "{} is left empty", collection.spec.name);
    }
}

#[test]
fn in_process_all_logits_are_those_of_the_papers_code() {
    let folder = tempfile::tempdir().unwrap();
    check(Arc::new(LocalMemory::open(folder.path()).unwrap()));
}

#[test]
fn through_the_service_all_logits_are_those_of_the_papers_code() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::new(Arc::new(LocalMemory::open(folder.path()).unwrap()));
    check(served.remote.clone());
}

#[test]
fn a_difference_is_seen_and_a_folder_without_cases_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let memory: Arc<dyn BlockMemory> = Arc::new(LocalMemory::open(&folder.path().join("data")).unwrap());
    let cases = folder.path().join("cases");
    std::fs::create_dir(&cases).unwrap();
    let refused = golden(&cases, &memory, None, &mut |_| {}).unwrap_err();
    assert!(matches!(refused, GoldenError::NoCase { .. }), "{refused}");

    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    for file in ["tiny-k2.json", "tiny-k2.model.safetensors", "tiny-k2.expected.safetensors"] {
        std::fs::copy(recorded.join(file), cases.join(file)).unwrap();
    }
    // Blocks of another size: the same weights, read in another way.
    let json = std::fs::read_to_string(cases.join("tiny-k2.json")).unwrap();
    std::fs::write(cases.join("tiny-k2.json"), json.replace("\"mem_freq\": 15", "\"mem_freq\": 14")).unwrap();
    let outputs = golden(&cases, &memory, None, &mut |_| {}).unwrap();
    assert!(outputs.iter().all(|output| !output.agrees()), "{outputs:?}");

    let expected = cases.join("tiny-k2.expected.safetensors");
    let bytes = std::fs::read(&expected).unwrap();
    std::fs::write(&expected, &bytes[..bytes.len() / 2]).unwrap();
    let cut = golden(&cases, &memory, None, &mut |_| {}).unwrap_err();
    assert!(matches!(cut, GoldenError::Damaged { .. }), "{cut}");
}
