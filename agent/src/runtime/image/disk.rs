//! The store's files. Invariant: whatever moment the machine stops at, a record names only layers that are whole and
//! durable, and a name only records that are. Locks order processes: `names.lock` those that change names,
//! `layers.lock` those that use layers (shared) from those that remove them (exclusive).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::ImageConfig;
use super::digest::Digest;
use super::error::ImageError;
use super::{mounted, tree};

/// Name in a layer's directory of the unpacked files.
const ROOT: &str = "root";
/// Name in a layer's directory of its size.
const SIZE: &str = "size";

/// An image on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: Digest,
    pub(super) manifest: Option<Digest>,
    /// Chain ids, the lowest first.
    pub(super) layers: Vec<Digest>,
    pub(super) config: ImageConfig,
    pub(super) created: String,
    pub(super) size_bytes: u64,
}

/// Normalised name to image id.
pub(super) type Names = BTreeMap<String, Digest>;

/// While this lives, no layer of the store is removed, by whichever process.
#[derive(Debug)]
pub struct Hold {
    _lock: Flock<File>,
}

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// Layers that were removed.
    pub layers: usize,
    /// Layers that no image has any more but a mounted root filesystem does.
    pub in_use: usize,
    /// An import is running or a [`Hold`] is held: nothing was looked at; the next sweep will.
    pub busy: bool,
}

/// The directory of the store.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    dir: PathBuf,
}

fn fail(op: &'static str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { op, path: path.clone(), source }
}

impl Disk {
    /// Opens or makes it. Its directories are closed to everybody else: images bring setuid programs.
    pub(super) fn open(dir: PathBuf) -> Result<Self, ImageError> {
        for sub in ["", "layers", "records", "tmp"] {
            let path = dir.join(sub);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(fail("make the image directory", &path))?;
        }
        Ok(Disk { dir })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn layers(&self) -> PathBuf {
        self.dir.join("layers")
    }

    /// Where a layer is unpacked, once it is.
    pub(super) fn layer_root(&self, chain: &Digest) -> PathBuf {
        self.layers().join(chain.hex()).join(ROOT)
    }

    /// Bytes of the layer's tar stream; `None` where the layer is not there.
    pub(super) fn layer_size(&self, chain: &Digest) -> Result<Option<u64>, ImageError> {
        let path = self.layers().join(chain.hex()).join(SIZE);
        match std::fs::read_to_string(&path) {
            Ok(text) => match text.trim().parse() {
                Ok(size) => Ok(Some(size)),
                Err(_) => Err(fail("read the size of a layer", &path)(ErrorKind::InvalidData.into())),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(fail("read the size of a layer", &path)(e)),
        }
    }

    /// Keeps every layer where it is.
    pub(super) fn hold(&self) -> Result<Hold, ImageError> {
        Ok(Hold { _lock: self.lock("layers.lock", FlockArg::LockShared)? })
    }

    fn lock_file(&self, name: &str) -> Result<(File, PathBuf), ImageError> {
        let path = self.dir.join(name);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        Ok((file.map_err(fail("open the lock", &path))?, path))
    }

    fn lock(&self, name: &str, how: FlockArg) -> Result<Flock<File>, ImageError> {
        let (mut file, path) = self.lock_file(name)?;
        loop {
            match Flock::lock(file, how) {
                Ok(lock) => return Ok(lock),
                Err((back, Errno::EINTR)) => file = back,
                Err((_, e)) => return Err(fail("lock", &path)(e.into())),
            }
        }
    }

    /// A directory below `tmp/` for one import. Only a [`Hold`] keeps it from being swept.
    pub(super) fn work(&self, _hold: &Hold) -> Result<Work, ImageError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let tmp = self.dir.join("tmp");
        loop {
            let name = format!("import-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let dir = tmp.join(&name);
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(Work { tmp, name, dir }),
                // Left behind by a killed process that had this one's id.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(fail("make a directory for the import", &dir)(e)),
            }
        }
    }

    /// Makes the unpacked layers of `work` durable and gives them their place.
    pub(super) fn publish(&self, work: &Work, chains: &[Digest]) -> Result<(), ImageError> {
        if chains.is_empty() {
            return Ok(());
        }
        let fd = tree::open_store_dir(&work.dir).map_err(|e| fail("open", &work.dir)(e.into()))?;
        nix::unistd::syncfs(&fd).map_err(|e| fail("make layers durable in", &work.dir)(e.into()))?;
        for chain in chains {
            let to = self.layers().join(chain.hex());
            match std::fs::rename(work.dir.join(chain.hex()), &to) {
                Ok(()) => {}
                // Another import was first; its layer has the same digests.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOTEMPTY)) => {}
                Err(e) => return Err(fail("put the layer at", &to)(e)),
            }
        }
        sync_dir(&self.layers())
    }

    /// The names, empty where there are none yet.
    pub(super) fn names(&self) -> Result<Names, ImageError> {
        Ok(self.read("names.json")?.unwrap_or_default())
    }

    /// The record of an image.
    pub(super) fn record(&self, id: &Digest) -> Result<Option<Record>, ImageError> {
        self.read(&record_name(id))
    }

    fn read<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<Option<T>, ImageError> {
        let path = self.dir.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(value) => Ok(Some(value)),
                Err(source) => Err(ImageError::Record { path, source }),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(fail("read", &path)(e)),
        }
    }

    /// Writes whole and durable, or not at all. The caller holds `names.lock`.
    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), ImageError> {
        let path = self.dir.join(name);
        let new = path.with_extension("new");
        let bytes =
            serde_json::to_vec(value).map_err(|source| ImageError::Record { path: path.clone(), source })?;
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.map_err(fail("write", &new))?;
        std::fs::rename(&new, &path).map_err(fail("rename to", &path))?;
        sync_dir(path.parent().unwrap_or(&self.dir))
    }

    /// Adds images and points their names at them.
    pub(super) fn commit(&self, images: &[(Record, Vec<String>)]) -> Result<(), ImageError> {
        let _lock = self.lock("names.lock", FlockArg::LockExclusive)?;
        let mut names = self.names()?;
        for (record, new_names) in images {
            self.write(&record_name(&record.id), record)?;
            for name in new_names {
                names.insert(name.clone(), record.id.clone());
            }
        }
        self.write("names.json", &names)
    }

    /// Takes names away; false if none of them is there.
    pub(super) fn forget(&self, gone: impl Fn(&str, &Digest) -> bool) -> Result<bool, ImageError> {
        let _lock = self.lock("names.lock", FlockArg::LockExclusive)?;
        let mut names = self.names()?;
        let before = names.len();
        names.retain(|name, id| !gone(name, id));
        if names.len() == before {
            return Ok(false);
        }
        self.write("names.json", &names)?;
        Ok(true)
    }

    /// Removes records without a name, layers without a record (except those `in_use` says to keep, by directory,
    /// and those that are mounted), and what killed imports left behind.
    pub(super) fn sweep(&self, in_use: &dyn Fn(&Path) -> bool) -> Result<Swept, ImageError> {
        let (file, path) = self.lock_file("layers.lock")?;
        let _layers = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => {
                return Ok(Swept { busy: true, ..Swept::default() });
            }
            Err((_, e)) => return Err(fail("lock", &path)(e.into())),
        };
        let _names = self.lock("names.lock", FlockArg::LockExclusive)?;
        self.clear_tmp()?;
        let kept = self.drop_records()?;
        let mut unwanted = Vec::new();
        for name in entries(&self.layers())? {
            if !kept.contains(&name) {
                unwanted.push(name);
            }
        }
        let mut swept = Swept::default();
        if unwanted.is_empty() {
            return Ok(swept);
        }
        let proc = Path::new("/proc");
        let mounted = mounted::layers().map_err(fail("find out which layers are mounted from", proc))?;
        for name in unwanted {
            if mounted.contains(&name) || in_use(&self.layers().join(&name).join(ROOT)) {
                swept.in_use += 1;
            } else {
                self.discard(&self.layers(), &name)?;
                swept.layers += 1;
            }
        }
        Ok(swept)
    }

    /// Removes records that no name points at; returns the layers of the others.
    fn drop_records(&self) -> Result<BTreeSet<String>, ImageError> {
        let named: BTreeSet<Digest> = self.names()?.into_values().collect();
        let records = self.dir.join("records");
        let mut kept = BTreeSet::new();
        for file in entries(&records)? {
            let id = file.strip_suffix(".json").and_then(|hex| Digest::parse(&format!("sha256:{hex}")).ok());
            match id {
                Some(id) if named.contains(&id) => {
                    let layers = self.record(&id)?.map(|record| record.layers).unwrap_or_default();
                    kept.extend(layers.iter().map(|chain| chain.hex().to_owned()));
                }
                _ => {
                    let path = records.join(&file);
                    std::fs::remove_file(&path).map_err(fail("remove", &path))?;
                }
            }
        }
        Ok(kept)
    }

    fn clear_tmp(&self) -> Result<(), ImageError> {
        let tmp = self.dir.join("tmp");
        for name in entries(&tmp)? {
            self.discard(&tmp, &name)?;
        }
        Ok(())
    }

    /// Removes a directory: out of sight first, so that a half removed one is never taken for whole.
    fn discard(&self, parent: &Path, name: &str) -> Result<(), ImageError> {
        discard(parent, name, &self.dir.join("tmp"))
    }
}

fn discard(parent: &Path, name: &str, tmp: &Path) -> Result<(), ImageError> {
    let path = parent.join(name);
    let removed = tree::open_store_dir(parent)
        .and_then(|from| tree::remove_tree(&from, name.as_bytes(), &tree::open_store_dir(tmp)?));
    match removed {
        Ok(()) => Ok(()),
        Err(Errno::ENOTDIR) => std::fs::remove_file(&path).map_err(fail("remove", &path)),
        Err(e) => Err(fail("remove", &path)(e.into())),
    }
}

fn record_name(id: &Digest) -> String {
    format!("records/{}.json", id.hex())
}

fn entries(dir: &Path) -> Result<Vec<String>, ImageError> {
    let name = |entry: io::Result<std::fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    std::fs::read_dir(dir).and_then(|list| list.map(name).collect()).map_err(fail("list", dir))
}

fn sync_dir(dir: &Path) -> Result<(), ImageError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail("make durable", dir))
}

/// Where one import unpacks. Gone when dropped.
#[derive(Debug)]
pub(super) struct Work {
    tmp: PathBuf,
    name: String,
    dir: PathBuf,
}

impl Work {
    /// Directory of a layer to be unpacked: its root and a place for what its entries replace.
    pub(super) fn layer(&self, chain: &Digest) -> Result<(PathBuf, PathBuf), ImageError> {
        let root = self.dir.join(chain.hex()).join(ROOT);
        let trash = self.dir.join("trash");
        for (dir, mode) in [(&root, 0o755), (&trash, 0o700)] {
            DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(dir)
                .map_err(fail("make a directory for a layer", dir))?;
        }
        Ok((root, trash))
    }

    /// Removes half a layer, so that its space is free again.
    pub(super) fn discard_layer(&self, chain: &Digest) -> Result<(), ImageError> {
        discard(&self.dir, chain.hex(), &self.dir)
    }

    /// Notes the size of an unpacked layer.
    pub(super) fn unpacked(&self, chain: &Digest, size_bytes: u64) -> io::Result<()> {
        std::fs::write(self.dir.join(chain.hex()).join(SIZE), size_bytes.to_string())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = discard(&self.tmp, &self.name, &self.tmp) {
            tracing::warn!(%error, "an import's directory stays until the next sweep");
        }
    }
}
