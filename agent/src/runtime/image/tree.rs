//! Makes a layer's entries below a directory. Invariant: nothing outside that directory is ever made, changed or
//! read. Every path is resolved by the kernel with the directory as its root (`openat2`, `RESOLVE_IN_ROOT`), the
//! last component is never followed, and everything made is reached through the descriptor it was made with.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstatat, futimens, makedev,
    mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};

use super::entry::{Item, Kind};
use super::error::{Fault, is_disk_full};
use super::path::{Meaning, meaning};
use super::xattr;

/// Attribute that makes overlayfs hide what lower layers have in a directory.
pub(super) const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";
/// Permissions of directories that a layer uses without naming them.
const IMPLICIT_DIR_MODE: u32 = 0o755;
/// Bytes copied at a time.
const COPY_BYTES: usize = 128 << 10;
/// Times that a path walk which lost a race against a rename elsewhere is tried.
const WALK_TRIES_MAX: usize = 32;

/// A layer that is being unpacked.
pub(super) struct Tree {
    root: OwnedFd,
    /// A directory on the same filesystem for what is replaced.
    trash: OwnedFd,
    /// Times of directories, set last because making entries changes them.
    times: BTreeMap<Vec<u8>, (i64, i64)>,
    /// The directory that the last entry was made in: entries come sorted by directory.
    recent: Option<(Vec<u8>, OwnedFd)>,
    /// Something was replaced by the entry being made: paths may lead elsewhere now.
    replaced: bool,
    buffer: Vec<u8>,
}

/// What failed at an entry, before it has its name.
enum Failure {
    /// The entry is refused.
    Refused(String),
    /// The operating system refused.
    System(&'static str, io::Error),
    /// The stream ended or broke.
    Stream(io::Error),
}

type Outcome<T> = Result<T, Failure>;

fn system(op: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::System(op, errno.into())
}

impl Tree {
    /// Unpacks below `root`, with `trash` for what entries replace.
    pub(super) fn new(root: OwnedFd, trash: OwnedFd) -> Self {
        Tree {
            root,
            trash,
            times: BTreeMap::new(),
            recent: None,
            replaced: false,
            buffer: vec![0; COPY_BYTES],
        }
    }

    /// Makes one entry; `data` is its content. Returns the bytes written.
    pub(super) fn make(&mut self, item: &Item, data: &mut impl Read) -> Result<u64, Fault> {
        self.make_inner(item, data).map_err(|failure| {
            let entry = String::from_utf8_lossy(item.path.bytes()).into_owned();
            match failure {
                Failure::System(_, source) if is_disk_full(&source) => Fault::DiskFull { needed_bytes: None },
                Failure::System(op, source) => {
                    let problem = match source.raw_os_error() {
                        Some(libc::EPERM | libc::EACCES) => format!("{op} (unpacking needs root)"),
                        _ => op.to_owned(),
                    };
                    Fault::Entry { entry, problem, source: Some(source) }
                }
                Failure::Refused(problem) => Fault::Entry { entry, problem, source: None },
                Failure::Stream(source) => {
                    let problem =
                        "its content ends early or can't be read; export the image again".to_owned();
                    Fault::Entry { entry, problem, source: Some(source) }
                }
            }
        })
    }

    /// Sets the directories' times.
    pub(super) fn finish(mut self) -> Result<(), Fault> {
        self.recent = None;
        for (path, mtime) in &self.times {
            let time = time(*mtime);
            match self.walk(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
                Ok(dir) => futimens(dir, &time, &time)
                    .map_err(|e| Fault::Io { op: "set times of directories in", source: e.into() })?,
                // Replaced by a later entry.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(e) => return Err(Fault::Io { op: "open directories in", source: e.into() }),
            }
        }
        Ok(())
    }

    fn make_inner(&mut self, item: &Item, data: &mut impl Read) -> Outcome<u64> {
        let Some((dir, name)) = item.path.split() else {
            return self.make_root(item).map(|()| 0);
        };
        if item.kind == Kind::Nothing {
            return Ok(0);
        }
        let meaning = meaning(name).map_err(Failure::Refused)?;
        if meaning == Meaning::Ignored {
            return Ok(0);
        }
        self.replaced = false;
        let parent = self.directory(dir)?;
        let made = match meaning {
            Meaning::Opaque => {
                hide_lower(open_self(&parent)?)?;
                Ok(0)
            }
            Meaning::Whiteout(hidden) => whiteout(&parent, hidden).map(|()| 0),
            _ => self.make_at(&parent, name, item, data),
        };
        if !self.replaced {
            self.recent = Some((dir.to_vec(), parent));
        }
        made
    }

    fn make_root(&mut self, item: &Item) -> Outcome<()> {
        if item.kind != Kind::Directory {
            return Err(Failure::Refused("the root of an image is a directory".to_owned()));
        }
        let root = open_self(&self.root)?;
        self.times.insert(Vec::new(), item.mtime);
        own(&root, item)
    }

    fn make_at(&mut self, parent: &OwnedFd, name: &[u8], item: &Item, data: &mut impl Read) -> Outcome<u64> {
        match &item.kind {
            Kind::Directory => {
                let dir = self.make_dir(parent, name)?;
                self.times.insert(item.path.bytes().to_vec(), item.mtime);
                own(&dir, item)?;
                Ok(0)
            }
            Kind::File(size) => self.make_file(parent, name, item, *size, data),
            Kind::Symlink(target) => {
                self.in_place(parent, name, || symlinkat(target.as_slice(), parent, name))
                    .map_err(system("make the symbolic link"))?;
                own_unopened(parent, name, item)?;
                Ok(0)
            }
            Kind::Hardlink(target) => self.make_hardlink(parent, name, target).map(|()| 0),
            Kind::Fifo => self.make_node(parent, name, item, SFlag::S_IFIFO, 0).map(|()| 0),
            Kind::CharDevice(major, minor) => {
                self.make_node(parent, name, item, SFlag::S_IFCHR, makedev(*major, *minor)).map(|()| 0)
            }
            Kind::Nothing => Ok(0),
        }
    }

    fn make_dir(&mut self, parent: &OwnedFd, name: &[u8]) -> Outcome<OwnedFd> {
        match mkdirat(parent, name, Mode::S_IRWXU) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                let stat = stat_of(parent, name)?;
                if kind_of(&stat) != SFlag::S_IFDIR {
                    unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)
                        .map_err(system("replace an earlier entry"))?;
                    self.replaced = true;
                    mkdirat(parent, name, Mode::S_IRWXU).map_err(system("make the directory"))?;
                    if is_whiteout(&stat) {
                        hide_lower(open_dir(parent, name)?)?;
                    }
                }
            }
            Err(e) => return Err(system("make the directory")(e)),
        }
        open_dir(parent, name)
    }

    fn make_file(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        item: &Item,
        size: u64,
        data: &mut impl Read,
    ) -> Outcome<u64> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let made = self
            .in_place(parent, name, || openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR))
            .map_err(system("make the file"))?;
        let mut file = File::from(made);
        let mut written = 0;
        loop {
            let n = match data.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Failure::Stream(e)),
            };
            file.write_all(&self.buffer[..n]).map_err(|e| Failure::System("write the file", e))?;
            written += n as u64;
        }
        if written != size {
            let ended = format!("{written} of {size} bytes");
            return Err(Failure::Stream(io::Error::new(io::ErrorKind::UnexpectedEof, ended)));
        }
        own(&file, item)?;
        let time = time(item.mtime);
        futimens(&file, &time, &time).map_err(system("set its time"))?;
        Ok(written)
    }

    fn make_hardlink(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        target: &super::path::EntryPath,
    ) -> Outcome<()> {
        let shown = || String::from_utf8_lossy(target.bytes()).into_owned();
        let missing = |why: &str| Failure::Refused(format!("hard link to {:?}: {why}", shown()));
        let Some((dir, target_name)) = target.split() else {
            return Err(missing("a directory can't be linked"));
        };
        let from = match self.walk(dir, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(from) => from,
            Err(Errno::ENOENT | Errno::ENOTDIR) => {
                return Err(missing("the layer has no such entry before it"));
            }
            Err(e) => return Err(system("find the target of the hard link")(e)),
        };
        match fstatat(&from, target_name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if kind_of(&stat) == SFlag::S_IFDIR => {
                return Err(missing("a directory can't be linked"));
            }
            Ok(stat) if is_whiteout(&stat) => return Err(missing("the layer removes it")),
            Ok(stat) => {
                // A link to itself would remove its own target on the way.
                let same = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)
                    .is_ok_and(|own| (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino));
                if same {
                    return Ok(());
                }
            }
            Err(Errno::ENOENT) => return Err(missing("the layer has no such entry before it")),
            Err(e) => return Err(system("find the target of the hard link")(e)),
        }
        self.in_place(parent, name, || linkat(&from, target_name, parent, name, AtFlags::empty()))
            .map_err(system("make the hard link"))
    }

    fn make_node(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        item: &Item,
        kind: SFlag,
        device: libc::dev_t,
    ) -> Outcome<()> {
        self.in_place(parent, name, || mknodat(parent, name, kind, Mode::empty(), device))
            .map_err(system("make the special file"))?;
        own_unopened(parent, name, item)?;
        // Following is harmless: the name was made above, in a directory that nobody else writes to, and is not
        // a symbolic link.
        fchmodat(parent, name, Mode::from_bits_truncate(item.mode), FchmodatFlags::FollowSymlink)
            .map_err(system("set its permissions"))
    }

    /// Runs `make`; where the name is taken, moves what has it out of the way and runs it again.
    fn in_place<T>(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        make: impl Fn() -> nix::Result<T>,
    ) -> nix::Result<T> {
        match make() {
            Err(Errno::EEXIST) => {}
            done => return done,
        }
        self.replaced = true;
        let stat = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if kind_of(&stat) == SFlag::S_IFDIR {
            remove_tree(parent, name, &self.trash)?;
        } else {
            unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
        }
        make()
    }

    /// Opens a path below the root, links inside resolved as a process rooted there would.
    fn walk(&self, path: &[u8], flags: OFlag) -> nix::Result<OwnedFd> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        walk(&self.root, path, flags)
    }

    /// The directory that an entry is made in; directories that the layer does not name are made.
    fn directory(&mut self, dir: &[u8]) -> Outcome<OwnedFd> {
        if let Some((path, fd)) = self.recent.take()
            && path == dir
        {
            return Ok(fd);
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        match self.walk(dir, flags) {
            Ok(fd) => return Ok(fd),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(e) => return Err(system("open its directory")(e)),
        }
        let mut parent = self.walk(b"", flags).map_err(system("open its directory"))?;
        for (at, part) in components(dir) {
            parent = match self.walk(at, flags) {
                Ok(fd) => fd,
                Err(Errno::ENOENT | Errno::ENOTDIR) => self.implicit_dir(&parent, part, at)?,
                Err(e) => return Err(system("open its directory")(e)),
            };
        }
        Ok(parent)
    }

    fn implicit_dir(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Outcome<OwnedFd> {
        if let Ok(stat) = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            && !is_whiteout(&stat)
        {
            let shown = String::from_utf8_lossy(path);
            let what = if kind_of(&stat) == SFlag::S_IFLNK {
                "a symbolic link to nothing"
            } else {
                "not a directory"
            };
            return Err(Failure::Refused(format!("the layer's own {shown:?}, in its path, is {what}")));
        }
        let dir = self.make_dir(parent, name)?;
        fchmod(&dir, Mode::from_bits_truncate(IMPLICIT_DIR_MODE)).map_err(system("set its permissions"))?;
        Ok(dir)
    }
}

/// Opens `path` below `root`, as a process rooted there would.
pub(super) fn walk(root: &OwnedFd, path: &[u8], flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV,
    );
    for _ in 1..WALK_TRIES_MAX {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN) => {}
            done => return done,
        }
    }
    openat2(root, path, how)
}

/// `a/b/c` as (`a`, `a`), (`a/b`, `b`), (`a/b/c`, `c`).
fn components(path: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let ends = (0..path.len()).filter(|at| path[*at] == b'/').chain([path.len()]);
    ends.map(|end| {
        let start = path[..end].iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        (&path[..end], &path[start..end])
    })
}

fn time((seconds, nanos): (i64, i64)) -> TimeSpec {
    TimeSpec::new(seconds, nanos)
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn is_whiteout(stat: &FileStat) -> bool {
    kind_of(stat) == SFlag::S_IFCHR && stat.st_rdev == 0
}

fn stat_of(parent: &OwnedFd, name: &[u8]) -> Outcome<FileStat> {
    fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(system("look at an earlier entry"))
}

fn open_dir(parent: &OwnedFd, name: &[u8]) -> Outcome<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty()).map_err(system("open the directory"))
}

/// A descriptor that can be changed through, of a directory that is only named by its own.
fn open_self(dir: &OwnedFd) -> Outcome<OwnedFd> {
    open_dir(dir, b".")
}

fn hide_lower(dir: OwnedFd) -> Outcome<()> {
    xattr::set(&dir, OPAQUE_XATTR, b"y").map_err(|e| Failure::System("mark the directory opaque", e))
}

/// Whiteouts speak of lower layers: what this layer has under the name stays, and hides the rest.
fn whiteout(parent: &OwnedFd, name: &[u8]) -> Outcome<()> {
    match mknodat(parent, name, SFlag::S_IFCHR, Mode::empty(), makedev(0, 0)) {
        Ok(()) => Ok(()),
        Err(Errno::EEXIST) if kind_of(&stat_of(parent, name)?) == SFlag::S_IFDIR => {
            hide_lower(open_dir(parent, name)?)
        }
        Err(Errno::EEXIST) => Ok(()),
        Err(e) => Err(system("make the whiteout")(e)),
    }
}

/// Owner before permissions before attributes: each clears something of the next (setuid bits, capabilities).
fn own(file: &impl AsFd, item: &Item) -> Outcome<()> {
    fchown(file, Some(Uid::from_raw(item.uid)), Some(Gid::from_raw(item.gid)))
        .map_err(system("set its owner"))?;
    fchmod(file, Mode::from_bits_truncate(item.mode)).map_err(system("set its permissions"))?;
    for (name, value) in &item.xattrs {
        match xattr::set(file, name, value) {
            // Notes for users, which not every filesystem keeps (tmpfs only since 6.6); others change what the file
            // does and must not get lost.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) && name.starts_with(b"user.") => {
                tracing::debug!(name = %String::from_utf8_lossy(name), "the filesystem has no such attributes");
            }
            done => done.map_err(|e| Failure::System("set its extended attributes", e))?,
        }
    }
    Ok(())
}

/// Owner and time of what can't be opened without an effect: links, devices, pipes.
fn own_unopened(parent: &OwnedFd, name: &[u8], item: &Item) -> Outcome<()> {
    let (uid, gid) = (Uid::from_raw(item.uid), Gid::from_raw(item.gid));
    fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
        .map_err(system("set its owner"))?;
    let time = time(item.mtime);
    utimensat(parent, name, &time, &time, UtimensatFlags::NoFollowSymlink).map_err(system("set its time"))
}

/// Removes the directory `name` in `parent` with everything below it. Whatever its depth, it takes a handful of
/// descriptors and no stack: directories that are not empty are first moved next to each other into `trash`.
pub(super) fn remove_tree(parent: &impl AsFd, name: &[u8], trash: &impl AsFd) -> nix::Result<()> {
    let mut next: u64 = 0;
    let mut fresh = || {
        next += 1;
        format!("{}-{next}", std::process::id()).into_bytes()
    };
    let mut todo = vec![move_to(parent, name, trash, &mut fresh)?];
    while let Some(top) = todo.pop() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut dir = nix::dir::Dir::openat(trash, top.as_slice(), flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry?;
            let child = entry.file_name().to_bytes();
            if child != b"." && child != b".." {
                names.push(child.to_vec());
            }
        }
        for child in names {
            match unlinkat(&dir, child.as_slice(), UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => continue,
                Err(Errno::EISDIR | Errno::EPERM) => {}
                Err(e) => return Err(e),
            }
            match unlinkat(&dir, child.as_slice(), UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => todo.push(move_to(&dir, &child, trash, &mut fresh)?),
                Err(e) => return Err(e),
            }
        }
        drop(dir);
        unlinkat(trash, top.as_slice(), UnlinkatFlags::RemoveDir)?;
    }
    Ok(())
}

fn move_to(
    from: &impl AsFd,
    name: &[u8],
    trash: &impl AsFd,
    fresh: &mut impl FnMut() -> Vec<u8>,
) -> nix::Result<Vec<u8>> {
    loop {
        let to = fresh();
        match renameat(from, name, trash, to.as_slice()) {
            Ok(()) => return Ok(to),
            Err(Errno::EEXIST | Errno::ENOTEMPTY) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Opens a directory of the store by its own path.
pub(super) fn open_store_dir(path: &std::path::Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat(AT_FDCWD, path, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_come_with_their_paths() {
        let parts: Vec<(&[u8], &[u8])> = components(b"a/bc/d").collect();
        assert_eq!(parts, [(&b"a"[..], &b"a"[..]), (b"a/bc", b"bc"), (b"a/bc/d", b"d")]);
    }

    #[test]
    fn trees_of_any_depth_are_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let (top, trash) = (tmp.path().join("top"), tmp.path().join("trash"));
        std::fs::create_dir_all(&trash).unwrap();
        std::fs::create_dir(&top).unwrap();
        std::fs::write(tmp.path().join("kept"), "x").unwrap();
        std::os::unix::fs::symlink(tmp.path(), top.join("outside")).unwrap();
        let mut at = open_store_dir(&top).unwrap();
        for _ in 0..3000 {
            mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
            at = open_dir(&at, b"d").ok().unwrap();
        }
        drop(at);
        let parent = open_store_dir(tmp.path()).unwrap();
        remove_tree(&parent, b"top", &open_store_dir(&trash).unwrap()).unwrap();
        assert!(!top.exists() && tmp.path().join("kept").exists());
        assert_eq!(std::fs::read_dir(&trash).unwrap().count(), 0);
    }
}
