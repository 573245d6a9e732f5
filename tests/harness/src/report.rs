//! Skips are never silent: each is a line in the file that `cargo xtask test` names, which counts them and holds
//! them against the list of allowed ones.

use std::io::Write;

/// The environment variable naming the file that skips are appended to; unset outside `cargo xtask test`.
pub const SKIP_FILE: &str = "SHEAVE_SKIP_FILE";

/// Reports the running test as skipped. The caller returns right after it.
///
/// A line is `<test>\t<reason>`; a line is written in one `write`, so tests may report at the same time.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let name = crate::isolate::running().or(thread.name().map(str::to_owned)).unwrap_or_default();
    eprintln!("skipped: {name}: {reason}");
    let Some(path) = std::env::var_os(SKIP_FILE) else { return };
    let mut file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(&path)
        .unwrap_or_else(|e| panic!("open skip file {}: {e}", path.display()));
    file.write_all(format!("{name}\t{reason}\n").as_bytes()).expect("write to the skip file");
}

/// What another test program said, each line marked, so that who counts verdicts does not take its verdicts for those of the
/// program that repeats them.
pub fn set_apart(said: &[u8]) -> String {
    String::from_utf8_lossy(said).lines().map(|line| format!("| {line}\n")).collect()
}
