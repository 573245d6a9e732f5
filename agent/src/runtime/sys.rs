//! System calls that neither std nor nix wraps. Invariant: every function here is safe to call with any
//! arguments from a single-threaded or multi-threaded process, except [`clone_process`], whose caller
//! promises to be single-threaded.
#![expect(unsafe_code, reason = "raw system calls: clone3, the mount API, capset, seccomp, close_range")]

use std::ffi::{CStr, CString, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// libc's constant does not fit the type that it has there.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What [`clone_process`] returns on its two sides.
pub(super) enum Clone {
    Parent(i32),
    Child,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just returned this descriptor to us, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub(super) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Forks into new namespaces (`CLONE_NEW*` flags) and a cgroup of the v2 hierarchy. Only for processes
/// with one thread: the child goes on with a copy of everything.
pub(super) fn clone_process(namespaces: c_int, cgroup: BorrowedFd<'_>) -> io::Result<Clone> {
    let mut args = libc::clone_args {
        flags: namespaces as u64 | CLONE_INTO_CGROUP,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.as_raw_fd() as u64,
    };
    // SAFETY: without CLONE_VM and a stack this is a fork; the arguments live through the call. The
    // caller has one thread, so no lock can be held by a thread that the child lacks.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    Ok(if pid == 0 { Clone::Child } else { Clone::Parent(pid as i32) })
}

/// Forks; the child has no exit signal's handler, no other thread and a copy of everything. Only for
/// processes with one thread.
pub(super) fn fork() -> io::Result<Clone> {
    // SAFETY: the caller has one thread, so no lock can be held by a thread that the child lacks.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => Ok(Clone::Child),
        nix::unistd::ForkResult::Parent { child } => Ok(Clone::Parent(child.as_raw())),
    }
}

/// Ends the process at once, without destructors or buffers.
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// An empty configuration of a filesystem.
pub(super) fn fsopen(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `kind` is a C string that lives through the call.
    check_fd(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })
}

/// Sets an option with a value. Values are limited to 255 bytes by the kernel.
pub(super) fn fsconfig_string(fs: &OwnedFd, key: &CStr, value: &CStr) -> io::Result<()> {
    // SAFETY: both strings live through the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            fs.as_raw_fd(),
            libc::FSCONFIG_SET_STRING,
            key.as_ptr(),
            value.as_ptr(),
            0,
        )
    })
    .map(drop)
}

/// Sets an option that has no value.
pub(super) fn fsconfig_flag(fs: &OwnedFd, key: &CStr) -> io::Result<()> {
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: the key lives through the call, a flag has no value.
    check(unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), libc::FSCONFIG_SET_FLAG, key.as_ptr(), null, 0)
    })
    .map(drop)
}

/// Creates the configured filesystem and returns it as a mount that is attached nowhere.
/// `attributes` are `MOUNT_ATTR_*`.
pub(super) fn fs_create(fs: &OwnedFd, attributes: u64) -> io::Result<OwnedFd> {
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: FSCONFIG_CMD_CREATE takes no key and no value.
    check(unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), libc::FSCONFIG_CMD_CREATE, null, null, 0)
    })?;
    // SAFETY: takes only integers.
    check_fd(unsafe {
        libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes as libc::c_uint)
    })
}

/// What the kernel says about a failed configuration step, one message a line.
pub(super) fn fs_messages(fs: &OwnedFd) -> String {
    let mut text = String::new();
    let mut buffer = [0u8; 512];
    while let Ok(n) = nix::unistd::read(fs, &mut buffer) {
        if n == 0 {
            break;
        }
        if !text.is_empty() {
            text.push_str("; ");
        }
        text.push_str(String::from_utf8_lossy(&buffer[..n]).trim());
    }
    text
}

/// A detached copy of the mount tree at `path`, including submounts if `recursive`.
pub(super) fn open_tree(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: `path` is a C string that lives through the call.
    check_fd(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches a detached mount on the file or directory that `target` is open on.
pub(super) fn move_mount(mount: &OwnedFd, target: BorrowedFd<'_>) -> io::Result<()> {
    const FLAGS: libc::c_uint = 0x4 | 0x40; // MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    // SAFETY: both paths are empty C strings, both descriptors are open.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            FLAGS,
        )
    })
    .map(drop)
}

/// Changes a mount's attributes (`MOUNT_ATTR_*`) and, where not 0, its propagation (`MS_PRIVATE`, …).
pub(super) fn mount_setattr(
    mount: BorrowedFd<'_>,
    set: u64,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let mut attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` lives through the call and its size is passed along.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw mut attr,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// A descriptor of a process.
pub(super) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes only integers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Signals the process that the descriptor was opened for, never a later one of the same number.
pub(super) fn pidfd_signal(process: &OwnedFd, signal: c_int) -> io::Result<()> {
    let null = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo asks for the default one.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, null, 0) })
        .map(drop)
}

/// Closes every descriptor from `first` on, whoever believes to own it: only for processes that never
/// touch one again.
pub(super) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the callers own nothing anymore and open nothing afterwards.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Sets the close-on-exec flag of every descriptor from `first` on.
pub(super) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: CLOSE_RANGE_CLOEXEC closes nothing that anybody owns.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
        .map(drop)
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3: two words a set.
const CAPABILITY_SELF: CapabilityHeader = CapabilityHeader { version: 0x2008_0522, pid: 0 };

/// Sets the three capability sets of this process to `set` (effective and permitted) and none
/// (inheritable).
pub(super) fn set_capabilities(set: u64) -> io::Result<()> {
    let word = |bits: u32| CapabilityWord { effective: bits, permitted: bits, inheritable: 0 };
    let data = [word(set as u32), word((set >> 32) as u32)];
    let header = CAPABILITY_SELF;
    // SAFETY: version 3 reads one header and two words, all of which live through the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// The permitted capabilities of this process.
pub(super) fn permitted_capabilities() -> io::Result<u64> {
    let mut data = [CapabilityWord { effective: 0, permitted: 0, inheritable: 0 }; 2];
    let header = CAPABILITY_SELF;
    // SAFETY: version 3 reads one header and writes two words, all of which live through the call.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

fn prctl(option: c_int, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used in this file take integers only.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) } as libc::c_long).map(drop)
}

/// Takes a capability out of the bounding set.
pub(super) fn drop_bounding(capability: u32) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability))
}

/// Keeps the permitted capabilities through the next change of user.
pub(super) fn keep_capabilities() -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1)
}

/// Empties the ambient set.
pub(super) fn clear_ambient() -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong)
}

/// No later exec gives more rights.
pub(super) fn set_no_new_privs() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Other processes may not look into this one; undone by exec.
pub(super) fn set_undumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0)
}

/// Names this process in `ps`; at most 15 bytes are shown.
pub(super) fn set_name(name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is a C string that lives through the call.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) }.into()).map(drop)
}

/// Orphaned descendants become children of this process.
pub(super) fn become_subreaper() -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1)
}

/// Adds a system call filter. Needs `no_new_privs` or CAP_SYS_ADMIN.
pub(super) fn add_seccomp_filter(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
    };
    // SAFETY: both sock_filter types are the kernel's struct; the kernel only reads the program, which
    // lives through the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })
        .map(drop)
}

/// Sets the IFF_UP flag of `lo` in the network namespace of this process.
pub(super) fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }.into())
        .map(drop)
}

/// Gives every signal its default action, also those that the C library keeps for itself.
pub(super) fn reset_signals() -> io::Result<()> {
    // The kernel's sigaction, on every architecture no longer than this; all zero is SIG_DFL.
    let default = [0u64; 4];
    let none = std::ptr::null::<u64>();
    for signal in (1..=64).filter(|s| *s != libc::SIGKILL && *s != libc::SIGSTOP) {
        // SAFETY: SIG_DFL installs no handler; the action lives through the call.
        check(unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, size_of::<u64>())
        })?;
    }
    Ok(())
}

/// Replaces the program of this process; returns only the error.
pub(super) fn execve(path: &CStr, argv: &[CString], env: &[CString]) -> io::Error {
    match nix::unistd::execve(path, argv, env) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}
