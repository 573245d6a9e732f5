//! Errors of the image store. Invariant: a message names the image and, where there is one, the layer and the
//! entry, and says what to do about it.

use std::io;
use std::path::PathBuf;

/// Why an image could not be imported, found or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The operating system refused.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not a name.
    #[error("image name {name:?}: {problem}")]
    Name {
        /// As it was given.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Not an archive or layout that images can be read from.
    #[error("{}: {problem}", path.display())]
    Archive {
        /// The archive or layout.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// An index, manifest or configuration that can't be used.
    #[error("image {image}: {problem}")]
    Document {
        /// The image, as far as its name is known.
        image: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A blob that the image needs is not in the archive.
    #[error("image {image}: {blob} is missing from {}; export the image again with all its blobs", archive.display())]
    BlobMissing {
        /// The image.
        image: String,
        /// Path of the blob in the archive.
        blob: String,
        /// The archive.
        archive: PathBuf,
    },
    /// Content that is not what its digest says.
    #[error(
        "image {image}: {what} should be {expected} but is {found}; the archive is damaged, export it again"
    )]
    Digest {
        /// The image.
        image: String,
        /// Which content.
        what: String,
        /// The digest it should have.
        expected: String,
        /// The digest it has.
        found: String,
    },
    /// A layer that can't be read.
    #[error("image {image}, layer {layer}: {problem}")]
    Layer {
        /// The image.
        image: String,
        /// The layer's diff id.
        layer: String,
        /// What is wrong and what to do.
        problem: String,
        /// What the reader said.
        source: Option<io::Error>,
    },
    /// An entry of a layer that is refused or can't be made.
    #[error("image {image}, layer {layer}, entry {entry:?}: {problem}")]
    Entry {
        /// The image.
        image: String,
        /// The layer's diff id.
        layer: String,
        /// Path of the entry in the layer.
        entry: String,
        /// What is wrong and what to do.
        problem: String,
        /// What the operating system said.
        source: Option<io::Error>,
    },
    /// No room for a layer.
    #[error(
        "image {image}, layer {layer}: no space left in {}: {}{free_bytes} bytes and {free_inodes} inodes are free; \
         make room or move the state directory", dir.display(), needed(*.needed_bytes)
    )]
    DiskFull {
        /// The image.
        image: String,
        /// The layer's diff id.
        layer: String,
        /// Where it was unpacked.
        dir: PathBuf,
        /// Bytes that the layer takes, if its end could be read.
        needed_bytes: Option<u64>,
        /// Bytes that are free there without the half of the layer that was removed again.
        free_bytes: u64,
        /// Inodes that are free there.
        free_inodes: u64,
    },
    /// The store has no such image.
    #[error("no image {name}; `sheave image list` shows those that are there")]
    NotFound {
        /// The name that was asked for.
        name: String,
    },
    /// A record of the store that can't be read.
    #[error("image record {}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

fn needed(bytes: Option<u64>) -> String {
    bytes.map(|bytes| format!("the layer needs {bytes} bytes, ")).unwrap_or_default()
}

/// What went wrong inside a layer; the caller knows image and layer.
#[derive(Debug)]
pub(super) enum Fault {
    /// The stream: truncated, not what its digest says, too large.
    Stream { problem: String, source: Option<io::Error> },
    /// A digest that does not match: what, expected, found.
    Digest { what: &'static str, expected: String, found: String },
    /// One entry.
    Entry { entry: String, problem: String, source: Option<io::Error> },
    /// No room; the bytes that the layer takes, if known.
    DiskFull { needed_bytes: Option<u64> },
    /// The operating system refused something that is no entry.
    Io { op: &'static str, source: io::Error },
}

impl Fault {
    pub(super) fn stream(problem: impl Into<String>) -> Self {
        Fault::Stream { problem: problem.into(), source: None }
    }

    /// Gives the fault its place.
    pub(super) fn of(self, image: &str, layer: &str, dir: &std::path::Path) -> ImageError {
        let (image, layer) = (image.to_owned(), layer.to_owned());
        match self {
            Fault::Stream { problem, source } => ImageError::Layer { image, layer, problem, source },
            Fault::Digest { what, expected, found } => {
                let what = format!("{what} of layer {layer}");
                ImageError::Digest { image, what, expected, found }
            }
            Fault::Entry { entry, problem, source } => {
                ImageError::Entry { image, layer, entry, problem, source }
            }
            Fault::DiskFull { needed_bytes } => {
                let (free_bytes, free_inodes) = free(dir);
                ImageError::DiskFull {
                    image,
                    layer,
                    dir: dir.to_owned(),
                    needed_bytes,
                    free_bytes,
                    free_inodes,
                }
            }
            Fault::Io { op, source } => ImageError::Io { op, path: dir.to_owned(), source },
        }
    }
}

/// Free bytes and inodes where `dir` is; zero where that can't be asked, which on a full disk is near enough.
fn free(dir: &std::path::Path) -> (u64, u64) {
    match nix::sys::statvfs::statvfs(dir) {
        Ok(stat) => (stat.blocks_available() * stat.fragment_size(), stat.files_available()),
        Err(_) => (0, 0),
    }
}

/// True for the errors that mean "no room".
pub(super) fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
