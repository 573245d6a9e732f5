//! Builds image archives for tests, good ones and broken ones, byte by byte with the `tar` crate.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// `sha256:<hex>` of some bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// This machine as images name it.
pub(crate) fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A layer's tar stream.
pub(crate) struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Layer {
    pub(crate) fn new() -> Self {
        Layer { tar: tar::Builder::new(Vec::new()) }
    }

    pub(crate) fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        header
    }

    /// Adds an entry whatever its name is: the crate's own methods refuse hostile ones.
    pub(crate) fn raw(mut self, name: &str, link: &str, mut header: tar::Header, data: &[u8]) -> Self {
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        if header.size().is_ok_and(|size| size == 0) {
            header.set_size(data.len() as u64);
        }
        header.set_cksum();
        self.tar.append(&header, data).expect("append to a tar in memory");
        self
    }

    pub(crate) fn file(self, name: &str, content: &str) -> Self {
        self.raw(name, "", Self::header(tar::EntryType::Regular, 0o644), content.as_bytes())
    }

    pub(crate) fn bytes(self, name: &str, content: &[u8]) -> Self {
        self.raw(name, "", Self::header(tar::EntryType::Regular, 0o644), content)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.raw(name, "", Self::header(tar::EntryType::Directory, 0o755), &[])
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(name, target, Self::header(tar::EntryType::Symlink, 0o777), &[])
    }

    pub(crate) fn hardlink(self, name: &str, target: &str) -> Self {
        self.raw(name, target, Self::header(tar::EntryType::Link, 0o644), &[])
    }

    pub(crate) fn device(self, name: &str, kind: tar::EntryType, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, 0o666);
        header.set_device_major(major).expect("a gnu header");
        header.set_device_minor(minor).expect("a gnu header");
        self.raw(name, "", header, &[])
    }

    /// An entry with pax records, such as extended attributes.
    pub(crate) fn pax(mut self, records: &[(&str, &[u8])], name: &str, mode: u32, content: &[u8]) -> Self {
        self.tar.append_pax_extensions(records.iter().copied()).expect("append pax records");
        self.raw(name, "", Self::header(tar::EntryType::Regular, mode), content)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.tar.into_inner().expect("finish a tar in memory")
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compress in memory");
    encoder.finish().expect("compress in memory")
}

/// The files of an archive, by name.
#[derive(Clone, Default)]
pub(crate) struct Archive {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) index: Vec<Value>,
}

impl Archive {
    /// An archive with one image named `name` of `layers`, compressed.
    pub(crate) fn of(name: &str, layers: &[Vec<u8>]) -> Self {
        let mut archive = Archive::default();
        archive.add(name, layers, true, &[]);
        archive
    }

    pub(crate) fn blob(&mut self, bytes: Vec<u8>) -> String {
        let digest = digest(&bytes);
        self.files.insert(blob_path(&digest), bytes);
        digest
    }

    /// Adds an image; `diff_ids` replaces the true ones where it is not empty.
    pub(crate) fn add(&mut self, name: &str, layers: &[Vec<u8>], compress: bool, diff_ids: &[String]) {
        let true_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
        let diff_ids = if diff_ids.is_empty() { &true_ids } else { diff_ids };
        let config = json!({
            "architecture": arch(), "os": "linux", "created": "2026-01-02T03:04:05Z",
            "config": {
                "Entrypoint": ["/bin/web"], "Cmd": ["--port", "80"], "Env": ["PATH=/bin", "EMPTY=", "A=b=c"],
                "User": "web:www", "WorkingDir": "/srv", "StopSignal": "SIGINT",
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let mut described = Vec::new();
        for layer in layers {
            let blob = if compress { gzip(layer) } else { layer.clone() };
            let size = blob.len();
            let kind = if compress { "tar+gzip" } else { "tar" };
            described.push(json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.{kind}"),
                "digest": self.blob(blob), "size": size,
            }));
        }
        let entry = self.manifest(&config, &described);
        self.name(name, entry);
    }

    /// Adds a manifest; returns its index entry without a name.
    pub(crate) fn manifest(&mut self, config: &Value, layers: &[Value]) -> Value {
        let config = config.to_string().into_bytes();
        let size = config.len();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json", "digest": self.blob(config), "size": size,
            },
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        let size = manifest.len();
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.blob(manifest), "size": size,
        })
    }

    /// Puts an entry into the index, named unless `name` is empty.
    pub(crate) fn name(&mut self, name: &str, mut entry: Value) {
        if !name.is_empty() {
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        self.index.push(entry);
    }

    fn all(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = self.files.clone();
        let index = json!({"schemaVersion": 2, "manifests": self.index});
        files.entry("index.json".to_owned()).or_insert_with(|| index.to_string().into_bytes());
        files.entry("oci-layout".to_owned()).or_insert_with(|| br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        files
    }

    pub(crate) fn tar(&self, path: &Path) -> PathBuf {
        let mut builder = tar::Builder::new(std::fs::File::create(path).expect("make the archive"));
        for (name, bytes) in self.all() {
            let mut header = Layer::header(tar::EntryType::Regular, 0o644);
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, &bytes[..]).expect("write the archive");
        }
        builder.finish().expect("write the archive");
        path.to_owned()
    }

    pub(crate) fn layout(&self, dir: &Path) -> PathBuf {
        for (name, bytes) in self.all() {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("make the layout");
            std::fs::write(path, bytes).expect("write the layout");
        }
        dir.to_owned()
    }
}

pub(crate) fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"))
}
