//! Starting other programs: a failure always names the command line that failed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The command line, as somebody would type it.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs to the end with this process's own output; an error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", line(command)))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// Runs to the end, collecting what it prints. The verdict is the caller's.
pub(crate) fn capture(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("start {}", line(command)))
}

/// Runs to the end and returns what it printed; an error with its standard error if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = capture(command)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}: {}", line(command), output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The program's place in PATH, if it has one.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Like [`find`], also where `cargo install` puts programs, which need not be in PATH.
pub(crate) fn find_tool(program: &str) -> Option<PathBuf> {
    find(program).or_else(|| cargo_bin().map(|dir| dir.join(program)).filter(|file| file.is_file()))
}

fn cargo_bin() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| std::env::home_dir().map(|dir| dir.join(".cargo"))).map(|dir| dir.join("bin"))
}

/// The workspace's directory.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// cargo, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Last, so that it changes nothing where the person has it already.
    let dirs = std::env::split_paths(&path).chain(cargo_bin());
    if let Ok(path) = std::env::join_paths(dirs) {
        command.env("PATH", path);
    }
    command
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> Result<&'static Path> {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    if let Some(dir) = DIR.get() {
        return Ok(dir);
    }
    let text = output(cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    let data: Value = serde_json::from_str(&text).context("read cargo's metadata")?;
    let dir = data["target_directory"].as_str().context("cargo's metadata names no target directory")?;
    Ok(DIR.get_or_init(|| dir.into()))
}
