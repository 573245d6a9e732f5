//! Images on disk. Invariant: what the store lists is whole — every layer directory was verified against its digests
//! and was durable before anything named it; everything unfinished is below `tmp/` and is nobody's.
//!
//! `<state_dir>/images/layers/<chain id>/root` holds an unpacked layer with whiteouts in overlayfs' form,
//! `records/<id>.json` an image, `names.json` what names point at. Any number of processes may use it at once.

mod digest;
mod disk;
mod entry;
mod error;
mod layer;
mod manifest;
mod mounted;
mod name;
mod path;
mod source;
mod tree;
mod user;
mod xattr;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use disk::{Hold, Swept};
pub use error::ImageError;
pub use layer::LayerLimits;
pub use user::{UserIds, resolve_user};

use digest::Digest;
use disk::{Disk, Record, Work};
use error::Fault;
use manifest::{Found, FoundLayer, Host};
use name::Reference;
use source::Source;

/// An image that can be run: its layers are unpacked and its settings are parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of the image's configuration, `sha256:<64 hex>`; what Kubernetes calls the image id.
    pub id: String,
    /// Digest of the manifest it came by, if it came by one (docker archives have none).
    pub manifest_digest: Option<String>,
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
    /// `user[:group]`, names or numbers; empty means root. See [`resolve_user`].
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

/// The images of one node, below `<state_dir>/images`. Its methods block; several processes may use it at once.
#[derive(Debug, Clone)]
pub struct ImageStore {
    disk: Disk,
    limits: LayerLimits,
}

impl ImageStore {
    /// Opens or makes the store and removes what killed imports left behind.
    pub fn open(state_dir: &Path) -> Result<Self, ImageError> {
        Self::open_with(state_dir, LayerLimits::default())
    }

    /// The same, with bounds of its own.
    pub fn open_with(state_dir: &Path, limits: LayerLimits) -> Result<Self, ImageError> {
        let disk = Disk::open(state_dir.join("images"))?;
        disk.sweep(&|_| false)?;
        Ok(ImageStore { disk, limits })
    }

    /// Imports the images of an OCI archive (`.tar`), a docker archive or an OCI layout directory. `name` names the
    /// image where there is exactly one; without it the archive's own names are taken. Needs root.
    pub fn import(
        &self,
        path: &Path,
        name: Option<&str>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<ImageInfo>, ImageError> {
        let name = name.map(parse_name).transpose()?;
        let source = Source::open(path)?;
        let found = manifest::images(&source, name.as_ref(), &Host::this())?;
        let imported = self.unpack_all(&source, found, progress);
        // Also after a failure: it may have published some layers.
        let swept = self.disk.sweep(&|_| false);
        let ids = imported?;
        if let Err(error) = swept {
            tracing::warn!(%error, "image layers that nothing needs stay for now");
        }
        let list = self.list()?;
        Ok(list.into_iter().filter(|info| ids.iter().any(|id| id.to_string() == info.id)).collect())
    }

    fn unpack_all(
        &self,
        source: &Source,
        found: Vec<Found>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Digest>, ImageError> {
        let hold = self.disk.hold()?;
        let mut unpacking =
            Unpacking { store: self, source, work: self.disk.work(&hold)?, new: BTreeMap::new(), progress };
        let mut images = Vec::new();
        for image in found {
            images.push(unpacking.image(image)?);
        }
        let new: Vec<Digest> = unpacking.new.keys().cloned().collect();
        self.disk.publish(&unpacking.work, &new)?;
        self.disk.commit(&images)?;
        Ok(images.into_iter().map(|(record, _)| record.id).collect())
    }

    /// Every image, ordered by name.
    pub fn list(&self) -> Result<Vec<ImageInfo>, ImageError> {
        let mut by_id: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (name, id) in self.disk.names()? {
            by_id.entry(id).or_default().push(name);
        }
        let mut list = Vec::new();
        for (id, names) in by_id {
            // Removed between the two reads.
            let Some(record) = self.disk.record(&id)? else { continue };
            list.push(ImageInfo {
                id: id.to_string(),
                names,
                manifest_digest: record.manifest.map(|m| m.to_string()),
                layers: record.layers.len(),
                size_bytes: record.size_bytes,
                created: record.created,
            });
        }
        list.sort_by(|a, b| a.names.cmp(&b.names));
        Ok(list)
    }

    /// Takes a name away, and with its last name the image and the layers that no other image has; an id takes all
    /// names of its image. Layers for which `in_use` is true (it gets their directory) or that are part of a mounted
    /// root filesystem stay until a later sweep.
    pub fn remove(&self, name: &str, in_use: &dyn Fn(&Path) -> bool) -> Result<Swept, ImageError> {
        let not_found = || ImageError::NotFound { name: name.to_owned() };
        let removed = match Digest::parse(name) {
            Ok(wanted) => self.disk.forget(|_, id| *id == wanted)?,
            Err(_) => {
                let reference = parse_name(name)?;
                if reference.digest.is_some() {
                    return Err(ImageError::Name {
                        name: name.to_owned(),
                        problem: "remove an image by name or by id".to_owned(),
                    });
                }
                let wanted = reference.to_string();
                self.disk.forget(|name, _| name == wanted)?
            }
        };
        if !removed {
            return Err(not_found());
        }
        self.sweep(in_use)
    }

    /// Removes layers that nothing needs any more; see [`ImageStore::remove`].
    pub fn sweep(&self, in_use: &dyn Fn(&Path) -> bool) -> Result<Swept, ImageError> {
        self.disk.sweep(in_use)
    }

    /// Keeps layers from being removed between [`ImageStore::resolve`] and the mount of a root filesystem. Hold it
    /// for that long only: while it is held, removed images keep their disk space.
    pub fn hold(&self) -> Result<Hold, ImageError> {
        self.disk.hold()
    }

    /// Finds an image by name (`web`, `web:1`, `reg/web@sha256:…`) or by id (`sha256:…`).
    pub fn resolve(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let names = self.disk.names()?;
        let id = match Digest::parse(reference) {
            Ok(id) => names.values().find(|known| **known == id).cloned(),
            Err(_) => self.find(&names, &parse_name(reference)?)?,
        };
        let Some(id) = id else { return Ok(None) };
        let Some(record) = self.disk.record(&id)? else { return Ok(None) };
        let names = names.into_iter().filter(|(_, known)| *known == id).map(|(name, _)| name).collect();
        Ok(Some(Image {
            id: id.to_string(),
            manifest_digest: record.manifest.map(|m| m.to_string()),
            names,
            layers: record.layers.iter().map(|chain| self.disk.layer_root(chain)).collect(),
            config: record.config,
            size_bytes: record.size_bytes,
        }))
    }

    fn find(&self, names: &disk::Names, wanted: &Reference) -> Result<Option<Digest>, ImageError> {
        let Some(digest) = &wanted.digest else {
            return Ok(names.get(&wanted.to_string()).cloned());
        };
        for (name, id) in names {
            if Reference::parse(name).is_ok_and(|known| known.repository == wanted.repository)
                && self.disk.record(id)?.is_some_and(|record| record.manifest.as_ref() == Some(digest))
            {
                return Ok(Some(id.clone()));
            }
        }
        Ok(None)
    }
}

fn parse_name(name: &str) -> Result<Reference, ImageError> {
    Reference::parse(name).map_err(|problem| ImageError::Name { name: name.to_owned(), problem })
}

/// One import at work.
struct Unpacking<'a> {
    store: &'a ImageStore,
    source: &'a Source,
    work: Work,
    /// Layers unpacked by this import, with their sizes.
    new: BTreeMap<Digest, u64>,
    progress: &'a mut dyn FnMut(Progress),
}

impl Unpacking<'_> {
    fn image(&mut self, found: Found) -> Result<(Record, Vec<String>), ImageError> {
        let label = found.names.first().map_or_else(|| found.id.to_string(), Reference::to_string);
        let mut chains: Vec<Digest> = Vec::new();
        let mut size_bytes: u64 = 0;
        for (at, layer) in found.layers.iter().enumerate() {
            let chain = Digest::chain(chains.last(), &layer.diff_id);
            let place = (label.as_str(), at, found.layers.len());
            size_bytes = size_bytes.saturating_add(self.layer(place, layer, &chain)?);
            chains.push(chain);
        }
        let record = Record {
            id: found.id,
            manifest: found.manifest,
            layers: chains,
            config: image_config(&found.config),
            created: found.config.created().clone().unwrap_or_default(),
            size_bytes,
        };
        Ok((record, found.names.iter().map(Reference::to_string).collect()))
    }

    /// Unpacks a layer unless it is there; returns its size.
    fn layer(
        &mut self,
        (image, at, layers): (&str, usize, usize),
        layer: &FoundLayer,
        chain: &Digest,
    ) -> Result<u64, ImageError> {
        let known = match self.new.get(chain) {
            Some(size) => Some(*size),
            None => self.store.disk.layer_size(chain)?,
        };
        let missing = || ImageError::BlobMissing {
            image: image.to_owned(),
            blob: layer.member.clone(),
            archive: self.source.path().to_owned(),
        };
        let (blob, total_bytes) = self.source.member(&layer.member)?.ok_or_else(missing)?;
        let state = |done_bytes, present| Progress {
            image: image.to_owned(),
            layer: at,
            layers,
            done_bytes,
            total_bytes,
            present,
        };
        if let Some(size) = known {
            (self.progress)(state(total_bytes, true));
            return Ok(size);
        }
        let (root, trash) = self.work.layer(chain)?;
        let open = |dir: &Path| {
            tree::open_store_dir(dir).map_err(|e| ImageError::Io {
                op: "open",
                path: dir.to_owned(),
                source: e.into(),
            })
        };
        let expected = layer::Expected {
            blob: layer.blob.as_ref().map(|(digest, size)| (digest, *size)),
            diff_id: &layer.diff_id,
        };
        let progress = &mut *self.progress;
        let size =
            layer::unpack(blob, &expected, open(&root)?, open(&trash)?, &self.store.limits, &mut |done| {
                progress(state(done, false))
            })
            .and_then(|size| self.noted(chain, size))
            .map_err(|fault| self.failed(fault, image, layer, chain))?;
        self.new.insert(chain.clone(), size);
        Ok(size)
    }

    fn noted(&self, chain: &Digest, size: u64) -> Result<u64, Fault> {
        match self.work.unpacked(chain, size) {
            Ok(()) => Ok(size),
            Err(e) if error::is_disk_full(&e) => Err(Fault::DiskFull { needed_bytes: Some(size) }),
            Err(source) => Err(Fault::Io { op: "note the size of a layer in", source }),
        }
    }

    /// Removes the half layer before saying how much room there is.
    fn failed(&self, fault: Fault, image: &str, layer: &FoundLayer, chain: &Digest) -> ImageError {
        if let Err(error) = self.work.discard_layer(chain) {
            tracing::warn!(%error, "half a layer stays until the import ends");
        }
        fault.of(image, layer.diff_id.short(), self.store.disk.dir())
    }
}

/// What a container needs of an image's configuration.
fn image_config(config: &oci_spec::image::ImageConfiguration) -> ImageConfig {
    let Some(config) = config.config() else { return ImageConfig::default() };
    let env = config.env().iter().flatten().map(|pair| match pair.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (pair.clone(), String::new()),
    });
    ImageConfig {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: env.collect(),
        user: config.user().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone().unwrap_or_default(),
    }
}
