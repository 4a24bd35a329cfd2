//! Just enough Rust to hold rules against: code without comments and literals, its words, paths and functions.
//!
//! No parser, so that the check needs no dependency and builds in a second. Braces are counted; macros are read as
//! if their bodies were ordinary code.

/// Source with every comment and literal turned into spaces. Lines and byte offsets stay what they were.
pub fn blank(source: &str) -> String {
    let mut code = source.as_bytes().to_vec();
    let mut at = 0;
    while at < source.len() {
        let Some(length) = comment_or_literal(source, at) else {
            at += 1;
            continue;
        };
        for byte in &mut code[at..at + length] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at += length;
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// Bytes of the comment or literal that begins at `at`, if one does.
fn comment_or_literal(source: &str, at: usize) -> Option<usize> {
    let rest = source.get(at..)?;
    match rest.as_bytes()[0] {
        b'/' if rest.starts_with("//") => Some(rest.find('\n').unwrap_or(rest.len())),
        b'/' if rest.starts_with("/*") => Some(block_comment(rest.as_bytes())),
        b'"' => Some(quoted(rest.as_bytes(), b'"')),
        b'r' if may_begin_raw(&source[..at]) => raw_string(rest),
        b'\'' if rest[1..].starts_with('\\') => Some(quoted(rest.as_bytes(), b'\'')),
        b'\'' => {
            // A character has its closing quote right behind it; a lifetime has none.
            let width = rest[1..].chars().next()?.len_utf8();
            rest[1 + width..].starts_with('\'').then_some(width + 2)
        }
        _ => None,
    }
}

/// Whether an `r` behind this text may begin a raw string: at the start of a word, or after `b` or `c`.
fn may_begin_raw(before: &str) -> bool {
    let word = before.bytes().rev().take_while(|&byte| is_word(byte)).count();
    matches!(&before[before.len() - word..], "" | "b" | "c")
}

/// None for a word that begins with `r`, and for a raw identifier.
fn raw_string(rest: &str) -> Option<usize> {
    let hashes = rest[1..].bytes().take_while(|&byte| byte == b'#').count();
    let inside = rest[1 + hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&close).map_or(inside.len(), |found| found + close.len());
    Some(rest.len() - inside.len() + length)
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

/// Every identifier, keyword and number with its byte offset.
pub fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let bytes = code.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        at += bytes[at..].iter().position(|&byte| is_word(byte))?;
        let begin = at;
        at += bytes[at..].iter().take_while(|&&byte| is_word(byte)).count();
        Some((begin, &code[begin..at]))
    })
}

/// The line of a byte offset, counted from 1.
pub fn line_of(code: &str, offset: usize) -> usize {
    1 + code.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count()
}

/// The names that paths beginning with `root::` go on with, each with its line: `store` for `root::store::Store`,
/// `api` and `types` for `root::{api::Hits, types::{self}}`.
pub fn paths_from<'a>(code: &'a str, root: &str) -> Vec<(usize, &'a str)> {
    let mut found = Vec::new();
    for (at, word) in words(code) {
        let Some(tail) = code[at + word.len()..].strip_prefix("::") else { continue };
        if word != root || code[..at].ends_with("::") && root != "super" {
            continue;
        }
        let begin = code.len() - tail.len();
        let mut depth = 0;
        let mut expects_name = true;
        let mut next = begin;
        for (offset, character) in tail.char_indices() {
            let at = begin + offset;
            if at < next {
                continue;
            }
            match character {
                '{' => (depth, expects_name) = (depth + 1, depth == 0),
                '}' => depth -= 1,
                ',' => expects_name = depth == 1,
                space if space.is_whitespace() => continue,
                _ if expects_name => {
                    let name = words(&code[at..]).next().filter(|(begin, _)| *begin == 0).map_or("*", |(_, name)| name);
                    found.push((line_of(code, at), name));
                    next = at + name.len();
                    expects_name = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Every path of two names or more with its line, as it is written; trees of a `use` are spelled out: `a::b` and `a::c::d` for
/// `a::{b, c::d}`, and `a` for `a::{self}`.
pub fn paths(code: &str) -> Vec<(usize, Vec<&str>)> {
    let mut found = Vec::new();
    let mut end = 0;
    for (at, word) in words(code) {
        if at < end || code[..at].ends_with("::") || !code[at + word.len()..].starts_with("::") {
            continue;
        }
        let mut paths = Vec::new();
        end = tree(code, at, &mut Vec::new(), &mut paths);
        found.extend(paths.into_iter().map(|path| (line_of(code, at), path)));
    }
    found
}

/// Reads a path or a `use` tree; returns where it ends.
fn tree<'a>(code: &'a str, at: usize, before: &mut Vec<&'a str>, found: &mut Vec<Vec<&'a str>>) -> usize {
    let space = |at: usize| at + code[at..].len() - code[at..].trim_start().len();
    let Some((_, name)) = words(&code[at..]).next().filter(|(begin, _)| *begin == 0) else {
        found.push(before.clone());
        return at;
    };
    before.push(name);
    let mut end = at + name.len();
    match code[end..].strip_prefix("::") {
        Some(tail) if tail.starts_with('{') => {
            end = space(end + "::{".len());
            while end < code.len() && !code[end..].starts_with('}') {
                let next = tree(code, end, before, found);
                // An alias, a star, a comma.
                let rest = code[next..].find([',', '}']).map_or(code.len(), |to| next + to);
                end = space(rest + usize::from(code[rest..].starts_with(',')));
            }
            end = (end + 1).min(code.len());
        }
        Some(tail) if tail.starts_with(|first: char| first == '_' || first.is_alphabetic() || first == '*') => {
            end = tree(code, end + "::".len(), before, found);
        }
        _ => {
            let length = before.len() - usize::from(name == "self" && before.len() > 1);
            found.push(before[..length].to_vec());
        }
    }
    before.pop();
    end
}

/// A function with a body.
#[derive(Debug, PartialEq)]
pub struct Function<'a> {
    pub name: &'a str,
    pub line: usize,
    /// From the line of `fn` to the closing brace.
    pub lines: usize,
    /// From its name to the closing brace.
    pub text: &'a str,
}

pub fn functions(code: &str) -> Vec<Function<'_>> {
    let mut found = Vec::new();
    let mut words = words(code).peekable();
    while let Some((at, word)) = words.next() {
        let Some(&(name_at, name)) = words.peek() else { break };
        // `fn(u32)` is a type and `fn $name` a macro's pattern: neither has a name right behind.
        if word != "fn" || !code[at + 2..name_at].trim().is_empty() {
            continue;
        }
        let Some(end) = body_end(&code[name_at..]) else { continue };
        let line = line_of(code, at);
        let text = &code[name_at..=name_at + end];
        found.push(Function { name, line, lines: line_of(code, name_at + end) - line + 1, text });
    }
    found
}

/// Offset of the brace that closes the first body in `code`; none if the signature ends with a semicolon.
fn body_end(code: &str) -> Option<usize> {
    let (mut nested, mut braces) = (0, 0);
    for (at, byte) in code.bytes().enumerate() {
        match byte {
            b'(' | b'[' => nested += 1,
            b')' | b']' => nested -= 1,
            b';' if nested == 0 && braces == 0 => return None,
            b'{' => braces += 1,
            b'}' => {
                braces -= 1;
                if braces == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_become_spaces() {
        for (source, code) in [
            ("a // b\nc", "a     \nc"),
            ("a /* b /* c */\n d */ e", "a             \n      e"),
            (r#"a("b\"c", 'd', '"', '\'')"#, r#"a(      ,    ,    ,     )"#),
            ("br#\"a\"b\"# c r\"\\\" d", "b         c      d"),
            ("&'a str, r#fn, for 'b' in", "&'a str, r#fn, for     in"),
            ("'é' é", "     é"),
        ] {
            assert_eq!(blank(source), code, "{source}");
        }
    }

    #[test]
    fn paths_name_what_follows_their_root() {
        let names = |code, root| paths_from(code, root).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
        assert_eq!(names("use crate::store::Store;", "crate"), ["store"]);
        assert_eq!(names("use crate::{\n api::{A, B}, types::C,\n};", "crate"), ["api", "types"]);
        assert_eq!(names("let x = crate::api::f(crate::shape::g());", "crate"), ["api", "shape"]);
        assert_eq!(names("use crate::*; my_crate::a; other::crate::b", "crate"), ["*"]);
        assert_eq!(names("use super::super::wire::X;", "super"), ["super", "wire"]);
        assert_eq!(paths_from("\nuse crate::{a,\nb};", "crate"), [(2, "a"), (3, "b")]);
    }

    #[test]
    fn trees_of_paths_are_spelled_out() {
        let spelled = |code| paths(code).into_iter().map(|(_, path)| path.join("::")).collect::<Vec<_>>();
        assert_eq!(spelled("use a::{b, c::{self, d as e}, f::*};"), ["a::b", "a::c", "a::c::d", "a::f"]);
        assert_eq!(
            spelled("let x = super::super::f::<u8>(a::B); y: c::D<e::F>"),
            ["super::super::f", "a::B", "c::D", "e::F"]
        );
        assert_eq!(spelled("use a::{\n    b,\n};\nx"), ["a::b"]);
    }

    #[test]
    fn functions_are_measured_from_their_name_to_their_brace() {
        let code =
            "trait T { fn none(&self, x: [u8; 2]); }\nfn two() -> [u8; 2] {\n}\ntype F = fn(u8);\nfn one() { { } }";
        let found: Vec<_> = functions(code).into_iter().map(|f| (f.name, f.line, f.lines)).collect();
        assert_eq!(found, [("two", 2, 2), ("one", 5, 1)]);
    }
}
