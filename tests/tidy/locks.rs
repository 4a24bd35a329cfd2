//! Is there parallel work while a lock is held? Whoever waits for rayon's pool inside of it works on other tasks meanwhile, and one
//! of these may want the same lock on the same thread: then nobody of the pool ever goes on.
//!
//! By names, as everything here: a guard is what `lock()`, `read()` and `write()` give, and every function whose result is one; a
//! function is parallel if it names rayon's work, or calls one of its file that is. Calls are not followed into other files, where
//! names such as `get` mean anything.

use std::collections::HashSet;

use super::code::{self, Function};

/// What the functions of some files do.
#[derive(Debug, Default)]
pub struct Program {
    /// Of each file: its path and a function.
    guards: HashSet<(String, String)>,
    /// Likewise.
    parallel: HashSet<(String, String)>,
}

/// Part of a function in which a guard lives, by offsets in its text.
struct Alive {
    begin: usize,
    end: usize,
}

impl Program {
    /// Of files: path and code without comments and literals.
    pub fn of(files: &[(&str, &str)]) -> Program {
        let functions: Vec<(&str, Function)> = files
            .iter()
            .flat_map(|&(path, code)| code::functions(code).into_iter().map(move |function| (path, function)))
            .collect();
        let mut program = Program::default();
        let gives_guard = |function: &Function| {
            let signature = function.text.split('{').next().unwrap_or_default();
            signature.rsplit_once("->").is_some_and(|(_, result)| result.contains("Guard<"))
        };
        let guards = functions.iter().filter(|(_, function)| gives_guard(function));
        program.guards = guards.map(|(path, function)| (path.to_string(), function.name.to_string())).collect();
        loop {
            let mut grew = false;
            for (path, function) in &functions {
                let body = function.text.split_once('{').map_or("", |(_, body)| body);
                if !program.is_parallel(path, function.name) && program.parallel_word(path, body).is_some() {
                    grew |= program.parallel.insert((path.to_string(), function.name.into()));
                }
            }
            if !grew {
                return program;
            }
        }
    }

    fn is_parallel(&self, path: &str, name: &str) -> bool {
        self.parallel.contains(&(path.to_string(), name.to_string()))
    }

    /// The first word that shares work out.
    fn parallel_word<'a>(&self, path: &str, code: &'a str) -> Option<&'a str> {
        let is_parallel = |&(at, word): &(usize, &str)| {
            let of_rayon = code[..at].ends_with("rayon::") && ["join", "scope", "in_place_scope"].contains(&word);
            let of_other = code[..at].ends_with('.') && !code[..at].ends_with("self.");
            let is_call = code[at + word.len()..].starts_with(['(', ':']) && !code[..at].ends_with("fn ") && !of_other;
            word.starts_with("par_") || word == "into_par_iter" || of_rayon || is_call && self.is_parallel(path, word)
        };
        code::words(code).find(is_parallel).map(|(_, word)| word)
    }

    /// Lines of a file where a guard is taken that lives while work is shared out, each with the word that does.
    pub fn parallel_under_lock<'a>(&self, path: &str, code: &'a str) -> Vec<(usize, &'a str)> {
        let mut found = Vec::new();
        for function in code::functions(code) {
            for Alive { begin, end } in self.guards_of(path, function.text) {
                if let Some(word) = self.parallel_word(path, &function.text[begin..end]) {
                    found.push((function.line + code::line_of(function.text, begin) - 1, word));
                }
            }
        }
        found.dedup();
        found
    }

    fn guards_of(&self, path: &str, text: &str) -> Vec<Alive> {
        // Closures that take a lock when they are called.
        let mut closures = HashSet::new();
        let mut alive = Vec::new();
        for (at, word) in code::words(text) {
            let after = &text[at + word.len()..];
            let is_method = text[..at].ends_with('.');
            let takes = is_method && ["lock", "read", "write"].contains(&word) && after.starts_with("()");
            // In another file a function with arguments is another one of this name.
            let gives = |(of, name): &(String, String)| name == word && (of == path || after.starts_with("()"));
            let calls = after.starts_with('(') && !text[..at].ends_with("fn ") && self.guards.iter().any(gives);
            if !(takes || calls || after.starts_with("()") && !is_method && closures.contains(word)) {
                continue;
            }
            let statement = text[..at].rfind([';', '{', '}']).map_or(0, |before| before + 1);
            let head = text[statement..at].trim_start();
            let begin = after_guard(text, at + word.len());
            if let Some((name, "")) = closure(head) {
                closures.insert(name);
                continue;
            }
            let after = text[begin..].trim_start_matches([')', ' ', '\n']);
            // Inside parentheses it is what somebody else makes of it, unless a closure gives it.
            let is_value = after.starts_with(';') && (text[begin..].starts_with(';') || head.contains('|'));
            let end = match binding(head).filter(|_| is_value) {
                Some("_") => begin,
                Some(name) => {
                    let end = end_of_block(text, begin);
                    text[begin..end].find(&format!("drop({name})")).map_or(end, |dropped| begin + dropped)
                }
                None if ["if let", "while let", "match", "for "].iter().any(|word| head.starts_with(word)) => {
                    let body = begin + text[begin..].find('{').map_or(0, |brace| brace + 1);
                    end_of_block(text, body)
                }
                None if ["if ", "while "].iter().any(|word| head.starts_with(word)) => {
                    begin + text[begin..].find('{').unwrap_or_default()
                }
                None => end_of_statement(text, begin),
            };
            alive.push(Alive { begin, end });
        }
        alive
    }
}

/// `name` of `let name = || ..`, and what stands between the closure's arguments and here, up to the first call's receiver.
fn closure(head: &str) -> Option<(&str, &str)> {
    let (name, value) = head.strip_prefix("let ")?.split_once(" = ")?;
    let body = value.trim_start_matches("move ").strip_prefix("||")?;
    Some((name, if body.contains(['(', '{']) { body } else { "" }))
}

/// `name` of `let name = ..`.
fn binding(head: &str) -> Option<&str> {
    let pattern = head.strip_prefix("let ")?.split(['=', ':']).next()?;
    Some(pattern.trim().trim_start_matches("mut "))
}

/// Behind the call of which the arguments begin at `at`, and behind what leaves a guard a guard.
fn after_guard(text: &str, at: usize) -> usize {
    let mut at = at + parenthesized(&text[at..]);
    while let Some(call) = [".ignore_poison", ".unwrap_or_else", ".unwrap", ".expect"].iter().find(|call| {
        let after = text[at..].trim_start();
        after.strip_prefix(**call).is_some_and(|after| after.starts_with('('))
    }) {
        at += text[at..].find(call).unwrap_or_default() + call.len();
        at += parenthesized(&text[at..]);
    }
    at
}

fn parenthesized(text: &str) -> usize {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    text.len()
}

/// Where the block ends that is open at `at`.
fn end_of_block(text: &str, at: usize) -> usize {
    end(text, at, |_, depth| depth < 0)
}

/// Where the statement ends that is not over at `at`.
fn end_of_statement(text: &str, at: usize) -> usize {
    end(text, at, |byte, depth| depth < 0 || depth == 0 && byte == b';')
}

fn end(text: &str, at: usize, is_end: impl Fn(u8, i32) -> bool) -> usize {
    let mut depth = 0;
    for (offset, byte) in text.bytes().enumerate().skip(at) {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if is_end(byte, depth) {
            return offset;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<(usize, String)> {
        let program = Program::of(files);
        let (path, code) = files[0];
        program.parallel_under_lock(path, code).into_iter().map(|(line, word)| (line, word.into())).collect()
    }

    /// The engine `cuda` rearranged int8 keys on all threads while it held the lock of the chunk's copy. Called from inside the
    /// pool, a thread that waited for its parts began another request over the same chunk, and waited for itself.
    #[test]
    fn the_deadlock_of_int8_keys_is_found() {
        let cuda = "fn on_gpu<R: Runner>(runner: &R, chunk: &Chunk) -> Result<Arc<Keys<R::Memory>>, R::Error> {
    let mut copy = chunk.copy();
    if let Some(keys) = copy.clone().and_then(|copy| copy.downcast().ok()) {
        return Ok(keys);
    }
    let keys = Arc::new(match chunk.all_panels() {
        Panels::Int8 { numbers, scales } => {
            let numbers = &by_dimension(numbers, width);
            Keys::upload(runner, cuda::Panels::Int8 { numbers, scales }, width, pieces)?
        }
    });
    *copy = Some(keys.clone());
    Ok(keys)
}

fn by_dimension(quads: &[i8], width: usize) -> Vec<i8> {
    let panels = rows.par_chunks_exact_mut(width * PANEL).zip(quads.par_chunks_exact(panel_quads));
    panels.for_each(|(rows, quads)| {});
    rows
}";
        let snapshot = "fn copy(&self) -> MutexGuard<'_, Option<Copied>> { self.copy.lock().unwrap() }";
        assert_eq!(found(&[("cuda.rs", cuda), ("snapshot.rs", snapshot)]), [(2, "by_dimension".into())]);
    }

    #[test]
    fn a_guard_lives_as_long_as_rust_says() {
        for (body, count) in [
            ("let kept = self.kept.lock().unwrap(); kept.par_iter().sum()", 1),
            ("let kept = self.kept.lock().unwrap(); drop(kept); rows.par_iter().sum()", 0),
            ("{ let kept = self.kept.write().ignore_poison(); } rows.par_iter()", 0),
            ("let rows = self.kept.read().unwrap().clone(); rows.into_par_iter().sum()", 0),
            ("self.kept.lock().unwrap().par_iter().sum()", 1),
            ("let _ = self.kept.lock(); rayon::join(a, b)", 0),
            ("let _kept = self.kept.lock(); rayon::join(a, b)", 1),
            ("let _kept = wants.then(|| self.kept.lock().unwrap()); rayon::scope(|_| ())", 1),
            ("if let Some(rows) = self.kept.lock().unwrap().get(0) { rows.par_iter() }", 1),
            ("if self.kept.lock().unwrap().is_empty() { rows.par_iter() }", 0),
            ("let lock = || self.kept.lock().unwrap(); let n = lock().len(); rows.par_iter()", 0),
            ("let lock = || self.kept.lock().unwrap(); let kept = lock(); rows.par_iter()", 1),
            ("let kept = file.read(&mut bytes); rows.par_iter()", 0),
            ("std::thread::scope(|_| self.kept.lock()); join(a)", 0),
        ] {
            let code = format!("fn f(&self) {{ {body} }}");
            assert_eq!(found(&[("a.rs", &code)]).len(), count, "{body}");
        }
    }

    #[test]
    fn parallel_work_is_followed_through_calls_inside_a_file() {
        let (f, g) = ("fn f(&self) { let kept = self.kept.lock(); g(1) }", "fn g(n: u8) { h(n) }");
        let h = "fn h(n: u8) { rows.par_iter() }";
        assert_eq!(found(&[("a.rs", &format!("{f}\n{g}\n{h}"))]), [(1, "g".into())]);
        assert_eq!(found(&[("a.rs", f), ("b.rs", &format!("{g} {h}"))]), []);
    }
}
