//! Container output to log files. Invariant: output is always taken from the pipe, whatever becomes of the
//! file: a full disk loses log lines, never blocks a container; and a file holds whole records only.
//!
//! A record is `<RFC 3339 time, 9 digits> <stream> <F|P> <text>`; `P` marks a piece of a line that goes on.
//! Full files are renamed to `<file>.<YYYYMMDD-HHMMSS>` and not compressed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::limits::{LOG_FILE_BYTES_MAX, LOG_FILES_MAX, LOG_LINE_BYTES_MAX};

/// Cuts a stream into records.
#[derive(Debug)]
pub(super) struct Lines {
    stream: &'static str,
    held: Vec<u8>,
}

impl Lines {
    pub(super) fn new(stream: &'static str) -> Lines {
        Lines { stream, held: Vec::new() }
    }

    /// Appends the records that `input` completes to `out`.
    pub(super) fn feed(&mut self, mut input: &[u8], now: Timestamp, out: &mut Vec<u8>) {
        while let Some(end) = input.iter().position(|b| *b == b'\n') {
            let (line, rest) = input.split_at(end);
            input = &rest[1..];
            if self.held.is_empty() {
                self.record_line(line, now, out);
            } else {
                self.held.extend_from_slice(line);
                let held = std::mem::take(&mut self.held);
                self.record_line(&held, now, out);
            }
        }
        self.held.extend_from_slice(input);
        while self.held.len() > LOG_LINE_BYTES_MAX {
            let piece: Vec<u8> = self.held.drain(..LOG_LINE_BYTES_MAX).collect();
            self.record(&piece, 'P', now, out);
        }
        if self.held.is_empty() {
            self.held = Vec::new();
        }
    }

    /// Appends what is left of an unfinished line.
    pub(super) fn finish(&mut self, now: Timestamp, out: &mut Vec<u8>) {
        let held = std::mem::take(&mut self.held);
        if !held.is_empty() {
            self.record(&held, 'P', now, out);
        }
    }

    fn record_line(&self, line: &[u8], now: Timestamp, out: &mut Vec<u8>) {
        let mut line = line.strip_suffix(b"\r").unwrap_or(line);
        while line.len() > LOG_LINE_BYTES_MAX {
            let (piece, rest) = line.split_at(LOG_LINE_BYTES_MAX);
            self.record(piece, 'P', now, out);
            line = rest;
        }
        self.record(line, 'F', now, out);
    }

    fn record(&self, text: &[u8], tag: char, now: Timestamp, out: &mut Vec<u8>) {
        // Writing to a Vec cannot fail.
        drop(write!(out, "{now:.9} {} {tag} ", self.stream));
        out.extend_from_slice(text);
        out.push(b'\n');
    }
}

/// A log file and its rotated predecessors.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    last: Timestamp,
    /// Bytes of records that could not be written.
    pub(super) lost_bytes: u64,
}

impl LogFile {
    /// Opens a log for appending; makes its directory.
    pub(super) fn open(path: PathBuf) -> io::Result<LogFile> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut log = LogFile { path, file: None, size: 0, last: Timestamp::UNIX_EPOCH, lost_bytes: 0 };
        log.reopen()?;
        Ok(log)
    }

    fn reopen(&mut self) -> io::Result<()> {
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o640).open(&self.path)?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The time for the next record: never that of an earlier one, whatever the clock does.
    pub(super) fn now(&mut self) -> Timestamp {
        let tick = jiff::SignedDuration::from_nanos(1);
        let next = self.last.checked_add(tick).unwrap_or(self.last);
        self.last = Timestamp::now().max(next);
        self.last
    }

    /// Writes whole records; those that cannot be written are counted and gone.
    pub(super) fn write(&mut self, records: &[u8]) {
        if self.file.is_none() && self.reopen().is_err() {
            self.lost_bytes += records.len() as u64;
            return;
        }
        let Some(file) = &self.file else { return };
        if file.write_all_at(records, self.size).is_ok() {
            self.size += records.len() as u64;
        } else {
            self.lost_bytes += records.len() as u64;
            // Half a record would run into the next one.
            if file.set_len(self.size).is_err() {
                self.file = None;
            }
        }
        if self.size > LOG_FILE_BYTES_MAX {
            self.rotate();
        }
    }

    /// Failures are tried again after the next write.
    fn rotate(&mut self) {
        let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{stamp}"));
        let target = PathBuf::from(name);
        // One rotation a second keeps the names in order.
        if target.exists() || fs::rename(&self.path, &target).is_err() {
            return;
        }
        self.file = None;
        if self.reopen().is_err() {
            self.file = None;
        }
        if let Ok(mut old) = rotated(&self.path) {
            old.sort();
            let keep = LOG_FILES_MAX.saturating_sub(1);
            let surplus = old.len().saturating_sub(keep);
            for path in &old[..surplus] {
                if let Err(error) = fs::remove_file(path) {
                    eprintln!("remove {}: {error}", path.display());
                }
            }
        }
    }
}

fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Ok(Vec::new());
    };
    let prefix = format!("{name}.");
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|n| n.starts_with(&prefix)) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(records: &[u8]) -> Vec<String> {
        let all = String::from_utf8(records.to_vec()).unwrap();
        all.lines().map(|l| l.split_once(' ').unwrap().1.to_owned()).collect()
    }

    fn now() -> Timestamp {
        "2026-11-21T03:00:00.5Z".parse().unwrap()
    }

    #[test]
    fn records_have_the_documented_form() {
        let mut out = Vec::new();
        Lines::new("stdout").feed(b"hello\n", now(), &mut out);
        assert_eq!(out, b"2026-11-21T03:00:00.500000000Z stdout F hello\n");
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let (mut lines, mut out) = (Lines::new("stderr"), Vec::new());
        for piece in ["a", "b\r\n", "\n", "c"] {
            lines.feed(piece.as_bytes(), now(), &mut out);
        }
        assert_eq!(text(&out), ["stderr F ab", "stderr F "]);
        lines.finish(now(), &mut out);
        assert_eq!(text(&out)[2], "stderr P c");
    }

    #[test]
    fn long_lines_come_in_bounded_pieces() {
        let (mut lines, mut out) = (Lines::new("stdout"), Vec::new());
        let long = "x".repeat(LOG_LINE_BYTES_MAX * 2 + 5);
        lines.feed(long.as_bytes(), now(), &mut out);
        lines.feed(b"\nz\n", now(), &mut out);
        let lengths: Vec<_> = text(&out).iter().map(|l| (l.as_bytes()[7] as char, l.len() - 9)).collect();
        assert_eq!(lengths, [('P', LOG_LINE_BYTES_MAX), ('P', LOG_LINE_BYTES_MAX), ('F', 5), ('F', 1)]);
    }

    #[test]
    fn files_are_appended_to_and_rotated_in_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c/0.log");
        LogFile::open(path.clone()).unwrap().write(b"first\n");
        let mut log = LogFile::open(path.clone()).unwrap();
        log.write(b"second\n");
        assert_eq!(fs::read(&path).unwrap(), b"first\nsecond\n");
        for age in 0..8 {
            fs::write(dir.path().join(format!("c/0.log.2020010{age}-000000")), "old").unwrap();
        }
        let block = vec![b'x'; LOG_FILE_BYTES_MAX as usize];
        log.write(&block);
        assert_eq!(fs::metadata(&path).unwrap().len(), 0, "a fresh file");
        let old = rotated(&path).unwrap();
        assert_eq!(old.len(), LOG_FILES_MAX - 1);
        assert!(!old.iter().any(|p| p.to_str().unwrap().contains("20200104")), "the oldest went");
    }

    #[test]
    fn a_log_that_cannot_be_written_loses_lines_and_says_so() {
        let mut log = LogFile { file: None, ..LogFile::open("/dev/full".into()).unwrap() };
        log.file = Some(OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.write(b"lost\n");
        assert_eq!(log.lost_bytes, 5);
    }

    #[test]
    fn times_never_go_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogFile::open(dir.path().join("x.log")).unwrap();
        log.last = "2300-01-01T00:00:00Z".parse().unwrap();
        let (a, b) = (log.now(), log.now());
        assert!(a < b);
    }
}
