//! bpf(2), the part that aya does not have: batches, links by raw file descriptor, pins of anything. Invariant: every
//! function is one system call, checks that its buffers have the sizes that the kernel will read and write, and
//! decides nothing.
#![expect(unsafe_code, reason = "bpf(2) and getsockopt(2) take raw pointers")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Commands of bpf(2) (uapi/linux/bpf.h, `enum bpf_cmd`).
#[derive(Clone, Copy)]
#[repr(u32)]
enum Cmd {
    LookupElem = 1,
    UpdateElem = 2,
    DeleteElem = 3,
    ObjPin = 6,
    ObjGet = 7,
    ObjGetInfo = 15,
    LookupBatch = 24,
    UpdateBatch = 26,
    DeleteBatch = 27,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// `union bpf_attr` for BPF_MAP_*_ELEM.
#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for BPF_MAP_*_BATCH.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `union bpf_attr` for BPF_OBJ_PIN and BPF_OBJ_GET.
#[repr(C)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` for BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// `union bpf_attr` for BPF_LINK_CREATE, BPF_LINK_UPDATE and BPF_LINK_DETACH.
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    words: [u32; 4],
}

fn bpf<A>(cmd: Cmd, attr: &mut A) -> io::Result<i64> {
    // SAFETY: `attr` is one of the structs above, laid out as the kernel reads it for `cmd`, and lives until the call
    // returns; the callers below keep what it points to alive and large enough.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            cmd as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<A>() as libc::c_long,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

/// `struct bpf_map_info`, its first part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MapInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

/// `struct bpf_link_info`, the part that cgroup and tcx links have.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) program: u32,
    pad: u32,
    /// cgroup: low half of the cgroup id; tcx and XDP: interface index. 0 when the link is severed.
    pub(super) target_low: u32,
    /// cgroup: high half of the cgroup id; tcx: attach type.
    pub(super) target_high: u32,
    /// cgroup: attach type.
    pub(super) cgroup_attach_type: u32,
    pad2: u32,
}

/// BPF_LINK_TYPE_CGROUP.
const LINK_CGROUP: u32 = 3;
/// BPF_LINK_TYPE_XDP.
const LINK_XDP: u32 = 6;
/// BPF_LINK_TYPE_TCX.
const LINK_TCX: u32 = 11;

impl LinkInfo {
    /// The cgroup id of a cgroup link, the interface index of a tcx or XDP link; 0 when it is severed, `None` for others.
    pub(super) fn target(&self) -> Option<u64> {
        match self.kind {
            LINK_CGROUP => Some(u64::from(self.target_high) << 32 | u64::from(self.target_low)),
            LINK_TCX | LINK_XDP => Some(u64::from(self.target_low)),
            _ => None,
        }
    }
}

/// Types whose all-zero and every other bit pattern is valid, for `info`.
trait Info: Default {}
impl Info for MapInfo {}
impl Info for LinkInfo {}

fn info<T: Info>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let at = std::ptr::from_mut(&mut info) as u64;
    bpf(Cmd::ObjGetInfo, &mut InfoAttr { fd: raw(fd), len: size_of::<T>() as u32, info: at })?;
    Ok(info)
}

/// What the kernel says of a map.
pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

/// What the kernel says of a link.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

/// Opens what is pinned at `path`; `NotFound` when nothing is.
pub(super) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(Cmd::ObjGet, &mut ObjAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 }).map(owned)
}

/// Pins a map, program or link.
pub(super) fn obj_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(Cmd::ObjPin, &mut ObjAttr { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 }).map(drop)
}

/// Attaches a program to a cgroup (a descriptor of its directory) or a network device (its index), by a link.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    bpf(Cmd::LinkCreate, &mut LinkAttr { words: [raw(program), target, attach_type, flags] }).map(owned)
}

/// Puts another program into a link, atomically. `ENOLINK` when the link is severed.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(Cmd::LinkUpdate, &mut LinkAttr { words: [raw(link), raw(program), 0, 0] }).map(drop)
}

/// Severs a link whoever else holds it.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(Cmd::LinkDetach, &mut LinkAttr { words: [raw(link), 0, 0, 0] }).map(drop)
}

/// Sizes of a map's key and value as the kernel copies them from and to user space.
#[derive(Clone, Copy, Debug)]
pub(super) struct ElemSize {
    pub(super) key: usize,
    pub(super) value: usize,
}

/// Reads one element into `value`.
pub(super) fn lookup(map: BorrowedFd<'_>, size: ElemSize, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    if key.len() != size.key || value.len() != size.value {
        return Err(invalid("element size"));
    }
    let mut attr = ElemAttr {
        map_fd: raw(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(Cmd::LookupElem, &mut attr).map(drop)
}

fn write(map: BorrowedFd<'_>, size: ElemSize, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    if key.len() != size.key || value.len() != size.value {
        return Err(invalid("element size"));
    }
    let (key, value) = (key.as_ptr() as u64, value.as_ptr() as u64);
    bpf(Cmd::UpdateElem, &mut ElemAttr { map_fd: raw(map), pad: 0, key, value, flags }).map(drop)
}

/// Writes one element.
pub(super) fn update(map: BorrowedFd<'_>, size: ElemSize, key: &[u8], value: &[u8]) -> io::Result<()> {
    write(map, size, key, value, 0)
}

/// Writes one element that is not there yet; `EEXIST` when it is.
pub(super) fn insert(map: BorrowedFd<'_>, size: ElemSize, key: &[u8], value: &[u8]) -> io::Result<()> {
    /// BPF_NOEXIST (uapi/linux/bpf.h).
    const NOEXIST: u64 = 1;
    write(map, size, key, value, NOEXIST)
}

/// Deletes one element; `NotFound` when there is none.
pub(super) fn delete(map: BorrowedFd<'_>, size: ElemSize, key: &[u8]) -> io::Result<()> {
    if key.len() != size.key {
        return Err(invalid("element size"));
    }
    let mut attr = ElemAttr { map_fd: raw(map), pad: 0, key: key.as_ptr() as u64, value: 0, flags: 0 };
    bpf(Cmd::DeleteElem, &mut attr).map(drop)
}

/// A batch that stopped early: how many elements were done, and what stopped it.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) done: usize,
    pub(super) source: io::Error,
}

fn elements(size: ElemSize, keys: &[u8], values: Option<&[u8]>) -> io::Result<usize> {
    let count = keys.len() / size.key;
    let whole =
        count * size.key == keys.len() && values.is_none_or(|values| values.len() == count * size.value);
    if whole { Ok(count) } else { Err(invalid("batch size")) }
}

/// Writes many elements: keys and values one after the other, without gaps.
pub(super) fn update_batch(
    map: BorrowedFd<'_>,
    size: ElemSize,
    keys: &[u8],
    values: &[u8],
) -> Result<(), Stopped> {
    let count = elements(size, keys, Some(values)).map_err(|source| Stopped { done: 0, source })?;
    change_batch(Cmd::UpdateBatch, map, count, keys.as_ptr() as u64, values.as_ptr() as u64)
}

/// Deletes many elements; stops at the first that does not exist.
pub(super) fn delete_batch(map: BorrowedFd<'_>, size: ElemSize, keys: &[u8]) -> Result<(), Stopped> {
    let count = elements(size, keys, None).map_err(|source| Stopped { done: 0, source })?;
    change_batch(Cmd::DeleteBatch, map, count, keys.as_ptr() as u64, 0)
}

fn change_batch(cmd: Cmd, map: BorrowedFd<'_>, count: usize, keys: u64, values: u64) -> Result<(), Stopped> {
    if count == 0 {
        return Ok(());
    }
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys,
        values,
        count: count as u32,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    // The kernel sets `count` to what it did before it stopped; on errors before that it leaves it as it was.
    match bpf(cmd, &mut attr) {
        Ok(_) => Ok(()),
        Err(source) => {
            let done = if attr.count as usize >= count { 0 } else { attr.count as usize };
            Err(Stopped { done, source })
        }
    }
}

/// Where a lookup in batches is; opaque to user space.
#[derive(Clone, Copy)]
pub(super) struct Cursor([u8; 64]);

impl Cursor {
    /// The bucket of a hash map where the walk goes on.
    pub(super) fn bucket(&self) -> u32 {
        let [a, b, c, d, ..] = self.0;
        u32::from_ne_bytes([a, b, c, d])
    }
}

/// One batch of a walk over a map.
pub(super) struct Batch {
    /// Elements read into the buffers.
    pub(super) count: usize,
    /// Where to go on; `None` at the end.
    pub(super) next: Option<Cursor>,
}

/// Reads the next elements after `cursor` into `keys` and `values`, as many as both have room for. `ENOSPC` when
/// they are too small for one bucket of a hash map.
pub(super) fn lookup_batch(
    map: BorrowedFd<'_>,
    size: ElemSize,
    cursor: Option<&Cursor>,
    keys: &mut [u8],
    values: &mut [u8],
) -> io::Result<Batch> {
    let room = elements(size, keys, Some(values))?;
    // The kernel writes a key or a u32 there; ours are smaller than the buffer.
    if size.key > 64 {
        return Err(invalid("key size"));
    }
    let mut next = Cursor([0; 64]);
    let mut attr = BatchAttr {
        in_batch: cursor.map_or(0, |c| c.0.as_ptr() as u64),
        out_batch: next.0.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: room as u32,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    match bpf(Cmd::LookupBatch, &mut attr) {
        Ok(_) => Ok(Batch { count: attr.count as usize, next: Some(next) }),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
            Ok(Batch { count: attr.count as usize, next: None })
        }
        Err(e) => Err(e),
    }
}

/// Cookie of the calling thread's network namespace (SO_NETNS_COOKIE, Linux 5.14).
pub(super) fn netns_cookie() -> io::Result<u64> {
    /// asm-generic/socket.h; not in the libc crate for every target.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` has room for the eight bytes that `len` announces, and both live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Nanoseconds of the monotonic clock, as the programs read it.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    // The clock always exists, and never is before the boot.
    now.map_or(0, |at| (at.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(at.tv_nsec() as u64))
}

/// Seconds of the monotonic clock, which fit for 136 years after the boot.
pub(super) fn monotonic_s() -> u32 {
    u32::try_from(monotonic_ns() / 1_000_000_000).unwrap_or(u32::MAX)
}

/// A descriptor of ours for what `fd` is in the process `pid` (pidfd_getfd(2), Linux 5.6).
pub(super) fn descriptor_of(pid: u32, fd: u32) -> io::Result<OwnedFd> {
    let call = |number, arguments: [libc::c_long; 3]| {
        // SAFETY: both calls take numbers only, and make a descriptor or fail.
        let result = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(owned(result)) }
    };
    let process = call(libc::SYS_pidfd_open, [libc::c_long::from(pid), 0, 0])?;
    call(libc::SYS_pidfd_getfd, [libc::c_long::from(process.as_raw_fd()), libc::c_long::from(fd), 0])
}

/// CPUs that the kernel could ever have, which is how many values a per-CPU element has.
pub(super) fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| invalid("/sys/devices/system/cpu/possible"))
}

/// The name of the driver of a network device (SIOCETHTOOL with ETHTOOL_GDRVINFO, linux/ethtool.h).
pub(super) fn driver(device: &str) -> io::Result<String> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const GDRVINFO: u32 = 3;
    /// `struct ethtool_drvinfo`.
    #[repr(C)]
    struct DriverInfo {
        command: u32,
        driver: [u8; 32],
        rest: [u8; 160],
    }
    /// `struct ifreq`, with a pointer for its union.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        data: *mut DriverInfo,
        rest: [u64; 2],
    }
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut info = DriverInfo { command: GDRVINFO, driver: [0; 32], rest: [0; 160] };
    let mut name = [0; libc::IFNAMSIZ];
    name.get_mut(..device.len())
        .filter(|_| device.len() < libc::IFNAMSIZ)
        .ok_or_else(|| invalid("device name"))?;
    name[..device.len()].copy_from_slice(device.as_bytes());
    let mut request = Request { name, data: &raw mut info, rest: [0; 2] };
    // SAFETY: the request has the size of `struct ifreq` and names a device by a terminated string; its data has the size
    // of `struct ethtool_drvinfo`, which the command fills, and both live until the call returns.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let end = info.driver.iter().position(|byte| *byte == 0).unwrap_or(info.driver.len());
    Ok(String::from_utf8_lossy(&info.driver[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_have_the_sizes_of_the_kernel() {
        assert_eq!(size_of::<ElemAttr>(), 32);
        assert_eq!(size_of::<BatchAttr>(), 56);
        assert_eq!(size_of::<ObjAttr>(), 16);
        assert_eq!(size_of::<InfoAttr>(), 16);
        assert_eq!(size_of::<MapInfo>(), 24);
        assert_eq!(size_of::<LinkInfo>(), 32);
    }

    #[test]
    fn batches_must_be_whole() {
        let size = ElemSize { key: 4, value: 8 };
        assert_eq!(elements(size, &[0; 8], Some(&[0; 16])).unwrap(), 2);
        assert!(elements(size, &[0; 7], None).is_err());
        assert!(elements(size, &[0; 8], Some(&[0; 15])).is_err());
    }

    #[test]
    fn severed_links_have_no_target() {
        assert_eq!(LinkInfo { kind: LINK_CGROUP, ..LinkInfo::default() }.target(), Some(0));
        let info = LinkInfo { kind: LINK_CGROUP, target_low: 5, target_high: 1, ..LinkInfo::default() };
        assert_eq!(info.target(), Some((1 << 32) + 5));
        assert_eq!(LinkInfo { kind: 1, ..LinkInfo::default() }.target(), None);
    }
}
