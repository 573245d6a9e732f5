//! Metadata: names, labels, annotations, owners and finalizers.

use serde_json::{Map, Value};

use super::faults::Faults;
use crate::resource::kinds::{self, Kind};
use crate::resource::lifecycle::{FOREGROUND_FINALIZER, ORPHAN_FINALIZER};
use crate::resource::names;
use crate::resource::object::{self, bool_at, items_at, map_at, str_at};
use crate::resource::path::Path;

/// Bytes that all annotations of an object may take together.
const ANNOTATIONS_BYTES_MAX: usize = 256 << 10;

fn name_rule(kind: &Kind) -> fn(&str) -> Result<(), String> {
    if kind == &kinds::SERVICES {
        names::dns1035_label
    } else if kind == &kinds::NAMESPACES {
        names::dns1123_label
    } else {
        names::dns1123_subdomain
    }
}

pub(super) fn object(kind: &Kind, object: &Value, faults: &mut Faults) {
    let meta = Path::Root.key("metadata");
    let name = object::name(object);
    faults.check(&meta.key("name"), name, name_rule(kind)(name));
    if kind.namespaced {
        let namespace = object::namespace(object);
        faults.check(&meta.key("namespace"), namespace, names::dns1123_label(namespace));
    }
    let Some(metadata) = object.get("metadata") else { return };
    labels_and_annotations(metadata, &meta, faults);
    owners(metadata, &meta, faults);
    finalizers(items_at(metadata, &["finalizers"]), &meta.key("finalizers"), faults);
}

/// Labels and annotations of an object or a pod template.
pub(super) fn labels_and_annotations(metadata: &Value, path: &Path<'_>, faults: &mut Faults) {
    if let Some(map) = map_at(metadata, &["labels"]) {
        labels(map, &path.key("labels"), faults);
    }
    let Some(map) = map_at(metadata, &["annotations"]) else { return };
    let path = path.key("annotations");
    let mut size = 0;
    for (key, value) in map {
        size += key.len() + value.as_str().map_or(0, str::len);
        // Annotation keys of old clients have upper-case prefixes.
        faults.check(&path, key, names::qualified_name(&key.to_ascii_lowercase()));
    }
    if size > ANNOTATIONS_BYTES_MAX {
        faults.too_long(&path, ANNOTATIONS_BYTES_MAX);
    }
}

/// A map of labels: metadata, node selectors, service selectors.
pub(super) fn labels(map: &Map<String, Value>, path: &Path<'_>, faults: &mut Faults) {
    for (key, value) in map {
        faults.check(path, key, names::qualified_name(key));
        let value = value.as_str().unwrap_or("");
        if let Err(why) = names::label_value(value) {
            faults.invalid_text(&path.key(key), value, why);
        }
    }
}

fn owners(metadata: &Value, path: &Path<'_>, faults: &mut Faults) {
    let mut controllers = 0;
    super::each(metadata, "ownerReferences", path, faults, |owner, path, faults| {
        for key in ["apiVersion", "kind", "name", "uid"] {
            if str_at(owner, &[key]).is_empty() {
                faults.required(&path.key(key), "");
            }
        }
        if bool_at(owner, &["controller"]) {
            controllers += 1;
            if controllers == 2 {
                faults.forbidden(&path.key("controller"), "only one owner may be the managing controller");
            }
        }
    });
}

pub(super) fn finalizers(list: &[Value], path: &Path<'_>, faults: &mut Faults) {
    for (i, item) in list.iter().enumerate() {
        let name = item.as_str().unwrap_or("");
        let path = path.at(i);
        if let Err(why) = names::qualified_name(name) {
            faults.invalid_text(&path, name, why);
        } else if !name.contains('/')
            && ![FOREGROUND_FINALIZER, ORPHAN_FINALIZER, "kubernetes"].contains(&name)
        {
            faults.invalid_text(
                &path,
                name,
                "a finalizer must have a domain prefix (such as 'example.com/cleanup')",
            );
        }
    }
}

/// What may not change while an object lives.
pub(super) fn change(new: &Value, old: &Value, faults: &mut Faults) {
    if object::is_deleting(old) {
        let before = items_at(old, &["metadata", "finalizers"]);
        let added = items_at(new, &["metadata", "finalizers"]).iter().find(|f| !before.contains(f));
        if let Some(added) = added {
            let meta = Path::Root.key("metadata");
            let path = meta.key("finalizers");
            faults.forbidden(&path, format_args!("no new finalizers can be added if the object is being deleted, found new finalizer {added}"));
        }
    }
}
