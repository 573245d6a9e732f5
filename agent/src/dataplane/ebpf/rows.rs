//! An array map's memory in this process, for as long as many rows are read or written. Invariant: nothing beyond the rows that
//! were asked for is touched, each word is read and written whole, and those of a row are written in order, so that a program
//! which looks at the last one sees the others.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a word.
const WORD: usize = size_of::<u64>();

/// What is to be done with the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// They are read.
    Read,
    /// They are written.
    Write,
}

impl Access {
    fn protection(self) -> ProtFlags {
        match self {
            Self::Read => ProtFlags::PROT_READ,
            Self::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        }
    }
}

/// Some rows of an array map that was made with BPF_F_MMAPABLE (`array_map_mmap` in kernel/bpf/arraymap.c).
#[derive(Debug)]
pub(super) struct Rows {
    start: NonNull<c_void>,
    len: usize,
    /// Bytes before the first row.
    before: usize,
    value: usize,
    count: usize,
    access: Access,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

impl Rows {
    /// Maps `rows` of a map whose values have `value` bytes, a multiple of eight. The map has all of these rows.
    pub(super) fn map(
        map: BorrowedFd<'_>,
        value: usize,
        rows: Range<u32>,
        access: Access,
    ) -> io::Result<Self> {
        if value == 0 || !value.is_multiple_of(WORD) || rows.is_empty() {
            return Err(invalid("no whole words, or no rows"));
        }
        let page =
            sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| usize::try_from(size).ok()).unwrap_or(4096);
        let (from, to) = (rows.start as usize * value, rows.end as usize * value);
        let first = from / page * page;
        let len = NonZeroUsize::new(to.saturating_sub(first)).ok_or_else(|| invalid("rows"))?;
        let offset = libc::off_t::try_from(first).map_err(|_| invalid("too many rows"))?;
        // SAFETY: the kernel chooses a place that nothing else has, and the mapping is given up only by `drop`.
        let start = unsafe { mmap(None, len, access.protection(), MapFlags::MAP_SHARED, map, offset) }?;
        let (before, count) = (from - first, rows.len());
        Ok(Self { start, len: len.get(), before, value, count, access })
    }

    /// The words of a row, counted from the first that is mapped.
    fn words(&self, row: usize) -> io::Result<impl Iterator<Item = &AtomicU64>> {
        if row >= self.count {
            return Err(invalid("row"));
        }
        let at = self.before + row * self.value;
        Ok((0..self.value / WORD).map(move |word| {
            // SAFETY: the row lies within the mapping, whose start is a page's; rows have whole words, so the word is aligned.
            // The kernel and its programs read it at any time, as is done with an atomic.
            unsafe { &*self.start.as_ptr().byte_add(at + word * WORD).cast::<AtomicU64>() }
        }))
    }

    /// A word of 64 bits of a row, for more than reading or writing it: `at` counts bytes and is a multiple of eight.
    pub(super) fn word(&self, row: usize, at: usize) -> io::Result<&AtomicU64> {
        if !at.is_multiple_of(WORD) {
            return Err(invalid("word"));
        }
        self.words(row)?.nth(at / WORD).ok_or_else(|| invalid("word"))
    }

    /// The same with 32 bits and a multiple of four.
    pub(super) fn half(&self, row: usize, at: usize) -> io::Result<&AtomicU32> {
        if row >= self.count || !at.is_multiple_of(WORD / 2) || at >= self.value {
            return Err(invalid("half of a word"));
        }
        // SAFETY: as in `words`, with half of a word.
        Ok(unsafe { &*self.start.as_ptr().byte_add(self.before + row * self.value + at).cast::<AtomicU32>() })
    }

    /// Writes a row.
    pub(super) fn write(&self, row: usize, value: &[u8]) -> io::Result<()> {
        if self.access != Access::Write || value.len() != self.value {
            return Err(invalid("row to write"));
        }
        let (words, _) = value.as_chunks::<WORD>();
        for (place, word) in self.words(row)?.zip(words) {
            place.store(u64::from_ne_bytes(*word), Ordering::Release);
        }
        Ok(())
    }

    /// Reads a row.
    pub(super) fn read(&self, row: usize, into: &mut [u8]) -> io::Result<()> {
        if into.len() != self.value {
            return Err(invalid("row to read"));
        }
        let (words, _) = into.as_chunks_mut::<WORD>();
        for (place, word) in self.words(row)?.zip(words) {
            *word = place.load(Ordering::Relaxed).to_ne_bytes();
        }
        Ok(())
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and nobody has a reference into it any more.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            tracing::debug!(%error, "a map's memory stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    /// A file in memory stands for the map: what is tested is which bytes are touched.
    #[test]
    fn rows_lie_where_the_map_has_them() {
        let file = nix::sys::memfd::memfd_create(c"rows", nix::sys::memfd::MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&file, 24 * 1000).unwrap();
        let rows = Rows::map(file.as_fd(), 24, 500..503, Access::Write).unwrap();
        rows.write(0, &[1; 24]).unwrap();
        rows.write(2, &[3; 24]).unwrap();
        assert!(rows.write(3, &[4; 24]).is_err(), "not mapped");
        assert!(rows.write(0, &[4; 16]).is_err(), "not a row");
        rows.half(1, 20).unwrap().store(u32::MAX, Ordering::Relaxed);
        assert_eq!(rows.word(1, 16).unwrap().swap(0, Ordering::Relaxed), u64::from(u32::MAX) << 32);
        assert!(rows.half(1, 24).is_err() && rows.word(1, 24).is_err() && rows.half(3, 0).is_err(), "beyond");
        assert!(rows.half(1, 2).is_err() && rows.word(1, 4).is_err(), "not aligned");
        drop(rows);
        let rows = Rows::map(file.as_fd(), 24, 0..1000, Access::Read).unwrap();
        assert!(rows.write(0, &[1; 24]).is_err(), "read only");
        let mut row = [9; 24];
        for at in 0..1000 {
            rows.read(at, &mut row).unwrap();
            let wanted = match at {
                500 => 1,
                502 => 3,
                _ => 0,
            };
            assert_eq!(row, [wanted; 24], "row {at}");
        }
        assert!(Rows::map(file.as_fd(), 12, 0..1, Access::Read).is_err(), "no whole words");
        assert!(Rows::map(file.as_fd(), 24, 4..4, Access::Read).is_err(), "nothing");
    }
}
