//! When is a test run, and when is it skipped by name?

use std::sync::Arc;

use libtest_mimic::Trial;

use crate::suite::{Need, Suite};

/// One test.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// What it has to do to the service besides calling it.
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn(&Suite),
}

/// `cases() -> Vec<Case>` of a module, by the names of its functions: `name;`, `name needs [Kill];`.
macro_rules! cases {
    ($($name:ident $(needs [$($need:ident),+])?;)+) => {
        pub(crate) fn cases() -> Vec<$crate::harness::Case> {
            #[allow(unused_imports, reason = "most modules need nothing")]
            use $crate::suite::Need::*;
            vec![$($crate::harness::Case {
                name: concat!(module_path!(), "::", stringify!($name)),
                needs: &[$($($need),+)?],
                run: $name,
            }),+]
        }
    };
}
pub(crate) use cases;

impl Case {
    /// Without the name of the program.
    pub(crate) fn short_name(&self) -> &'static str {
        self.name.split_once("::").map_or(self.name, |(_, name)| name)
    }

    /// Why it is not run, if it is not.
    fn skipped(&self, suite: &Suite) -> Option<String> {
        let missing: Vec<&str> = self.needs.iter().filter_map(|&need| suite.missing(need)).collect();
        (!missing.is_empty()).then(|| format!("needs {}, not set", missing.join(" and ")))
    }
}

/// A test as the harness runs it. `quiet` keeps it from telling why it will be skipped.
pub(crate) fn trial(suite: &Arc<Suite>, case: Case, quiet: bool) -> Trial {
    let skipped = case.skipped(suite);
    if let Some(why) = skipped.as_ref().filter(|_| !quiet) {
        eprintln!("skipped {}: {why}", case.short_name());
    }
    let suite = suite.clone();
    let run = move || {
        let _calling = case.needs.is_empty().then(|| suite.calling());
        (case.run)(&suite);
        Ok(())
    };
    Trial::test(case.short_name(), run).with_ignored_flag(skipped.is_some())
}

/// Says which of several a test was at when it failed.
pub(crate) struct Named<T: std::fmt::Display>(pub(crate) T);

impl<T: std::fmt::Display> Drop for Named<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("    with {}", self.0);
        }
    }
}
