//! Compiles `ebpf/prog` for the kernel. Invariant: it never fails where there is merely no BPF toolchain (the crate
//! then exports a stub and says what is missing), and always fails where there is one and the programs don't compile.
//!
//! Two toolchains will do, tried in this order unless `SHEAVE_BPF_TOOLCHAIN` (`prebuilt`, `nightly` or `none`) picks
//! one: a rustc that brings a prebuilt `core` for the target (Debian's `rustc-web` with `libstd-rust-web-dev-bpf`),
//! and a nightly with `rust-src`, which builds `core` itself. Both link with `bpf-linker`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";
/// The objects: the service data plane's, and the network's.
const PROGRAMS: [&str; 2] = ["sheave-ebpf-prog", "sheave-ebpf-net"];
const OVERRIDE: &str = "SHEAVE_BPF_TOOLCHAIN";
/// Crates that use unstable features (`asm_experimental_arch`); named, so that stable rustc allows it for them alone.
const UNSTABLE_CRATES: &str = "aya_ebpf,aya_ebpf_bindings,sheave_ebpf_kernel";

enum Toolchain {
    /// A cargo and a rustc with a prebuilt `core`.
    Prebuilt { cargo: PathBuf, rustc: PathBuf },
    /// `rustup run nightly`.
    Nightly,
}

fn main() {
    let manifest = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR"));
    let ebpf = manifest.parent().expect("ebpf/object has a parent directory").to_path_buf();
    for watched in [
        "prog/src",
        "prog/Cargo.toml",
        "prog/Cargo.lock",
        "core/src",
        "core/Cargo.toml",
        "abi/src",
        "abi/Cargo.toml",
    ] {
        println!("cargo:rerun-if-changed={}", ebpf.join(watched).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed={OVERRIDE}");

    match find_linker().and_then(|linker| Ok((find_toolchain()?, linker))) {
        Ok((toolchain, linker)) => {
            let built = compile(&toolchain, &linker, &ebpf.join("prog"), &out.join("nested"));
            for name in PROGRAMS {
                let from = built.join(name);
                fs::copy(&from, out.join(format!("{name}.o")))
                    .unwrap_or_else(|e| panic!("copying {}: {e}", from.display()));
            }
            println!("cargo:rustc-env=SHEAVE_EBPF_AVAILABLE=1");
            println!("cargo:rustc-env=SHEAVE_EBPF_WHY_NOT=");
        }
        Err(why) => {
            for name in PROGRAMS {
                let object = out.join(format!("{name}.o"));
                fs::write(&object, b"").unwrap_or_else(|e| panic!("writing {}: {e}", object.display()));
            }
            println!("cargo:warning=no eBPF programs in this build: {why}");
            println!("cargo:rustc-env=SHEAVE_EBPF_AVAILABLE=0");
            println!("cargo:rustc-env=SHEAVE_EBPF_WHY_NOT={why}");
        }
    }
}

fn var(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}

/// Where `cargo install` puts programs.
fn cargo_bin() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    Some(home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")))?.join("bin"))
}

/// Not told to cargo by `PATH`, which differs between callers and would rebuild everything each time: what is watched
/// is the linker itself or, where there is none yet, the directory that it will be installed into.
fn find_linker() -> Result<PathBuf, String> {
    let mut places: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    places.extend(cargo_bin());
    let found = places.into_iter().map(|place| place.join("bpf-linker")).find(|linker| linker.is_file());
    match found {
        Some(linker) => {
            println!("cargo:rerun-if-changed={}", linker.display());
            Ok(linker)
        }
        None => {
            watch_installs();
            Err("bpf-linker is not installed (cargo xtask setup does it)".to_owned())
        }
    }
}

fn watch_installs() {
    for bin in cargo_bin().into_iter().chain(["/usr/bin".into()]).filter(|bin| bin.is_dir()) {
        println!("cargo:rerun-if-changed={}", bin.display());
    }
}

fn find_toolchain() -> Result<Toolchain, String> {
    let wanted = env::var(OVERRIDE).unwrap_or_default();
    match wanted.as_str() {
        "none" => return Err(format!("{OVERRIDE}=none")),
        "" | "prebuilt" | "nightly" => {}
        other => panic!("{OVERRIDE}={other}: expected prebuilt, nightly or none"),
    }
    if wanted != "nightly"
        && has_prebuilt_core(Path::new("/usr/bin/rustc"))
        && Path::new("/usr/bin/cargo").is_file()
    {
        return Ok(Toolchain::Prebuilt { cargo: "/usr/bin/cargo".into(), rustc: "/usr/bin/rustc".into() });
    }
    if wanted != "prebuilt" && nightly_has_source() {
        return Ok(Toolchain::Nightly);
    }
    watch_installs();
    Err("neither a rustc with a prebuilt core for bpfel-unknown-none nor a nightly with rust-src \
         (cargo xtask setup installs one)"
        .to_owned())
}

/// First line that a command prints, if it runs and succeeds.
fn answer(command: &mut Command) -> Option<PathBuf> {
    let output = command.output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(text.trim()))
}

fn has_prebuilt_core(rustc: &Path) -> bool {
    let libs = answer(Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]));
    let Some(entries) = libs.and_then(|dir| fs::read_dir(dir).ok()) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn nightly_has_source() -> bool {
    let sysroot = answer(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    sysroot.is_some_and(|root| root.join("lib/rustlib/src/rust/library/core").is_dir())
}

fn compile(toolchain: &Toolchain, linker: &Path, prog: &Path, target_dir: &Path) -> PathBuf {
    let mut cargo = match toolchain {
        Toolchain::Prebuilt { cargo, rustc } => {
            let mut command = Command::new(cargo);
            command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", UNSTABLE_CRATES).arg("build");
            command
        }
        Toolchain::Nightly => {
            let mut command = Command::new("rustup");
            command.env_remove("RUSTC").args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            command
        }
    };
    // What the outer cargo set for the host's build must not reach the kernel's.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let foreign =
            ["CARGO_FEATURE_", "CARGO_CFG_", "CARGO_PKG_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_BUILD_"];
        if foreign.iter().any(|prefix| name.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    for name in
        ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTDOC", "CARGO_MAKEFLAGS", "MAKEFLAGS"]
    {
        cargo.env_remove(name);
    }
    cargo
        .current_dir(prog)
        .env("CARGO_ENCODED_RUSTFLAGS", rust_flags(linker))
        .args(["--release", "--locked", "--quiet", "--target", TARGET, "--target-dir"])
        .arg(target_dir);
    let output = cargo.output().unwrap_or_else(|e| panic!("running {cargo:?}: {e}"));
    if !output.status.success() {
        panic!("the eBPF programs do not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    target_dir.join(TARGET).join("release")
}

fn rust_flags(linker: &Path) -> OsString {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let mut linker_flag = OsString::from("-Clinker=");
    linker_flag.push(linker);
    let flags = [
        OsString::from(format!("--cfg=bpf_target_arch=\"{arch}\"")),
        "-Cdebuginfo=2".into(),
        linker_flag,
        "-Clink-arg=--btf".into(),
        // LLVM 22 crashes expanding some copies of structs in order.
        "-Clink-arg=--disable-expand-memcpy-in-order".into(),
        // 32-bit jumps and atomics with a result; kernels since 5.12.
        "-Ctarget-cpu=v3".into(),
    ];
    flags.join(&OsString::from("\x1f"))
}
