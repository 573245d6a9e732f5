//! The images of the examples and suites, as OCI archives made here: no registry, no container tool, and the same bytes
//! from the same programs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{build, proc, setup};

/// What manifests call the images.
pub(crate) const ECHO_NAME: &str = "localhost/echo:1";
const BUSYBOX_NAME: &str = "localhost/busybox:1";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the echo server's archive goes; default: echo.tar in the directory for images
    #[arg(long)]
    out: Option<PathBuf>,
    /// Also make an image of the host's busybox, for the suites
    #[arg(long)]
    busybox: bool,
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::ensure(&[setup::Group::Test], args.yes)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => dir()?.join("echo.tar"),
    };
    echo(&out)?;
    println!("{}", out.display());
    if args.busybox {
        println!("{}", busybox()?.display());
    }
    Ok(())
}

/// Where images go unless told otherwise.
pub(crate) fn dir() -> Result<PathBuf> {
    let dir = proc::target_dir()?.join("xtask/images");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    Ok(dir)
}

/// Makes every image that suites use and returns the directory.
pub(crate) fn all() -> Result<PathBuf> {
    let dir = dir()?;
    echo(&dir.join("echo.tar"))?;
    busybox()?;
    Ok(dir)
}

/// Builds the echo server and packs it.
pub(crate) fn echo(out: &Path) -> Result<()> {
    let program = build::program("sheave-echo", "echo", false)?;
    let config = json!({
        "Entrypoint": ["/echo"],
        "Env": ["PATH=/"],
        "ExposedPorts": {"8080/tcp": {}, "8080/udp": {}},
    });
    pack(ECHO_NAME, &[("echo", &program)], &[], config, out)
}

/// Packs the host's static busybox, with a link for each of its tools.
pub(crate) fn busybox() -> Result<PathBuf> {
    let program = Path::new("/bin/busybox");
    let tools = proc::output(std::process::Command::new(program).arg("--list"))?;
    let names: Vec<String> = tools.lines().filter(|t| *t != "busybox").map(|t| format!("bin/{t}")).collect();
    let links: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "busybox")).collect();
    let config = json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]});
    let out = dir()?.join("busybox.tar");
    pack(BUSYBOX_NAME, &[("bin/busybox", program)], &links, config, &out)?;
    Ok(out)
}

/// Writes an OCI archive with one layer: `files` (name, content's place) and `links` (name, target).
fn pack(
    name: &str,
    files: &[(&str, &Path)],
    links: &[(&str, &str)],
    config: Value,
    out: &Path,
) -> Result<()> {
    let layer = layer(files, links)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        // Not compressed: it never leaves this host, and unpacking is what a first pod waits for.
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] =
        json!({"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name});
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    let mut archive = tar::Builder::new(Vec::new());
    put(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    put(&mut archive, "index.json", 0o644, index.to_string().as_bytes())?;
    for blob in [&config, &manifest, &layer] {
        put(&mut archive, &format!("blobs/sha256/{}", &digest(blob)["sha256:".len()..]), 0o644, blob)?;
    }
    let bytes = archive.into_inner().context("end the archive")?;
    // Whole or not at all: suites may be reading the one that is replaced.
    let part = out.with_extension(format!("part-{}", std::process::id()));
    fs::write(&part, bytes).with_context(|| format!("write {}", part.display()))?;
    fs::rename(&part, out).with_context(|| format!("write {}", out.display()))
}

fn layer(files: &[(&str, &Path)], links: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    let mut parents: Vec<&str> =
        files.iter().filter_map(|(name, _)| name.rsplit_once('/')).map(|(dir, _)| dir).collect();
    parents.push("tmp");
    for dir in parents {
        let mut header = header(if dir == "tmp" { 0o1777 } else { 0o755 }, 0);
        header.set_entry_type(tar::EntryType::Directory);
        layer.append_data(&mut header, format!("{dir}/"), std::io::empty()).context("add a directory")?;
    }
    for (name, path) in files {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        put(&mut layer, name, 0o755, &content)?;
    }
    for (name, target) in links {
        let mut header = header(0o777, 0);
        header.set_entry_type(tar::EntryType::Symlink);
        layer.append_link(&mut header, name, target).with_context(|| format!("add {name}"))?;
    }
    layer.into_inner().context("end the layer")
}

fn put(archive: &mut tar::Builder<Vec<u8>>, name: &str, mode: u32, content: &[u8]) -> Result<()> {
    archive
        .append_data(&mut header(mode, content.len() as u64), name, content)
        .with_context(|| format!("add {name}"))
}

/// Root's, without a time.
fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    fn entries(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        let entries = archive.entries().expect("a tar file");
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.expect("an entry");
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("its content");
            (entry.path().expect("a path").to_string_lossy().into_owned(), content)
        };
        entries.map(read).collect()
    }

    #[test]
    fn digests_hold_and_bytes_repeat() {
        let dir = std::env::temp_dir().join(format!("sheave-image-test-{}", std::process::id()));
        fs::create_dir(&dir).expect("make a directory");
        let (program, a, b) = (dir.join("p"), dir.join("a.tar"), dir.join("b.tar"));
        fs::write(&program, "program").expect("write");
        for out in [&a, &b] {
            pack("localhost/x:1", &[("bin/p", &program)], &[("bin/q", "p")], json!({}), out).expect("pack");
        }
        let (a, b) = (fs::read(a).expect("read"), fs::read(b).expect("read"));
        fs::remove_dir_all(&dir).expect("remove the directory");
        assert!(a == b, "the same input gave different bytes");
        let archive = entries(&a);
        let blobs: Vec<_> = archive.iter().filter(|(name, _)| name.starts_with("blobs/sha256/")).collect();
        assert_eq!(blobs.len(), 3);
        for (name, content) in blobs {
            assert_eq!(format!("sha256:{}", &name["blobs/sha256/".len()..]), digest(content));
        }
        let layer =
            archive.values().find(|blob| blob.len() % 512 == 0 && blob.len() > 1024).expect("a layer");
        assert_eq!(entries(layer).keys().collect::<Vec<_>>(), ["bin/", "bin/p", "bin/q", "tmp/"]);
    }
}
