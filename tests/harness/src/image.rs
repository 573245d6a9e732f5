//! The images that suites run in pods, made by `cargo xtask image`: no registry, no container tool.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use crate::netns::checked;

/// The name by which pods ask for [`echo`]: entrypoint `/echo`, HTTP and UDP on port 8080 (see `examples/echo`).
pub const ECHO: &str = "localhost/echo:1";
/// The name by which pods ask for [`busybox`]: a shell and its tools in `/bin`.
pub const BUSYBOX: &str = "localhost/busybox:1";

/// The directory that holds the archives, where they are made beforehand (`cargo xtask test`, and in guests, which
/// cannot build).
const DIR: &str = "SHEAVE_IMAGES";

/// The OCI archive of a server that names its pod, and of its client.
pub fn echo() -> PathBuf {
    archive("echo.tar")
}

/// The OCI archive of the host's static busybox.
pub fn busybox() -> PathBuf {
    archive("busybox.tar")
}

fn archive(name: &str) -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let dir = MADE.get_or_init(|| match std::env::var_os(DIR) {
        Some(dir) => PathBuf::from(dir),
        None => make(),
    });
    let path = dir.join(name);
    assert!(path.exists(), "{} is missing; `cargo xtask image --busybox` makes it", path.display());
    path
}

fn make() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "--package", "xtask", "--", "image", "--busybox", "--yes"]);
    // Meant for the suites; xtask sets its own for what it builds.
    command.env_remove("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS");
    let printed = checked(command.current_dir(env!("CARGO_MANIFEST_DIR")));
    let first = printed.lines().next().expect("xtask prints where the archive is");
    PathBuf::from(first).parent().expect("archives lie in a directory").to_owned()
}
