//! Debian's kernels, from package to bootable: an uncompressed kernel (unpacking it in an emulated machine takes
//! seconds) and an archive of the modules that tests may need.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use crate::{proc, ui};

/// The kernels that are tested: the oldest that is promised, and the newest that Debian 12 has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Series {
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
}

impl Series {
    pub(crate) const ALL: [Series; 2] = [Series::V6_1, Series::V6_12];

    /// The package that depends on the newest kernel of the series. The flavour for clouds has all that is needed
    /// and is a third of the size.
    fn package(self) -> &'static str {
        match self {
            Series::V6_1 => "linux-image-cloud-amd64",
            Series::V6_12 => "linux-image-6.12-cloud-amd64",
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Series::V6_1 => "6.1.",
            Series::V6_12 => "6.12.",
        }
    }
}

/// A kernel in the cache.
pub(crate) struct Kernel {
    pub(crate) dir: PathBuf,
}

impl Kernel {
    pub(crate) fn image(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// `lib/modules/<version>` as a cpio archive.
    pub(crate) fn modules(&self) -> PathBuf {
        self.dir.join("modules.cpio")
    }
}

/// Module names, `*` for any ending. Their dependencies come along.
const MODULES: &[&str] = &[
    // the machine and the shared files
    "virtio_mmio",
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtiofs",
    "fuse",
    "overlay",
    "loop",
    "ext4",
    // links
    "veth",
    "dummy",
    "bridge",
    "br_netfilter",
    "vxlan",
    "geneve",
    "ipip",
    "wireguard",
    "macvlan",
    "ipvlan",
    "tun",
    "ifb",
    "netkit",
    "vrf",
    "8021q",
    // packet handling
    "sch_*",
    "cls_*",
    "act_*",
    "ip_vs*",
    "nf_*",
    "nft_*",
    "nfnetlink*",
    "x_tables",
    "xt_*",
    "ip_tables",
    "iptable_*",
    "ipt_*",
    "ip6_tables",
    "ip6table_*",
    "ip6t_*",
    "ip_set*",
    // what ss and the residue scan ask
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "netlink_diag",
    // checksums that others ask for by name
    "libcrc32c",
    "crc32c*",
];

/// The kernel of `series`, fetched if it is not in the cache.
pub(crate) fn prepared(series: Series) -> Result<Kernel> {
    let cache = cache_dir()?;
    if let Some(dir) = newest(&cache, series.prefix()) {
        return Ok(Kernel { dir });
    }
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    let work = cache.join(format!("tmp-{}", std::process::id()));
    fs::create_dir(&work).with_context(|| format!("make {}", work.display()))?;
    let result = fetch(series, &work).and_then(|package| unpack(&package, &work, &cache));
    let removed = fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()));
    let kernel = result?;
    removed.map(|()| kernel)
}

/// `$XDG_CACHE_HOME/sheave/vm`, by default `~/.cache/sheave/vm`.
fn cache_dir() -> Result<PathBuf> {
    let xdg = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let cache = xdg.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    Ok(cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("sheave/vm"))
}

fn newest(cache: &Path, prefix: &str) -> Option<PathBuf> {
    let named = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(prefix);
    let dirs = fs::read_dir(cache).ok()?.flatten().filter(named).map(|entry| entry.path());
    dirs.max_by_key(|dir| numbers(&dir.to_string_lossy()))
}

fn numbers(version: &str) -> Vec<u64> {
    let base = version.rsplit('/').next().unwrap_or(version);
    base.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Downloads the package of the series' newest kernel into `work`.
fn fetch(series: Series, work: &Path) -> Result<PathBuf> {
    let image = match image_package(series)? {
        Some(image) => image,
        None => {
            ui::step("apt-get update", Command::new("apt-get").arg("update"))?;
            image_package(series)?.with_context(|| format!("apt knows no package {}", series.package()))?
        }
    };
    let download = || {
        let mut apt = Command::new("apt-get");
        ui::step(&format!("fetch {image} (some 30 MB)"), apt.args(["download", &image]).current_dir(work))
    };
    if download().is_err() {
        // Lists older than the archive name versions that are gone.
        ui::step("apt-get update", Command::new("apt-get").arg("update"))?;
        download()?;
    }
    let mut files = fs::read_dir(work).with_context(|| format!("list {}", work.display()))?.flatten();
    let package = files.find(|entry| entry.path().extension().is_some_and(|end| end == "deb"));
    Ok(package.context("apt-get download left no package")?.path())
}

fn image_package(series: Series) -> Result<Option<String>> {
    let output =
        proc::capture(Command::new("apt-cache").args(["depends", series.package()]).env("LC_ALL", "C"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned))
}

fn unpack(package: &Path, work: &Path, cache: &Path) -> Result<Kernel> {
    let step = ui::Step::start("unpack the kernel and its modules");
    let tree = work.join("tree");
    proc::output(Command::new("dpkg-deb").arg("-x").arg(package).arg(&tree))?;
    let version = single_name(&tree.join("lib/modules"))?;
    let made = work.join("made");
    fs::create_dir(&made).with_context(|| format!("make {}", made.display()))?;
    decompress_kernel(&tree.join("boot").join(format!("vmlinuz-{version}")), &made.join("vmlinux"), work)?;
    let count = pack_modules(&tree, &version, work, &made.join("modules.cpio"))?;
    let dir = cache.join(&version);
    // Complete or absent: a run that is cut short leaves nothing that looks like a kernel.
    match fs::rename(&made, &dir) {
        Err(error) if !dir.exists() => return Err(error).with_context(|| format!("make {}", dir.display())),
        _ => step.done(&format!("{version}, {count} modules")),
    }
    Ok(Kernel { dir })
}

fn single_name(dir: &Path) -> Result<String> {
    let mut entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?.flatten();
    let entry = entries.next().with_context(|| format!("{} is empty", dir.display()))?;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// Finds the compressed kernel inside a bzImage by its magic number; the right one unpacks to an ELF file.
fn decompress_kernel(image: &Path, out: &Path, work: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("read {}", image.display()))?;
    let formats: [(&[u8], &[&str]); 4] = [
        (b"\x28\xb5\x2f\xfd", &["zstd", "-dcf"]),
        (b"\xfd7zXZ\0", &["xz", "-dc", "--single-stream"]),
        (b"\x02\x21\x4c\x18", &["lz4", "-dc"]),
        (b"\x1f\x8b\x08", &["gzip", "-dc"]),
    ];
    let part = work.join("part");
    for (magic, program) in formats {
        for at in bytes.windows(magic.len()).enumerate().filter(|(_, w)| *w == magic).map(|(at, _)| at) {
            fs::write(&part, &bytes[at..]).with_context(|| format!("write {}", part.display()))?;
            let input = fs::File::open(&part).with_context(|| format!("open {}", part.display()))?;
            let mut command = Command::new(program[0]);
            command.args(&program[1..]).stdin(input).stderr(Stdio::null());
            // What follows the compressed part makes every unpacker fail at its end: judge by what came out.
            let output = command.output().with_context(|| format!("start {}", proc::line(&command)))?;
            if output.stdout.starts_with(b"\x7fELF") {
                return fs::write(out, output.stdout).with_context(|| format!("write {}", out.display()));
            }
        }
    }
    bail!("{} holds no kernel in a known format", image.display())
}

/// Writes the archive of the wanted modules and returns how many there are.
fn pack_modules(tree: &Path, version: &str, work: &Path, out: &Path) -> Result<usize> {
    proc::output(Command::new("depmod").arg("-b").arg(tree).arg(version))?;
    let from = tree.join("lib/modules").join(version);
    let dep = fs::read_to_string(from.join("modules.dep")).context("read modules.dep")?;
    let wanted = closure(&dep);
    let root = work.join("root");
    let to = root.join("lib/modules").join(version);
    let mut compressed = Vec::new();
    for module in &wanted {
        let file = to.join(module);
        fs::create_dir_all(file.parent().context("modules lie in directories")?)
            .context("make module directories")?;
        fs::copy(from.join(module), &file).with_context(|| format!("copy {module}"))?;
        if module.ends_with(".xz") {
            compressed.push(file);
        }
    }
    if !compressed.is_empty() {
        proc::output(Command::new("xz").arg("-d").args(&compressed))?;
    }
    for name in ["modules.builtin", "modules.order", "modules.builtin.modinfo"] {
        fs::copy(from.join(name), to.join(name)).with_context(|| format!("copy {name}"))?;
    }
    proc::output(Command::new("depmod").arg("-b").arg(&root).arg(version))?;
    let file = fs::File::create(out).with_context(|| format!("make {}", out.display()))?;
    let mut archive = Archive::new(std::io::BufWriter::new(file));
    archive.directory("lib")?;
    archive.tree(&root.join("lib"), "lib")?;
    archive.finish()?.into_inner().context("write the module archive")?;
    Ok(wanted.len())
}

/// The wanted modules in `dep` (lines `<path>: <paths it needs>`) and all that they need.
fn closure(dep: &str) -> BTreeSet<&str> {
    let needs: BTreeMap<&str, Vec<&str>> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let mut open: Vec<&str> = needs.keys().copied().filter(|path| is_wanted(path)).collect();
    let mut found = BTreeSet::new();
    while let Some(module) = open.pop() {
        if found.insert(module) {
            open.extend(needs.get(module).into_iter().flatten());
        }
    }
    found
}

fn is_wanted(path: &str) -> bool {
    let base = path.rsplit('/').next().unwrap_or(path);
    let name = base.split('.').next().unwrap_or(base).replace('-', "_");
    MODULES.iter().any(|wanted| match wanted.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == *wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_along() {
        let dep = "kernel/net/veth.ko.xz:\nkernel/a/ip_vs_rr.ko: kernel/a/ip_vs.ko\n\
            kernel/a/ip_vs.ko: kernel/lib/odd.ko\nkernel/lib/odd.ko:\nkernel/sound/snd.ko:\n";
        let found: Vec<_> = closure(dep).into_iter().collect();
        assert_eq!(
            found,
            ["kernel/a/ip_vs.ko", "kernel/a/ip_vs_rr.ko", "kernel/lib/odd.ko", "kernel/net/veth.ko.xz"]
        );
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(numbers("/c/6.1.0-56-cloud-amd64") > numbers("/c/6.1.0-9-cloud-amd64"));
    }
}
