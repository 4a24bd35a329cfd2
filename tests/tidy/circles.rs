//! Modules that lie side by side in one folder and need each other in a circle.

use std::collections::{BTreeMap, BTreeSet};

use super::code;

/// A module's names from its package's root: `["index", "scan"]`.
type Module = Vec<String>;

/// The modules of one package: of each, its file and its code without tests.
pub struct Package<'a> {
    modules: BTreeMap<Module, (&'a str, &'a str)>,
    /// What a module has from one below it: `Query` of `["index"]` is from `["index", "query"]`.
    passed_on: BTreeMap<(Module, String), Module>,
}

impl<'a> Package<'a> {
    /// Of files below `sources`, each with its code.
    pub fn of(sources: &str, files: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut package = Package { modules: BTreeMap::new(), passed_on: BTreeMap::new() };
        for (path, code) in files {
            let names = path[sources.len()..].trim_end_matches(".rs").split('/').map(String::from);
            let module: Module = names.filter(|name| !["mod", "lib", "main"].contains(&name.as_str())).collect();
            if !module.iter().any(|name| name == "tests") {
                package.modules.insert(module, (path, without_tests(code)));
            }
        }
        for (module, (_, code)) in &package.modules {
            for (_, path) in code::paths(code) {
                let Some((name, begin)) = path.split_last() else { continue };
                let below = package.below(module, begin);
                if below.len() > module.len() {
                    package.passed_on.insert((module.clone(), name.to_string()), below);
                }
            }
        }
        package
    }

    /// The module that names lead to from `module`, through modules that exist.
    fn below(&self, module: &[String], names: &[&str]) -> Module {
        let mut at = module.to_vec();
        for name in names.iter().skip_while(|name| **name == "self") {
            at.push(name.to_string());
            if !self.modules.contains_key(&at) {
                at.pop();
                break;
            }
        }
        at
    }

    /// The module that defines what a path in `module` names; nothing for paths out of the package.
    fn definer(&self, module: &[String], path: &[&str]) -> Option<Module> {
        let up = path.iter().take_while(|name| **name == "super").count();
        let from = match *path.first()? {
            "crate" => &[],
            "self" => module,
            "super" => &module[..module.len().checked_sub(up)?],
            _ => return None,
        };
        let names = &path[up.max(1)..];
        let found = self.below(from, names);
        let rest = &names[found.len() - from.len()..];
        let passed_on = rest.first().and_then(|name| self.passed_on.get(&(found.clone(), name.to_string())));
        Some(passed_on.cloned().unwrap_or(found))
    }

    /// Every circle, as the places where one of its modules names another of them.
    pub fn circles(&self) -> Vec<Vec<Place>> {
        // By folder, which of the modules in it need which others, and where they first say so.
        let mut needs: BTreeMap<Module, BTreeMap<(String, String), String>> = BTreeMap::new();
        for (module, (file, code)) in &self.modules {
            for (line, path) in code::paths(code) {
                let Some(other) = self.definer(module, &path) else { continue };
                let shared = module.iter().zip(&other).take_while(|(a, b)| a == b).count();
                if let (Some(one), Some(other)) = (module.get(shared), other.get(shared)) {
                    let of_folder = needs.entry(module[..shared].to_vec()).or_default();
                    let place = || format!("{file}:{line}: {one} needs {other}");
                    of_folder.entry((one.clone(), other.clone())).or_insert_with(place);
                }
            }
        }
        needs.values().flat_map(circles_among).collect()
    }
}

/// A line where a module names another.
type Place = String;

fn circles_among(needs: &BTreeMap<(String, String), Place>) -> Vec<Vec<Place>> {
    let mut circles = Vec::new();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for (from, _) in needs.keys() {
        let reached = reach(needs, from);
        if seen.contains(from.as_str()) || !reached.contains(from.as_str()) {
            continue;
        }
        let circle: BTreeSet<&str> =
            reached.into_iter().filter(|to| reach(needs, to).contains(from.as_str())).collect();
        let inside = |name: &String| circle.contains(name.as_str());
        let places = needs.iter().filter(|((one, other), _)| inside(one) && inside(other));
        circles.push(places.map(|(_, place)| place.clone()).collect());
        seen.extend(circle);
    }
    circles
}

/// All modules that one needs, itself or through others.
fn reach<'a>(needs: &'a BTreeMap<(String, String), Place>, from: &str) -> BTreeSet<&'a str> {
    let of = |from: &str| -> Vec<&'a str> {
        needs.keys().filter(|(one, _)| one == from).map(|(_, other)| other.as_str()).collect()
    };
    let mut reached = BTreeSet::new();
    let mut ahead = of(from);
    while let Some(next) = ahead.pop() {
        if reached.insert(next) {
            ahead.extend(of(next));
        }
    }
    reached
}

/// Tests beside the code come last in a file, and may use whatever they compare with.
fn without_tests(code: &str) -> &str {
    code.split("#[cfg(test)]\nmod tests {").next().unwrap_or(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<Vec<Place>> {
        Package::of("src/", files.iter().copied()).circles()
    }

    #[test]
    fn modules_that_need_each_other_are_found_however_they_name_each_other() {
        let none = circles(&[
            ("src/lib.rs", "mod a; mod b; use a::X; use b::Y;"),
            ("src/a.rs", "use crate::b::Y;"),
            ("src/b.rs", "use super::Z; #[cfg(test)]\nmod tests { use super::a::X; }"),
        ]);
        assert!(none.is_empty(), "{none:?}");
        let both = |files: &[(&str, &str)]| {
            let [circle] = &circles(files)[..] else { panic!("one circle") };
            assert_eq!(circle.len(), 2, "{circle:?}");
            assert!(circle[0].ends_with(": a needs b") && circle[1].ends_with(": b needs a"), "{circle:?}");
        };
        both(&[("src/a.rs", "use super::b::Y;"), ("src/b.rs", "fn f() { crate::a::g() }")]);
        both(&[("src/a/x.rs", "use super::super::b::Y;"), ("src/a/mod.rs", ""), ("src/b.rs", "use crate::{a::x::Z};")]);
        let root = ("src/lib.rs", "pub use a::X; pub use self::b::{Y, Z};");
        both(&[root, ("src/a.rs", "use super::Z;"), ("src/b.rs", "use crate::X;")]);
        let three =
            [("src/a.rs", "use super::b::Y;"), ("src/b.rs", "use super::c::Y;"), ("src/c.rs", "use super::a::Y;")];
        assert_eq!(circles(&three)[0].len(), 3);
    }
}
