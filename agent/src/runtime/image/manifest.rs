//! From an archive's index to the images in it. Invariant: what is returned has been compared with the digests that
//! lead to it, fits this machine, and has as many layers as diff ids.

use std::collections::BTreeMap;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;

use super::digest::Digest;
use super::error::ImageError;
use super::name::Reference;
use super::source::Source;
use crate::limits;

/// Annotation of an index entry: the whole name (containerd, docker, buildkit).
const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// Annotation of an index entry: a name, or only a tag (image specification).
const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";
/// Annotation of entries that are no images (buildkit's attestations).
const ATTESTATION_ANNOTATION: &str = "vnd.docker.reference.type";

/// An image of an archive, ready to be unpacked.
pub(super) struct Found {
    pub(super) names: Vec<Reference>,
    pub(super) manifest: Option<Digest>,
    pub(super) id: Digest,
    pub(super) config: ImageConfiguration,
    /// The lowest first.
    pub(super) layers: Vec<FoundLayer>,
}

/// One of its layers.
pub(super) struct FoundLayer {
    /// Name in the archive.
    pub(super) member: String,
    /// What the manifest says of the blob; docker archives say nothing.
    pub(super) blob: Option<(Digest, u64)>,
    pub(super) diff_id: Digest,
}

/// The machine that images must fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// As images name it: `amd64`, `arm64`.
    pub(super) arch: String,
}

impl Host {
    /// This machine.
    pub(super) fn this() -> Self {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Host { arch: arch.to_owned() }
    }
}

/// Reads every image of `source` that fits `host`. `name`, where given, replaces the archive's own name.
pub(super) fn images(
    source: &Source,
    name: Option<&Reference>,
    host: &Host,
) -> Result<Vec<Found>, ImageError> {
    let found = if let Some(index) = source.document("index.json")? {
        oci_images(source, &index, host)?
    } else if let Some(manifest) = source.document("manifest.json")? {
        docker_images(source, &manifest)?
    } else {
        let problem = "has neither index.json (OCI) nor manifest.json (docker): it is not an image archive";
        return Err(ImageError::Archive { path: source.path().to_owned(), problem: problem.to_owned() });
    };
    for image in &found {
        check_platform(image, host)?;
    }
    named(source, found, name)
}

/// Applies `name`, and refuses images that would have none.
fn named(source: &Source, mut found: Vec<Found>, name: Option<&Reference>) -> Result<Vec<Found>, ImageError> {
    let archive = |problem: String| ImageError::Archive { path: source.path().to_owned(), problem };
    match (name, found.as_mut_slice()) {
        (_, []) => return Err(archive("holds no image".to_owned())),
        (Some(name), [only]) => only.names = vec![name.clone()],
        (Some(_), many) => {
            let count = many.len();
            return Err(archive(format!(
                "holds {count} images, so one name can't be given; leave --name out"
            )));
        }
        (None, many) => {
            if let Some(nameless) = many.iter().find(|image| image.names.is_empty()) {
                return Err(archive(format!(
                    "does not name its image {}; give a name with --name",
                    nameless.id
                )));
            }
        }
    }
    Ok(found)
}

fn document_error(image: &str, problem: impl Into<String>) -> ImageError {
    ImageError::Document { image: image.to_owned(), problem: problem.into() }
}

fn parse<'a, T: Deserialize<'a>>(image: &str, what: &str, bytes: &'a [u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes)
        .map_err(|e| document_error(image, format!("its {what} is not valid ({e}); export it again")))
}

/// The names that an index entry gives; bare tags name nothing.
fn names_of(entry: &Descriptor) -> Result<Vec<Reference>, ImageError> {
    let annotations = entry.annotations().as_ref();
    let get = |key| annotations.and_then(|a| a.get(key)).filter(|v| !v.is_empty());
    let text = match (get(NAME_ANNOTATION), get(REF_ANNOTATION)) {
        (Some(name), _) => name,
        (None, Some(name)) if !is_bare_tag(name) => name,
        _ => return Ok(Vec::new()),
    };
    let reference = Reference::parse(text).map_err(|problem| ImageError::Name {
        name: text.clone(),
        problem: format!("{problem}; give --name"),
    })?;
    Ok(vec![reference])
}

/// `latest`, `1.2`, `v3`: a word that is more likely a tag than a name.
fn is_bare_tag(text: &str) -> bool {
    let number = text.strip_prefix('v').unwrap_or(text);
    !text.contains(['/', ':', '@']) && (text == "latest" || number.starts_with(|c: char| c.is_ascii_digit()))
}

fn oci_images(source: &Source, index: &[u8], host: &Host) -> Result<Vec<Found>, ImageError> {
    let shown = source.path().display().to_string();
    let index: ImageIndex = parse(&shown, "index.json", index)?;
    // One name may stand before several platforms.
    let mut groups: BTreeMap<Vec<Reference>, Vec<Descriptor>> = BTreeMap::new();
    for entry in index.manifests().iter().filter(|entry| is_image(entry)) {
        groups.entry(names_of(entry)?).or_default().push(entry.clone());
    }
    let mut found: Vec<Found> = Vec::new();
    for (names, entries) in groups {
        let label = names.first().map_or_else(|| shown.clone(), Reference::to_string);
        let manifest = resolve(source, &label, &entries, host, 0)?;
        match found.iter_mut().find(|image| image.manifest.as_ref() == Some(&manifest)) {
            Some(image) => image.names.extend(names),
            None => found.push(oci_image(source, &label, names, manifest)?),
        }
    }
    Ok(found)
}

fn is_image(entry: &Descriptor) -> bool {
    let attestation = entry.annotations().as_ref().is_some_and(|a| a.contains_key(ATTESTATION_ANNOTATION));
    !attestation && (is_index(entry) || is_manifest(entry))
}

fn is_index(entry: &Descriptor) -> bool {
    let docker = "application/vnd.docker.distribution.manifest.list.v2+json";
    *entry.media_type() == MediaType::ImageIndex || entry.media_type().as_ref() == docker
}

fn is_manifest(entry: &Descriptor) -> bool {
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    *entry.media_type() == MediaType::ImageManifest || entry.media_type().as_ref() == docker
}

/// Follows indexes down to the manifest that fits `host`.
fn resolve(
    source: &Source,
    image: &str,
    entries: &[Descriptor],
    host: &Host,
    depth: usize,
) -> Result<Digest, ImageError> {
    if depth > limits::IMAGE_INDEX_DEPTH_MAX {
        let max = limits::IMAGE_INDEX_DEPTH_MAX;
        return Err(document_error(image, format!("its indexes are nested more than {max} deep")));
    }
    let entry = choose(entries, host).map_err(|problem| document_error(image, problem))?;
    let digest = digest_of(image, entry)?;
    if !is_index(entry) {
        return Ok(digest);
    }
    let bytes = blob_document(source, image, &digest)?;
    let index: ImageIndex = parse(image, "index", &bytes)?;
    let inner: Vec<Descriptor> = index.manifests().iter().filter(|e| is_image(e)).cloned().collect();
    resolve(source, image, &inner, host, depth + 1)
}

/// The entry for `host`: one that names its platform, else one that names none.
fn choose<'a>(entries: &'a [Descriptor], host: &Host) -> Result<&'a Descriptor, String> {
    let fits = |entry: &&Descriptor| {
        entry.platform().as_ref().is_some_and(|platform| {
            platform.os().to_string() == "linux" && platform.architecture().to_string() == host.arch
        })
    };
    let silent = |entry: &&Descriptor| entry.platform().is_none();
    entries.iter().find(fits).or_else(|| entries.iter().find(silent)).ok_or_else(|| {
        let have: Vec<String> = entries.iter().filter_map(|e| e.platform().as_ref()).map(shown).collect();
        let have = if have.is_empty() { "nothing".to_owned() } else { have.join(", ") };
        format!("it has {have} but nothing for linux/{}; export it for this platform", host.arch)
    })
}

fn shown(platform: &oci_spec::image::Platform) -> String {
    format!("{}/{}", platform.os(), platform.architecture())
}

fn digest_of(image: &str, entry: &Descriptor) -> Result<Digest, ImageError> {
    Digest::parse(entry.digest().as_ref()).map_err(|problem| document_error(image, problem))
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Reads a document by digest and compares it.
fn blob_document(source: &Source, image: &str, digest: &Digest) -> Result<Vec<u8>, ImageError> {
    let name = blob_name(digest);
    let Some(bytes) = source.document(&name)? else {
        let archive = source.path().to_owned();
        return Err(ImageError::BlobMissing { image: image.to_owned(), blob: name, archive });
    };
    let found = Digest::of(&bytes);
    if found != *digest {
        let (expected, found) = (digest.to_string(), found.to_string());
        return Err(ImageError::Digest { image: image.to_owned(), what: name, expected, found });
    }
    Ok(bytes)
}

fn oci_image(
    source: &Source,
    image: &str,
    names: Vec<Reference>,
    digest: Digest,
) -> Result<Found, ImageError> {
    let manifest: ImageManifest = parse(image, "manifest", &blob_document(source, image, &digest)?)?;
    let id = digest_of(image, manifest.config())?;
    let config = configuration(image, &blob_document(source, image, &id)?)?;
    let diff_ids = diff_ids(image, &config, manifest.layers().len())?;
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (layer, diff_id) in manifest.layers().iter().zip(diff_ids) {
        check_media_type(image, layer)?;
        let blob = digest_of(image, layer)?;
        layers.push(FoundLayer { member: blob_name(&blob), blob: Some((blob, layer.size())), diff_id });
    }
    check_members(source, image, &layers)?;
    Ok(Found { names, manifest: Some(digest), id, config, layers })
}

fn configuration(image: &str, bytes: &[u8]) -> Result<ImageConfiguration, ImageError> {
    parse(image, "configuration", bytes)
}

fn diff_ids(image: &str, config: &ImageConfiguration, layers: usize) -> Result<Vec<Digest>, ImageError> {
    let ids = config.rootfs().diff_ids();
    if ids.len() != layers {
        let have = ids.len();
        return Err(document_error(
            image,
            format!("its manifest has {layers} layers, its configuration {have}"),
        ));
    }
    if layers > limits::IMAGE_LAYERS_MAX {
        let max = limits::IMAGE_LAYERS_MAX;
        return Err(document_error(image, format!("it has {layers} layers, more than {max}; squash it")));
    }
    if layers == 0 {
        return Err(document_error(image, "it has no layer, so nothing in it could run"));
    }
    ids.iter().map(|id| Digest::parse(id).map_err(|problem| document_error(image, problem))).collect()
}

fn check_media_type(image: &str, layer: &Descriptor) -> Result<(), ImageError> {
    let kind = layer.media_type().to_string();
    if kind.contains("zstd") {
        let problem =
            "its layers are compressed with zstd, which is not supported yet; export it with gzip layers";
        return Err(document_error(image, problem));
    }
    let known = kind.contains("layer") && kind.contains("tar") || kind.contains("rootfs.diff.tar");
    if known && !kind.contains("encrypted") && !kind.contains("foreign") {
        return Ok(());
    }
    Err(document_error(image, format!("it has a layer of type {kind:?}, which can't be unpacked")))
}

/// Every blob that is needed must be there before the first is unpacked.
fn check_members(source: &Source, image: &str, layers: &[FoundLayer]) -> Result<(), ImageError> {
    for layer in layers {
        if source.member(&layer.member)?.is_none() {
            let archive = source.path().to_owned();
            return Err(ImageError::BlobMissing {
                image: image.to_owned(),
                blob: layer.member.clone(),
                archive,
            });
        }
    }
    Ok(())
}

fn check_platform(image: &Found, host: &Host) -> Result<(), ImageError> {
    let (os, arch) = (image.config.os().to_string(), image.config.architecture().to_string());
    if os == "linux" && arch == host.arch {
        return Ok(());
    }
    let label = image.names.first().map_or_else(|| image.id.to_string(), Reference::to_string);
    let problem =
        format!("it is for {os}/{arch}, this node is linux/{}; export it for this platform", host.arch);
    Err(document_error(&label, problem))
}

/// An entry of a docker archive's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn docker_images(source: &Source, manifest: &[u8]) -> Result<Vec<Found>, ImageError> {
    let shown = source.path().display().to_string();
    let entries: Vec<DockerEntry> = parse(&shown, "manifest.json", manifest)?;
    entries.into_iter().map(|entry| docker_image(source, &shown, entry)).collect()
}

fn docker_image(source: &Source, shown: &str, entry: DockerEntry) -> Result<Found, ImageError> {
    let mut names = Vec::new();
    for tag in entry.repo_tags.unwrap_or_default() {
        let name = Reference::parse(&tag).map_err(|problem| ImageError::Name { name: tag, problem })?;
        names.push(name);
    }
    let image = names.first().map_or_else(|| shown.to_owned(), Reference::to_string);
    let Some(bytes) = source.document(&entry.config)? else {
        let archive = source.path().to_owned();
        return Err(ImageError::BlobMissing { image, blob: entry.config, archive });
    };
    let id = Digest::of(&bytes);
    let config = configuration(&image, &bytes)?;
    let diff_ids = diff_ids(&image, &config, entry.layers.len())?;
    let layers: Vec<FoundLayer> = entry
        .layers
        .into_iter()
        .zip(diff_ids)
        .map(|(member, diff_id)| FoundLayer { member, blob: None, diff_id })
        .collect();
    check_members(source, &image, &layers)?;
    Ok(Found { names, manifest: None, id, config, layers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(value: serde_json::Value) -> Descriptor {
        let mut base = json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{}", "0".repeat(64)), "size": 1,
        });
        for (key, value) in value.as_object().unwrap() {
            base[key] = value.clone();
        }
        serde_json::from_value(base).unwrap()
    }

    fn platform(os: &str, arch: &str) -> Descriptor {
        entry(json!({"platform": {"os": os, "architecture": arch}}))
    }

    #[test]
    fn the_platform_of_the_host_is_chosen() {
        let host = Host { arch: "arm64".to_owned() };
        let entries = [platform("linux", "amd64"), platform("windows", "arm64"), platform("linux", "arm64")];
        assert_eq!(choose(&entries, &host).unwrap(), &entries[2]);
        let silent = [platform("linux", "amd64"), entry(json!({}))];
        assert_eq!(choose(&silent, &host).unwrap(), &silent[1]);
        let error = choose(&entries[..2], &host).unwrap_err();
        assert!(error.contains("linux/amd64, windows/arm64") && error.contains("linux/arm64"), "{error}");
    }

    #[test]
    fn names_come_from_annotations() {
        let name = |annotations: serde_json::Value| {
            let names = names_of(&entry(json!({"annotations": annotations}))).unwrap();
            names.first().map(Reference::to_string)
        };
        assert_eq!(name(json!({REF_ANNOTATION: "latest"})), None);
        assert_eq!(name(json!({REF_ANNOTATION: "v1.2"})), None);
        assert_eq!(name(json!({REF_ANNOTATION: "web"})).unwrap(), "docker.io/library/web:latest");
        assert_eq!(name(json!({REF_ANNOTATION: "r.io/a:2"})).unwrap(), "r.io/a:2");
        assert_eq!(name(json!({REF_ANNOTATION: "1", NAME_ANNOTATION: "r.io/a:1"})).unwrap(), "r.io/a:1");
        assert_eq!(name(json!({})), None);
        assert!(names_of(&entry(json!({"annotations": {REF_ANNOTATION: "../x"}}))).is_err());
    }

    #[test]
    fn attestations_and_unknown_media_types_are_no_images() {
        assert!(is_image(&entry(json!({}))));
        assert!(!is_image(&entry(json!({"annotations": {ATTESTATION_ANNOTATION: "attestation-manifest"}}))));
        assert!(!is_image(&entry(json!({"mediaType": "application/json"}))));
        let docker = "application/vnd.docker.distribution.manifest.v2+json";
        assert!(is_image(&entry(json!({"mediaType": docker}))));
    }

    #[test]
    fn layers_of_other_kinds_are_refused() {
        let check = |kind: &str| check_media_type("i", &entry(json!({"mediaType": kind})));
        for good in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ] {
            check(good).unwrap();
        }
        let zstd = check("application/vnd.oci.image.layer.v1.tar+zstd").unwrap_err().to_string();
        assert!(zstd.contains("zstd") && zstd.contains("not supported yet"), "{zstd}");
        for bad in ["application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "text/plain"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
