//! Which control group hierarchies a host has. Pure: reads a `mountinfo` text, never the host.

use std::path::{Path, PathBuf};

use super::{Hierarchies, LegacyHierarchy};

/// v1 controllers that pods are limited by or measured with; `name=systemd` is followed so that stopping
/// the agent's unit does not stop its pods.
const LEGACY_WANTED: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "devices", "name=systemd"];

/// Finds the hierarchies in a `/proc/self/mountinfo`. `attach` is a directory of the v2 hierarchy, or
/// `None` for its root.
pub(in crate::runtime) fn discover(mountinfo: &str, attach: Option<&Path>) -> Result<Hierarchies, String> {
    let mut unified: Option<(PathBuf, PathBuf)> = None;
    let mut legacy: Vec<LegacyHierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4).map(unescape) else { continue };
        let mut fields = right.split(' ');
        match (fields.next(), fields.nth(1)) {
            (Some("cgroup2"), _) => {
                let base = match attach {
                    None => Some(PathBuf::new()),
                    Some(path) => path.strip_prefix(&point).ok().map(Path::to_owned),
                };
                if let (Some(base), None) = (base, &unified) {
                    unified = Some((point, base));
                }
            }
            (Some("cgroup"), Some(options)) => {
                let controllers: Vec<String> =
                    options.split(',').filter(|o| LEGACY_WANTED.contains(o)).map(str::to_owned).collect();
                if !controllers.is_empty() && !legacy.iter().any(|h| h.controllers == controllers) {
                    legacy.push(LegacyHierarchy { root: point, controllers });
                }
            }
            _ => {}
        }
    }
    match (unified, attach) {
        (Some((unified, base)), _) => Ok(Hierarchies { unified, legacy, base }),
        (None, None) => Err("no cgroup2 hierarchy is mounted (needed for cgroup.kill and BPF hooks)".into()),
        (None, Some(path)) => Err(format!("{} is in no mounted cgroup2 hierarchy", path.display())),
    }
}

/// Undoes the octal escapes of mountinfo (`\040` for a blank).
fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let octal = (bytes[i] == b'\\').then(|| field.get(i + 1..i + 4)).flatten();
        if let Some(value) = octal.and_then(|o| u8::from_str_radix(o, 8).ok()) {
            out.push(value);
            i += 4;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 1 0:23 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
26 25 0:24 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
27 25 0:25 / /sys/fs/cgroup/cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpuacct
28 25 0:26 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
29 25 0:27 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
30 25 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_hosts_use_the_wanted_v1_hierarchies() {
        let found = discover(HYBRID, Some(Path::new("/sys/fs/cgroup/unified/a/b"))).unwrap();
        assert_eq!(found.unified, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(found.base, Path::new("a/b"));
        let controllers: Vec<_> = found.legacy.iter().map(|h| h.controllers.join(",")).collect();
        assert_eq!(controllers, ["cpu", "cpuacct", "name=systemd"]);
        assert!(!found.is_unified());
    }

    #[test]
    fn a_v2_host_has_no_others() {
        let found = discover("30 1 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n", None).unwrap();
        assert!(found.legacy.is_empty() && found.is_unified());
        assert_eq!(found.base, Path::new(""));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let none = discover("26 25 0:24 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", None).unwrap_err();
        assert!(none.contains("no cgroup2"), "{none}");
        let outside = discover(HYBRID, Some(Path::new("/sys/fs/cgroup/memory/x"))).unwrap_err();
        assert!(outside.contains("/sys/fs/cgroup/memory/x"), "{outside}");
    }

    #[test]
    fn mount_points_with_blanks_are_read() {
        assert_eq!(unescape(r"/a\040b\134"), Path::new("/a b\\"));
        assert_eq!(unescape(r"/a\9"), Path::new("/a\\9"));
    }
}
