//! Where images are imported from: an archive (a tar file, read in place) or a layout directory. Invariant: a source
//! is only read, never followed out of (symlinks of a layout stay inside it), and its bytes prove nothing until a
//! digest has been compared.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::error::ImageError;
use super::{path::EntryPath, tree};
use crate::limits;

/// A file of a source and its length.
pub(super) type Member<'a> = (Box<dyn Read + 'a>, u64);

/// An opened archive or layout.
pub(super) struct Source {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    /// Members by cleaned name: offset and length in the file.
    Archive {
        file: File,
        members: HashMap<Vec<u8>, (u64, u64)>,
    },
    Layout {
        dir: OwnedFd,
    },
}

impl Source {
    /// Opens an archive file or a layout directory.
    pub(super) fn open(path: &Path) -> Result<Self, ImageError> {
        let io = |op| move |source| ImageError::Io { op, path: path.to_owned(), source };
        let file = File::open(path).map_err(io("open the image archive"))?;
        let meta = file.metadata().map_err(io("look at the image archive"))?;
        let kind = if meta.is_dir() {
            Kind::Layout { dir: OwnedFd::from(file) }
        } else if meta.is_file() {
            Kind::Archive { members: members(path, &file)?, file }
        } else {
            return Err(archive(
                path,
                "is neither a regular file nor a directory; save the image to a file first",
            ));
        };
        Ok(Source { path: path.to_owned(), kind })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The member `name` and its length; `None` where there is no such member.
    pub(super) fn member(&self, name: &str) -> Result<Option<Member<'_>>, ImageError> {
        let io =
            |source| ImageError::Io { op: "read from the image archive", path: self.path.join(name), source };
        match &self.kind {
            Kind::Archive { file, members } => Ok(members.get(name.as_bytes()).map(|(offset, length)| {
                let slice = Slice { file, offset: *offset, left: *length };
                (Box::new(slice) as Box<dyn Read>, *length)
            })),
            Kind::Layout { dir } => {
                // Non-blocking, so that a pipe in a blob's place can't hold the import up.
                match tree::walk(dir, name.as_bytes(), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
                    Ok(fd) => {
                        let file = File::from(fd);
                        let meta = file.metadata().map_err(io)?;
                        if !meta.is_file() {
                            return Err(archive(&self.path.join(name), "is not a regular file"));
                        }
                        Ok(Some((Box::new(file), meta.len())))
                    }
                    Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
                    Err(e) => Err(io(e.into())),
                }
            }
        }
    }

    /// The whole member `name`, which is a document.
    pub(super) fn document(&self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some((reader, length)) = self.member(name)? else { return Ok(None) };
        let max = limits::IMAGE_DOCUMENT_BYTES_MAX;
        if length > max {
            let problem =
                format!("{name} has {length} bytes, more than the {max} of an index, manifest or config");
            return Err(archive(&self.path, problem));
        }
        let mut bytes = Vec::new();
        reader.take(max).read_to_end(&mut bytes).map_err(|source| ImageError::Io {
            op: "read from the image archive",
            path: self.path.join(name),
            source,
        })?;
        Ok(Some(bytes))
    }
}

fn archive(path: &Path, problem: impl Into<String>) -> ImageError {
    ImageError::Archive { path: path.to_owned(), problem: problem.into() }
}

/// Lists a tar file without reading its contents.
fn members(path: &Path, file: &File) -> Result<HashMap<Vec<u8>, (u64, u64)>, ImageError> {
    let mut magic = [0; 4];
    let io = |source| ImageError::Io { op: "read the image archive", path: path.to_owned(), source };
    let n = file.read_at(&mut magic, 0).map_err(io)?;
    if n == 0 {
        return Err(archive(path, "is empty"));
    }
    if magic.starts_with(&[0x1f, 0x8b]) {
        return Err(archive(path, "is compressed with gzip; decompress it first (gunzip)"));
    }
    if magic == [0x28, 0xb5, 0x2f, 0xfd] {
        return Err(archive(path, "is compressed with zstd; decompress it first (unzstd)"));
    }
    let broken = |e: io::Error| archive(path, format!("is not a tar archive or is truncated: {e}"));
    let length = file.metadata().map_err(io)?.len();
    let mut found = HashMap::new();
    let mut tar = tar::Archive::new(Bounded { file, at: 0, since_seek: 0 });
    for entry in tar.entries_with_seek().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        if found.len() >= limits::IMAGE_ARCHIVE_MEMBERS_MAX {
            return Err(archive(
                path,
                format!("has more than {} members", limits::IMAGE_ARCHIVE_MEMBERS_MAX),
            ));
        }
        if !matches!(entry.header().entry_type(), tar::EntryType::Regular | tar::EntryType::Continuous) {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (offset, size) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(archive(path, format!("is truncated: {name} reaches beyond its end; copy it again")));
        }
        let clean = EntryPath::clean(&entry.path_bytes())
            .map_err(|problem| archive(path, format!("has a member {name:?}: {problem}")))?;
        found.insert(clean.bytes().to_vec(), (offset, size));
    }
    Ok(found)
}

/// A file that is read with a bound between seeks, so that no header can make the tar reader collect more.
struct Bounded<'a> {
    file: &'a File,
    at: u64,
    since_seek: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        self.since_seek += n as u64;
        if self.since_seek > limits::IMAGE_DOCUMENT_BYTES_MAX {
            return Err(io::Error::other("the headers of a member are too large"));
        }
        Ok(n)
    }
}

impl io::Seek for Bounded<'_> {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        let end = self.file.metadata()?.len();
        let target = match to {
            io::SeekFrom::Start(at) => Some(at),
            io::SeekFrom::End(by) => end.checked_add_signed(by),
            io::SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        let target =
            target.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek out of range"))?;
        self.at = target;
        self.since_seek = 0;
        Ok(target)
    }
}

/// A part of a file, read without moving the file's own position.
struct Slice<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Slice<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buffer[..want], self.offset)?;
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}
