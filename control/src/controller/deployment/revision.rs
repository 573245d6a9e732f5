//! Generations of a Deployment's pod template. Invariant: a template and its ReplicaSet are tied by equality of the
//! template alone; the hash only makes the name, and the revision annotations only tell the order.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::rolling::Bounds;
use crate::controller::claim::controller_reference;
use crate::controller::model::{Deployment, Meta, ReplicaSet, StringMap};
use crate::resource::kinds::DEPLOYMENTS;

pub(super) const HASH_LABEL: &str = "pod-template-hash";
pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub(super) const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub(super) const MAX: &str = "deployment.kubernetes.io/max-replicas";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Letters that can't spell a word, as API names use them.
const SAFE_LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// Whether a ReplicaSet is of this template: equal but for the hash label, and for fields that are null.
pub(super) fn same_template(set: &ReplicaSet, deployment: &Deployment) -> bool {
    essence(&set.spec.template) == essence(&deployment.spec.template)
}

fn essence(template: &Value) -> Value {
    let mut template = without_nulls(template);
    if let Some(labels) = template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(HASH_LABEL);
    }
    template
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), without_nulls(v))).collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}

/// The hash of the template, spelt in safe letters; `collisions` makes another one of the same template.
pub(super) fn template_hash(template: &Value, collisions: Option<i64>) -> String {
    // FNV-1a, 32 bits, over the canonical text: serde_json keeps the keys of a map sorted.
    let mut text = essence(template).to_string();
    if let Some(collisions) = collisions {
        text.push_str(&collisions.to_string());
    }
    let hash =
        text.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let letters = SAFE_LETTERS.len();
    hash.to_string().bytes().map(|digit| char::from(SAFE_LETTERS[usize::from(digit) % letters])).collect()
}

/// The name that the ReplicaSet of the current template gets.
pub(crate) fn new_set_name(deployment: &Deployment) -> String {
    let hash = template_hash(&deployment.spec.template, deployment.status.collision_count);
    format!("{}-{hash}", deployment.metadata.name)
}

/// The revision of a set or a Deployment; 0 if it has none yet.
pub(super) fn revision(meta: &Meta) -> i64 {
    meta.annotation(REVISION).and_then(|r| r.parse().ok()).unwrap_or(0)
}

/// A Deployment's annotations are passed on to its sets, but for those that mean the Deployment itself.
fn inherited(deployment: &Deployment) -> StringMap {
    let own = [LAST_APPLIED, REVISION, REVISION_HISTORY, DESIRED, MAX];
    let annotations = deployment.metadata.annotations.iter();
    annotations.filter(|(k, _)| !own.contains(&k.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// What a set's annotations tell about the size it was given, for the proportions of a later scale.
pub(super) fn size_annotations(bounds: &Bounds) -> StringMap {
    let pairs = [(DESIRED, bounds.replicas), (MAX, bounds.total_max())];
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_string())).collect()
}

/// The annotations of the new set that have to change, so that it is of `revision`. A set that becomes current
/// again (a roll back) keeps the revisions that it had as its history.
pub(super) fn new_set_annotations(deployment: &Deployment, set: &Meta, new_revision: i64) -> StringMap {
    let mut changed: StringMap =
        inherited(deployment).into_iter().filter(|(k, v)| set.annotations.get(k) != Some(v)).collect();
    let old_revision = revision(set);
    if old_revision < new_revision {
        changed.insert(REVISION.to_owned(), new_revision.to_string());
        if old_revision > 0 {
            let mut history: BTreeSet<i64> = set
                .annotation(REVISION_HISTORY)
                .into_iter()
                .flat_map(|h| h.split(','))
                .filter_map(|r| r.parse().ok())
                .collect();
            history.insert(old_revision);
            let text: Vec<String> = history.iter().map(i64::to_string).collect();
            changed.insert(REVISION_HISTORY.to_owned(), text.join(","));
        }
    }
    changed
}

/// The ReplicaSet of the current template, with `replicas` pods.
pub(super) fn new_set(deployment: &Deployment, bounds: &Bounds, new_revision: i64, replicas: i64) -> Value {
    let spec = &deployment.spec;
    let hash = template_hash(&spec.template, deployment.status.collision_count);
    let mut annotations = inherited(deployment);
    annotations.extend(size_annotations(bounds));
    annotations.insert(REVISION.to_owned(), new_revision.to_string());
    let template = with_hash(without_nulls(&spec.template), &hash);
    let mut selector = deployment.spec.selector.json.clone();
    if let Value::Object(selector) = &mut selector {
        put(selector, "matchLabels", HASH_LABEL, &hash);
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": new_set_name(deployment),
            "namespace": deployment.metadata.namespace,
            "labels": template["metadata"]["labels"],
            "annotations": annotations,
            "ownerReferences": [controller_reference(&DEPLOYMENTS, &deployment.metadata)],
        },
        "spec": {
            "replicas": replicas,
            "minReadySeconds": spec.min_ready_seconds,
            "selector": selector,
            "template": template,
        },
    })
}

fn with_hash(mut template: Value, hash: &str) -> Value {
    if let Value::Object(template) = &mut template {
        let metadata = template.entry("metadata").or_insert_with(|| json!({}));
        if let Value::Object(metadata) = metadata {
            put(metadata, "labels", HASH_LABEL, hash);
        }
    }
    template
}

fn put(parent: &mut Map<String, Value>, field: &str, key: &str, value: &str) {
    let map = parent.entry(field).or_insert_with(|| json!({}));
    if !map.is_object() {
        *map = json!({});
    }
    map[key] = json!(value);
}

/// Old sets that fall off the history: the oldest of those that are empty and stay so.
pub(super) fn beyond_history<'a>(deployment: &Deployment, old: &[&'a ReplicaSet]) -> Vec<&'a ReplicaSet> {
    let Some(limit) = deployment.spec.revision_history_limit else { return Vec::new() };
    let mut kept: Vec<&ReplicaSet> = old.iter().copied().filter(|s| !s.metadata.is_deleting()).collect();
    let surplus = kept.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    kept.sort_by_key(|s| (revision(&s.metadata), s.metadata.creation_timestamp));
    kept.into_iter()
        .take(surplus)
        .filter(|s| {
            s.spec.replicas == 0
                && s.status.replicas == 0
                && s.metadata.generation <= s.status.observed_generation
        })
        .collect()
}
