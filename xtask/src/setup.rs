//! What a host needs, found out by looking and installed only after saying what and why. A second run finds nothing
//! to do and says so within a second.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, proc, ui};

/// What the host is to be able to do; a verb asks only for what it uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Group {
    /// Compile the program, the eBPF object included
    Build,
    /// Run the demo
    Demo,
    /// Run every test ring
    Test,
    /// Run the benches' rivals
    Bench,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install without asking
    #[arg(long)]
    yes: bool,
    /// Only say what is missing; exit 1 if anything is
    #[arg(long)]
    check: bool,
    /// For what; default: build and test
    #[arg(value_enum)]
    groups: Vec<Group>,
}

/// Debian packages that serve one purpose.
struct Packages {
    groups: &'static [Group],
    why: &'static str,
    names: &'static [&'static str],
}

/// The compiler part comes from Debian because its `libstd-rust-web-dev-bpf` brings a prebuilt `core` for BPF, which
/// elsewhere takes a nightly compiler; its LLVM must be the one that bpf-linker is built with.
const BPF_COMPILER: Packages = Packages {
    groups: &[Group::Build],
    why: "a Rust compiler with a prebuilt `core` for BPF",
    names: &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"],
};

const PACKAGES: &[Packages] = &[
    Packages {
        groups: &[Group::Build],
        why: "linking, and the libc for static programs",
        names: &["gcc", "g++", "libc6-dev", "binutils"],
    },
    Packages {
        groups: &[Group::Demo, Group::Test],
        why: "network namespaces and links",
        names: &["iproute2"],
    },
    Packages {
        groups: &[Group::Test],
        why: "rules as kube-proxy lays them, which are to be found and removed",
        names: &["nftables", "iptables"],
    },
    Packages {
        groups: &[Group::Test],
        why: "virtual machines with other kernels, and an image for test pods",
        names: &["qemu-system-x86", "busybox-static", "kmod", "xz-utils", "zstd", "lz4"],
    },
    Packages { groups: &[Group::Bench], why: "what the benches compare with", names: &["etcd-server"] },
    Packages {
        groups: &[Group::Test, Group::Bench],
        why: "a runtime whose containers ours are compared with",
        names: &["runc"],
    },
    Packages {
        groups: &[Group::Test, Group::Bench],
        why: "the reference network plugins, which ours is compared and chained with",
        names: &["containernetworking-plugins"],
    },
    Packages {
        groups: &[Group::Test],
        why: "runtimes of others, whose containers our network connects",
        names: &["containerd", "podman"],
    },
];

/// To build bpf-linker; asked for only while it is missing.
const LINKER_PACKAGES: Packages = Packages {
    groups: &[Group::Build],
    why: "to build bpf-linker",
    names: &["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev"],
};

const LINKER_VERSION: &str = "0.13.0";
const LINKER_LLVM: &str = "/usr/lib/llvm-22";

/// Where Debian's BPF `core` lies.
const DEBIAN_BPF: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";

pub(crate) fn main(args: &Args) -> Result<()> {
    let groups = if args.groups.is_empty() { &[Group::Build, Group::Test] } else { args.groups.as_slice() };
    let missing = Missing::look(groups)?;
    if missing.is_empty() {
        println!("nothing is missing");
        return Ok(());
    }
    if args.check {
        missing.print();
        bail!("something is missing; `cargo xtask setup` installs it");
    }
    missing.install(args.yes)
}

/// Installs what `groups` lack, asking first unless `yes`; silent when nothing does.
pub(crate) fn ensure(groups: &[Group], yes: bool) -> Result<()> {
    let mut missing = Missing::look(groups)?;
    // Nothing needs it.
    missing.target = false;
    if missing.is_empty() { Ok(()) } else { missing.install(yes) }
}

/// What the host lacks.
#[derive(Default)]
struct Missing {
    /// Purpose and names of packages to install.
    packages: Vec<(&'static str, Vec<&'static str>)>,
    linker: bool,
    /// The plugin's target.
    target: bool,
}

impl Missing {
    fn look(groups: &[Group]) -> Result<Missing> {
        let mut missing = Missing::default();
        let mut wanted: Vec<&Packages> =
            PACKAGES.iter().filter(|p| p.groups.iter().any(|group| groups.contains(group))).collect();
        if groups.contains(&Group::Build) {
            if !Path::new(DEBIAN_BPF).exists() && !nightly_has_source() {
                wanted.push(&BPF_COMPILER);
            }
            missing.linker = !linker_serves();
            // Without rustup the plugin is linked with the libc that every program is.
            missing.target = proc::find_tool("rustup").is_some() && !has_target(build::SMALL_TARGET);
            if missing.linker {
                wanted.push(&LINKER_PACKAGES);
            }
        }
        let installed = installed_packages(wanted.iter().flat_map(|p| p.names.iter().copied()))?;
        for packages in wanted {
            let names: Vec<_> = packages.names.iter().copied().filter(|n| !installed.contains(*n)).collect();
            if !names.is_empty() {
                missing.packages.push((packages.why, names));
            }
        }
        Ok(missing)
    }

    fn is_empty(&self) -> bool {
        self.packages.is_empty() && !self.linker && !self.target
    }

    fn names(&self) -> Vec<&'static str> {
        self.packages.iter().flat_map(|(_, names)| names.iter().copied()).collect()
    }

    fn print(&self) {
        eprintln!("To be installed:");
        for (why, names) in &self.packages {
            eprintln!("  apt packages {}: {why}", names.join(" "));
        }
        if self.linker {
            eprintln!("  bpf-linker {LINKER_VERSION} by `cargo install`: links the eBPF object");
        }
        if self.target {
            eprintln!("  target {} by `rustup target add`: a smaller network plugin", build::SMALL_TARGET);
        }
    }

    fn install(&self, yes: bool) -> Result<()> {
        self.print();
        if !yes {
            if !ui::interactive() {
                bail!("not installed: nobody to ask; pass --yes, or run `cargo xtask setup --yes`");
            }
            if !ui::confirm("Install now?")? {
                bail!("not installed");
            }
        }
        self.install_packages()?;
        if self.linker {
            install_linker()?;
        }
        if self.target {
            // The plugin is built without it, too.
            if let Err(error) = add_target() {
                eprintln!("The network plugin will be larger: {error:#}");
            }
        }
        rebuild_object()
    }

    fn install_packages(&self) -> Result<()> {
        let names = self.names();
        if names.is_empty() {
            return Ok(());
        }
        let by_hand = format!("apt-get install --no-install-recommends {}", names.join(" "));
        if proc::find("apt-get").is_none() {
            bail!(
                "this host has no apt-get; install what these Debian packages hold, then try again: {}",
                names.join(" ")
            );
        }
        if !is_root()? {
            bail!("installing packages takes root: run this verb as root, or by hand: sudo {by_hand}");
        }
        let install = || {
            let mut apt = Command::new("apt-get");
            apt.args(["install", "-y", "--no-install-recommends"]).args(&names);
            apt.env("DEBIAN_FRONTEND", "noninteractive");
            ui::step(&format!("apt-get install ({} packages)", names.len()), &mut apt)
        };
        // The package lists may be missing or too old to fetch from; refreshing them always would cost seconds.
        if all_known(&names)? && install().is_ok() {
            return Ok(());
        }
        ui::step("apt-get update", Command::new("apt-get").arg("update"))?;
        install()
    }
}

fn install_linker() -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["install", "bpf-linker", "--locked", "--version", LINKER_VERSION]);
    cargo.args(["--no-default-features", "--features", "llvm-22", "--force"]).env("LLVM_PREFIX", LINKER_LLVM);
    ui::step(&format!("cargo install bpf-linker {LINKER_VERSION} (some minutes)"), &mut cargo)
}

fn add_target() -> Result<()> {
    let rustup = proc::find_tool("rustup").context("rustup is gone")?;
    let mut add = Command::new(rustup);
    add.args(["target", "add", build::SMALL_TARGET]);
    ui::step(&format!("rustup target add {}", build::SMALL_TARGET), &mut add)
}

/// True if the compiler has the standard library for `target`.
pub(crate) fn has_target(target: &str) -> bool {
    let sysroot = proc::output(Command::new("rustc").args(["--print", "sysroot"]));
    sysroot.is_ok_and(|dir| Path::new(dir.trim()).join("lib/rustlib").join(target).join("lib").exists())
}

/// What was built without a BPF toolchain holds no programs; cargo does not notice by itself that one has come.
fn rebuild_object() -> Result<()> {
    let script = proc::root().join("ebpf/object/build.rs");
    let file = std::fs::File::options().append(true).open(&script);
    let touched = file.and_then(|file| file.set_modified(std::time::SystemTime::now()));
    touched.with_context(|| format!("touch {}", script.display()))
}

/// True if a bpf-linker is there that is not older than the one we build.
fn linker_serves() -> bool {
    let Some(path) = proc::find_tool("bpf-linker") else { return false };
    let Ok(text) = proc::output(Command::new(path).arg("--version")) else { return false };
    let Some(version) = text.split_whitespace().nth(1) else { return false };
    numbers(version) >= numbers(LINKER_VERSION)
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|part| part.parse().ok()).collect()
}

/// A nightly compiler with the library's source builds `core` for BPF itself.
fn nightly_has_source() -> bool {
    let sysroot =
        proc::output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    sysroot.is_ok_and(|dir| Path::new(dir.trim()).join("lib/rustlib/src/rust/library/core").exists())
}

fn installed_packages<'a>(names: impl Iterator<Item = &'a str>) -> Result<BTreeSet<String>> {
    if proc::find("dpkg-query").is_none() {
        return Ok(BTreeSet::new());
    }
    // Unknown packages make dpkg-query fail after it has printed the known ones.
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(names);
    let output = proc::capture(&mut query)?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(|line| line.strip_suffix(" installed")).map(str::to_owned).collect())
}

/// True if apt's lists know a version of every package.
fn all_known(names: &[&str]) -> Result<bool> {
    let text = proc::output(Command::new("apt-cache").arg("policy").args(names).env("LC_ALL", "C"))?;
    let candidates =
        text.lines().filter(|l| l.trim_start().starts_with("Candidate:") && !l.contains("(none)"));
    Ok(candidates.count() == names.len())
}

/// Read from /proc because std has no call for it and a crate for one number is too much.
pub(crate) fn is_root() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let uids =
        status.lines().find_map(|line| line.strip_prefix("Uid:")).context("/proc/self/status has no Uid")?;
    Ok(uids.split_whitespace().nth(1) == Some("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(numbers("0.13.0") >= numbers(LINKER_VERSION));
        assert!(numbers("0.14.1-beta") > numbers("0.13.0"));
        assert!(numbers("0.9.15") < numbers("0.13.0"));
    }

    #[test]
    fn no_package_is_named_twice() {
        let all: Vec<_> =
            PACKAGES.iter().chain([&BPF_COMPILER, &LINKER_PACKAGES]).flat_map(|p| p.names).collect();
        assert_eq!(all.len(), all.iter().collect::<BTreeSet<_>>().len());
    }
}
