//! OpenAPI v3, as much of it as kubectl 1.29 and later read before they write: which kinds are patched where, and
//! that the server checks fields (`fieldValidation`); and the fields' names and types for `kubectl explain`. PATCH
//! does not advertise strategic merge on purpose: kubectl would look for merge keys in the schemas, and without the
//! advertisement it uses those that it was built with.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::discovery::group_names;
use super::kinds::{Kind, Subresource, kinds};
use super::types::schemas;

/// One group-version's document.
#[derive(Debug)]
pub struct Document {
    /// Path below `/openapi/v3/`, such as `api/v1` or `apis/apps/v1`.
    pub path: String,
    /// Upper-case hex digest of the body: the `hash` of the address and the ETag (in quotes).
    pub hash: String,
    /// The JSON body.
    pub body: Vec<u8>,
}

static DOCUMENTS: LazyLock<Vec<Document>> =
    LazyLock::new(|| std::iter::once("").chain(group_names()).map(document_of).collect());

/// The documents of all group-versions.
pub fn documents() -> &'static [Document] {
    &DOCUMENTS
}

/// The document at a path below `/openapi/v3/`.
pub fn document(path: &str) -> Option<&'static Document> {
    DOCUMENTS.iter().find(|d| d.path == path)
}

/// `GET /openapi/v3`: where each document is; the hash in the address lets clients keep it for ever.
pub fn index() -> Value {
    let paths: Map<String, Value> = DOCUMENTS
        .iter()
        .map(|d| {
            let url = format!("/openapi/v3/{}?hash={}", d.path, d.hash);
            (d.path.clone(), json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": paths})
}

fn document_of(group: &str) -> Document {
    let path = if group.is_empty() { "api/v1".to_owned() } else { format!("apis/{group}/v1") };
    let mut paths = Map::new();
    for kind in kinds().iter().filter(|k| k.group == group) {
        let collection = if kind.namespaced {
            format!("/{path}/namespaces/{{namespace}}/{}", kind.plural)
        } else {
            format!("/{path}/{}", kind.plural)
        };
        let item = format!("{collection}/{{name}}");
        paths.insert(collection, collection_item(kind));
        paths.insert(item.clone(), object_item(kind, kind.kind, kind.group, kind.version));
        for sub in kind.subresources.iter().filter(|s| s.verbs.contains(&"patch")) {
            let segment = match sub.sub {
                Subresource::Main => continue,
                other => other.as_str(),
            };
            paths.insert(format!("{item}/{segment}"), object_item(kind, sub.kind, sub.group, sub.version));
        }
    }
    let document = json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1"},
        "paths": paths,
        "components": {"schemas": schemas(kinds().iter().copied().filter(|k| k.group == group))},
    });
    let body = document.to_string().into_bytes();
    let hash = Sha256::digest(&body).iter().map(|b| format!("{b:02X}")).collect();
    Document { path, hash, body }
}

fn query(name: &str, kind: &str) -> Value {
    json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
}

fn operation(action: &str, kind: &str, group: &str, version: &str, writes: bool) -> Value {
    let mut parameters = Vec::new();
    if writes {
        parameters.extend([
            query("dryRun", "string"),
            query("fieldManager", "string"),
            query("fieldValidation", "string"),
        ]);
    }
    if action == "patch" {
        parameters.push(query("force", "boolean"));
    }
    json!({
        "parameters": parameters,
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
    })
}

fn collection_item(kind: &Kind) -> Value {
    json!({
        "get": operation("list", kind.kind, kind.group, kind.version, false),
        "post": operation("post", kind.kind, kind.group, kind.version, true),
    })
}

fn object_item(kind: &Kind, body_kind: &str, group: &str, version: &str) -> Value {
    let mut patch = operation("patch", body_kind, group, version, true);
    let content: Map<String, Value> =
        ["application/apply-patch+yaml", "application/json-patch+json", "application/merge-patch+json"]
            .into_iter()
            .map(|media| (media.to_owned(), json!({"schema": {"type": "object"}})))
            .collect();
    patch["requestBody"] = json!({"content": content, "required": true});
    let mut item = json!({
        "get": operation("get", body_kind, group, version, false),
        "put": operation("put", body_kind, group, version, true),
        "patch": patch,
    });
    if body_kind == kind.kind {
        item["delete"] = operation("delete", body_kind, group, version, false);
    }
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_and_documents_agree() {
        let index = index();
        assert_eq!(index["paths"].as_object().unwrap().len(), 5);
        for d in documents() {
            let url = index["paths"][&d.path]["serverRelativeURL"].as_str().unwrap();
            assert_eq!(url, format!("/openapi/v3/{}?hash={}", d.path, d.hash));
            assert_eq!(d.hash.len(), 64);
            assert!(std::ptr::eq(document(&d.path).unwrap(), d));
        }
        assert!(document("apis/nope/v1").is_none());
    }

    #[test]
    fn every_kind_has_a_checked_patch() {
        for kind in kinds() {
            let path =
                if kind.group.is_empty() { "api/v1".to_owned() } else { format!("apis/{}/v1", kind.group) };
            let body: Value = serde_json::from_slice(&document(&path).unwrap().body).unwrap();
            let found = body["paths"].as_object().unwrap().values().any(|item| {
                let patch = &item["patch"];
                patch["x-kubernetes-group-version-kind"]
                    == json!({"group": kind.group, "version": kind.version, "kind": kind.kind})
                    && patch["parameters"].as_array().unwrap().iter().any(|p| p["name"] == "fieldValidation")
            });
            assert!(found, "{}", kind.plural);
        }
    }
}
