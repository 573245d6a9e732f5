//! Archives that lie, attack or are broken: each is refused with a message that names the place, leaves nothing
//! behind, and touches nothing outside the store.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use sheave_agent::runtime::image::{ImageError, ImageStore, LayerLimits};
use sheave_harness::require_root;

use crate::image_archive::{Archive, Layer, arch, blob_path, digest, gzip};
use crate::image_import::{names, quiet};

/// A store, and a directory outside it that hostile layers aim at.
struct Bench {
    dir: tempfile::TempDir,
    store: ImageStore,
}

impl Bench {
    fn new() -> Self {
        Self::with(LayerLimits::default())
    }

    fn with(limits: LayerLimits) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("outside")).expect("make the target");
        fs::write(dir.path().join("outside/secret"), "untouched").expect("write the target");
        let store = ImageStore::open_with(&dir.path().join("state"), limits).expect("open");
        Bench { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn outside(&self) -> String {
        self.path("outside").display().to_string()
    }

    /// The error that importing `archive` gives, with its sources; nothing of it may stay.
    #[track_caller]
    fn refused(&self, archive: &Archive) -> String {
        self.refused_file(&archive.tar(&self.path("archive.tar")))
    }

    #[track_caller]
    fn refused_file(&self, path: &Path) -> String {
        let error = self.store.import(path, None, &mut quiet()).expect_err("must be refused");
        self.assert_untouched();
        assert!(self.store.list().expect("list").is_empty());
        for sub in ["layers", "records", "tmp"] {
            assert_eq!(names(&self.path("state"), sub), Vec::<String>::new(), "{sub} after {error}");
        }
        in_full(&error)
    }

    #[track_caller]
    fn refused_layer(&self, layer: Layer) -> String {
        let text = self.refused(&Archive::of("evil", &[layer.finish()]));
        assert!(text.contains("docker.io/library/evil:latest"), "it names the image: {text}");
        text
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let secret = fs::read_to_string(self.path("outside/secret")).expect("the target is there");
        assert_eq!(secret, "untouched");
        let meta = fs::metadata(self.path("outside/secret")).expect("the target");
        assert_eq!((meta.mode() & 0o7777, meta.nlink()), (0o644, 1));
        assert_eq!(fs::read_dir(self.path("outside")).expect("the target").count(), 1);
    }
}

fn in_full(error: &ImageError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn names_that_climb_are_refused() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    for name in ["../outside/secret", "a/../../outside/secret", "a/..", ".."] {
        let text = bench.refused_layer(Layer::new().file("ok", "x").file(name, "evil"));
        has(&text, &[name, ".."]);
    }
    for name in [".wh...", "a/.wh..", ".wh."] {
        has(&bench.refused_layer(Layer::new().dir("a").file(name, "")), &[name, "whiteout"]);
    }
}

#[test]
fn absolute_names_and_links_stay_inside() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let outside = bench.outside();
    let inner = outside.trim_start_matches('/');
    let layer = Layer::new()
        .file(&format!("{outside}/absolute"), "inside")
        .symlink("root", "/")
        .file(&format!("root/{inner}/through-root"), "inside")
        .symlink("out", &outside)
        .file("out/secret", "inside")
        .symlink("up", "../../../../../../../../../..")
        .file(&format!("up/{inner}/through-up"), "inside")
        .symlink("etc", "/usr/etc")
        .dir("usr/etc")
        .file("etc/x", "inside");
    let path = Archive::of("links", &[layer.finish()]).tar(&bench.path("links.tar"));
    bench.store.import(&path, None, &mut quiet()).expect("links are not refused, they are kept inside");
    bench.assert_untouched();
    let image = bench.store.resolve("links").expect("resolve").expect("the image");
    let root = &image.layers[0];
    for name in ["absolute", "through-root", "secret", "through-up"] {
        let inside =
            fs::read_to_string(root.join(inner).join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(inside, "inside");
    }
    assert_eq!(fs::read_to_string(root.join("usr/etc/x")).expect("x"), "inside");
    assert_eq!(fs::read_link(root.join("out")).expect("a link"), PathBuf::from(&outside));
}

#[test]
fn nothing_is_written_through_the_last_link() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let secret = format!("{}/secret", bench.outside());
    let layer = Layer::new()
        .symlink("a", &secret)
        .file("a", "evil")
        .symlink("b", &bench.outside())
        .dir("b")
        .symlink("c", &secret)
        .raw("c", "", Layer::header(tar::EntryType::Fifo, 0o777), &[])
        .symlink("d", &secret)
        .pax(&[("SCHILY.xattr.user.evil", b"1")], "d", 0o777, b"evil")
        .symlink("./", "/");
    has(&bench.refused_layer(layer), &["root of an image"]);
}

#[test]
fn hard_links_reach_nothing_outside() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let secret = format!("{}/secret", bench.outside());
    let climb = format!("../../../../../../../../..{secret}");
    has(&bench.refused_layer(Layer::new().hardlink("x", &climb)), &["\"x\"", "hard link", ".."]);
    has(&bench.refused_layer(Layer::new().hardlink("x", &secret)), &["\"x\"", "no such entry"]);
    let through = Layer::new().symlink("out", &bench.outside()).hardlink("x", "out/secret");
    has(&bench.refused_layer(through), &["\"x\"", "no such entry"]);
    has(&bench.refused_layer(Layer::new().dir("d").hardlink("x", "d")), &["\"x\"", "directory"]);
    has(&bench.refused_layer(Layer::new().file(".wh.y", "").hardlink("x", "y")), &["\"x\"", "removes"]);
    // A link to a symbolic link is a link to the link.
    let layer = Layer::new().symlink("s", &secret).hardlink("h", "s").file("h", "evil").finish();
    let path = Archive::of("h", &[layer]).tar(&bench.path("h.tar"));
    bench.store.import(&path, None, &mut quiet()).expect("import");
    bench.assert_untouched();
}

#[test]
fn paths_through_things_that_are_no_directories_are_refused() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    has(&bench.refused_layer(Layer::new().file("f", "x").file("f/y", "x")), &["f/y", "not a directory"]);
    has(
        &bench.refused_layer(Layer::new().symlink("l", "gone").file("l/y", "x")),
        &["l/y", "link to nothing"],
    );
    let round = Layer::new().symlink("p", "q").symlink("q", "p").file("p/x", "x");
    has(&bench.refused_layer(round), &["p/x"]);
}

#[test]
fn devices_and_unknown_entries_are_refused() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    for (kind, major, minor) in
        [(tar::EntryType::Block, 8, 0), (tar::EntryType::Char, 1, 1), (tar::EntryType::Char, 0, 0)]
    {
        let text = bench.refused_layer(Layer::new().device("dev/x", kind, major, minor));
        has(&text, &["dev/x", &format!("{major}:{minor}"), "refused"]);
    }
    let odd = Layer::new().raw("odd", "", Layer::header(tar::EntryType::new(b'V'), 0o644), &[]);
    has(&bench.refused_layer(odd), &["odd", "not supported"]);
}

#[test]
fn digests_must_be_true() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let layer = Layer::new().file("a", "x").finish();
    let mut archive = Archive::of("lie", std::slice::from_ref(&layer));
    let blob = blob_path(&digest(&gzip(&layer)));
    archive.files.insert(blob.clone(), gzip(&Layer::new().file("a", "y").finish()));
    has(&bench.refused(&archive), &["lie", &digest(&gzip(&layer)), "should be"]);
    let bytes = &archive.files[&blob];
    let half = bytes[..bytes.len() / 2].to_vec();
    archive.files.insert(blob.clone(), half);
    has(&bench.refused(&archive), &["lie"]);
    archive.files.remove(&blob);
    has(&bench.refused(&archive), &["lie", &blob, "missing"]);

    let mut wrong = Archive::default();
    wrong.add("wrong", std::slice::from_ref(&layer), true, &[digest(b"something else")]);
    has(&bench.refused(&wrong), &["wrong", "diff id", &digest(b"something else"), &digest(&layer)]);

    let mut manifest = Archive::of("m", std::slice::from_ref(&layer));
    let name = blob_path(manifest.index[0]["digest"].as_str().expect("a digest"));
    manifest.files.get_mut(&name).expect("the manifest").push(b' ');
    has(&bench.refused(&manifest), &["m:latest", &name, "should be"]);

    let mut evil = Archive::default();
    evil.name(
        "evil",
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": "sha256:../../../../etc/passwd", "size": 1,
        }),
    );
    bench.refused(&evil);
}

#[test]
fn truncated_and_mangled_layers_are_refused() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let content: Vec<u8> = (0..200_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let layer = Layer::new().bytes("big", &content).file("b", "x").finish();
    let zipped = gzip(&layer);
    let with = |blob: Vec<u8>| {
        let mut archive = Archive::default();
        let config = json!({
            "architecture": arch(), "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        });
        let size = blob.len();
        let blob = archive.blob(blob);
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        let entry = archive.manifest(&config, &[json!({"mediaType": kind, "digest": blob, "size": size})]);
        archive.name("cut", entry);
        archive
    };
    // The digest of the blob is true each time: what is inside is not.
    has(&bench.refused(&with(zipped[..zipped.len() / 2].to_vec())), &["cut", "big", "ends early"]);
    let mut flipped = zipped.clone();
    let at = flipped.len() / 2;
    flipped[at] ^= 0x55;
    has(&bench.refused(&with(flipped)), &["cut"]);
    has(&bench.refused(&with(gzip(&layer[..1024]))), &["cut", "big"]);
    has(&bench.refused(&with(b"not a layer".to_vec())), &["cut"]);
    has(
        &bench.refused(&with(vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0])),
        &["cut", "zstd", "not supported yet"],
    );
    // The same content in two gzip members is one layer.
    let (first, second) = layer.split_at(layer.len() / 2);
    let path = with([gzip(first), gzip(second)].concat()).tar(&bench.path("members.tar"));
    bench.store.import(&path, None, &mut quiet()).expect("import");
}

#[test]
fn bombs_are_stopped_early() {
    if !require_root() {
        return;
    }
    let limits = LayerLimits {
        bytes_max: 4 << 20,
        entries_max: 100,
        ratio_max: 50,
        ratio_floor_bytes: 1 << 20,
        header_bytes_max: 64 << 10,
    };
    let bench = Bench::with(limits);
    let mut huge = Layer::header(tar::EntryType::Regular, 0o644);
    huge.set_size(1 << 40);
    has(&bench.refused_layer(Layer::new().raw("huge", "", huge, b"x")), &["huge", "larger than 4194304"]);
    has(&bench.refused_layer(Layer::new().bytes("zeros", &vec![0; 3 << 20])), &["50 times", "bomb"]);
    let noise: Vec<u8> = (0..5_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    has(&bench.refused_layer(Layer::new().bytes("noise", &noise)), &["noise", "larger than 4194304"]);
    let many = (0..101).fold(Layer::new(), |layer, n| layer.file(&format!("f{n}"), ""));
    has(&bench.refused_layer(many), &["more than 100 entries"]);
    let value: Vec<u8> =
        (0..1_000_000_u32).map(|n| b'a' + (n.wrapping_mul(2_654_435_761) >> 28) as u8).collect();
    let fat = Layer::new().pax(&[("SCHILY.xattr.user.fat", &value)], "fat", 0o644, b"");
    has(&bench.refused_layer(fat), &["names or attributes", "65536"]);
}

#[test]
fn deep_trees_are_removed_again() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    // Each link shortens the way to the next run of directories, as far as the kernel follows links: deeper than
    // a process has descriptors.
    let run = "d/".repeat(45);
    let mut layer = Layer::new();
    for n in 0..38 {
        layer = layer.dir(&format!("{}{run}", if n == 0 { String::new() } else { format!("s{}/", n - 1) }));
        let target = if n == 0 { run.clone() } else { format!("s{}/{run}", n - 1) };
        layer = layer.symlink(&format!("s{n}"), &target);
    }
    let text = bench.refused_layer(layer.file("..", ""));
    has(&text, &[".."]);
}

#[test]
fn what_is_no_archive_says_so() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(bench.path(name), bytes).expect("write");
        bench.path(name)
    };
    let error = bench.store.import(&bench.path("none.tar"), None, &mut quiet()).expect_err("not there");
    has(&in_full(&error), &["none.tar", "No such file"]);
    has(&bench.refused_file(&file("empty.tar", b"")), &["empty.tar", "empty"]);
    has(&bench.refused_file(&file("junk.tar", &[b'j'; 4000])), &["junk.tar", "not a tar archive"]);
    has(&bench.refused_file(&file("a.tar.gz", &gzip(b"x"))), &["a.tar.gz", "gunzip"]);
    let other = Layer::new().file("hello", "x").finish();
    has(&bench.refused_file(&file("other.tar", &other)), &["other.tar", "not an image archive"]);
    has(&bench.refused_file(Path::new("/dev/null")), &["/dev/null", "regular file"]);
    let whole = fs::read(
        Archive::of("cut", &[Layer::new().bytes("f", &[7; 9000]).finish()]).tar(&bench.path("whole.tar")),
    );
    let whole = whole.expect("read the archive");
    for part in [whole.len() / 4, whole.len() / 2, whole.len() - 2000] {
        let text = bench.refused_file(&file("cut.tar", &whole[..part]));
        has(&text, &["cut"]);
    }
    let empty = bench.path("empty-dir");
    fs::create_dir(&empty).expect("a directory");
    has(&bench.refused_file(&empty), &["empty-dir", "not an image archive"]);
    let mut archive = Archive::of("x", &[Layer::new().file("a", "b").finish()]);
    archive.files.insert("index.json".to_owned(), b"{".to_vec());
    has(&bench.refused(&archive), &["index.json", "not valid"]);
    let error =
        bench.store.import(&bench.path("whole.tar"), Some("Bad Name"), &mut quiet()).expect_err("a bad name");
    has(&in_full(&error), &["Bad Name", "lower case"]);
}

#[test]
fn a_layout_cannot_point_outside_itself() {
    if !require_root() {
        return;
    }
    let bench = Bench::new();
    let layer = Layer::new().file("a", "x").finish();
    let archive = Archive::of("layout", std::slice::from_ref(&layer));
    let dir = archive.layout(&bench.path("layout"));
    let blob = dir.join(blob_path(&digest(&gzip(&layer))));
    fs::rename(&blob, bench.path("blob")).expect("move the blob out");
    std::os::unix::fs::symlink(bench.path("blob"), &blob).expect("link to it");
    has(&bench.refused_file(&dir), &["layout", "missing"]);
    fs::remove_file(&blob).expect("remove the link");
    nix::unistd::mkfifo(&blob, nix::sys::stat::Mode::S_IRWXU).expect("make a pipe");
    has(&bench.refused_file(&dir), &["not a regular file"]);
}

/// Runs `work` on a thread whose mount namespace has a tmpfs of `bytes` at `at`; it is gone with the thread.
fn on_small_disk<T: Send>(at: &Path, options: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("make mounts private");
            mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("mount a tmpfs");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn a_full_disk_leaves_no_half_layer() {
    if !require_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    fs::create_dir(&state).expect("a mount point");
    let noise: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    let small = Layer::new().file("etc/os-release", "small").finish();
    let big = Layer::new().bytes("big", &noise).file("after", "x").finish();
    let good = Archive::of("small", std::slice::from_ref(&small)).tar(&dir.path().join("small.tar"));
    let bad = Archive::of("big", &[small, big.clone()]).tar(&dir.path().join("big.tar"));
    on_small_disk(&state, "size=2m", || {
        let store = ImageStore::open(&state).expect("open");
        store.import(&good, None, &mut quiet()).expect("the small one fits");
        let error = store.import(&bad, None, &mut quiet()).expect_err("the big one does not");
        let ImageError::DiskFull { needed_bytes, free_bytes, .. } = &error else { panic!("{error}") };
        assert_eq!(*needed_bytes, Some(big.len() as u64), "what the whole layer needs");
        assert!(*free_bytes > 1 << 20, "counted after the half layer is gone: {free_bytes}");
        has(&error.to_string(), &["big:latest", "no space left", &big.len().to_string(), "state directory"]);
        assert_eq!(names(&state, "tmp"), Vec::<String>::new());
        assert_eq!(names(&state, "layers").len(), 1, "the small image's layer, which both have");
        let left = store.list().expect("list");
        assert_eq!((left.len(), left[0].layers), (1, 1), "{left:?}");
        store.remove("small", &|_| false).expect("there is always room to remove");
    });
    on_small_disk(&state, "size=64m,nr_inodes=30", || {
        let store = ImageStore::open(&state).expect("open");
        let many = (0..100).fold(Layer::new(), |layer, n| layer.file(&format!("f{n}"), "")).finish();
        let path = Archive::of("many", &[many]).tar(&dir.path().join("many.tar"));
        let error = store.import(&path, None, &mut quiet()).expect_err("no inodes").to_string();
        has(&error, &["many:latest", "no space left", "inodes"]);
        assert_eq!((names(&state, "tmp").len(), names(&state, "layers").len()), (0, 0));
    });
}
