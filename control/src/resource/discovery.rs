//! Discovery: what is served, told from the kinds table in the legacy and the aggregated form. The documents never
//! change while the program runs.

use serde_json::{Value, json};

use super::kinds::{Kind, SubresourceKind, VERBS, kinds};

/// The two aggregated forms: kubectl up to 1.29 asks for the beta, later ones for v2. Both have one shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aggregated {
    /// `apidiscovery.k8s.io/v2`.
    V2,
    /// `apidiscovery.k8s.io/v2beta1`.
    V2Beta1,
}

impl Aggregated {
    /// The version's name.
    pub fn version(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V2Beta1 => "v2beta1",
        }
    }

    /// The Content-Type of the answer; clients compare it literally.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::V2 => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            Self::V2Beta1 => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
        }
    }
}

/// The API groups (without the core group) in their order, each with its versions.
pub fn group_names() -> Vec<&'static str> {
    let mut names = Vec::new();
    for kind in kinds() {
        if !kind.group.is_empty() && !names.contains(&kind.group) {
            names.push(kind.group);
        }
    }
    names
}

fn kinds_of(group: &str) -> impl Iterator<Item = &'static Kind> {
    kinds().iter().copied().filter(move |k| k.group == group)
}

/// `GET /api`, legacy form. `server_address` is `host:port` as clients reach it.
pub fn core_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}],
    })
}

fn group_body(group: &str) -> Value {
    let version = json!({"groupVersion": format!("{group}/v1"), "version": "v1"});
    json!({"name": group, "versions": [version], "preferredVersion": version})
}

/// `GET /apis`, legacy form.
pub fn groups() -> Value {
    let groups: Vec<Value> = group_names().into_iter().map(group_body).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `GET /apis/<group>`; `None` for groups that are not served.
pub fn group(group: &str) -> Option<Value> {
    if group.is_empty() || kinds_of(group).next().is_none() {
        return None;
    }
    let mut body = group_body(group);
    body["kind"] = json!("APIGroup");
    body["apiVersion"] = json!("v1");
    Some(body)
}

/// `GET /api/v1` (empty group) and `GET /apis/<group>/<version>`; `None` when not served.
pub fn resources(group: &str, version: &str) -> Option<Value> {
    let mut list = Vec::new();
    for kind in kinds_of(group).filter(|k| k.version == version) {
        list.push(legacy_resource(kind));
        list.extend(kind.subresources.iter().map(|sub| legacy_subresource(kind, sub)));
    }
    let first = kinds_of(group).next()?;
    (!list.is_empty()).then(|| {
        json!({
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": first.api_version(),
            "resources": list,
        })
    })
}

fn legacy_resource(kind: &Kind) -> Value {
    let mut out = json!({
        "name": kind.plural,
        "singularName": kind.singular,
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": VERBS,
    });
    if !kind.short_names.is_empty() {
        out["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        out["categories"] = json!(kind.categories);
    }
    out
}

fn legacy_subresource(kind: &Kind, sub: &SubresourceKind) -> Value {
    let mut out = json!({
        "name": format!("{}/{}", kind.plural, sub.sub.as_str()),
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": sub.kind,
        "verbs": sub.verbs,
    });
    if sub.group != kind.group {
        out["group"] = json!(sub.group);
        out["version"] = json!(sub.version);
    }
    out
}

/// The aggregated document: of `/api` with `core`, of `/apis` without.
pub fn aggregated(core: bool, form: Aggregated) -> Value {
    let groups = if core { vec![""] } else { group_names() };
    let items: Vec<Value> = groups.into_iter().map(aggregated_group).collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{}", form.version()),
        "metadata": {},
        "items": items,
    })
}

fn aggregated_group(group: &str) -> Value {
    let resources: Vec<Value> = kinds_of(group).map(aggregated_resource).collect();
    let metadata = if group.is_empty() { json!({}) } else { json!({"name": group}) };
    json!({
        "metadata": metadata,
        "versions": [{"version": "v1", "resources": resources, "freshness": "Current"}],
    })
}

fn aggregated_resource(kind: &Kind) -> Value {
    let mut out = json!({
        "resource": kind.plural,
        "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": VERBS,
    });
    if !kind.short_names.is_empty() {
        out["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        out["categories"] = json!(kind.categories);
    }
    if !kind.subresources.is_empty() {
        let subresources = kind.subresources.iter().map(|sub| {
            json!({
                "subresource": sub.sub.as_str(),
                "responseKind": {"group": sub.group, "version": sub.version, "kind": sub.kind},
                "verbs": sub.verbs,
            })
        });
        out["subresources"] = subresources.collect();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_lists_every_kind_and_subresource() {
        let core = resources("", "v1").unwrap();
        let names: Vec<&str> =
            core["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
        for expected in ["pods", "pods/log", "pods/binding", "pods/status", "namespaces/finalize", "services"]
        {
            assert!(names.contains(&expected), "{expected} missing in {names:?}");
        }
        assert_eq!(core["groupVersion"], "v1");
        let apps = resources("apps", "v1").unwrap();
        assert_eq!(apps["groupVersion"], "apps/v1");
        let scale =
            apps["resources"].as_array().unwrap().iter().find(|r| r["name"] == "deployments/scale").unwrap();
        assert_eq!((&scale["group"], &scale["kind"]), (&json!("autoscaling"), &json!("Scale")));
        assert_eq!(resources("apps", "v1beta1"), None);
        assert_eq!(resources("nope", "v1"), None);
    }

    #[test]
    fn groups_are_listed_once() {
        let groups = groups();
        let names: Vec<&Value> = groups["groups"].as_array().unwrap().iter().map(|g| &g["name"]).collect();
        assert_eq!(names, ["apps", "discovery.k8s.io", "coordination.k8s.io", "networking.k8s.io"]);
        assert_eq!(group("apps").unwrap()["preferredVersion"]["groupVersion"], "apps/v1");
        assert_eq!(group(""), None);
        assert_eq!(group("nope"), None);
    }

    #[test]
    fn aggregated_holds_the_same_resources() {
        for form in [Aggregated::V2, Aggregated::V2Beta1] {
            let mut count = 0;
            for core in [true, false] {
                let document = aggregated(core, form);
                assert_eq!(document["apiVersion"], format!("apidiscovery.k8s.io/{}", form.version()));
                for item in document["items"].as_array().unwrap() {
                    count += item["versions"][0]["resources"].as_array().unwrap().len();
                }
            }
            assert_eq!(count, kinds().len());
            assert!(form.content_type().contains(&format!("v={};", form.version())));
        }
    }
}
