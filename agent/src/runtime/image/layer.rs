//! One layer from its blob to a directory. Invariant: a layer that unpacked without error had the digest its
//! manifest names and the diff id its configuration names, and stayed within its limits; anything hostile was
//! stopped before it cost more than them.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;

use super::digest::{Digest, Hashed};
use super::entry::{self, Kind};
use super::error::Fault;
use super::tree::Tree;
use crate::limits;

/// Bytes read from a blob at a time.
const READ_BYTES: usize = 128 << 10;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Bounds of what one layer may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLimits {
    /// Bytes of the tar stream, and bytes written.
    pub bytes_max: u64,
    /// Entries.
    pub entries_max: u64,
    /// Tar bytes over compressed bytes, once there are more than `ratio_floor_bytes`.
    pub ratio_max: u64,
    /// Tar bytes below which the ratio does not matter.
    pub ratio_floor_bytes: u64,
    /// Headers of one entry.
    pub header_bytes_max: u64,
}

impl Default for LayerLimits {
    fn default() -> Self {
        LayerLimits {
            bytes_max: limits::IMAGE_LAYER_BYTES_MAX,
            entries_max: limits::IMAGE_LAYER_ENTRIES_MAX,
            ratio_max: limits::IMAGE_LAYER_RATIO_MAX,
            ratio_floor_bytes: limits::IMAGE_LAYER_RATIO_FLOOR_BYTES,
            header_bytes_max: limits::IMAGE_ENTRY_HEADER_BYTES_MAX,
        }
    }
}

/// What a layer must turn out to be.
pub(super) struct Expected<'a> {
    /// Digest and size of the blob; docker archives have none.
    pub(super) blob: Option<(&'a Digest, u64)>,
    /// Digest of the tar stream.
    pub(super) diff_id: &'a Digest,
}

/// Unpacks `blob` into `root`, calling `progress` with the blob's bytes read so far. Returns the bytes of the tar
/// stream. On error `root` holds half a layer.
pub(super) fn unpack(
    blob: impl Read,
    expected: &Expected<'_>,
    root: OwnedFd,
    trash: OwnedFd,
    limits: &LayerLimits,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, Fault> {
    let meter = Rc::new(Meter::default());
    let decoder = Decoder::new(blob, &meter)?;
    let guard = Guard { inner: Hashed::new(decoder), meter: Rc::clone(&meter), limits: *limits };
    let mut archive = tar::Archive::new(BufReader::with_capacity(READ_BYTES, guard));
    let mut tree = Tree::new(root, trash);
    let unpacked = entries(&mut archive, &mut tree, &meter, limits, progress);
    meter.header_end.set(u64::MAX);
    // What the unpacker left unread counts towards the digests and, on a full disk, towards the space needed.
    let mut rest = archive.into_inner();
    let drained = match &unpacked {
        Ok(()) | Err(Fault::DiskFull { .. }) => io::copy(&mut rest, &mut io::sink()),
        Err(_) => Ok(0),
    };
    match (unpacked, drained) {
        (Err(fault), Err(_)) => return Err(fault),
        (Err(Fault::DiskFull { .. }), Ok(_)) => {
            return Err(Fault::DiskFull { needed_bytes: Some(meter.plain.get()) });
        }
        (Err(fault), Ok(_)) => return Err(meter.violation.take().unwrap_or(fault)),
        (Ok(()), Err(error)) => return Err(meter.violation.take().unwrap_or_else(|| unreadable(error))),
        (Ok(()), Ok(_)) => {}
    }
    tree.finish()?;
    let plain = rest.into_inner().inner;
    verify(plain, expected, progress).map(|()| meter.plain.get())
}

fn entries<R: Read>(
    archive: &mut tar::Archive<R>,
    tree: &mut Tree,
    meter: &Meter,
    limits: &LayerLimits,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Fault> {
    let mut count = 0;
    let mut written: u64 = 0;
    meter.expect_header(limits);
    for entry in archive.entries().map_err(unreadable)? {
        let mut entry = entry.map_err(unreadable)?;
        meter.header_end.set(u64::MAX);
        count += 1;
        if count > limits.entries_max {
            return Err(Fault::stream(format!("it has more than {} entries", limits.entries_max)));
        }
        let item = match entry::read(&mut entry) {
            Ok(item) => item,
            Err(problem) => return Err(Fault::Entry { entry: shown(&entry), problem, source: None }),
        };
        if let Kind::File(size) = item.kind {
            written = written.saturating_add(size);
            if written > limits.bytes_max {
                return Err(Fault::Entry { entry: shown(&entry), problem: too_large(limits), source: None });
            }
        }
        tree.make(&item, &mut entry)?;
        io::copy(&mut entry, &mut io::sink()).map_err(unreadable)?;
        progress(meter.compressed.get());
        meter.expect_header(limits);
    }
    Ok(())
}

fn shown<R: Read>(entry: &tar::Entry<'_, R>) -> String {
    String::from_utf8_lossy(&entry.path_bytes()).into_owned()
}

fn too_large(limits: &LayerLimits) -> String {
    format!("the layer is larger than {} bytes unpacked", limits.bytes_max)
}

fn unreadable(source: io::Error) -> Fault {
    Fault::Stream {
        problem: "it is truncated or not a tar stream; export the image again".to_owned(),
        source: Some(source),
    }
}

/// Reads the blob to its end and compares both digests.
fn verify<R: Read>(
    plain: Hashed<Decoder<R>>,
    expected: &Expected<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Fault> {
    let (diff_id, decoder) = plain.finish_with_inner();
    let mut blob = decoder.into_blob();
    io::copy(&mut blob, &mut io::sink()).map_err(unreadable)?;
    let size = blob.count();
    progress(size);
    let digest = blob.finish();
    if let Some((wanted, wanted_size)) = expected.blob {
        if size < wanted_size {
            return Err(Fault::stream(format!(
                "its blob ends after {size} of {wanted_size} bytes; export the image again"
            )));
        }
        if digest != *wanted {
            let (expected, found) = (wanted.to_string(), digest.to_string());
            return Err(Fault::Digest { what: "the blob", expected, found });
        }
    }
    if diff_id != *expected.diff_id {
        let (expected, found) = (expected.diff_id.to_string(), diff_id.to_string());
        return Err(Fault::Digest { what: "the unpacked content (diff id)", expected, found });
    }
    Ok(())
}

/// What has passed, seen from outside the readers.
#[derive(Default)]
struct Meter {
    compressed: Cell<u64>,
    plain: Cell<u64>,
    /// Tar bytes up to which reading is allowed while headers are read.
    header_end: Cell<u64>,
    /// Why the guard stopped the stream.
    violation: Cell<Option<Fault>>,
}

impl Meter {
    fn expect_header(&self, limits: &LayerLimits) {
        // The reader below the unpacker is ahead by one buffer.
        self.header_end.set(self.plain.get() + READ_BYTES as u64 + limits.header_bytes_max);
    }
}

/// The tar stream, held to the limits.
struct Guard<R> {
    inner: Hashed<R>,
    meter: Rc<Meter>,
    limits: LayerLimits,
}

impl<R> Guard<R> {
    fn check(&self) -> Result<(), String> {
        let (plain, compressed) = (self.meter.plain.get(), self.meter.compressed.get());
        let limits = &self.limits;
        if plain > limits.bytes_max {
            return Err(too_large(limits));
        }
        if plain > limits.ratio_floor_bytes && plain / compressed.max(1) > limits.ratio_max {
            return Err(format!(
                "it unpacks to more than {} times its size, as a decompression bomb does",
                limits.ratio_max
            ));
        }
        if plain > self.meter.header_end.get() {
            return Err(format!(
                "names or attributes of an entry take more than {} bytes",
                limits.header_bytes_max
            ));
        }
        Ok(())
    }
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.meter.plain.set(self.meter.plain.get() + n as u64);
        self.check().map_err(|problem| {
            self.meter.violation.set(Some(Fault::stream(problem.clone())));
            io::Error::other(problem)
        })?;
        Ok(n)
    }
}

/// Counts what is taken from the blob where the other side can see it.
struct Counted<R> {
    inner: R,
    meter: Rc<Meter>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.meter.compressed.set(self.meter.compressed.get() + n as u64);
        Ok(n)
    }
}

type Blob<R> = BufReader<Hashed<Counted<R>>>;

/// The tar stream in a blob, compressed or not.
enum Decoder<R> {
    Plain(Blob<R>),
    Gzip(Box<MultiGzDecoder<Blob<R>>>),
}

impl<R: Read> Decoder<R> {
    /// Looks at the first bytes: media types are not always true.
    fn new(blob: R, meter: &Rc<Meter>) -> Result<Self, Fault> {
        let counted = Counted { inner: blob, meter: Rc::clone(meter) };
        let mut blob = BufReader::with_capacity(READ_BYTES, Hashed::new(counted));
        let head = blob.fill_buf().map_err(unreadable)?;
        if head.starts_with(ZSTD_MAGIC) {
            return Err(Fault::stream(
                "it is compressed with zstd, which is not supported yet; export the image with gzip layers",
            ));
        }
        if head.starts_with(GZIP_MAGIC) {
            return Ok(Decoder::Gzip(Box::new(MultiGzDecoder::new(blob))));
        }
        Ok(Decoder::Plain(blob))
    }

    fn into_blob(self) -> Hashed<Counted<R>> {
        // What the buffer still holds was hashed when it was read.
        match self {
            Decoder::Plain(blob) => blob.into_inner(),
            Decoder::Gzip(decoder) => decoder.into_inner().into_inner(),
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Decoder::Plain(blob) => blob.read(buffer),
            Decoder::Gzip(decoder) => decoder.read(buffer),
        }
    }
}
