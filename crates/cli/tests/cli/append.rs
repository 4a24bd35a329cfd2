//! `encode --append`: a document that grows with its file.

use crate::with_text;

#[test]
fn a_document_grows_with_its_file_until_it_is_sealed() {
    let (sandbox, run) = with_text("Monday. The ferry leaves at ni");
    let encode = ["encode", "text.txt", "--append", "--json"];
    let first = run(&sandbox, 0, &encode).json();
    assert_eq!((&first["resumed_tokens"], &first["document"]["sealed"]), (&0.into(), &false.into()));
    let again = run(&sandbox, 0, &encode).json();
    assert_eq!(again["resumed_tokens"], first["document"]["tokens"], "nothing is appended twice");
    assert_eq!(again["document"]["tokens"], first["document"]["tokens"]);

    // It is asked as far as it has come.
    let asked = run(&sandbox, 0, &["ask", "The ferry", "--raw", "--doc", "text", "--max-tokens", "2"]).stdout;
    assert!(asked.contains("default/text is open: only the"), "{asked}");
    let longer = "Monday. The ferry leaves at nine, and the bell rings twice.\n";
    sandbox.write_file("text.txt", longer);
    let second = run(&sandbox, 0, &encode).json();
    assert_eq!(second["resumed_tokens"], first["document"]["tokens"]);
    let text = || {
        let blocks = sandbox.run(&["blocks", "text", "--data", "d", "--json"]).exits(0).json();
        blocks["blocks"].as_array().unwrap().iter().map(|block| block["text"].as_str().unwrap()).collect::<String>()
    };
    assert_eq!(text(), longer);
    sandbox.write_file("text.txt", "Another text.");
    let refused = run(&sandbox, 1, &["encode", "text.txt", "--append"]).stderr;
    assert!(refused.contains("they differ from block 0 on") && refused.contains("--replace"), "{refused}");

    // The last run seals it; from then on a longer text is another.
    let whole = format!("{longer}Tuesday. Nobody rang.\n");
    sandbox.write_file("text.txt", &whole);
    run(&sandbox, 0, &["encode", "text.txt"]);
    assert_eq!(text(), whole);
    sandbox.write_file("text.txt", &format!("{whole}Wednesday.\n"));
    for typed in [&["encode", "text.txt"][..], &["encode", "text.txt", "--append"]] {
        let refused = run(&sandbox, 1, typed).stderr;
        assert!(refused.contains("the document is sealed; --replace puts this one in its place"), "{refused}");
        assert!(refused.contains("open to grow, with --append"), "{refused}");
    }
    let open = run(&sandbox, 0, &["encode", "text.txt", "--append", "--replace", "--json"]).json();
    assert_eq!((&open["replaced"], &open["document"]["sealed"]), (&true.into(), &false.into()));
    sandbox.run(&["verify", "--rebuild", "--data", "d"]).exits(0);
}
