//! The laws of the tree that no compiler knows, as a verb and as a test. Each violation is one line
//! `file:line: what; fix`.

mod manifest;
mod rooms;
mod shape;
mod source;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::proc;
use source::Source;

/// A broken law.
#[derive(Debug, PartialEq)]
pub(crate) struct Violation {
    /// Relative to the workspace.
    file: String,
    /// From 1.
    line: usize,
    /// What is wrong, and after a semicolon what to do.
    text: String,
}

impl Violation {
    fn new(file: &str, line: usize, text: impl Into<String>) -> Violation {
        Violation { file: file.to_owned(), line, text: text.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

pub(crate) fn main() -> Result<()> {
    let violations = check(proc::root())?;
    for violation in &violations {
        println!("{violation}");
    }
    if !violations.is_empty() {
        bail!("tidy: {} violations", violations.len());
    }
    Ok(())
}

/// Checks the whole tree below `root`.
fn check(root: &Path) -> Result<Vec<Violation>> {
    let mut files = Vec::new();
    walk(root, root, &mut files)?;
    files.sort();
    let ratchet = shape::Ratchet::read(root)?;
    let mut found = Vec::new();
    let mut manifests = Vec::new();
    for name in &files {
        let read = || fs::read_to_string(root.join(name)).with_context(|| format!("read {name}"));
        if name.ends_with("Cargo.toml") {
            manifests.push(manifest::Manifest::parse(name, &read()?));
        } else if name.ends_with(".rs") {
            let source = Source::new(name, read()?);
            found.extend(shape::check(&source, &ratchet));
            found.extend(rooms::check(&source));
        }
    }
    found.extend(ratchet.unused());
    found.extend(manifest::check(&manifests));
    Ok(found)
}

/// Collects the relative names of the files that are ours: not hidden, not in a build directory.
fn walk(root: &Path, dir: &Path, files: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path: PathBuf = entry.with_context(|| format!("list {}", dir.display()))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden || path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            let built = path.join("CACHEDIR.TAG").exists() || path == root.join("target");
            if !built {
                walk(root, &path, files)?;
            }
        } else if let Ok(name) = path.strip_prefix(root) {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy() {
        let violations = check(proc::root()).expect("the tree can be read");
        let text: Vec<_> = violations.iter().map(ToString::to_string).collect();
        assert!(text.is_empty(), "\n{}", text.join("\n"));
    }
}
