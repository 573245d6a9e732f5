//! Images that are well come in whole, once, under the right names, and what is removed is gone.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;
use sheave_agent::runtime::image::{Image, ImageStore, Progress, resolve_user};
use sheave_harness::{netns::checked, require_root};

use crate::image_archive::{Archive, Layer, arch, blob_path, digest, gzip};

/// Set in the process that is killed: the state directory and the archive.
const IMPORT: &str = "SHEAVE_TEST_IMPORT";

pub(crate) fn quiet() -> impl FnMut(Progress) {
    |_| {}
}

/// What is below `images/<sub>`.
pub(crate) fn names(state: &Path, sub: &str) -> Vec<String> {
    let list = fs::read_dir(state.join("images").join(sub)).expect("list the store");
    let mut names: Vec<String> =
        list.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn base() -> Vec<u8> {
    Layer::new()
        .dir("./")
        .dir("bin")
        .file("bin/web", "#!/bin/sh\n")
        .dir("etc")
        .file("etc/passwd", "root:x:0:0::/root:/bin/sh\nweb:x:101:102::/srv:/bin/false\n")
        .file("etc/group", "root:x:0:\nwww:x:103:\n")
        .dir("old")
        .file("old/a", "a")
        .file("old/b", "b")
        .dir("opaque")
        .file("opaque/lower", "hidden")
        .file("gone", "hidden")
        .finish()
}

fn upper() -> Vec<u8> {
    Layer::new()
        .file(".wh.gone", "")
        .file("old/.wh.a", "")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/upper", "seen")
        .file(".wh..wh.plnk", "")
        .finish()
}

fn import(store: &ImageStore, archive: &Archive) -> Image {
    let dir = tempfile::tempdir().expect("a directory");
    let info = store.import(&archive.tar(&dir.path().join("a.tar")), None, &mut quiet()).expect("import");
    store.resolve(&info[0].id).expect("resolve").expect("the image")
}

#[test]
fn archives_and_layouts_give_the_same_image() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let archive = Archive::of("web:1", &[base(), upper()]);
    let image = import(&store, &archive);
    assert_eq!(image.names, ["docker.io/library/web:1"]);
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.config.entrypoint, ["/bin/web"]);
    assert_eq!(image.config.cmd, ["--port", "80"]);
    let env: Vec<String> = image.config.env.iter().map(|(k, v)| format!("{k}|{v}")).collect();
    assert_eq!(env, ["PATH|/bin", "EMPTY|", "A|b=c"]);
    assert_eq!((image.config.working_dir.as_str(), image.config.stop_signal.as_str()), ("/srv", "SIGINT"));
    assert_eq!(image.size_bytes, (base().len() + upper().len()) as u64);
    let user = resolve_user(&image, &image.config.user).expect("the image's user");
    assert_eq!((user.uid, user.gid), (101, 103));

    let dir = tempfile::tempdir().expect("a directory");
    let mut present = 0;
    let layout = archive.layout(dir.path());
    let infos = store
        .import(&layout, Some("other"), &mut |progress| present += usize::from(progress.present))
        .expect("import the layout");
    assert_eq!((infos.len(), present), (1, 2), "layers that are there are not unpacked again");
    assert_eq!(infos[0].names, ["docker.io/library/other:latest", "docker.io/library/web:1"]);
    for name in ["web:1", "docker.io/library/web:1", "other", "library/other:latest", &image.id] {
        assert_eq!(store.resolve(name).expect("resolve").expect(name).id, image.id, "{name}");
    }
    let by_digest = format!("web@{}", infos[0].manifest_digest.as_deref().expect("a manifest"));
    assert_eq!(store.resolve(&by_digest).expect("resolve").expect("by digest").id, image.id);
    assert_eq!(store.resolve("web").expect("resolve"), None, "another tag");
    assert_eq!(store.resolve(&format!("web@{}", digest(b"x"))).expect("resolve"), None);
    store.resolve("a//b").expect_err("not a name");
    assert_eq!(names(state.path(), "tmp"), Vec::<String>::new());
}

#[test]
fn plain_layers_and_docker_archives_are_read_too() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let mut plain = Archive::default();
    plain.add("plain", &[base()], false, &[]);
    let plain = import(&store, &plain);
    let config = json!({
        "architecture": arch(), "os": "linux", "config": {"Cmd": ["/bin/web"], "Env": null},
        "rootfs": {"type": "layers", "diff_ids": [digest(&base())]},
    });
    let mut docker = tar::Builder::new(Vec::new());
    let manifest =
        json!([{"Config": "c.json", "RepoTags": ["r.io/web:2", "web"], "Layers": ["l/layer.tar"]}]);
    for (name, bytes) in [
        ("l/layer.tar", gzip(&base())),
        ("c.json", config.to_string().into_bytes()),
        ("manifest.json", manifest.to_string().into_bytes()),
    ] {
        let mut header = Layer::header(tar::EntryType::Regular, 0o644);
        header.set_size(bytes.len() as u64);
        docker.append_data(&mut header, name, &bytes[..]).expect("write the archive");
    }
    let path = state.path().join("docker.tar");
    fs::write(&path, docker.into_inner().expect("finish")).expect("write the archive");
    let info = store.import(&path, None, &mut quiet()).expect("import a docker archive");
    assert_eq!(info[0].names, ["docker.io/library/web:latest", "r.io/web:2"]);
    assert_eq!(info[0].manifest_digest, None);
    let image = store.resolve("r.io/web:2").expect("resolve").expect("the image");
    assert_eq!(image.layers, plain.layers, "the same content is stored once");
}

#[test]
fn the_entry_for_this_platform_is_taken() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let mut archive = Archive::default();
    archive.add("", &[base()], true, &[]);
    let mut ours = archive.index.remove(0);
    ours["platform"] = json!({"os": "linux", "architecture": arch()});
    let other = json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(b"not there"), "size": 9,
        "platform": {"os": "linux", "architecture": "s390x"},
    });
    let inner = json!({"schemaVersion": 2, "manifests": [other.clone(), ours]}).to_string().into_bytes();
    let size = inner.len();
    let digest_of_index = archive.blob(inner);
    let index = |digest: &str| json!({"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": size});
    archive.name("multi", index(&digest_of_index));
    assert_eq!(import(&store, &archive).names, ["docker.io/library/multi:latest"]);

    let mut foreign = Archive::default();
    foreign.name("foreign", other);
    let path = foreign.tar(&state.path().join("foreign.tar"));
    let error = store.import(&path, None, &mut quiet()).expect_err("no such platform").to_string();
    assert!(error.contains("foreign") && error.contains("linux/s390x") && error.contains(arch()), "{error}");
}

#[test]
fn files_come_as_they_were() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let mut owned = Layer::header(tar::EntryType::Regular, 0o4750);
    owned.set_uid(101);
    owned.set_gid(102);
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut sticky = Layer::header(tar::EntryType::Directory, 0o1777);
    sticky.set_mtime(1_500_000_000);
    let long = format!("deep/{}/{}", "x".repeat(58), "y".repeat(35));
    let layer = Layer::new()
        .raw("bin/su", "", owned, b"elf")
        .pax(
            &[
                ("SCHILY.xattr.security.capability", capability),
                ("SCHILY.xattr.user.note", b"kept"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("mtime", b"1600000001.25"),
            ],
            "bin/ping",
            0o755,
            b"elf",
        )
        .raw("tmp", "", sticky, &[])
        .file("tmp/inside", "x")
        .symlink("bin/sh", "su")
        .hardlink("bin/su2", "bin/su")
        .device("dev/null", tar::EntryType::Char, 1, 3)
        .raw("run/pipe", "", Layer::header(tar::EntryType::Fifo, 0o600), &[])
        .file(&long, "long")
        .finish();
    let image = import(&store, &Archive::of("files", &[layer]));
    let root = &image.layers[0];
    let meta = |name: &str| fs::symlink_metadata(root.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let su = meta("bin/su");
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid(), su.mtime()), (0o4750, 101, 102, 1_600_000_000));
    assert_eq!(meta("bin/su2").ino(), su.ino());
    assert_eq!(fs::read_link(root.join("bin/sh")).expect("a link"), PathBuf::from("su"));
    let ping = meta("bin/ping");
    assert_eq!((ping.mtime(), ping.mtime_nsec()), (1_600_000_001, 250_000_000));
    // GNU tar is everywhere, and shows every attribute that a file has.
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "-cf", "-", "-C"]).arg(root).arg("bin/ping");
    let dump = tar.output().expect("run tar").stdout;
    let dump = String::from_utf8_lossy(&dump);
    let found: Vec<&str> = dump.split("SCHILY.xattr.").skip(1).filter_map(|r| r.split('=').next()).collect();
    assert_eq!(BTreeSet::from_iter(found), BTreeSet::from(["security.capability", "user.note"]));
    let tmp = meta("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.mtime()), (0o1777, 1_500_000_000), "set after what is inside");
    assert!(meta("dev/null").file_type().is_char_device() && meta("dev/null").mode() & 0o777 == 0o666);
    assert!(meta("run/pipe").file_type().is_fifo());
    assert_eq!(meta("run").mode() & 0o7777, 0o755, "directories that nobody named");
    assert_eq!(fs::read_to_string(root.join(&long)).expect("a long name"), "long");
    let store_mode = fs::metadata(state.path().join("images")).expect("the store").permissions().mode();
    assert_eq!(store_mode & 0o077, 0, "setuid programs of images are out of the reach of the node's users");
}

#[test]
fn overlayfs_understands_the_layers() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let third = Layer::new()
        // A whiteout and the name itself, in either order: the name is new, what was below is hidden.
        .file(".wh.old", "")
        .dir("old")
        .file("old/new", "n")
        .dir("etc")
        .file("etc/.wh.group", "")
        .file("etc/group", "root:x:0:\n")
        .finish();
    let image = import(&store, &Archive::of("layers", &[base(), upper(), third]));
    let layers: Vec<String> = image.layers.iter().rev().map(|dir| dir.display().to_string()).collect();
    let target = state.path().join("merged");
    fs::create_dir(&target).expect("a mount point");
    let script = "mount -t overlay overlay -o ro,lowerdir=\"$1\" \"$2\" && cd \"$2\" && find . | sort";
    let listed = checked(
        Command::new("unshare").args(["--mount", "sh", "-ec", script, "sh", &layers.join(":")]).arg(&target),
    );
    let listed: Vec<&str> = listed.lines().collect();
    let wanted = [
        ".",
        "./bin",
        "./bin/web",
        "./etc",
        "./etc/group",
        "./etc/passwd",
        "./old",
        "./old/new",
        "./opaque",
        "./opaque/upper",
    ];
    assert_eq!(listed, wanted);
}

#[test]
fn later_entries_replace_earlier_ones() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let layer = Layer::new()
        .file("twice", "one")
        .file("twice", "two")
        .file("was-file/", "")
        .dir("was-dir")
        .file("was-dir/x", "x")
        .file("was-dir", "now a file")
        .symlink("was-link", "/etc")
        .dir("was-link")
        .file("was-link/x", "inside")
        .file("self", "kept")
        .hardlink("self", "self")
        .dir("same")
        .file("same/x", "x")
        .dir("same")
        .finish();
    let image = import(&store, &Archive::of("replace", &[layer]));
    let read =
        |name: &str| fs::read_to_string(image.layers[0].join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(read("twice"), "two");
    assert_eq!(read("was-dir"), "now a file");
    assert_eq!(read("was-link/x"), "inside");
    assert!(fs::symlink_metadata(image.layers[0].join("was-link")).expect("it").is_dir());
    assert_eq!(read("self"), "kept");
    assert_eq!(read("same/x"), "x");
}

#[test]
fn removed_images_take_their_layers_along_unless_they_are_used() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let one = import(&store, &Archive::of("one", &[base(), upper()]));
    let two = import(&store, &Archive::of("two", &[base()]));
    assert_eq!(one.layers[0], two.layers[0], "shared");
    let error = store.remove("three", &|_| false).expect_err("no such image").to_string();
    assert!(error.contains("three"), "{error}");
    let busy = one.layers[1].clone();
    let swept = store.remove("one", &|dir| dir == busy).expect("remove");
    assert_eq!((swept.layers, swept.in_use), (0, 1));
    assert!(busy.exists() && store.resolve("one").expect("resolve").is_none());
    let held = store.hold().expect("hold");
    assert!(store.sweep(&|_| false).expect("sweep").busy && busy.exists());
    drop(held);
    assert_eq!(store.sweep(&|_| false).expect("sweep").layers, 1);
    assert!(!busy.exists() && two.layers[0].exists());
    store.remove(&two.id, &|_| false).expect("remove by id");
    for sub in ["layers", "records", "tmp"] {
        assert_eq!(names(state.path(), sub), Vec::<String>::new(), "{sub}");
    }
    assert!(store.list().expect("list").is_empty());
}

#[test]
fn layers_of_a_mounted_root_are_in_use() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let image = import(&store, &Archive::of("mounted", &[base(), upper()]));
    let layers: Vec<String> = image.layers.iter().rev().map(|dir| dir.display().to_string()).collect();
    let target = state.path().join("merged");
    fs::create_dir(&target).expect("a mount point");
    // In a mount namespace of its own, as a container's is: nothing of it is seen from here.
    let script = "mount -t overlay overlay -o ro,lowerdir=\"$1\" \"$2\" && echo mounted && read -r line";
    let mut holder = Command::new("unshare")
        .args(["--mount", "sh", "-ec", script, "sh", &layers.join(":")])
        .arg(&target)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start the holder");
    let mut said = String::new();
    let mut out = std::io::BufReader::new(holder.stdout.take().expect("its output"));
    std::io::BufRead::read_line(&mut out, &mut said).expect("hear from the holder");
    assert_eq!(said, "mounted\n");
    let swept = store.remove("mounted", &|_| false).expect("remove");
    assert_eq!((swept.layers, swept.in_use), (0, 2));
    drop(holder.stdin.take());
    holder.wait().expect("the holder ends");
    assert_eq!(store.sweep(&|_| false).expect("sweep").layers, 2);
}

#[test]
fn imports_at_once_share_their_work() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let dir = tempfile::tempdir().expect("a directory");
    let paths: Vec<PathBuf> = (0..4)
        .map(|n| {
            Archive::of(&format!("web{n}"), &[base(), upper()]).tar(&dir.path().join(format!("{n}.tar")))
        })
        .collect();
    std::thread::scope(|scope| {
        for path in &paths {
            // A store each, as several processes have.
            let store = ImageStore::open(state.path()).expect("open");
            scope.spawn(move || {
                for _ in 0..5 {
                    store.import(path, None, &mut quiet()).expect("import");
                }
            });
        }
        let store = ImageStore::open(state.path()).expect("open");
        scope.spawn(move || {
            for _ in 0..50 {
                store.sweep(&|_| false).expect("sweep");
            }
        });
    });
    let store = ImageStore::open(state.path()).expect("open");
    assert_eq!(store.list().expect("list").len(), 1, "one image, as the contents are the same");
    assert_eq!(store.list().expect("list")[0].names.len(), 4);
    assert_eq!((names(state.path(), "layers").len(), names(state.path(), "tmp").len()), (2, 0));
}

#[test]
fn killed_at_any_moment_the_store_is_whole() {
    if let Ok(spec) = std::env::var(IMPORT) {
        import_for_ever(&spec);
    }
    if !require_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    let mut layer = Layer::new();
    for n in 0..400 {
        layer = layer.file(&format!("dir{}/file{n}", n % 20), &"x".repeat(n));
    }
    let archive = Archive::of("web", &[base(), layer.finish()]).tar(&dir.path().join("web.tar"));
    let spec = format!("{} {}", state.display(), archive.display());
    let begin = Instant::now();
    let store = ImageStore::open(&state).expect("open");
    store.import(&archive, None, &mut quiet()).expect("import");
    store.remove("web", &|_| false).expect("remove");
    let cycle = begin.elapsed();
    let mut seen = BTreeSet::new();
    // More rounds only where a busy machine lets every kill come before the first step.
    for round in 0..200_u32 {
        if round >= 25 && seen.len() > 1 {
            break;
        }
        let mut child = Command::new(std::env::current_exe().expect("the test program's own path"))
            .args(["image_import::killed_at_any_moment_the_store_is_whole", "--exact", "--nocapture"])
            .env(IMPORT, &spec)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("start the importer");
        let out = std::io::BufReader::new(child.stdout.take().expect("its output"));
        let started =
            std::io::BufRead::lines(out).map_while(Result::ok).any(|line| line.ends_with("importing"));
        assert!(started, "the importer did not start");
        // Not a wait for anything: the rounds spread the kill over one import and removal.
        std::thread::sleep(cycle * round / 20);
        child.kill().expect("kill the importer");
        child.wait().expect("collect the importer");
        seen.insert((names(&state, "tmp").len(), names(&state, "layers").len()));

        let store = ImageStore::open(&state).expect("open what a killed process left");
        assert_eq!(names(&state, "tmp"), Vec::<String>::new(), "round {round}");
        match store.resolve("web").expect("resolve") {
            None => assert_eq!(names(&state, "layers"), Vec::<String>::new(), "round {round}"),
            Some(image) => {
                let files = image.layers.iter().map(|layer| count(layer)).collect::<Vec<_>>();
                assert_eq!(files, [12, 421], "round {round}: a listed image is whole");
            }
        }
    }
    assert!(seen.len() > 1, "every kill hit the same moment: {seen:?}");
}

fn count(dir: &Path) -> usize {
    let list = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let below = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.expect("an entry");
        if entry.file_type().expect("its type").is_dir() { count(&entry.path()) } else { 1 }
    };
    1 + list.map(below).sum::<usize>()
}

fn import_for_ever(spec: &str) -> ! {
    let (state, archive) = spec.split_once(' ').expect("two paths");
    let store = ImageStore::open(Path::new(state)).expect("open");
    println!("importing");
    loop {
        store.import(Path::new(archive), None, &mut quiet()).expect("import");
        store.remove("web", &|_| false).expect("remove");
    }
}

#[test]
fn several_images_of_one_archive_keep_their_names() {
    if !require_root() {
        return;
    }
    let state = tempfile::tempdir().expect("a state directory");
    let store = ImageStore::open(state.path()).expect("open");
    let mut archive = Archive::of("one:1", &[base()]);
    archive.add("r.io/two", &[base(), upper()], true, &[]);
    let again = archive.index[0].clone();
    archive.name("uno", again);
    let path = archive.tar(&state.path().join("a.tar"));
    let mut infos = store.import(&path, None, &mut quiet()).expect("import");
    infos.sort_by_key(|info| info.layers);
    assert_eq!(infos[0].names, ["docker.io/library/one:1", "docker.io/library/uno:latest"]);
    assert_eq!(infos[1].names, ["r.io/two:latest"]);
    let error = store.import(&path, Some("x"), &mut quiet()).expect_err("two images, one name").to_string();
    assert!(error.contains("2 images"), "{error}");
    let mut nameless = Archive::default();
    nameless.add("", &[base()], true, &[]);
    let path = nameless.tar(&state.path().join("b.tar"));
    let error = store.import(&path, None, &mut quiet()).expect_err("no name").to_string();
    assert!(error.contains("--name"), "{error}");
    assert!(archive.files.contains_key(&blob_path(&digest(&gzip(&base())))));
}
