//! Holds the rules of docs/architecture.md against the files of the repository. Each failure says where, which rule,
//! why it is there and what to do.

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/code.rs"]
mod code;
#[path = "tidy/locks.rs"]
mod locks;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folders of the packages' sources that the table is about, and the modules that all others there may import.
const PACKAGES: &[(&str, &[&str])] = &[
    ("src/", &["types", "shape", "limits", "lock", "until", "budget", "lru"]),
    ("crates/grpc/src/", &[]),
    ("crates/lab/src/", &["passkey"]),
];

/// What each top-level module may import besides those: the directions that cargo does not hold, inside of packages.
const IMPORTS: &[(&str, &[&str])] = &[
    ("src/types", &[]),
    ("src/shape", &[]),
    ("src/limits", &[]),
    ("src/lock", &[]),
    ("src/until", &[]),
    ("src/budget", &[]),
    ("src/lru", &[]),
    ("src/api", &[]),
    ("src/store", &[]),
    ("src/cuda", &[]),
    ("src/index", &["cuda"]),
    ("src/memory", &["api", "store", "index", "cuda"]),
    ("src/attention", &["api"]),
    ("src/lib", &[]),
    ("crates/grpc/src/wire", &[]),
    ("crates/grpc/src/server", &["wire"]),
    ("crates/grpc/src/client", &["wire"]),
    ("crates/grpc/src/lib", &[]),
    ("crates/lab/src/passkey", &[]),
    ("crates/lab/src/train", &[]),
    ("crates/lab/src/eval", &["train"]),
    ("crates/lab/src/bench", &["eval"]),
    ("crates/lab/src/lib", &[]),
];

/// Outside libraries that only one module of their package names.
const LIBRARIES: &[(&[&str], &str)] = &[
    (&["sled", "bincode"], "src/store"),
    (&["cudarc"], "src/cuda"),
    (&["faiss", "faiss_sys"], "src/index"),
    (&["hyper", "hyper_util", "http", "http_body"], "crates/grpc/src/server"),
    (&["plotters"], "crates/lab/src/eval"),
];

const FILE_LINES_MAX: usize = 700;
const FUNCTION_LINES_MAX: usize = 100;
const FEATURE_LINES_MAX: usize = 12;

struct Rule {
    rule: &'static str,
    why: &'static str,
    fix: &'static str,
}

/// A place that breaks a rule.
#[derive(Debug, PartialEq)]
struct Finding {
    /// Counted from 1.
    line: usize,
    what: String,
}

/// One file of the repository.
struct File {
    /// From the repository's root, with `/`.
    path: String,
    text: String,
    /// The text without comments and literals; empty unless it is Rust.
    code: String,
}

impl File {
    fn new(path: &str, text: String) -> File {
        let code = if path.ends_with(".rs") { code::blank(&text) } else { String::new() };
        File { path: path.into(), text, code }
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// The row of the package that it belongs to.
    fn package(&self) -> Option<(&'static str, &'static [&'static str])> {
        PACKAGES.iter().find(|(sources, _)| self.path.starts_with(sources)).copied()
    }

    /// The top-level module that a file of a package in the table belongs to, as the table names it.
    fn module(&self) -> Option<&str> {
        let (sources, _) = self.package()?;
        let first = self.path[sources.len()..].split('/').next()?;
        Some(&self.path[..sources.len() + first.trim_end_matches(".rs").len()])
    }
}

fn root() -> PathBuf {
    std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// Every UTF-8 file that git tracks or would track; without git, everything but `target/` and hidden folders.
fn files() -> Vec<File> {
    let root = root();
    let git = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let paths: Vec<String> = match Command::new("git").args(git).current_dir(&root).output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).split_terminator('\0').map(String::from).collect()
        }
        _ => walk(&root, ""),
    };
    let read = |path: &String| Some(File::new(path, fs::read_to_string(root.join(path)).ok()?));
    let files: Vec<File> = paths.iter().filter_map(read).collect();
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "no src/lib.rs under {}", root.display());
    files
}

fn walk(root: &Path, folder: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(root.join(folder)).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && name != "target" && !name.starts_with('.') => paths.extend(walk(root, &path)),
            Ok(kind) if kind.is_file() => paths.push(path),
            _ => {}
        }
    }
    paths
}

/// Fails with every place that `check` finds in the files that `applies` lets through.
fn hold(rule: Rule, applies: fn(&File) -> bool, check: impl Fn(&File) -> Vec<Finding>) {
    let mut places = String::new();
    for file in files().iter().filter(|file| applies(file)) {
        for finding in check(file) {
            places += &format!("{}:{}: {}\n", file.path, finding.line, finding.what);
        }
    }
    let Rule { rule, why, fix } = rule;
    assert!(places.is_empty(), "\n{places}\nrule: {rule}\nwhy:  {why}\ndo:   {fix}\n");
}

fn in_src(file: &File) -> bool {
    file.is_rust() && (file.path.starts_with("src/") || file.path.starts_with("crates/") && file.path.contains("/src/"))
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let rule = Rule {
        rule: "a module imports only what IMPORTS in tests/tidy.rs lists for it, tests beside the code included",
        why: "the direction of dependencies is what lets one layer be read, tested and replaced without the others",
        fix: "move the code to the layer that owns it, pass a value or a trait from api in, or move a test that \
              spans layers to tests/; a new edge is a change of design: docs/architecture.md and the table together",
    };
    hold(rule, |file| file.is_rust() && file.module().is_some(), check_imports);
}

fn is_module(sources: &str, name: &str) -> bool {
    IMPORTS.iter().any(|(known, _)| known.strip_prefix(sources) == Some(name))
}

/// The modules of a file's own package that it names, and where.
fn imports(file: &File) -> Vec<(usize, &str)> {
    let Some((sources, _)) = file.package() else { return Vec::new() };
    let mut imports = code::paths_from(&file.code, "crate");
    // `super` leads out of a folder only to another top-level module.
    imports.extend(code::paths_from(&file.code, "super").into_iter().filter(|(_, name)| is_module(sources, name)));
    imports
}

fn check_imports(file: &File) -> Vec<Finding> {
    let Some((sources, open)) = file.package() else { return Vec::new() };
    let module = file.module().unwrap_or_default();
    let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == module) else {
        return vec![Finding { line: 1, what: format!("module `{module}` is not in the table") }];
    };
    let own = &module[sources.len()..];
    let forbidden = |name: &str| name != own && !open.contains(&name) && !allowed.contains(&name) && !is_macro(name);
    let finding = |(line, name): (usize, &str)| {
        let what = if is_module(sources, name) {
            format!("`{own}` imports `{name}`")
        } else {
            format!("`{own}` imports `{name}` from the package's root: name the module that defines it")
        };
        forbidden(name).then_some(Finding { line, what })
    };
    imports(file).into_iter().filter_map(finding).collect()
}

/// Macros of ours: cargo puts them at the root.
fn is_macro(name: &str) -> bool {
    name == "words"
}

#[test]
fn the_table_allows_nothing_that_is_not_needed() {
    let files = files();
    let mut unneeded = Vec::new();
    for (module, allowed) in IMPORTS {
        let mut own = files.iter().filter(|file| file.is_rust() && file.module() == Some(module)).peekable();
        if own.peek().is_none() {
            unneeded.push(format!("{module}: there is no such module"));
        }
        let named: Vec<&str> = own.flat_map(imports).map(|(_, name)| name).collect();
        unneeded.extend(allowed.iter().filter(|name| !named.contains(name)).map(|name| format!("{module}: {name}")));
    }
    for (libraries, module) in LIBRARIES {
        let own = files.iter().filter(|file| file.is_rust() && file.module() == Some(module));
        let named: Vec<&str> = own.flat_map(|file| code::words(&file.code)).map(|(_, word)| word).collect();
        unneeded.extend(libraries.iter().filter(|name| !named.contains(name)).map(|name| format!("{module}: {name}")));
    }
    assert!(unneeded.is_empty(), "IMPORTS and LIBRARIES in tests/tidy.rs: {unneeded:#?}");
}

#[test]
fn no_modules_need_each_other_in_a_circle() {
    let files = files();
    let sources = files.iter().filter(|file| in_src(file));
    let mut packages: BTreeMap<&str, Vec<&File>> = BTreeMap::new();
    for file in sources {
        packages.entry(&file.path[..file.path.find("src/").unwrap_or(0) + "src/".len()]).or_default().push(file);
    }
    let mut circles = String::new();
    for (sources, files) in packages {
        let files = files.iter().map(|file| (file.path.as_str(), file.code.as_str()));
        for circle in circles::Package::of(sources, files).circles() {
            circles += &format!("{}\n\n", circle.join("\n"));
        }
    }
    assert!(
        circles.is_empty(),
        "\n{circles}\nrule: modules side by side in a folder do not import each other in a circle\n\
         why:  files in a circle can only be read, tested and replaced together: they are one file\n\
         do:   move what they share into a module below them, or to the one that owns it\n"
    );
}

#[test]
fn outside_libraries_are_named_in_one_place() {
    let rule = Rule {
        rule: "an outside library is named only in the module that LIBRARIES in tests/tidy.rs lists for it",
        why: "a library that one module knows can be replaced or upgraded there, and its types do not leak",
        fix: "wrap what is needed in a type or function of the module that owns the library",
    };
    hold(rule, |file| file.is_rust() && file.module().is_some(), check_libraries);
}

fn check_libraries(file: &File) -> Vec<Finding> {
    let module = file.module().unwrap_or_default();
    let mut findings = Vec::new();
    for (at, word) in code::words(&file.code) {
        let Some((_, owner)) = LIBRARIES.iter().find(|(names, _)| names.contains(&word)) else { continue };
        let (before, after) = (&file.code[..at], &file.code[at + word.len()..]);
        let begins_path = after.starts_with("::") && (!before.ends_with("::") || before.ends_with(" ::"));
        let is_used = before.ends_with("use ") && after.starts_with([';', ' ']);
        if (begins_path || is_used) && *owner != module {
            let what = format!("`{word}` is named in `{module}`; only `{owner}` may");
            findings.push(Finding { line: code::line_of(&file.code, at), what });
        }
    }
    findings
}

#[test]
fn files_and_functions_are_short() {
    let rule = Rule {
        rule: "a Rust file has at most 700 lines, a function of a package's src/ at most 100",
        why: "what fits on a few screens is read whole before it is changed",
        fix: "split by concept: name the part that can be understood alone, and give it a file or a function",
    };
    hold(rule, File::is_rust, check_lengths);
}

fn check_lengths(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lines = file.text.lines().count();
    if lines > FILE_LINES_MAX {
        findings.push(Finding { line: lines, what: format!("a file of {lines} lines") });
    }
    if in_src(file) {
        for function in code::functions(&file.code).iter().filter(|function| function.lines > FUNCTION_LINES_MAX) {
            let what = format!("`fn {}` has {} lines", function.name, function.lines);
            findings.push(Finding { line: function.line, what });
        }
    }
    findings
}

#[test]
fn every_unsafe_says_why_it_is_sound() {
    let rule = Rule {
        rule: "`unsafe` has a comment with `SAFETY:` (or, on an `unsafe fn`, `# Safety`) on or right above its statement",
        why: "the compiler no longer checks it, so a reader must be able to",
        fix: "write what makes it sound, or find a safe way",
    };
    hold(rule, File::is_rust, check_unsafe);
}

fn check_unsafe(file: &File) -> Vec<Finding> {
    let text: Vec<&str> = file.text.lines().collect();
    let code: Vec<&str> = file.code.lines().collect();
    let explains = |line: usize| {
        // In the text and not in the code: in a comment.
        ["SAFETY:", "# Safety"].iter().any(|reason| text[line].contains(reason) && !code[line].contains(reason))
    };
    let explained = |line: usize| {
        explains(line)
            || (0..line)
                .rev()
                .take_while(|&above| {
                    let statement_ends = code[above].trim_end().ends_with([';', '{', '}']);
                    !text[above].trim().is_empty() && !statement_ends
                })
                .any(explains)
    };
    let mut findings = Vec::new();
    // The type of a function's address promises nothing; what makes a value of it sound is said where it is called.
    let is_type = |at: usize| {
        let rest = file.code[at..].trim_start_matches("unsafe").trim_start().trim_start_matches("extern").trim_start();
        rest.starts_with("fn(")
    };
    for (at, _) in code::words(&file.code).filter(|&(at, word)| word == "unsafe" && !is_type(at)) {
        let line = code::line_of(&file.code, at);
        if !explained(line - 1) {
            findings.push(Finding { line, what: "`unsafe` without a reason".into() });
        }
    }
    findings
}

#[test]
fn no_lock_is_held_over_parallel_work() {
    let rule = Rule {
        rule: "no guard of a lock lives while its function shares work out over rayon's pool, itself or through what it calls",
        why: "whoever waits inside the pool works on other tasks meanwhile; one that wants the same lock waits for its own thread",
        fix: "do the parallel work first and take the lock for its result, or copy out of the lock what the work needs",
    };
    let files = files();
    let sources = files.iter().filter(|file| in_src(file));
    let code: Vec<(&str, &str)> = sources.map(|file| (file.path.as_str(), file.code.as_str())).collect();
    let program = locks::Program::of(&code);
    hold(rule, in_src, |file| {
        let found = program.parallel_under_lock(&file.path, &file.code).into_iter();
        found.map(|(line, word)| Finding { line, what: format!("a guard lives while `{word}` works") }).collect()
    });
}

#[test]
fn one_module_says_what_a_poisoned_lock_means() {
    let rule = Rule {
        rule: "only src/lock.rs names PoisonError",
        why: "whether work goes on after a panic is one decision, with one reason",
        fix: "use `IgnorePoison::ignore_poison`, or refuse as `StoreError::Poisoned` does",
    };
    hold(rule, |file| in_src(file) && file.path != "src/lock.rs", check_poison);
}

fn check_poison(file: &File) -> Vec<Finding> {
    code::words(&file.code)
        .filter(|&(_, word)| word == "PoisonError")
        .map(|(at, word)| Finding { line: code::line_of(&file.code, at), what: format!("`{word}`") })
        .collect()
}

#[test]
fn code_is_finished() {
    let rule = Rule {
        rule: "no todo!, unimplemented! or dbg! in Rust code",
        why: "each is a promise to the compiler that a user finds broken",
        fix: "write it, or return a typed error that says what is not supported",
    };
    hold(rule, File::is_rust, check_unfinished);
}

fn check_unfinished(file: &File) -> Vec<Finding> {
    let is_macro = |at: usize, word: &str| file.code[at + word.len()..].starts_with('!');
    code::words(&file.code)
        .filter(|&(at, word)| ["todo", "unimplemented", "dbg"].contains(&word) && is_macro(at, word))
        .map(|(at, word)| Finding { line: code::line_of(&file.code, at), what: format!("`{word}!`") })
        .collect()
}

#[test]
fn features_are_switched_in_few_places() {
    let lines: Vec<String> = files()
        .iter()
        .filter(|file| in_src(file) && !file.path.contains("/tests/"))
        .flat_map(|file| feature_lines(file).into_iter().map(move |line| format!("{}:{line}", file.path)))
        .collect();
    assert!(
        lines.len() <= FEATURE_LINES_MAX,
        "\n{}\n\nrule: at most {FEATURE_LINES_MAX} lines of src/ ask for a feature, found {}\n\
         why:  each one doubles the programs that must be tested\n\
         do:   swap a whole module at one place (`mod cuda;` or its absent twin)\n",
        lines.join("\n"),
        lines.len(),
    );
}

fn feature_lines(file: &File) -> Vec<usize> {
    let asks = |line: &str| {
        let has = |wanted: &str| code::words(line).any(|(_, word)| word == wanted);
        // What tests compile too makes no other program.
        has("feature") && (has("cfg") || has("cfg_attr")) && !has("test")
    };
    file.code.lines().enumerate().filter(|(_, line)| asks(line)).map(|(index, _)| index + 1).collect()
}

#[test]
fn files_know_no_machine() {
    let rule = Rule {
        rule: "no path of somebody's machine and no address of a package host in a tracked file",
        why: "they work for one person, tell strangers about that person's machine, and rot",
        fix: "use a path relative to the repository, a temporary folder asked from the system, or the package's name",
    };
    // Cargo writes its index into lock files.
    hold(rule, |file| !file.path.ends_with("Cargo.lock"), check_machine);
}

fn check_machine(file: &File) -> Vec<Finding> {
    // Assembled, so that this file does not contain what it forbids.
    let folders = ["home", "root", "Users", "work", "tmp"].map(|name| format!("/{name}/"));
    let hosts = ["crates.io", "pypi", "pythonhosted", "debian.org"];
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for folder in &folders {
            // Behind such a character it is the middle of a longer path.
            let begins = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-})~*".contains(c));
            if line.match_indices(folder.as_str()).any(|(at, _)| begins(at)) {
                findings.push(Finding { line: index + 1, what: format!("a path under {folder}") });
            }
        }
        let addresses = line.match_indices("://").map(|(at, _)| line[at..].split_whitespace().next().unwrap_or(""));
        for address in addresses {
            if hosts.iter().any(|host| address.contains(host)) {
                findings.push(Finding { line: index + 1, what: format!("the address http{address}") });
            }
        }
    }
    findings
}

/// The rules must be able to fail: each snippet, with how many findings its check has.
#[test]
fn checks_find_what_they_are_for() {
    type Check = fn(&File) -> Vec<Finding>;
    let long = format!("fn f() {{{}}}", "\n".repeat(FUNCTION_LINES_MAX));
    let slash = |path: &str| path.replace('|', "/");
    let cases: &[(Check, &str, &str, usize)] = &[
        (check_imports, "src/index/fast.rs", "use crate::types::BlockId; use crate::index::Query;", 0),
        (check_imports, "src/index/fast.rs", "use crate::store::Store;", 1),
        (check_imports, "src/index/fast.rs", "use super::super::store::Store; use super::exact;", 1),
        (check_imports, "src/memory/mod.rs", "use crate::{api::Hits, store::Store, attention::X};", 1),
        (check_imports, "src/memory/mod.rs", "use crate::BlockMemory;", 1),
        (check_imports, "src/other.rs", "", 1),
        (check_imports, "crates/grpc/src/server/mod.rs", "use crate::wire::v1; use crate::client::X;", 1),
        (check_imports, "crates/llm/src/other.rs", "use crate::gguf::X;", 0),
        (check_libraries, "src/store/catalog.rs", "use sled::Db;", 0),
        (check_libraries, "src/memory/mod.rs", "use crate::store::sled::Db; // sled::Db", 0),
        (check_libraries, "src/memory/mod.rs", "use sled::Db; let x: ::sled::Db;", 2),
        (check_libraries, "crates/grpc/src/wire/mod.rs", "use hyper::body; use prost::Message;", 1),
        (check_lengths, "src/a.rs", &long, 1),
        (check_lengths, "crates/cli/src/a.rs", &long, 1),
        (check_lengths, "crates/cli/tests/a.rs", &long, 0),
        (check_unsafe, "src/a.rs", "// SAFETY: it is.\nlet x =\n    unsafe { f() };", 0),
        (check_unsafe, "src/a.rs", "/// # Safety\n/// It is.\n#[inline]\nunsafe fn f() {}", 0),
        (check_unsafe, "src/a.rs", "// SAFETY: another.\nf();\nunsafe { g() }", 1),
        (check_unsafe, "src/a.rs", "type F = unsafe extern \"C\" fn(u8);\nunsafe extern \"C\" fn f() {}", 1),
        (check_unsafe, "src/a.rs", "// unsafe\nlet x = \"unsafe\";", 0),
        (check_poison, "src/a.rs", "lock.unwrap_or_else(PoisonError::into_inner)", 1),
        (check_unfinished, "src/a.rs", "todo!(); // dbg!()\nlet todo = 1;", 1),
        (check_machine, "a.md", &slash("see |home|me|x, src|work|y, {dir}|tmp|z, unix:||tmp|s"), 2),
        (check_machine, "a.md", &format!("https://{}.io/x, https://docs.rs/x", "crates"), 1),
    ];
    for (check, path, text, count) in cases {
        let found = check(&File::new(path, text.to_string()));
        assert_eq!(found.len(), *count, "{path}: {text}\n{found:?}");
    }
    let features =
        "#[cfg(feature = \"a\")]\n#[cfg(not(feature = \"b\"))]\n#[target_feature(enable = \"c\")]\n// cfg(feature)";
    assert_eq!(feature_lines(&File::new("src/a.rs", features.into())), [1, 2]);
}
