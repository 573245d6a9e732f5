//! How much is in pinned eBPF maps, asked of the kernel alone. Invariant: nothing is written, and what is no map counts
//! as nothing.

#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper that takes maps of any shape")]

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Commands of bpf(2).
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const OBJ_GET: libc::c_int = 7;

/// `union bpf_attr` for BPF_OBJ_GET and for BPF_MAP_GET_NEXT_KEY, which have the same size with padding.
#[repr(C)]
#[derive(Default)]
struct Attr {
    first: u64,
    second: u64,
    third: u64,
}

fn bpf(command: libc::c_int, attr: &mut Attr) -> libc::c_long {
    // SAFETY: the attribute is as large as its size says; what its fields point to is the callers' to keep alive.
    unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>()) }
}

/// Every map pinned below `dir`, and how many entries it has; arrays have as many as they hold.
pub fn entries(dir: &Path) -> Vec<(PathBuf, usize)> {
    let counted = |path: PathBuf| count(&path).map(|count| (path, count));
    files(dir).into_iter().filter_map(counted).collect()
}

/// Everything pinned below `dir`, in order.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found.sort();
    found
}

fn count(path: &Path) -> Option<usize> {
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut attr = Attr { first: name.as_ptr() as u64, ..Attr::default() };
    let raw = libc::c_int::try_from(bpf(OBJ_GET, &mut attr)).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let size = info.lines().find_map(|line| line.strip_prefix("key_size:"))?.trim().parse::<usize>().ok()?;
    let (mut key, mut next, mut has, mut count) = (vec![0_u8; size], vec![0_u8; size], false, 0);
    loop {
        let from = if has { key.as_ptr() as u64 } else { 0 };
        let map = u64::try_from(fd.as_raw_fd()).ok()?;
        let mut attr = Attr { first: map, second: from, third: next.as_mut_ptr() as u64 };
        if bpf(MAP_GET_NEXT_KEY, &mut attr) < 0 {
            return Some(count);
        }
        std::mem::swap(&mut key, &mut next);
        (has, count) = (true, count + 1);
    }
}
