//! A container's root filesystem, put together by the container's own first process in its own mount
//! namespace. Invariant: every path inside the image is resolved below the root by the kernel
//! (`openat2`), and every mount is attached to a descriptor, so that no link in an image leads to a file
//! of the node; and nothing shows in the node's mount table, so that nothing is left to unmount.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mkdirat, mknodat};
use nix::unistd::{fchdir, pivot_root, symlinkat};

use super::super::cgroup::Hierarchies;
use super::super::protocol::{Fault, Stage, names};
use super::super::spec::{ContainerSpec, Propagation};
use super::super::sys;

type Result<T> = std::result::Result<T, Fault>;

const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;

const MASKED: [&str; 14] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/kernel/debug",
    "/sys/kernel/tracing",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const MOUNT_ROOT: &str = "mount the root filesystem";

const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// What the root filesystem is made of. Relative paths are below the pod's run directory, which is the
/// current one.
pub(super) struct Rootfs<'a> {
    pub(super) spec: &'a ContainerSpec,
    pub(super) upper: &'a Path,
    pub(super) work: &'a Path,
    pub(super) hierarchies: &'a Hierarchies,
    /// The container's group.
    pub(super) group: &'a Path,
    /// File that the container may leave a message in.
    pub(super) termination_log: &'a Path,
}

impl Rootfs<'_> {
    /// Makes it and moves into it; the node's files are out of reach afterwards.
    pub(super) fn enter(&self) -> Result<()> {
        // Modes below are meant as they are written.
        let umask = nix::sys::stat::umask(Mode::empty());
        let mounted = self.overlay()?;
        let point = open(AT_FDCWD, Path::new(names::ROOTFS), ResolveFlag::empty()).stage("open rootfs")?;
        sys::move_mount(&mounted, point.as_fd()).stage("attach the root filesystem")?;
        // The descriptor of the mount is now one of the attached root.
        let root = mounted;
        sys::mount_setattr(root.as_fd(), 0, libc::MS_PRIVATE, false).stage("make the root private")?;
        self.kernel_mounts(&root)?;
        self.devices(&root)?;
        self.control_groups(&root)?;
        self.pod_files(&root)?;
        self.volumes(&root)?;
        if !self.spec.privileged {
            mask(&root)?;
        }
        if self.spec.read_only_root {
            sys::mount_setattr(root.as_fd(), RDONLY, 0, false).stage("make the root read-only")?;
        }
        fchdir(&root).stage("enter the root filesystem")?;
        pivot_root(".", ".").stage("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).stage("leave the node's filesystem")?;
        nix::sys::stat::umask(umask);
        nix::unistd::chdir("/").stage("enter the root filesystem")
    }

    /// The layers with a writable one on top, as a detached mount. `volatile`: the writable layer is of no
    /// use after a crash of the node, so nothing in it is ever synced to disk.
    fn overlay(&self) -> Result<OwnedFd> {
        let layers = &self.spec.image.layers;
        if layers.is_empty() {
            return Err(Fault::failed(MOUNT_ROOT, "the image has no layers"));
        }
        let fs = sys::fsopen(c"overlay").stage("open an overlay")?;
        let set = |key, path: &Path| {
            let value = sys::c_path(path)?;
            sys::fsconfig_string(&fs, key, &value)
        };
        // Layers one by one need Linux 6.7; the kernel takes the top-most first.
        let appended = layers.iter().rev().try_for_each(|layer| set(c"lowerdir+", layer));
        if appended.is_err() {
            return self.overlay_by_option();
        }
        set(c"upperdir", self.upper)
            .and_then(|()| set(c"workdir", self.work))
            .and_then(|()| sys::fsconfig_string(&fs, c"source", c"overlay"))
            .and_then(|()| sys::fsconfig_flag(&fs, c"volatile"))
            .stage("configure the overlay")?;
        match sys::fs_create(&fs, 0) {
            // Older kernels look at the options only now.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.overlay_by_option(),
            Err(e) => Err(with_messages(Fault::io(MOUNT_ROOT, &e), &sys::fs_messages(&fs))),
            Ok(mounted) => Ok(mounted),
        }
    }

    /// As `overlay`, with the older system call. All its options share one page and some characters have
    /// a meaning there, so directories are named by the numbers of their descriptors.
    fn overlay_by_option(&self) -> Result<OwnedFd> {
        let here = open(AT_FDCWD, Path::new("."), ResolveFlag::empty()).stage(MOUNT_ROOT)?;
        let numbered = |path: &Path| {
            let dir = open(AT_FDCWD, path, ResolveFlag::empty());
            dir.stage_with(|| format!("{MOUNT_ROOT}: {}", path.display()))
        };
        let layers = self.spec.image.layers.iter().rev().map(|l| numbered(l)).collect::<Result<Vec<_>>>()?;
        let (upper, work) = (numbered(self.upper)?, numbered(self.work)?);
        let point = numbered(Path::new(names::ROOTFS))?;
        let lower = layers.iter().map(|l| l.as_raw_fd().to_string()).collect::<Vec<_>>().join(":");
        let options =
            format!("lowerdir={lower},upperdir={},workdir={},volatile", upper.as_raw_fd(), work.as_raw_fd());
        nix::unistd::chdir("/proc/self/fd").stage(MOUNT_ROOT)?;
        let target = point.as_raw_fd().to_string();
        mount(Some("overlay"), target.as_str(), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .stage(MOUNT_ROOT)?;
        fchdir(&here).stage(MOUNT_ROOT)?;
        let tree = sys::open_tree(AT_FDCWD, Path::new(names::ROOTFS), false).stage(MOUNT_ROOT)?;
        umount2(names::ROOTFS, MntFlags::MNT_DETACH).stage(MOUNT_ROOT)?;
        Ok(tree)
    }

    fn kernel_mounts(&self, root: &OwnedFd) -> Result<()> {
        let secure = NOSUID | NODEV | NOEXEC;
        let sys_attributes = if self.spec.privileged { secure } else { secure | RDONLY };
        let proc = filesystem("proc", &[], secure)?;
        attach(root, &proc, "/proc", Kind::Special)?;
        let sysfs = filesystem("sysfs", &[], sys_attributes)?;
        attach(root, &sysfs, "/sys", Kind::Special)?;
        let dev = filesystem("tmpfs", &[("mode", "755"), ("size", "65536k")], NOSUID)?;
        attach(root, &dev, "/dev", Kind::Special)
    }

    fn devices(&self, root: &OwnedFd) -> Result<()> {
        let dev = open_in(root, "/dev").stage("open /dev")?;
        for (name, major, minor) in DEVICES {
            let mode = Mode::from_bits_truncate(0o666);
            mknodat(&dev, name, SFlag::S_IFCHR, mode, makedev(major, minor))
                .stage_with(|| format!("make /dev/{name}"))?;
        }
        for (name, target) in LINKS {
            symlinkat(target, &dev, name).stage_with(|| format!("make /dev/{name}"))?;
        }
        if self.spec.privileged {
            host_devices(&dev)?;
        }
        let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
        let pts = filesystem("devpts", &options, NOSUID | NOEXEC)?;
        attach(root, &pts, "/dev/pts", Kind::Directory)?;
        let shm = bind(Path::new(names::SHM), "/dev/shm")?;
        attach(root, &shm, "/dev/shm", Kind::Directory)?;
        let queues = filesystem("mqueue", &[], NOSUID | NODEV | NOEXEC)?;
        attach(root, &queues, "/dev/mqueue", Kind::Directory)
    }

    /// `/sys/fs/cgroup`, read-only: the container's own group as root on a v2 host; on others its
    /// directory of each hierarchy.
    fn control_groups(&self, root: &OwnedFd) -> Result<()> {
        const POINT: &str = "/sys/fs/cgroup";
        let secure = NOSUID | NODEV | NOEXEC;
        if self.hierarchies.is_unified() {
            let attributes = if self.spec.privileged { secure } else { secure | RDONLY };
            let group = filesystem("cgroup2", &[], attributes)?;
            return attach(root, &group, POINT, Kind::Existing);
        }
        let tmpfs = filesystem("tmpfs", &[("mode", "755"), ("size", "64k")], secure)?;
        attach(root, &tmpfs, POINT, Kind::Existing)?;
        for (name, dir) in self.hierarchies.views(self.group) {
            let tree = bind(&dir, POINT)?;
            sys::mount_setattr(tree.as_fd(), secure | RDONLY, libc::MS_PRIVATE, false).stage(POINT)?;
            attach(root, &tree, &format!("{POINT}/{name}"), Kind::Directory)?;
        }
        sys::mount_setattr(tmpfs.as_fd(), RDONLY, 0, false).stage(POINT)
    }

    /// Files that the pod's containers share, and the termination message.
    fn pod_files(&self, root: &OwnedFd) -> Result<()> {
        for name in ["hosts", "hostname", "resolv.conf"] {
            let target = format!("/etc/{name}");
            if self.spec.mounts.iter().any(|m| m.target == Path::new(&target)) {
                continue;
            }
            let file = bind(&Path::new(names::ETC).join(name), &target)?;
            attach(root, &file, &target, Kind::File)?;
        }
        let chosen = self.spec.termination_message_path.as_str();
        let target = if chosen.is_empty() { "/dev/termination-log" } else { chosen };
        let file = bind(self.termination_log, target)?;
        attach(root, &file, target, Kind::File)
    }

    fn volumes(&self, root: &OwnedFd) -> Result<()> {
        let mut mounts: Vec<_> = self.spec.mounts.iter().collect();
        mounts.sort_by_key(|m| m.target.components().count());
        for m in mounts {
            let target = m.target.to_string_lossy();
            let tree = sys::open_tree(AT_FDCWD, &m.source, true)
                .stage_with(|| format!("volume {}", m.source.display()))?;
            let propagation = match m.propagation {
                Propagation::None => libc::MS_PRIVATE,
                Propagation::HostToContainer => libc::MS_SLAVE,
            };
            let attributes = if m.read_only { RDONLY } else { 0 };
            sys::mount_setattr(tree.as_fd(), attributes, propagation, true)
                .stage_with(|| format!("volume {target}"))?;
            let kind = fstat(&tree).stage_with(|| format!("volume {target}"))?.st_mode & libc::S_IFMT;
            let kind = if kind == libc::S_IFDIR { Kind::Directory } else { Kind::File };
            attach(root, &tree, &target, kind)?;
        }
        Ok(())
    }
}

fn with_messages(fault: Fault, messages: &str) -> Fault {
    if messages.is_empty() {
        fault
    } else {
        Fault { message: format!("{}: {messages}", fault.message), ..fault }
    }
}

fn filesystem(kind: &str, options: &[(&str, &str)], attributes: u64) -> Result<OwnedFd> {
    let make = || {
        let c = |s: &str| CString::new(s).map_err(std::io::Error::from);
        let fs = sys::fsopen(&c(kind)?)?;
        for (key, value) in options {
            sys::fsconfig_string(&fs, &c(key)?, &c(value)?)?;
        }
        sys::fs_create(&fs, attributes)
    };
    make().stage_with(|| format!("make a {kind}"))
}

fn bind(source: &Path, what: &str) -> Result<OwnedFd> {
    sys::open_tree(AT_FDCWD, source, false).stage_with(|| format!("bind {} to {what}", source.display()))
}

/// What a mount is put on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A directory that is no link and not behind one; made if missing.
    Special,
    /// A directory; made if missing.
    Directory,
    /// A file; made if missing.
    File,
    /// Whatever is there.
    Existing,
}

fn attach(root: &OwnedFd, mount: &OwnedFd, target: &str, kind: Kind) -> Result<()> {
    let point = mount_point(root, target, kind).stage_with(|| format!("mount {target}"))?;
    sys::move_mount(mount, point.as_fd()).stage_with(|| format!("mount {target}"))
}

fn inside() -> ResolveFlag {
    ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS
}

fn open(dir: BorrowedFd<'_>, path: &Path, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    openat2(dir, path, how)
}

fn open_in(root: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    open(root.as_fd(), Path::new(path), inside())
}

/// Opens what a mount shall be attached to, making it and the directories above where missing.
fn mount_point(root: &OwnedFd, target: &str, kind: Kind) -> nix::Result<OwnedFd> {
    let mut resolve = inside();
    if kind == Kind::Special {
        resolve |= ResolveFlag::RESOLVE_NO_SYMLINKS;
    }
    match open(root.as_fd(), Path::new(target), resolve) {
        Err(Errno::ENOENT) if kind != Kind::Existing => {}
        other => return other,
    }
    let parts: Vec<_> = Path::new(target).components().filter(|c| !matches!(c, Component::RootDir)).collect();
    let mut path = PathBuf::from("/");
    for (i, part) in parts.iter().enumerate() {
        let Component::Normal(name) = part else { return Err(Errno::EINVAL) };
        let parent = open(root.as_fd(), &path, resolve)?;
        let made = if i + 1 == parts.len() && kind == Kind::File {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(&parent, *name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        } else {
            mkdirat(&parent, *name, Mode::from_bits_truncate(0o755))
        };
        match made {
            Ok(()) | Err(Errno::EEXIST) => path.push(name),
            Err(e) => return Err(e),
        }
    }
    open(root.as_fd(), Path::new(target), resolve)
}

/// Makes directories below the root of this process, as `mkdir -p`.
pub(super) fn make_working_dir(path: &str) -> nix::Result<OwnedFd> {
    let root = open(AT_FDCWD, Path::new("/"), ResolveFlag::empty())?;
    mount_point(&root, path, Kind::Directory)
}

/// Hides the files behind `/dev/null` and the directories behind one empty tmpfs.
fn mask(root: &OwnedFd) -> Result<()> {
    let mut empty: Option<OwnedFd> = None;
    for path in MASKED {
        let target = match open_in(root, path) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
            other => other.stage_with(|| format!("mask {path}"))?,
        };
        let kind = fstat(&target).stage_with(|| format!("mask {path}"))?.st_mode & libc::S_IFMT;
        let cover = if kind != libc::S_IFDIR {
            let null = open_in(root, "/dev/null").stage("open /dev/null")?;
            sys::open_tree(null.as_fd(), Path::new(""), false)
        } else if let Some(empty) = &empty {
            sys::open_tree(empty.as_fd(), Path::new(""), false)
        } else {
            Ok(filesystem("tmpfs", &[("mode", "555"), ("size", "0"), ("nr_inodes", "1")], RDONLY)?)
        };
        let cover = cover.stage_with(|| format!("mask {path}"))?;
        sys::move_mount(&cover, target.as_fd()).stage_with(|| format!("mask {path}"))?;
        if kind == libc::S_IFDIR {
            empty = Some(cover);
        }
    }
    for path in READ_ONLY {
        let target = match open_in(root, path) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
            other => other.stage_with(|| format!("protect {path}"))?,
        };
        let protect = || {
            let tree = sys::open_tree(target.as_fd(), Path::new(""), true)?;
            sys::mount_setattr(tree.as_fd(), RDONLY, 0, true)?;
            sys::move_mount(&tree, target.as_fd())
        };
        protect().stage_with(|| format!("protect {path}"))?;
    }
    Ok(())
}

/// Every device node of the node's `/dev`, for privileged containers.
fn host_devices(dev: &OwnedFd) -> Result<()> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    for entry in std::fs::read_dir("/dev").stage("list the node's devices")? {
        let entry = entry.stage("list the node's devices")?;
        let Ok(meta) = entry.metadata() else { continue };
        let kind = match meta.file_type() {
            t if t.is_char_device() => SFlag::S_IFCHR,
            t if t.is_block_device() => SFlag::S_IFBLK,
            _ => continue,
        };
        let mode = Mode::from_bits_truncate(meta.mode() & 0o777);
        match mknodat(dev, entry.file_name().as_os_str(), kind, mode, meta.rdev()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(e).stage_with(|| format!("make {}", entry.path().display())),
        }
    }
    Ok(())
}
