//! Which layers are part of a mounted root filesystem. Invariant: errs towards "in use": what can't be read counts
//! as an error, never as "not mounted".

use std::collections::HashSet;
use std::io;

/// Hex digits of a chain id.
const CHAIN_HEX_LEN: usize = 64;

/// Chain ids in the overlay mounts of every process of this host, whichever mount namespace it is in. Needs root and
/// a `/proc` that shows every process.
pub(super) fn layers() -> io::Result<HashSet<String>> {
    let mut namespaces = HashSet::new();
    let mut found = HashSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // Only saves reading one table often; without the right to look at the link every table is read.
        if std::fs::read_link(entry.path().join("ns/mnt"))
            .is_ok_and(|namespace| !namespaces.insert(namespace))
        {
            continue;
        }
        if let Some(table) = unless_gone(std::fs::read_to_string(entry.path().join("mountinfo")))? {
            found.extend(chain_ids(&table).map(str::to_owned));
        }
    }
    Ok(found)
}

/// `None` for processes that ended while they were looked at.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Chain ids in the options of overlay mounts. Only the id is looked for: paths there may be relative.
fn chain_ids(mountinfo: &str) -> impl Iterator<Item = &str> {
    mountinfo
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .filter(|(_, rest)| rest.starts_with("overlay "))
        .flat_map(|(_, rest)| rest.split(|c: char| !matches!(c, '0'..='9' | 'a'..='f')))
        .filter(|run| run.len() == CHAIN_HEX_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_found_in_overlay_options_only() {
        let (a, b) = ("a1".repeat(32), "b2".repeat(32));
        let table = format!(
            "30 1 0:5 / /x rw shared:1 - overlay overlay rw,lowerdir=/s/layers/{a}/root:{b}/root,upperdir=/u\n\
             31 1 0:6 /{a} /y rw - ext4 /dev/{b} rw\n\
             32 1 0:7 / /z rw - overlay none rw,lowerdir=/l/{a}0/root\n"
        );
        let found: Vec<&str> = chain_ids(&table).collect();
        assert_eq!(found, [a.as_str(), b.as_str()]);
    }

    #[test]
    fn this_host_can_be_scanned() {
        if nix::unistd::geteuid().is_root() {
            layers().unwrap();
        }
    }
}
