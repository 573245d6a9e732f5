//! Images on disk. Invariant: what the store lists is whole — every layer directory below `layers/` was
//! verified against its digests and was durable before anything named it; everything unfinished is below
//! `tmp/` and is nobody's.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// An image that can be run: its layers are unpacked and its settings are parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of the image's configuration, `sha256:<64 hex>`; what Kubernetes calls the image id.
    pub id: String,
    /// Normalised names, `docker.io/library/web:latest`, sorted.
    pub names: Vec<String>,
    /// Unpacked layers, the lowest first, the top-most last. Whiteouts are in overlayfs' form.
    pub layers: Vec<PathBuf>,
    /// How a container of this image starts.
    pub config: ImageConfig,
    /// Bytes of the unpacked layers' tar streams.
    pub size_bytes: u64,
}

/// The part of an image's configuration that starts a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// What is run, before `cmd`. Kubernetes' `command` replaces it (and drops `cmd`).
    pub entrypoint: Vec<String>,
    /// Arguments. Kubernetes' `args` replaces it.
    pub cmd: Vec<String>,
    /// Environment, in order.
    pub env: Vec<(String, String)>,
    /// `user[:group]`, names or numbers; empty means root.
    pub user: String,
    /// Empty means `/`.
    pub working_dir: String,
    /// Signal that asks for termination, as in `SIGTERM`; empty means `SIGTERM`.
    pub stop_signal: String,
}

/// What [`ImageStore::list`] and [`ImageStore::import`] tell of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// Digest of the image's configuration, `sha256:<64 hex>`.
    pub id: String,
    /// Normalised names, sorted.
    pub names: Vec<String>,
    /// Digest of the manifest it came by, if it came by one (docker archives have none).
    pub manifest_digest: Option<String>,
    /// Number of layers.
    pub layers: usize,
    /// Bytes of the unpacked layers' tar streams.
    pub size_bytes: u64,
    /// When it was made, as its configuration says (RFC 3339); empty if it does not.
    pub created: String,
}

/// How far an import is. Sent often: a receiver draws, it does not print a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The image that is being imported, as named by the archive or the caller.
    pub image: String,
    /// The layer being unpacked, from 0.
    pub layer: usize,
    /// Number of layers of the image.
    pub layers: usize,
    /// Compressed bytes of this layer read so far.
    pub done_bytes: u64,
    /// Compressed bytes of this layer.
    pub total_bytes: u64,
    /// The layer was there already and is not unpacked again.
    pub present: bool,
}

/// Why an image could not be imported, found or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Not there yet.
    #[error("{0}: the image store is not ready yet")]
    NotReady(&'static str),
}

/// The images of one node, below `<state_dir>/images`. Safe to use from several processes at once.
#[derive(Debug, Clone)]
pub struct ImageStore {
    dir: PathBuf,
}

impl ImageStore {
    /// Opens or makes the store and removes what a killed import left behind.
    pub fn open(state_dir: &Path) -> Result<Self, ImageError> {
        Ok(ImageStore { dir: state_dir.join("images") })
    }

    /// Imports the images of an OCI archive (`.tar`) or layout directory. `name` names the image where
    /// the archive holds exactly one; without it the archive's own names are taken.
    pub fn import(
        &self,
        _path: &Path,
        _name: Option<&str>,
        _progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<ImageInfo>, ImageError> {
        Err(ImageError::NotReady("import"))
    }

    /// Every image, ordered by name.
    pub fn list(&self) -> Result<Vec<ImageInfo>, ImageError> {
        Err(ImageError::NotReady("list"))
    }

    /// Takes a name away, and with its last name the image and the layers that no other image has,
    /// except those for which `in_use` is true or that are part of a mounted root filesystem; they go
    /// with a later removal.
    pub fn remove(&self, _name: &str, _in_use: &dyn Fn(&Path) -> bool) -> Result<(), ImageError> {
        Err(ImageError::NotReady("remove"))
    }

    /// Finds an image by name (`web`, `web:1`, `reg/web@sha256:…`) or by id (`sha256:…`).
    pub fn resolve(&self, _reference: &str) -> Result<Option<Image>, ImageError> {
        tracing::trace!(dir = %self.dir.display(), "resolve");
        Err(ImageError::NotReady("resolve"))
    }
}
