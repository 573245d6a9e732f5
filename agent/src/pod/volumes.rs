//! Volumes on disk, below `<state_dir>/pods/<uid>/volumes/<name>`. Setting up is idempotent and never
//! touches what a volume holds already; files from the API are replaced all at once or not at all;
//! tearing down never follows a link out of the directory.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};

use super::env::Sources;
use super::model::{KeyFiles, Pod, VolumeSource};
use super::quantity;

/// Why a volume could not be made; a sentence that names it.
#[derive(Debug, thiserror::Error)]
#[error("volume {volume:?}: {what}")]
pub struct VolumeError {
    /// Which.
    pub volume: String,
    /// What failed.
    pub what: String,
}

/// ConfigMaps and Secrets that a pod's volumes need.
pub fn needed(pod: &Pod) -> (Vec<&str>, Vec<&str>) {
    let mut config_maps = Vec::new();
    let mut secrets = Vec::new();
    for volume in &pod.spec.volumes {
        match &volume.source {
            VolumeSource::ConfigMap(files) => config_maps.push(files.name.as_str()),
            VolumeSource::Secret(files) => secrets.push(files.name.as_str()),
            _ => {}
        }
    }
    (config_maps, secrets)
}

/// Makes what the volumes of `pod` need below `dir` and returns where each of them is.
pub fn set_up(dir: &Path, pod: &Pod, sources: &Sources) -> Result<BTreeMap<String, PathBuf>, VolumeError> {
    let mut roots = BTreeMap::new();
    for volume in &pod.spec.volumes {
        let root = dir.join(&volume.name);
        let fail = |what: String| VolumeError { volume: volume.name.clone(), what };
        let at = match &volume.source {
            VolumeSource::EmptyDir { memory, size_limit } => {
                let limit = size_limit.as_ref().and_then(|limit| quantity::whole(&limit.0));
                let group = pod.spec.security_context.fs_group;
                empty_dir(&root, *memory, limit, group).map_err(fail)?;
                root
            }
            VolumeSource::HostPath { path, kind } => host_path(path, kind).map_err(fail)?,
            VolumeSource::ConfigMap(files) => {
                let data = sources.config_maps.get(&files.name).and_then(Option::as_ref);
                let wanted = chosen("ConfigMap", files, data).map_err(fail)?;
                make_dir(&root).map_err(fail)?;
                write_files(&root, &wanted, pod.spec.security_context.fs_group).map_err(fail)?;
                root
            }
            VolumeSource::Secret(files) => {
                let data = sources.secrets.get(&files.name).and_then(Option::as_ref);
                let wanted = chosen("Secret", files, data).map_err(fail)?;
                make_dir(&root).map_err(fail)?;
                mount_tmpfs(&root, None).map_err(fail)?;
                write_files(&root, &wanted, pod.spec.security_context.fs_group).map_err(fail)?;
                root
            }
            VolumeSource::ServiceAccountToken => continue,
            VolumeSource::Unsupported(kind) => return Err(fail(format!("type not supported yet: {kind}"))),
        };
        roots.insert(volume.name.clone(), at);
    }
    Ok(roots)
}

fn make_dir(path: &Path) -> Result<(), String> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(|e| format!("mkdir {}: {e}", path.display()))
}

fn empty_dir(root: &Path, memory: bool, limit: Option<i64>, group: Option<i64>) -> Result<(), String> {
    let fresh = !root.exists();
    make_dir(root)?;
    let mounted = memory && mount_tmpfs(root, limit)?;
    if !fresh && !mounted {
        return Ok(());
    }
    let mut mode = 0o777;
    if let Some(group) = group {
        let group = u32::try_from(group).map_err(|_| format!("fsGroup {group} is out of range"))?;
        std::os::unix::fs::chown(root, None, Some(group)).map_err(|e| format!("chown: {e}"))?;
        mode = 0o2777;
    }
    fs::set_permissions(root, fs::Permissions::from_mode(mode)).map_err(|e| format!("chmod: {e}"))
}

/// Mounts a tmpfs unless there is one; says whether it did.
fn mount_tmpfs(root: &Path, limit: Option<i64>) -> Result<bool, String> {
    let parent = root.parent().unwrap_or(root);
    let device =
        |path: &Path| fs::metadata(path).map(|m| m.dev()).map_err(|e| format!("{}: {e}", path.display()));
    if device(root)? != device(parent)? {
        return Ok(false);
    }
    let options = limit.map(|limit| format!("size={limit},mode=0755")).unwrap_or("mode=0755".to_owned());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), root, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|e| format!("mounting a tmpfs: {e}"))?;
    Ok(true)
}

fn host_path(path: &str, kind: &str) -> Result<PathBuf, String> {
    let at = PathBuf::from(path);
    if !at.is_absolute() || at.components().any(|part| part == Component::ParentDir) {
        return Err(format!("hostPath {path:?} is not an absolute path without '..'"));
    }
    let found = fs::metadata(&at).ok().map(|meta| meta.file_type());
    let right = match kind {
        "" => found.is_some(),
        "Directory" => found.is_some_and(|t| t.is_dir()),
        "File" => found.is_some_and(|t| t.is_file()),
        "Socket" => found.is_some_and(|t| t.is_socket()),
        "CharDevice" => found.is_some_and(|t| t.is_char_device()),
        "BlockDevice" => found.is_some_and(|t| t.is_block_device()),
        "DirectoryOrCreate" => match found {
            None => return make_dir(&at).map(|()| at),
            Some(t) => t.is_dir(),
        },
        "FileOrCreate" => match found {
            None => {
                fs::File::create_new(&at).map_err(|e| format!("creating {path}: {e}"))?;
                true
            }
            Some(t) => t.is_file(),
        },
        other => return Err(format!("hostPath type {other:?} is not known")),
    };
    match (right, kind) {
        (true, _) => Ok(at),
        // Without a type nothing is checked by the API's rules, but a mount needs something to mount.
        (false, "") => make_dir(&at).map(|()| at),
        (false, kind) => Err(format!("hostPath type check failed: {path} is not a {kind}")),
    }
}

/// Relative path, content and mode of one file.
type WantedFile = (PathBuf, Vec<u8>, u32);

fn chosen(
    kind: &str,
    files: &KeyFiles,
    data: Option<&BTreeMap<String, Vec<u8>>>,
) -> Result<Vec<WantedFile>, String> {
    let default_mode = files.default_mode.unwrap_or(0o644);
    let Some(data) = data else {
        return if files.optional { Ok(vec![]) } else { Err(format!("{kind} {:?} not found", files.name)) };
    };
    if files.items.is_empty() {
        return Ok(data
            .iter()
            .map(|(key, value)| (PathBuf::from(key), value.clone(), default_mode))
            .collect());
    }
    let mut wanted = Vec::new();
    for item in &files.items {
        let path = PathBuf::from(&item.path);
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        if item.path.is_empty() || !plain || item.path.starts_with("..") {
            return Err(format!("path {:?} is not a plain relative path", item.path));
        }
        match data.get(&item.key) {
            Some(value) => wanted.push((path, value.clone(), item.mode.unwrap_or(default_mode))),
            None if files.optional => {}
            None => return Err(format!("{kind} {:?} has no key {:?}", files.name, item.key)),
        }
    }
    Ok(wanted)
}

/// Writes files into a directory of their own and swaps it in by one rename, so that a reader sees all
/// of the old ones or all of the new ones.
fn write_files(root: &Path, wanted: &[WantedFile], group: Option<i64>) -> Result<(), String> {
    let current = root.join("..data");
    let same =
        |(path, content, _): &WantedFile| fs::read(current.join(path)).is_ok_and(|old| old == *content);
    let count = fs::read_dir(&current).map_or(0, Iterator::count);
    let tops: std::collections::BTreeSet<&std::ffi::OsStr> =
        wanted.iter().filter_map(|(path, ..)| path.iter().next()).collect();
    if current.exists() && count == tops.len() && wanted.iter().all(same) {
        return Ok(());
    }
    let io = |what: &str, path: &Path, e: std::io::Error| format!("{what} {}: {e}", path.display());
    let old = fs::read_link(&current).ok();
    let stamp = jiff::Timestamp::now().as_microsecond();
    let name = format!("..{stamp}");
    let fresh = root.join(&name);
    make_dir(&fresh)?;
    for (path, content, mode) in wanted {
        let file = fresh.join(path);
        if let Some(parent) = file.parent() {
            make_dir(parent)?;
        }
        fs::write(&file, content).map_err(|e| io("writing", &file, e))?;
        let mut mode = *mode & 0o777;
        if let Some(group) = group.and_then(|group| u32::try_from(group).ok()) {
            std::os::unix::fs::chown(&file, None, Some(group)).map_err(|e| io("chown", &file, e))?;
            mode |= 0o440;
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).map_err(|e| io("chmod", &file, e))?;
    }
    let link = root.join("..data_tmp");
    match fs::remove_file(&link) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("removing", &link, e)),
        _ => {}
    }
    std::os::unix::fs::symlink(&name, &link).map_err(|e| io("linking", &link, e))?;
    fs::rename(&link, &current).map_err(|e| io("renaming", &link, e))?;
    for top in &tops {
        let visible = root.join(top);
        if fs::symlink_metadata(&visible).is_err() {
            let target = Path::new("..data").join(top);
            std::os::unix::fs::symlink(&target, &visible).map_err(|e| io("linking", &visible, e))?;
        }
    }
    for entry in fs::read_dir(root).map_err(|e| io("listing", root, e))?.flatten() {
        let entry_name = entry.file_name();
        if !entry_name.to_string_lossy().starts_with("..") && !tops.contains(entry_name.as_os_str()) {
            fs::remove_file(entry.path()).map_err(|e| io("removing", &entry.path(), e))?;
        }
    }
    if let Some(old) = old.filter(|old| old.components().count() == 1) {
        let old = root.join(old);
        fs::remove_dir_all(&old).map_err(|e| io("removing", &old, e))?;
    }
    Ok(())
}

/// Opens a path inside a volume such that no link leads out of it, making directories that are missing.
/// The descriptor is what may be mounted: the path could be exchanged at any time by who writes there.
fn open_sub_path(root: &Path, sub_path: &Path) -> Result<OwnedFd, String> {
    let fail = |what: &str, e: nix::errno::Errno| format!("subPath {}: {what}: {e}", sub_path.display());
    let start = nix::fcntl::open(root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| fail("opening the volume", e))?;
    let how = || {
        OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
    };
    match openat2(&start, sub_path, how()) {
        Ok(fd) => return Ok(fd),
        Err(nix::errno::Errno::ENOENT) => {}
        Err(e) => return Err(fail("opening", e)),
    }
    let mut so_far = PathBuf::new();
    let mut parent = openat2(&start, ".", how()).map_err(|e| fail("opening", e))?;
    for part in sub_path.components() {
        so_far.push(part);
        let name = Path::new(part.as_os_str());
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(e) => return Err(fail("mkdir", e)),
        }
        parent = openat2(&start, &so_far, how()).map_err(|e| fail("opening", e))?;
    }
    Ok(parent)
}

/// Sees to it that what is mounted below `dir` later also appears to the shims that run already: where the
/// mount that `dir` is on tells nobody of such changes, `dir` becomes a mount of its own that does.
pub fn share(dir: &Path) -> Result<(), String> {
    make_dir(dir)?;
    let table =
        fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))?;
    let fail = |what: &str, e: nix::errno::Errno| format!("{what} {}: {e}", dir.display());
    let none = None::<&str>;
    match sharing(&table, dir) {
        Sharing::Shared => return Ok(()),
        Sharing::OwnMount => {}
        Sharing::Part => {
            mount(Some(dir), dir, none, MsFlags::MS_BIND, none).map_err(|e| fail("binding", e))?
        }
    }
    mount(none, dir, none, MsFlags::MS_SHARED, none).map_err(|e| fail("sharing", e))
}

/// What a mount table says of the mount that a directory is on.
#[derive(Debug, PartialEq, Eq)]
enum Sharing {
    /// It tells others of its changes.
    Shared,
    /// It does not, and the directory is its root.
    OwnMount,
    /// It does not, and the directory is somewhere in it.
    Part,
}

fn sharing(table: &str, dir: &Path) -> Sharing {
    let mut best: Option<(usize, bool, bool)> = None;
    for line in table.lines() {
        let Some(target) = line.split(' ').nth(4).map(unescaped) else { continue };
        let optional = line.split(" - ").next().unwrap_or("").split(' ').skip(6);
        let shared = optional.into_iter().any(|field| field.starts_with("shared:"));
        let depth = target.components().count();
        if dir.starts_with(&target) && best.is_none_or(|(known, ..)| depth >= known) {
            best = Some((depth, shared, target == dir));
        }
    }
    match best {
        Some((_, true, _)) => Sharing::Shared,
        Some((_, false, true)) => Sharing::OwnMount,
        _ => Sharing::Part,
    }
}

fn unescaped(text: &str) -> PathBuf {
    let mut out = text.to_owned();
    for (escape, plain) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        out = out.replace(escape, plain);
    }
    PathBuf::from(out)
}

/// Binds a part of a volume to `place`, instead of what was bound there before.
pub fn bind_sub_path(root: &Path, sub_path: &Path, place: &Path) -> Result<(), String> {
    let fail = |what: &str, e: &dyn std::fmt::Display| format!("subPath {}: {what}: {e}", sub_path.display());
    let fd = open_sub_path(root, sub_path)?;
    match umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(e) => return Err(fail("unmounting the earlier one", &e)),
    }
    let opened = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let is_dir = fs::metadata(&opened).map_err(|e| fail("looking", &e))?.is_dir();
    if is_dir {
        make_dir(place)?;
    } else {
        make_dir(place.parent().unwrap_or(place))?;
        fs::File::options().create(true).append(true).open(place).map_err(|e| fail("making a place", &e))?;
    }
    mount(Some(&opened), place, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|e| fail("binding", &e))
}

/// Removes a pod's directory: unmounts what was mounted below it first. Idempotent.
pub fn tear_down(pod_dir: &Path) -> Result<(), String> {
    let table =
        fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))?;
    for target in mounts_below(&table, pod_dir).iter().rev() {
        umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|e| format!("unmounting {}: {e}", target.display()))?;
    }
    match fs::remove_dir_all(pod_dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("removing {}: {e}", pod_dir.display()))
        }
        _ => Ok(()),
    }
}

/// Mount points below `dir` in the order of a mountinfo table.
fn mounts_below(table: &str, dir: &Path) -> Vec<PathBuf> {
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescaped);
    targets.filter(|target| target.starts_with(dir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(volumes: &str) -> Pod {
        serde_json::from_str(&format!(r#"{{"spec":{{"volumes":{volumes}}}}}"#)).expect("a pod")
    }

    fn sources(pairs: &[(&str, &str)]) -> Sources {
        let data = pairs.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect();
        Sources { config_maps: BTreeMap::from([("cm".to_owned(), Some(data))]), ..Sources::default() }
    }

    #[test]
    fn files_are_swapped_all_at_once_and_kept_if_equal() {
        let dir = tempfile::tempdir().expect("tempdir");
        let pod = pod(r#"[{"name":"v","configMap":{"name":"cm"}}]"#);
        let roots = set_up(dir.path(), &pod, &sources(&[("a", "1"), ("b", "2")])).expect("set up");
        let root = &roots["v"];
        assert_eq!(fs::read(root.join("a")).expect("a"), b"1");
        let first = fs::read_link(root.join("..data")).expect("link");
        set_up(dir.path(), &pod, &sources(&[("a", "1"), ("b", "2")])).expect("again");
        assert_eq!(fs::read_link(root.join("..data")).expect("link"), first, "nothing changed");
        set_up(dir.path(), &pod, &sources(&[("a", "9")])).expect("changed");
        assert_eq!(fs::read(root.join("a")).expect("a"), b"9");
        assert!(fs::symlink_metadata(root.join("b")).is_err(), "b went away");
        assert!(!root.join(first).exists(), "the old files went away");
        let hidden = fs::read_dir(root).expect("list").flatten().count();
        assert_eq!(hidden, 3, "a, ..data and its directory");
    }

    #[test]
    fn items_choose_and_place_keys() {
        let dir = tempfile::tempdir().expect("tempdir");
        let good =
            pod(r#"[{"name":"v","configMap":{"name":"cm","items":[{"key":"a","path":"x/y","mode":256}]}}]"#);
        let roots = set_up(dir.path(), &good, &sources(&[("a", "1"), ("b", "2")])).expect("set up");
        let meta = fs::metadata(roots["v"].join("x/y")).expect("the file");
        assert_eq!(meta.permissions().mode() & 0o777, 0o400);
        for (json, says) in [
            (
                r#"[{"name":"v","configMap":{"name":"cm","items":[{"key":"a","path":"../y"}]}}]"#,
                "plain relative",
            ),
            (r#"[{"name":"v","configMap":{"name":"cm","items":[{"key":"z","path":"y"}]}}]"#, "no key \"z\""),
            (r#"[{"name":"v","configMap":{"name":"other"}}]"#, "not found"),
        ] {
            let error = set_up(dir.path(), &pod(json), &sources(&[("a", "1")])).expect_err(json);
            assert!(error.to_string().contains(says), "{error}");
        }
        let optional = pod(r#"[{"name":"w","configMap":{"name":"other","optional":true}}]"#);
        set_up(dir.path(), &optional, &sources(&[])).expect("optional");
    }

    #[test]
    fn an_empty_dir_is_for_everyone_and_is_not_emptied_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let pod = pod(r#"[{"name":"e"}]"#);
        let root = set_up(dir.path(), &pod, &Sources::default()).expect("set up").remove("e").expect("e");
        assert_eq!(fs::metadata(&root).expect("meta").permissions().mode() & 0o7777, 0o777);
        fs::write(root.join("f"), "x").expect("write");
        set_up(dir.path(), &pod, &Sources::default()).expect("again");
        assert!(root.join("f").exists());
        tear_down(dir.path()).expect("torn down");
        assert!(!dir.path().exists());
        tear_down(dir.path()).expect("twice");
    }

    #[test]
    fn host_paths_are_checked_by_type() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        fs::write(path("file"), "").expect("write");
        for (name, kind, ok) in [
            ("file", "File", true),
            ("file", "Directory", false),
            ("new", "Directory", false),
            ("new", "DirectoryOrCreate", true),
            ("new2", "FileOrCreate", true),
            ("file", "Socket", false),
            ("file", "Nonsense", false),
            ("new3", "", true),
        ] {
            assert_eq!(host_path(&path(name), kind).is_ok(), ok, "{name} {kind}");
        }
        assert!(host_path("relative", "").is_err());
        assert!(host_path("/a/../b", "").is_err());
    }

    #[test]
    fn a_sub_path_never_leads_out_of_its_volume() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().join("v");
        fs::create_dir_all(root.join("in")).expect("mkdir");
        fs::write(dir.path().join("secret"), "").expect("write");
        std::os::unix::fs::symlink("../secret", root.join("up")).expect("link");
        std::os::unix::fs::symlink("/etc", root.join("abs")).expect("link");
        std::os::unix::fs::symlink("in", root.join("fine")).expect("link");
        assert!(open_sub_path(&root, Path::new("fine")).is_ok());
        assert!(open_sub_path(&root, Path::new("made/deep")).is_ok());
        assert!(root.join("made/deep").is_dir());
        open_sub_path(&root, Path::new("abs/x")).expect_err("the link points to nothing inside");
        assert!(!Path::new("/etc/x").exists());
        let up = open_sub_path(&root, Path::new("up"));
        assert!(up.is_err() || !dir.path().join("v/secret").is_file(), "{up:?}");
    }

    #[test]
    fn mounts_are_found_in_a_table() {
        let table = "1 2 0:1 / /a rw - x x rw\n1 2 0:1 / /a/b\\040c rw - x x rw\n1 2 0:1 / /ab rw - x x rw\n";
        assert_eq!(mounts_below(table, Path::new("/a")), [PathBuf::from("/a"), PathBuf::from("/a/b c")]);
    }

    #[test]
    fn who_hears_of_mounts() {
        let table = "1 1 0:1 / / rw - ext4 x rw\n2 1 0:1 / /s rw shared:3 - ext4 x rw\n\
                     3 1 0:1 / /s/own rw master:1 - ext4 x rw\n";
        let of = |dir: &str| sharing(table, Path::new(dir));
        assert_eq!(of("/x"), Sharing::Part);
        assert_eq!(of("/s/y"), Sharing::Shared);
        assert_eq!(of("/s/own"), Sharing::OwnMount);
        assert_eq!(of("/s/own/z"), Sharing::Part);
        assert_eq!(of("/sx"), Sharing::Part);
    }
}
