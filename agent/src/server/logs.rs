//! Reading container logs: records of `<RFC 3339 time> <stream> <F|P> <text>` in a file a run, its older
//! parts beside it with a time as suffix. Whoever follows gets every record once, across rotations; a `P`
//! record goes on in the next one of its stream.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::limits;

/// What is asked of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Go on until the container ends.
    pub follow: bool,
    /// The run before the present one.
    pub previous: bool,
    /// Put each line's time before it.
    pub timestamps: bool,
    /// Only the last lines.
    pub tail_lines: Option<usize>,
    /// Only what is at most this old.
    pub since: Option<jiff::Timestamp>,
    /// Stop after so many bytes.
    pub limit_bytes: Option<u64>,
}

impl LogQuery {
    /// Reads a query string. `now` is what `sinceSeconds` counts back from.
    pub fn parse(query: &str, now: jiff::Timestamp) -> Result<Self, String> {
        let mut parsed = LogQuery::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value);
            let number =
                || value.parse::<u64>().map_err(|_| format!("{name}: {value:?} is not a whole number"));
            let flag = || match value.as_str() {
                "true" | "1" => Ok(true),
                "false" | "0" | "" => Ok(false),
                other => Err(format!("{name}: {other:?} is neither true nor false")),
            };
            match name {
                "follow" => parsed.follow = flag()?,
                "previous" => parsed.previous = flag()?,
                "timestamps" => parsed.timestamps = flag()?,
                "tailLines" => parsed.tail_lines = Some(usize::try_from(number()?).unwrap_or(usize::MAX)),
                "limitBytes" => parsed.limit_bytes = Some(number()?),
                "sinceSeconds" => {
                    let back = i64::try_from(number()?).unwrap_or(i64::MAX);
                    let span = jiff::SignedDuration::from_secs(back);
                    parsed.since = Some(now.checked_sub(span).unwrap_or(jiff::Timestamp::UNIX_EPOCH));
                }
                "sinceTime" => {
                    parsed.since =
                        Some(value.parse().map_err(|_| format!("sinceTime: {value:?} is not a time"))?);
                }
                _ => {}
            }
        }
        Ok(parsed)
    }
}

fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let pair = [bytes.next().unwrap_or(b'%'), bytes.next().unwrap_or(b'%')];
                let hex = std::str::from_utf8(&pair).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok());
                out.push(hex.unwrap_or(b'%'));
            }
            other => out.push(other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// One record of a log.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    time: &'a [u8],
    partial: bool,
    text: &'a [u8],
}

/// Splits a line without its end. `None` for what is no record.
fn record(line: &[u8]) -> Option<Record<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (time, _stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let text = parts.next().unwrap_or(b"");
    Some(Record { time, partial: tag == b"P", text })
}

/// A run's files, the oldest first, the one being written last.
pub fn files(current: &Path) -> Vec<PathBuf> {
    let mut older = Vec::new();
    if let (Some(dir), Some(name)) = (current.parent(), current.file_name().and_then(|name| name.to_str()))
        && let Ok(entries) = std::fs::read_dir(dir)
    {
        let prefix = format!("{name}.");
        let rotated =
            entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        older.extend(rotated.map(|entry| entry.path()));
    }
    older.sort();
    older.push(current.to_owned());
    older
}

/// The newest run that has a log in a container's directory.
pub fn latest_attempt(dir: &Path) -> Option<u32> {
    let entries = std::fs::read_dir(dir).ok()?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter_map(|name| name.split_once(".log").and_then(|(number, _)| number.parse().ok())).max()
}

/// Where the last `lines` lines of a file begin, and how many lines there are from there on.
fn tail_start(file: &mut File, lines: usize) -> std::io::Result<(u64, usize)> {
    let mut position = file.seek(SeekFrom::End(0))?;
    let mut found = 0;
    let mut chunk = vec![0; limits::LOG_CHUNK_BYTES];
    let mut at_end = true;
    while position > 0 {
        let size = u64::try_from(chunk.len()).unwrap_or(u64::MAX).min(position);
        let size_here = usize::try_from(size).unwrap_or(chunk.len());
        position -= size;
        file.seek(SeekFrom::Start(position))?;
        file.read_exact(&mut chunk[..size_here])?;
        for (i, byte) in chunk[..size_here].iter().enumerate().rev() {
            if *byte == b'\n' && !std::mem::take(&mut at_end) {
                found += 1;
                if found == lines {
                    return Ok((position + u64::try_from(i).unwrap_or(0) + 1, found));
                }
            }
            at_end = false;
        }
    }
    Ok((0, found + usize::from(!at_end)))
}

/// Turns records into what is sent.
struct Shaper {
    query: LogQuery,
    sent: u64,
    continues: bool,
    out: Vec<u8>,
}

impl Shaper {
    /// Adds a line; false once the limit is reached.
    fn line(&mut self, line: &[u8]) -> bool {
        let Some(record) = record(line) else { return true };
        if let Some(since) = self.query.since {
            let time = std::str::from_utf8(record.time).ok().and_then(|t| t.parse::<jiff::Timestamp>().ok());
            if time.is_some_and(|time| time < since) {
                return true;
            }
        }
        let from = self.out.len();
        if self.query.timestamps && !self.continues {
            self.out.extend_from_slice(record.time);
            self.out.push(b' ');
        }
        self.out.extend_from_slice(record.text);
        if !record.partial {
            self.out.push(b'\n');
        }
        self.continues = record.partial;
        let added = u64::try_from(self.out.len() - from).unwrap_or(u64::MAX);
        if let Some(limit) = self.query.limit_bytes {
            let left = limit.saturating_sub(self.sent);
            if added >= left {
                self.out.truncate(from + usize::try_from(left).unwrap_or(usize::MAX));
                self.sent = limit;
                return false;
            }
        }
        self.sent += added;
        true
    }

    async fn flush(&mut self, to: &mpsc::Sender<Bytes>) -> bool {
        if self.out.is_empty() {
            return true;
        }
        to.send(Bytes::from(std::mem::take(&mut self.out))).await.is_ok()
    }
}

/// Sends a run's log. `ended` says whether nothing will be written any more.
pub async fn send<F: Future<Output = bool>>(
    current: PathBuf,
    query: LogQuery,
    ended: impl Fn() -> F,
    to: mpsc::Sender<Bytes>,
) -> std::io::Result<()> {
    let mut parts = files(&current);
    let mut first_at = 0;
    if let Some(mut wanted) = query.tail_lines {
        let mut from = parts.len();
        while wanted > 0 && from > 0 {
            from -= 1;
            let (at, found) = tail_start(&mut File::open(&parts[from])?, wanted)?;
            first_at = at;
            wanted = wanted.saturating_sub(found);
        }
        if from == parts.len() {
            from = parts.len() - 1;
            first_at = std::fs::metadata(&parts[from])?.len();
        }
        parts.drain(..from);
    }
    let follow = query.follow;
    let mut shaper = Shaper { query, sent: 0, continues: false, out: Vec::new() };
    let last = parts.pop().unwrap_or(current.clone());
    for part in parts {
        let mut reader = BufReader::with_capacity(limits::LOG_CHUNK_BYTES, File::open(&part)?);
        reader.seek(SeekFrom::Start(std::mem::take(&mut first_at)))?;
        if !pump(&mut reader, &mut Vec::new(), &mut shaper, &to).await? {
            return Ok(());
        }
    }
    let mut reader = BufReader::with_capacity(limits::LOG_CHUNK_BYTES, File::open(&last)?);
    reader.seek(SeekFrom::Start(first_at))?;
    let mut half = Vec::new();
    loop {
        // Asked before reading: what was written before the end is read after it was seen.
        let over = !follow || ended().await;
        if !pump(&mut reader, &mut half, &mut shaper, &to).await? {
            return Ok(());
        }
        let moved = std::fs::metadata(&current)
            .is_ok_and(|now| reader.get_ref().metadata().is_ok_and(|open| open.ino() != now.ino()));
        if moved {
            // Nothing is written to the old part after it was renamed.
            if !pump(&mut reader, &mut half, &mut shaper, &to).await? {
                return Ok(());
            }
            reader = BufReader::with_capacity(limits::LOG_CHUNK_BYTES, File::open(&current)?);
            half.clear();
            continue;
        }
        if over || to.is_closed() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(limits::LOG_FOLLOW_MS)) => {}
            () = to.closed() => return Ok(()),
        }
    }
}

/// Sends the whole lines that there are; false if no more is wanted.
async fn pump(
    reader: &mut BufReader<File>,
    half: &mut Vec<u8>,
    shaper: &mut Shaper,
    to: &mpsc::Sender<Bytes>,
) -> std::io::Result<bool> {
    loop {
        let read = reader.read_until(b'\n', half)?;
        if half.last() == Some(&b'\n') {
            half.pop();
            let more = shaper.line(half);
            half.clear();
            if !more {
                shaper.flush(to).await;
                return Ok(false);
            }
            if shaper.out.len() >= limits::LOG_CHUNK_BYTES && !shaper.flush(to).await {
                return Ok(false);
            }
        } else if read == 0 {
            return Ok(shaper.flush(to).await);
        }
    }
}

/// Time, stream and tag of a record.
const RECORD_HEAD_BYTES_MAX: usize = 64;

/// The text of the last lines of a log, at most `lines` of them and `bytes` in all. Empty if there is no
/// log.
pub fn tail_text(path: &Path, lines: usize, bytes: usize) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let (at, _) = tail_start(&mut file, lines)?;
        let length = file.seek(SeekFrom::End(0))?;
        let heads = lines.saturating_mul(RECORD_HEAD_BYTES_MAX);
        let window = u64::try_from(bytes.saturating_add(heads)).unwrap_or(u64::MAX);
        let from = at.max(length.saturating_sub(window));
        file.seek(SeekFrom::Start(from))?;
        let mut raw = Vec::new();
        file.take(window).read_to_end(&mut raw)?;
        let mut text = Vec::new();
        for line in raw.split(|byte| *byte == b'\n').skip(usize::from(from > at)) {
            if let Some(record) = record(line) {
                text.extend_from_slice(record.text);
                if !record.partial {
                    text.push(b'\n');
                }
            }
        }
        Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
    };
    let text = read().unwrap_or_default();
    let cut = text.len().saturating_sub(bytes);
    let start = (cut..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn lines(range: std::ops::Range<u32>) -> String {
        range.map(|i| format!("2023-11-14T22:13:{:02}.5Z stdout F line {i}\n", i % 60)).collect()
    }

    async fn read(path: &Path, query: LogQuery) -> String {
        let (to, mut from) = mpsc::channel(64);
        let path = path.to_owned();
        let sending = tokio::spawn(async move { send(path, query, || std::future::ready(true), to).await });
        let mut text = Vec::new();
        while let Some(chunk) = from.recv().await {
            text.extend_from_slice(&chunk);
        }
        sending.await.expect("task").expect("sent");
        String::from_utf8(text).expect("text")
    }

    fn query(text: &str) -> LogQuery {
        let now = "2023-11-14T22:13:59Z".parse().expect("a time");
        LogQuery::parse(text, now).expect("a query")
    }

    #[test]
    fn queries() {
        let parsed = query("follow=true&tailLines=5&sinceSeconds=9&timestamps=1&limitBytes=7&x=y");
        assert!(parsed.follow && parsed.timestamps && !parsed.previous);
        assert_eq!((parsed.tail_lines, parsed.limit_bytes), (Some(5), Some(7)));
        assert_eq!(parsed.since.map(|t| t.to_string()).as_deref(), Some("2023-11-14T22:13:50Z"));
        assert_eq!(
            query("sinceTime=2023-11-14T22%3A00%3A00Z").since.map(|t| t.to_string()).as_deref(),
            Some("2023-11-14T22:00:00Z")
        );
        let now = jiff::Timestamp::UNIX_EPOCH;
        for bad in ["tailLines=-1", "follow=maybe", "sinceTime=%zz"] {
            LogQuery::parse(bad, now).expect_err(bad);
        }
    }

    #[tokio::test]
    async fn options_of_a_whole_log() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("0.log");
        std::fs::write(dir.path().join("0.log.20231114-221300"), lines(0..3)).expect("write");
        std::fs::write(&path, lines(3..5)).expect("write");
        assert_eq!(read(&path, query("")).await, "line 0\nline 1\nline 2\nline 3\nline 4\n");
        assert_eq!(read(&path, query("tailLines=1")).await, "line 4\n");
        assert_eq!(read(&path, query("tailLines=3")).await, "line 2\nline 3\nline 4\n");
        assert_eq!(read(&path, query("tailLines=99")).await.lines().count(), 5);
        assert_eq!(read(&path, query("tailLines=0")).await, "");
        assert_eq!(read(&path, query("sinceTime=2023-11-14T22:13:04Z")).await, "line 4\n");
        assert_eq!(read(&path, query("limitBytes=9")).await, "line 0\nli");
        assert_eq!(
            read(&path, query("tailLines=1&timestamps=true")).await,
            "2023-11-14T22:13:04.5Z line 4\n"
        );
        assert_eq!(latest_attempt(dir.path()), Some(0));
    }

    #[tokio::test]
    async fn long_lines_are_put_together() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("0.log");
        let text = "2023-11-14T22:13:00Z stdout P ab\n2023-11-14T22:13:01Z stdout F cd\n2023-11-14T22:13:02Z stdout F\n";
        std::fs::write(&path, text).expect("write");
        assert_eq!(read(&path, query("")).await, "abcd\n\n");
        assert_eq!(
            read(&path, query("timestamps=true")).await,
            "2023-11-14T22:13:00Z abcd\n2023-11-14T22:13:02Z \n"
        );
    }

    #[tokio::test]
    async fn following_crosses_a_rotation_and_stops_at_the_end() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("0.log");
        std::fs::write(&path, lines(0..1)).expect("write");
        let over = Arc::new(AtomicBool::new(false));
        let (to, mut from) = mpsc::channel(64);
        let sending = tokio::spawn({
            let (path, over) = (path.clone(), over.clone());
            async move {
                send(path, query("follow=true"), || std::future::ready(over.load(Ordering::SeqCst)), to).await
            }
        });
        assert_eq!(from.recv().await.expect("a line"), "line 0\n");
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(lines(1..2).as_bytes()))
            .expect("append");
        assert_eq!(from.recv().await.expect("a line"), "line 1\n");
        std::fs::rename(&path, dir.path().join("0.log.20231114-221300")).expect("rename");
        std::fs::write(&path, lines(2..3)).expect("write");
        assert_eq!(from.recv().await.expect("a line"), "line 2\n");
        over.store(true, Ordering::SeqCst);
        assert_eq!(from.recv().await, None);
        sending.await.expect("task").expect("sent");
    }

    #[test]
    fn the_tail_is_bounded_in_lines_and_bytes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("0.log");
        std::fs::write(&path, lines(0..100)).expect("write");
        assert_eq!(tail_text(&path, 2, 1000), "line 98\nline 99");
        assert_eq!(tail_text(&path, 80, 7), "line 99");
        assert_eq!(tail_text(&path, 1, 7), "line 99");
        assert_eq!(tail_text(&dir.path().join("none"), 1, 1), "");
    }
}
