//! Network namespaces that exist as long as their guard, and no longer: they have no name and no mount, only a file
//! descriptor, so that even a killed test leaves none behind.

#![expect(unsafe_code, reason = "pre_exec, to start a program inside a namespace; ioctl, to set a device")]

use std::ffi::OsStr;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::sched::{CloneFlags, setns, unshare};

/// The calling thread's namespace. Never `/proc/self/…`: that is the main thread's.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace of its own, with `lo` up.
#[derive(Debug)]
pub struct NetNs {
    file: File,
}

impl NetNs {
    /// Makes a new namespace, leaving the calling thread where it is.
    #[expect(clippy::new_without_default, reason = "making one is an effect, not a default value")]
    pub fn new() -> Self {
        let file = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace (needs root)");
            File::open(OWN).expect("open the new network namespace")
        });
        let ns = NetNs { file };
        ns.ip(&["link", "set", "lo", "up"]);
        ns
    }

    /// The namespace behind a path such as `/proc/<pid>/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> std::io::Result<Self> {
        File::open(path).map(|file| NetNs { file })
    }

    /// A path that opens this namespace while the guard lives; `ip link set … netns <path>` takes it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    /// Moves the calling thread into the namespace until the returned guard is dropped.
    pub fn enter(&self) -> Entered {
        let home = File::open(OWN).expect("open the thread's network namespace");
        setns(&self.file, CloneFlags::CLONE_NEWNET).expect("enter a network namespace");
        Entered { home, _not_send: PhantomData }
    }

    /// Runs `work` on a thread inside the namespace; threads it starts (a tokio runtime's) are inside too.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_a_thread(|| {
            let _inside = self.enter();
            work()
        })
    }

    /// A command that will run inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        self.apply(&mut command);
        command
    }

    /// Makes `command` start inside the namespace.
    pub fn apply(&self, command: &mut Command) {
        let file = self.file.try_clone().expect("duplicate the namespace's descriptor");
        // SAFETY: between fork and exec only setns(2) runs; the descriptor is owned by the closure.
        unsafe {
            command.pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(Into::into));
        }
    }

    /// Runs `ip ARGS` inside and returns what it printed; panics if it fails.
    #[track_caller]
    pub fn ip(&self, args: &[&str]) -> String {
        checked(self.command("ip").args(args))
    }

    /// Connects `self` and `other` by a veth pair named `name` here and `peer` there, both up.
    #[track_caller]
    pub fn veth(&self, name: &str, other: &NetNs, peer: &str) {
        let path = other.path().display().to_string();
        self.ip(&["link", "add", name, "type", "veth", "peer", "name", peer, "netns", &path]);
        self.ip(&["link", "set", name, "up"]);
        other.ip(&["link", "set", peer, "up"]);
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The calling thread is inside a namespace while this lives. Not `Send`: it belongs to its thread.
#[derive(Debug)]
pub struct Entered {
    home: File,
    _not_send: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // A thread stuck in the wrong namespace would make every later test on it lie.
        if let Err(error) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            eprintln!("cannot return to the thread's network namespace: {error}");
            std::process::abort();
        }
    }
}

/// Makes the stack compute the checksums of what leaves by a device of the current namespace, instead of leaving them
/// to the device (`ethtool -K DEVICE tx off`). Frames of a veth device are then as they are on a wire.
pub fn checksum_in_stack(device: &str) -> std::io::Result<()> {
    ethtool(device, 0x17, 0)
}

/// `struct ethtool_value` by SIOCETHTOOL (linux/ethtool.h).
fn ethtool(device: &str, command: u32, value: u32) -> std::io::Result<()> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    /// `struct ifreq`, with a pointer for its union.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        data: *mut [u32; 2],
        rest: [u64; 2],
    }
    assert!(device.len() < libc::IFNAMSIZ, "{device}: too long for a device");
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut setting = [command, value];
    let mut request = Request { name: [0; libc::IFNAMSIZ], data: &raw mut setting, rest: [0; 2] };
    request.name[..device.len()].copy_from_slice(device.as_bytes());
    // SAFETY: the request has the size of `struct ifreq`, its name is terminated, and its data has the size of
    // `struct ethtool_value`; both live until the call returns.
    if unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), SIOCETHTOOL, &raw mut request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Runs a command to its end and returns its standard output; panics with its standard error if it fails.
#[track_caller]
pub fn checked(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}: {}", String::from_utf8_lossy(&stderr).trim());
    String::from_utf8_lossy(&stdout).into_owned()
}

/// Runs `work` on a thread that is thrown away, passing a panic on.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let name = std::thread::current().name().unwrap_or("netns").to_owned();
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name(name).spawn_scoped(scope, work).expect("start a thread");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
