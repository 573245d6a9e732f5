//! Entries of a layer as plain data, PURE. Invariant: an [`Item`] asks only for what an image may have; everything
//! else was refused while it was read.

use std::io::Read;

use super::path::{EntryPath, device_allowed, xattr_kept};

/// Prefix of extended attributes in pax headers.
const PAX_XATTR: &[u8] = b"SCHILY.xattr.";

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) path: EntryPath,
    pub(super) kind: Kind,
    /// The low twelve bits: permissions, setuid, setgid, sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds.
    pub(super) mtime: (i64, i64),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    /// Bytes.
    File(u64),
    /// Target, as it is.
    Symlink(Vec<u8>),
    /// An earlier entry of the layer.
    Hardlink(EntryPath),
    Fifo,
    /// Major and minor number.
    CharDevice(u64, u64),
    /// Carries nothing.
    Nothing,
}

/// Reads the header of an entry. The error says what is wrong with it.
pub(super) fn read<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Item, String> {
    let raw = entry.path_bytes().into_owned();
    let path = EntryPath::clean(&raw)?;
    let kind = kind(entry, &raw)?;
    let header = entry.header();
    let number = |what: &str, n: std::io::Result<u64>| {
        // The last one means "leave as it is" to chown(2).
        n.ok()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n != u32::MAX)
            .ok_or_else(|| format!("its {what} is out of range"))
    };
    let uid = number("uid", header.uid())?;
    let gid = number("gid", header.gid())?;
    let mode = header.mode().map_err(|_| "its mode is not a number".to_owned())? & 0o7777;
    let seconds = header.mtime().map_err(|_| "its mtime is not a number".to_owned())?;
    let mut mtime = (i64::try_from(seconds).map_err(|_| "its mtime is out of range".to_owned())?, 0);
    let mut xattrs = Vec::new();
    let pax = entry.pax_extensions().map_err(|e| format!("its extended header is not readable: {e}"))?;
    for pair in pax.into_iter().flatten() {
        let pair = pair.map_err(|e| format!("its extended header is not readable: {e}"))?;
        if let Some(name) = pair.key_bytes().strip_prefix(PAX_XATTR) {
            if xattr_kept(name) {
                xattrs.push((name.to_vec(), pair.value_bytes().to_vec()));
            }
        } else if pair.key_bytes() == b"mtime" {
            let text = pair.value().map_err(|_| "its mtime is not text".to_owned())?;
            mtime = pax_time(text).ok_or_else(|| format!("its mtime {text:?} is not a time"))?;
        }
    }
    Ok(Item { path, kind, mode, uid, gid, mtime, xattrs })
}

fn kind<R: Read>(entry: &tar::Entry<'_, R>, raw: &[u8]) -> Result<Kind, String> {
    use tar::EntryType as T;
    let header = entry.header();
    let target = || entry.link_name_bytes().map(|t| t.into_owned()).filter(|t| !t.is_empty());
    let device = || match (header.device_major(), header.device_minor()) {
        (Ok(Some(major)), Ok(Some(minor))) => Ok((u64::from(major), u64::from(minor))),
        _ => Err("it is a device without numbers".to_owned()),
    };
    match header.entry_type() {
        // Before POSIX a trailing slash was all that told a directory.
        T::Regular if raw.ends_with(b"/") => Ok(Kind::Directory),
        T::Regular | T::Continuous | T::GNUSparse => Ok(Kind::File(entry.size())),
        T::Directory => Ok(Kind::Directory),
        T::Symlink => {
            let target = target().ok_or("it is a symbolic link to nothing")?;
            if target.contains(&0) {
                Err("its target has a NUL byte".to_owned())
            } else {
                Ok(Kind::Symlink(target))
            }
        }
        T::Link => {
            let target = target().ok_or("it is a hard link to nothing")?;
            let target = EntryPath::clean(&target).map_err(|e| format!("hard link: {e}"))?;
            Ok(Kind::Hardlink(target))
        }
        T::Fifo => Ok(Kind::Fifo),
        block @ (T::Char | T::Block) => {
            let (major, minor) = device()?;
            if device_allowed(block == T::Block, major, minor) {
                return Ok(Kind::CharDevice(major, minor));
            }
            let kind = if block == T::Block { "block" } else { "character" };
            Err(format!(
                "{kind} device {major}:{minor} is refused: images may bring null, zero, full, random, urandom, \
                 tty, console and ptmx only; build the image without it"
            ))
        }
        T::XGlobalHeader => Ok(Kind::Nothing),
        other => Err(format!("entries of type {:?} are not supported", char::from(other.as_byte()))),
    }
}

/// `1700000000.5` as seconds and nanoseconds; negative times count down from the second below.
fn pax_time(text: &str) -> Option<(i64, i64)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos: i64 = digits.parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(build: impl FnOnce(&mut tar::Header)) -> Result<Item, String> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_mtime(7);
        header.set_path("dir/name").unwrap();
        build(&mut header);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&[0; 1024]);
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        read(&mut entry)
    }

    #[test]
    fn ordinary_entries_are_read() {
        let item = one(|h| h.set_mode(0o104755)).unwrap();
        assert_eq!((item.kind, item.mode, item.mtime), (Kind::File(0), 0o4755, (7, 0)));
        let item = one(|h| {
            h.set_entry_type(tar::EntryType::Symlink);
            h.set_link_name("../../etc").unwrap();
        });
        assert_eq!(item.unwrap().kind, Kind::Symlink(b"../../etc".to_vec()));
    }

    #[test]
    fn what_an_image_may_not_have_is_refused() {
        let device = |kind, major, minor| {
            one(|h| {
                h.set_entry_type(kind);
                h.set_device_major(major).unwrap();
                h.set_device_minor(minor).unwrap();
            })
        };
        assert_eq!(device(tar::EntryType::Char, 1, 3).unwrap().kind, Kind::CharDevice(1, 3));
        assert!(device(tar::EntryType::Char, 0, 0).unwrap_err().contains("0:0 is refused"));
        assert!(device(tar::EntryType::Block, 8, 0).unwrap_err().contains("block device 8:0"));
        let link = |to: &str| {
            one(|h| {
                h.set_entry_type(tar::EntryType::Link);
                h.as_mut_bytes()[157..157 + to.len()].copy_from_slice(to.as_bytes());
            })
        };
        assert!(link("../../etc/shadow").unwrap_err().contains(".."));
        assert!(link("").unwrap_err().contains("nothing"));
        assert!(one(|h| h.set_uid(u64::from(u32::MAX))).unwrap_err().contains("uid"));
        assert!(one(|h| h.set_entry_type(tar::EntryType::new(b'V'))).is_err());
    }

    #[test]
    fn times_of_pax_headers_are_exact() {
        assert_eq!(pax_time("12.5"), Some((12, 500_000_000)));
        assert_eq!(pax_time("12.0000000019"), Some((12, 1)));
        assert_eq!(pax_time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time("1.x"), None);
        assert_eq!(pax_time(""), None);
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 512..2048)) {
            let mut archive = tar::Archive::new(&bytes[..]);
            for entry in archive.entries().unwrap().take(4) {
                let Ok(mut entry) = entry else { break };
                drop(read(&mut entry));
            }
        }
    }
}
