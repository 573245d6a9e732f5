//! What a layer's entries mean, PURE. Invariant: an [`EntryPath`] is relative, has no `.` or `..` and no NUL, so
//! joining it below a directory can leave that directory only through a symlink, which the kernel is told not to
//! follow out.

/// Prefix of whiteouts (image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Hides everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names with this prefix are bookkeeping of a union filesystem long gone and carry nothing.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Longest path, bytes: what the kernel takes.
const PATH_BYTES_MAX: usize = 4095;

/// A cleaned path inside a layer; empty for the root itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EntryPath(Vec<u8>);

impl EntryPath {
    /// Cleans `raw`. A leading `/` means the image's root. The error says what is wrong.
    pub(super) fn clean(raw: &[u8]) -> Result<Self, String> {
        if raw.len() > PATH_BYTES_MAX {
            return Err(format!("its path has {} bytes, more than {PATH_BYTES_MAX}", raw.len()));
        }
        if raw.contains(&0) {
            return Err("its path has a NUL byte".to_owned());
        }
        let mut clean: Vec<u8> = Vec::with_capacity(raw.len());
        for part in raw.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err("its path has a `..`".to_owned()),
                part => {
                    if !clean.is_empty() {
                        clean.push(b'/');
                    }
                    clean.extend_from_slice(part);
                }
            }
        }
        Ok(EntryPath(clean))
    }

    /// `usr/bin/env`.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Directory and name; `None` for the root.
    pub(super) fn split(&self) -> Option<(&[u8], &[u8])> {
        match self.0.iter().rposition(|b| *b == b'/') {
            Some(at) => Some((&self.0[..at], &self.0[at + 1..])),
            None if self.0.is_empty() => None,
            None => Some((b"", &self.0)),
        }
    }
}

/// What the name of an entry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// The entry itself.
    Entry,
    /// What lower layers have under this name, in the entry's directory, is gone.
    Whiteout(&'a [u8]),
    /// What lower layers have in the entry's directory is gone.
    Opaque,
    /// Nothing.
    Ignored,
}

/// Reads whiteouts out of the name of an entry. The error says what is wrong.
pub(super) fn meaning(name: &[u8]) -> Result<Meaning<'_>, String> {
    if name == OPAQUE {
        return Ok(Meaning::Opaque);
    }
    if name.starts_with(WHITEOUT_META) {
        return Ok(Meaning::Ignored);
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(Meaning::Entry),
        Some(b"") => Err("it is a whiteout of nothing".to_owned()),
        Some(b"." | b"..") => Err("it is a whiteout of a directory outside its own".to_owned()),
        Some(hidden) => Ok(Meaning::Whiteout(hidden)),
    }
}

/// Character devices that an image may bring: those that every container has anyway.
pub(super) fn device_allowed(block: bool, major: u64, minor: u64) -> bool {
    !block && matches!((major, minor), (1, 3 | 5 | 7 | 8 | 9) | (5, 0..=2))
}

/// Extended attributes that are unpacked. Those of the host's security modules and of overlayfs itself would
/// change what the host or the mount does, and are left out.
pub(super) fn xattr_kept(name: &[u8]) -> bool {
    name.starts_with(b"user.") && !name.starts_with(b"user.overlay.")
        || matches!(name, b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_cleaned() {
        for (raw, clean) in [
            ("./", ""),
            ("/", ""),
            ("", ""),
            ("./a//b/./c/", "a/b/c"),
            ("/etc/x", "etc/x"),
            ("...", "..."),
            ("a/..b", "a/..b"),
        ] {
            assert_eq!(EntryPath::clean(raw.as_bytes()).unwrap().bytes(), clean.as_bytes(), "{raw}");
        }
        for bad in ["..", "../x", "a/../../x", "a/..", "a\0b"] {
            assert!(EntryPath::clean(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(EntryPath::clean(&vec![b'a'; 5000]).is_err());
    }

    #[test]
    fn split_finds_directory_and_name() {
        let split = |raw: &str| {
            let path = EntryPath::clean(raw.as_bytes()).unwrap();
            path.split().map(|(d, n)| (d.to_vec(), n.to_vec()))
        };
        assert_eq!(split("a/b/c"), Some((b"a/b".to_vec(), b"c".to_vec())));
        assert_eq!(split("c"), Some((b"".to_vec(), b"c".to_vec())));
        assert_eq!(split("/"), None);
    }

    #[test]
    fn whiteouts_are_recognised() {
        assert_eq!(meaning(b"x").unwrap(), Meaning::Entry);
        assert_eq!(meaning(b".whx").unwrap(), Meaning::Entry);
        assert_eq!(meaning(b".wh.x").unwrap(), Meaning::Whiteout(b"x"));
        assert_eq!(meaning(b".wh..hidden").unwrap(), Meaning::Whiteout(b".hidden"));
        assert_eq!(meaning(b".wh..wh..opq").unwrap(), Meaning::Opaque);
        assert_eq!(meaning(b".wh..wh.plnk").unwrap(), Meaning::Ignored);
        for bad in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(meaning(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_harmless_devices_and_attributes_pass() {
        assert!(device_allowed(false, 1, 3));
        assert!(!device_allowed(true, 1, 3));
        assert!(!device_allowed(false, 0, 0));
        assert!(!device_allowed(false, 1, 1));
        assert!(xattr_kept(b"user.x") && xattr_kept(b"security.capability"));
        assert!(!xattr_kept(b"trusted.overlay.redirect") && !xattr_kept(b"security.selinux"));
        assert!(!xattr_kept(b"user.overlay.opaque"));
    }

    proptest! {
        #[test]
        fn no_clean_path_can_climb(raw in proptest::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), Just(b'a'), any::<u8>()], 0..64)) {
            if let Ok(path) = EntryPath::clean(&raw) {
                prop_assert!(!path.bytes().starts_with(b"/"));
                prop_assert!(!path.bytes().contains(&0));
                for part in path.bytes().split(|b| *b == b'/') {
                    prop_assert!(part != b".." && part != b".");
                    prop_assert!(!part.is_empty() || path.bytes().is_empty());
                }
                if let Some((_, name)) = path.split()
                    && let Ok(Meaning::Whiteout(hidden)) = meaning(name) {
                    prop_assert!(hidden != b".." && hidden != b"." && !hidden.contains(&b'/'));
                }
            }
        }
    }
}
