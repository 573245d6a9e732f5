//! A Rust file as the checks see it: the text, and the same text with comments and literals blanked, so that a word
//! in a string is never taken for code. Both have the same lines.

use std::ops::Range;

pub(crate) struct Source {
    /// Relative to the workspace.
    pub(crate) name: String,
    pub(crate) text: String,
    /// `text` with the insides of comments and literals replaced by spaces.
    pub(crate) code: String,
    /// Line ranges (from 0) under `#[cfg(test)]`.
    tests: Vec<Range<usize>>,
    test_file: bool,
}

/// A function and the lines (from 0) from its `fn` to its closing brace.
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) lines: Range<usize>,
}

impl Source {
    pub(crate) fn new(name: &str, text: String) -> Source {
        let code = blank(&text);
        let stem = name.rsplit('/').next().unwrap_or(name);
        let test_file = name.starts_with("tests/")
            || name.contains("/tests/")
            || ["tests.rs", "selftest.rs"].contains(&stem)
            || stem.ends_with("_tests.rs");
        let tests = test_ranges(&code);
        Source { name: name.to_owned(), text, code, tests, test_file }
    }

    /// True if the line (from 0) is only compiled for tests.
    pub(crate) fn is_test(&self, line: usize) -> bool {
        self.test_file || self.tests.iter().any(|range| range.contains(&line))
    }

    /// True if the whole file is only compiled for tests.
    pub(crate) fn is_test_file(&self) -> bool {
        self.test_file
    }

    /// Every function with a body.
    pub(crate) fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for at in words(&self.code, "fn") {
            let rest = &self.code[at + 2..];
            let name: String =
                rest.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            // A `fn` type has no name, a declaration ends before any brace.
            let Some(open) = rest.find(['{', ';']).filter(|_| !name.is_empty()) else { continue };
            if rest.as_bytes()[open] == b'{' {
                let end = closing(&self.code, at + 2 + open);
                found.push(Function { name, lines: line_of(&self.code, at)..line_of(&self.code, end) + 1 });
            }
        }
        found
    }
}

/// Where `word` stands by itself in `code`.
pub(crate) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !part(code[..*at].chars().next_back()) && !part(code[at + word.len()..].chars().next())
    })
}

/// The line (from 0) that holds byte `at`.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count()
}

/// The byte of the brace that closes the one at `open`, or the end of the text.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0usize;
    for (at, c) in code[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return open + at,
            '}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

fn test_ranges(code: &str) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    for (at, _) in code.match_indices("#[cfg(test)]") {
        let Some(open) = code[at..].find(['{', ';']) else { continue };
        let end = if code.as_bytes()[at + open] == b'{' { closing(code, at + open) } else { at + open };
        ranges.push(line_of(code, at)..line_of(code, end) + 1);
    }
    ranges
}

/// Replaces the insides of comments, strings and character literals by spaces, keeping every newline.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => find(bytes, at, b"\n").unwrap_or(bytes.len()),
            b'/' if bytes[at..].starts_with(b"/*") => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'r' | b'b' if !follows_word(bytes, at) => raw_string_end(bytes, at).unwrap_or(at),
            b'\'' => char_end(bytes, at).unwrap_or(at),
            _ => at,
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    // Blanking is by whole literals, which end at character borders.
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

fn find(bytes: &[u8], from: usize, what: &[u8]) -> Option<usize> {
    bytes[from..].windows(what.len()).position(|window| window == what).map(|at| from + at)
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start + 2, 1);
    while at < bytes.len() && depth > 0 {
        let step = match &bytes[at..] {
            [b'/', b'*', ..] => 1,
            [b'*', b'/', ..] => -1,
            _ => 0,
        };
        depth += step;
        at += if step == 0 { 1 } else { 2 };
    }
    at.min(bytes.len())
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn raw_string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    while matches!(bytes.get(at), Some(b'r' | b'b')) {
        at += 1;
    }
    let hashes = bytes[at..].iter().take_while(|b| **b == b'#').count();
    if bytes.get(at + hashes) != Some(&b'"') || !bytes[start..at].contains(&b'r') {
        return None;
    }
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    Some(find(bytes, at + hashes + 1, &close).map_or(bytes.len(), |end| end + close.len()))
}

/// A quote that starts no character literal is a lifetime's.
fn char_end(bytes: &[u8], start: usize) -> Option<usize> {
    if bytes.get(start + 1) == Some(&b'\\') {
        return find(bytes, start + 3, b"'").map(|end| end + 1);
    }
    let text = std::str::from_utf8(&bytes[start + 1..]).ok()?;
    let first = text.chars().next()?;
    text[first.len_utf8()..].starts_with('\'').then(|| start + 2 + first.len_utf8())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_blank() {
        let code = blank(
            "let a = \"fn x { \\\" }\"; // fn\nlet b = '{'; let c: &'a str = r#\"\"}\"#; /* { /* } */ */ d",
        );
        assert!(!code.contains(['{', '}']) && !code.contains("fn"), "{code}");
        assert!(code.contains("&'a str") && code.ends_with(" d") && code.contains('\n'));
    }

    #[test]
    fn functions_are_measured() {
        let text = "fn a() {\n    {\n    }\n}\ntrait T { fn b(&self); }\nfn c(f: fn(u8)) { }\n";
        let found = Source::new("x.rs", text.into()).functions();
        let seen: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.lines.len())).collect();
        assert_eq!(seen, [("a", 4), ("c", 1)]);
    }

    #[test]
    fn test_modules_are_known() {
        let source =
            Source::new("x.rs", "fn a() {}\n#[cfg(test)]\nmod tests {\n    x\n}\nfn b() {}\n".into());
        let lines: Vec<_> = (0..6).map(|line| source.is_test(line)).collect();
        assert_eq!(lines, [false, true, true, true, true, false]);
    }
}
