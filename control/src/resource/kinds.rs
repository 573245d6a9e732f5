//! The table of API kinds: every kind, subresource and verb that is served is named here and nowhere else.

/// How `metadata.generation` follows the writes of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// The kind carries no generation.
    None,
    /// 1 at creation, plus one with each change of `spec`.
    Spec,
    /// 1 at creation, plus one with each change of anything outside `metadata` and `status`.
    Content,
}

/// One subresource as discovery shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubresourceKind {
    /// Which one.
    pub sub: Subresource,
    /// Group of the body's kind; empty for the core group.
    pub group: &'static str,
    /// Version of the body's kind.
    pub version: &'static str,
    /// Kind of the body.
    pub kind: &'static str,
    /// Verbs in discovery's (sorted) order.
    pub verbs: &'static [&'static str],
}

/// The part of an object that a request addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subresource {
    /// The object itself.
    Main,
    /// `/status`: only `status` changes.
    Status,
    /// `/scale`: a `autoscaling/v1` Scale view of the replica count.
    Scale,
    /// `pods/binding`: names the node of a pod, once.
    Binding,
    /// `pods/log`: text, read only.
    Log,
    /// `namespaces/finalize`: only `spec.finalizers` changes.
    Finalize,
}

impl Subresource {
    /// The path segment; empty for [`Subresource::Main`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Main => "",
            Self::Status => "status",
            Self::Scale => "scale",
            Self::Binding => "binding",
            Self::Log => "log",
            Self::Finalize => "finalize",
        }
    }
}

/// Verbs of every main resource, in discovery's order.
pub const VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

const GET_PATCH_UPDATE: &[&str] = &["get", "patch", "update"];

/// One served API kind. Kinds are compared by address-free equality of group and plural.
#[derive(Debug)]
pub struct Kind {
    /// API group, empty for the core group.
    pub group: &'static str,
    /// API version, `v1` throughout.
    pub version: &'static str,
    /// CamelCase kind.
    pub kind: &'static str,
    /// Lower-case plural: the path segment.
    pub plural: &'static str,
    /// Lower-case singular.
    pub singular: &'static str,
    /// kubectl's abbreviations.
    pub short_names: &'static [&'static str],
    /// Discovery categories, such as `all`.
    pub categories: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether `/status` exists; if so the main endpoint ignores `status`.
    pub status: bool,
    /// Whether `/scale` exists.
    pub scale: bool,
    /// How generation follows writes.
    pub generation: Generation,
    /// Every subresource, in discovery's order.
    pub subresources: &'static [SubresourceKind],
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.group == other.group && self.plural == other.plural
    }
}

impl Eq for Kind {}

impl Kind {
    /// `v1` or `apps/v1`: the value of an object's `apiVersion`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `pods` or `deployments.apps`: how errors and store keys name the resource.
    pub fn resource_key(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// `PodList` and the like.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// The subresource with this path segment, when the kind has it.
    pub fn subresource(&self, segment: &str) -> Option<&'static SubresourceKind> {
        self.subresources.iter().find(|s| s.sub.as_str() == segment)
    }

    /// True for the kind of this group and plural: `kind.is("apps", "deployments")`.
    pub fn is(&self, group: &str, plural: &str) -> bool {
        self.group == group && self.plural == plural
    }
}

const fn status_of(group: &'static str, kind: &'static str) -> SubresourceKind {
    SubresourceKind { sub: Subresource::Status, group, version: "v1", kind, verbs: GET_PATCH_UPDATE }
}

const SCALE: SubresourceKind = SubresourceKind {
    sub: Subresource::Scale,
    group: "autoscaling",
    version: "v1",
    kind: "Scale",
    verbs: GET_PATCH_UPDATE,
};

const BASE: Kind = Kind {
    group: "",
    version: "v1",
    kind: "",
    plural: "",
    singular: "",
    short_names: &[],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: Generation::None,
    subresources: &[],
};

/// Namespaces.
pub static NAMESPACES: Kind = Kind {
    kind: "Namespace",
    plural: "namespaces",
    singular: "namespace",
    short_names: &["ns"],
    namespaced: false,
    status: true,
    subresources: &[
        SubresourceKind {
            sub: Subresource::Finalize,
            group: "",
            version: "v1",
            kind: "Namespace",
            verbs: &["update"],
        },
        status_of("", "Namespace"),
    ],
    ..BASE
};

/// Nodes.
pub static NODES: Kind = Kind {
    kind: "Node",
    plural: "nodes",
    singular: "node",
    short_names: &["no"],
    namespaced: false,
    status: true,
    subresources: &[status_of("", "Node")],
    ..BASE
};

/// Pods.
pub static PODS: Kind = Kind {
    kind: "Pod",
    plural: "pods",
    singular: "pod",
    short_names: &["po"],
    categories: &["all"],
    status: true,
    generation: Generation::Spec,
    subresources: &[
        SubresourceKind {
            sub: Subresource::Binding,
            group: "",
            version: "v1",
            kind: "Binding",
            verbs: &["create"],
        },
        SubresourceKind { sub: Subresource::Log, group: "", version: "v1", kind: "Pod", verbs: &["get"] },
        status_of("", "Pod"),
    ],
    ..BASE
};

/// Services.
pub static SERVICES: Kind = Kind {
    kind: "Service",
    plural: "services",
    singular: "service",
    short_names: &["svc"],
    categories: &["all"],
    status: true,
    subresources: &[status_of("", "Service")],
    ..BASE
};

/// Config maps.
pub static CONFIG_MAPS: Kind =
    Kind { kind: "ConfigMap", plural: "configmaps", singular: "configmap", short_names: &["cm"], ..BASE };

/// Secrets.
pub static SECRETS: Kind = Kind { kind: "Secret", plural: "secrets", singular: "secret", ..BASE };

/// Events of the core group.
pub static EVENTS: Kind =
    Kind { kind: "Event", plural: "events", singular: "event", short_names: &["ev"], ..BASE };

/// Service accounts.
pub static SERVICE_ACCOUNTS: Kind = Kind {
    kind: "ServiceAccount",
    plural: "serviceaccounts",
    singular: "serviceaccount",
    short_names: &["sa"],
    ..BASE
};

/// Deployments.
pub static DEPLOYMENTS: Kind = Kind {
    group: "apps",
    kind: "Deployment",
    plural: "deployments",
    singular: "deployment",
    short_names: &["deploy"],
    categories: &["all"],
    status: true,
    scale: true,
    generation: Generation::Spec,
    subresources: &[SCALE, status_of("apps", "Deployment")],
    ..BASE
};

/// Replica sets.
pub static REPLICA_SETS: Kind = Kind {
    group: "apps",
    kind: "ReplicaSet",
    plural: "replicasets",
    singular: "replicaset",
    short_names: &["rs"],
    categories: &["all"],
    status: true,
    scale: true,
    generation: Generation::Spec,
    subresources: &[SCALE, status_of("apps", "ReplicaSet")],
    ..BASE
};

/// Endpoint slices.
pub static ENDPOINT_SLICES: Kind = Kind {
    group: "discovery.k8s.io",
    kind: "EndpointSlice",
    plural: "endpointslices",
    singular: "endpointslice",
    generation: Generation::Content,
    ..BASE
};

/// Leases.
pub static LEASES: Kind =
    Kind { group: "coordination.k8s.io", kind: "Lease", plural: "leases", singular: "lease", ..BASE };

/// Network policies.
pub static NETWORK_POLICIES: Kind = Kind {
    group: "networking.k8s.io",
    kind: "NetworkPolicy",
    plural: "networkpolicies",
    singular: "networkpolicy",
    short_names: &["netpol"],
    generation: Generation::Spec,
    ..BASE
};

static KINDS: [&Kind; 13] = [
    &NAMESPACES,
    &NODES,
    &PODS,
    &SERVICES,
    &CONFIG_MAPS,
    &SECRETS,
    &EVENTS,
    &SERVICE_ACCOUNTS,
    &DEPLOYMENTS,
    &REPLICA_SETS,
    &ENDPOINT_SLICES,
    &LEASES,
    &NETWORK_POLICIES,
];

/// Every served kind; the order is stable and is discovery's order.
pub fn kinds() -> &'static [&'static Kind] {
    &KINDS
}

/// The kind behind the path segments `group` (empty for core), `version` and `plural`.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    KINDS.iter().copied().find(|k| k.group == group && k.version == version && k.plural == plural)
}

/// The kind that an object's `apiVersion` and `kind` name.
pub fn find_by_gvk(api_version: &str, kind: &str) -> Option<&'static Kind> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    KINDS.iter().copied().find(|k| k.group == group && k.version == version && k.kind == kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        let mut seen = HashSet::new();
        for kind in kinds() {
            assert!(seen.insert(kind.plural), "{} twice", kind.plural);
            assert!(seen.insert(kind.singular), "{} twice", kind.singular);
            for short in kind.short_names {
                assert!(seen.insert(short), "{short} twice");
            }
        }
    }

    #[test]
    fn flags_agree_with_subresources() {
        for kind in kinds() {
            assert_eq!(kind.status, kind.subresource("status").is_some(), "{}", kind.plural);
            assert_eq!(kind.scale, kind.subresource("scale").is_some(), "{}", kind.plural);
        }
    }

    #[test]
    fn finds_by_path_and_by_gvk() {
        for kind in kinds() {
            assert_eq!(find(kind.group, kind.version, kind.plural), Some(*kind));
            assert_eq!(find_by_gvk(&kind.api_version(), kind.kind), Some(*kind));
        }
        assert_eq!(find("apps", "v1", "pods"), None);
        assert_eq!(find("", "v1beta1", "pods"), None);
        assert_eq!(DEPLOYMENTS.resource_key(), "deployments.apps");
        assert_eq!(PODS.resource_key(), "pods");
        assert_eq!(PODS.api_version(), "v1");
    }
}
