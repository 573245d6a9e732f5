//! The shape of files: a module doc first, functions and files that fit in a head, no drawers called `utils`, no
//! notes to self. The ratchet names what is still too long; it may only get shorter.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Violation;
use super::source::{Source, line_of, words};

/// Lines of a function, from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 72;
/// The same for tests, which may tell a longer story.
const TEST_LINES_MAX: usize = 120;
const FILE_LINES_MAX: usize = 800;
/// Of files that hold nothing but tests.
const TEST_FILE_LINES_MAX: usize = 1000;

/// Names of modules that become drawers for everything.
const DRAWERS: &[&str] = &["common", "utils", "util", "helpers", "misc"];

/// Kept apart so that this file does not contain them.
const NOTES_TO_SELF: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

const RATCHET: &str = "xtask/ratchet.txt";

/// What was too long when its law was made: `<file> <function> <lines>` a line, function `-` for the file itself.
pub(crate) struct Ratchet {
    allowed: BTreeMap<(String, String), (usize, usize)>,
    used: RefCell<Vec<(String, String)>>,
}

impl Ratchet {
    pub(crate) fn read(root: &Path) -> Result<Ratchet> {
        let text = fs::read_to_string(root.join(RATCHET)).with_context(|| format!("read {RATCHET}"))?;
        let mut allowed = BTreeMap::new();
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty() && !l.starts_with('#')) {
            let mut parts = line.split_whitespace();
            let entry =
                (|| Some((parts.next()?.into(), parts.next()?.into(), parts.next()?.parse().ok()?)))();
            let (file, function, lines) =
                entry.with_context(|| format!("{RATCHET}:{}: `{line}`", number + 1))?;
            allowed.insert((file, function), (lines, number + 1));
        }
        Ok(Ratchet { allowed, used: RefCell::default() })
    }

    fn permits(&self, file: &str, function: &str, lines: usize) -> bool {
        let key = (file.to_owned(), function.to_owned());
        let permitted = self.allowed.get(&key).is_some_and(|(max, _)| lines <= *max);
        if permitted {
            self.used.borrow_mut().push(key);
        }
        permitted
    }

    /// Lines that no longer excuse anything.
    pub(crate) fn unused(&self) -> Vec<Violation> {
        let used = self.used.borrow();
        let stale = self.allowed.iter().filter(|(key, _)| !used.contains(key));
        stale
            .map(|((file, function), (_, line))| {
                Violation::new(RATCHET, *line, format!("{file} {function} is short now; delete the line"))
            })
            .collect()
    }
}

pub(crate) fn check(source: &Source, ratchet: &Ratchet) -> Vec<Violation> {
    let mut found = Vec::new();
    if !source.text.starts_with("//!") {
        found.push(Violation::new(
            &source.name,
            1,
            "no module doc; start with `//!` and the invariant kept here",
        ));
    }
    lengths(source, ratchet, &mut found);
    for part in source.name.trim_end_matches(".rs").split('/') {
        if DRAWERS.contains(&part) {
            let text = format!("`{part}` says nothing; name the module after what it holds");
            found.push(Violation::new(&source.name, 1, text));
        }
    }
    for note in NOTES_TO_SELF {
        for at in words(&source.text, note) {
            let text = format!("{note}; do it now or write an issue");
            found.push(Violation::new(&source.name, line_of(&source.text, at) + 1, text));
        }
    }
    found
}

fn lengths(source: &Source, ratchet: &Ratchet, found: &mut Vec<Violation>) {
    let lines = source.text.lines().count();
    let max = if source.is_test_file() { TEST_FILE_LINES_MAX } else { FILE_LINES_MAX };
    if lines > max && !ratchet.permits(&source.name, "-", lines) {
        let text = format!("{lines} lines (max {max}); split the module");
        found.push(Violation::new(&source.name, 1, text));
    }
    for function in source.functions() {
        let max = if source.is_test(function.lines.start) { TEST_LINES_MAX } else { FUNCTION_LINES_MAX };
        let lines = function.lines.len();
        if lines > max && !ratchet.permits(&source.name, &function.name, lines) {
            let text = format!("`{}` has {lines} lines (max {max}); give its steps names", function.name);
            found.push(Violation::new(&source.name, function.lines.start + 1, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Ratchet {
        Ratchet { allowed: BTreeMap::new(), used: RefCell::default() }
    }

    fn texts(name: &str, text: &str) -> Vec<String> {
        check(&Source::new(name, text.into()), &empty()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_law_is_enforced() {
        assert_eq!(texts("a.rs", "//! Keeps x.\nfn short() {}\n"), [""; 0]);
        assert!(texts("a.rs", "use x;\n")[0].starts_with("a.rs:1: no module doc"));
        assert!(texts("a/utils/b.rs", "//! B.\n")[0].contains("`utils`"));
        let note = format!("//! B.\n// {}: later\n", NOTES_TO_SELF[0]);
        assert!(texts("a.rs", &note)[0].starts_with("a.rs:2:"));
        let long = format!("//! B.\nfn long() {{\n{}}}\n", "    x;\n".repeat(FUNCTION_LINES_MAX));
        assert!(texts("a.rs", &long)[0].starts_with("a.rs:2: `long` has 74 lines"));
        assert_eq!(texts("tests/a.rs", &long), [""; 0]);
        let huge = format!("//! B.\n{}", "x;\n".repeat(FILE_LINES_MAX));
        assert!(texts("a.rs", &huge)[0].contains("801 lines"));
    }

    #[test]
    fn the_ratchet_only_tightens() {
        let mut ratchet = empty();
        ratchet.allowed.insert(("a.rs".into(), "long".into()), (80, 1));
        assert!(ratchet.permits("a.rs", "long", 79) && !ratchet.permits("a.rs", "long", 81));
        assert!(ratchet.unused().is_empty());
        ratchet.allowed.insert(("b.rs".into(), "gone".into()), (80, 2));
        assert_eq!(ratchet.unused().len(), 1);
    }
}
