//! Does README.md say what each test is for?

use crate::harness::cases;
use crate::suite::Suite;

cases! {
    every_test_is_explained;
}

fn every_test_is_explained(_: &Suite) {
    let readme = include_str!("README.md");
    let cases = crate::cases();
    let missing: Vec<&str> = cases
        .iter()
        .filter_map(|case| case.short_name().split_once("::"))
        .filter(|(module, name)| *module != "readme" && !readme.contains(&format!("| `{name}` | ")))
        .map(|(_, name)| name)
        .collect();
    assert!(missing.is_empty(), "README.md has no row for {missing:?}");
    let rows = readme.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let explained: Vec<&str> = rows.map(|(name, _)| name).filter(|name| !name.starts_with("LANDMARK_")).collect();
    let gone = explained.iter().filter(|name| !cases.iter().any(|case| case.name.ends_with(&format!("::{name}"))));
    assert_eq!(gone.collect::<Vec<_>>(), Vec::<&&str>::new(), "rows of README.md without a test");
}
