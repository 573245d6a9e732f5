//! Which lists of the served kinds are merged, and by which key. Everything that is not named here is merged as a
//! map or, if it is a list, replaced whole.

use crate::resource::kinds::Kind;

/// How one field is merged.
pub(super) enum Field {
    /// A map with fields of its own.
    Object(&'static Schema),
    /// A list of maps.
    List(&'static ListOf),
    /// A list of scalars, merged as a set.
    Set,
    /// Strategic merge treats it like any other; server-side apply replaces it whole.
    WholeOnApply,
}

/// A list whose items are known by a key.
pub(super) struct ListOf {
    /// The key of strategic merge.
    pub merge_key: &'static str,
    /// The keys of server-side apply.
    pub apply_keys: &'static [&'static str],
    /// Whether server-side apply replaces a found item whole, because its members exclude each other.
    pub whole_on_apply: bool,
    /// The items' fields.
    pub item: &'static Schema,
}

/// The fields of one type that are not merged the plain way.
pub(super) struct Schema(&'static [(&'static str, Field)]);

impl Schema {
    pub(super) fn field(&self, name: &str) -> Option<&'static Field> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, f)| f)
    }
}

/// A type without special fields.
pub(super) static PLAIN: Schema = Schema(&[]);

const fn list(key: &'static str, apply_keys: &'static [&'static str], item: &'static Schema) -> ListOf {
    ListOf { merge_key: key, apply_keys, whole_on_apply: false, item }
}

static BY_NAME: ListOf = list("name", &["name"], &PLAIN);
static BY_TYPE: ListOf = list("type", &["type"], &PLAIN);
static BY_IP: ListOf = list("ip", &["ip"], &PLAIN);
static BY_UID: ListOf = list("uid", &["uid"], &PLAIN);
static BY_MOUNT_PATH: ListOf = list("mountPath", &["mountPath"], &PLAIN);
static BY_DEVICE_PATH: ListOf = list("devicePath", &["devicePath"], &PLAIN);
static BY_TOPOLOGY: ListOf = list("topologyKey", &["topologyKey", "whenUnsatisfiable"], &PLAIN);
static CONTAINER_PORTS: ListOf = list("containerPort", &["containerPort", "protocol"], &PLAIN);
static SERVICE_PORTS: ListOf = list("port", &["port", "protocol"], &PLAIN);
static ENV: ListOf = ListOf { merge_key: "name", apply_keys: &["name"], whole_on_apply: true, item: &PLAIN };
static VOLUMES: ListOf =
    ListOf { merge_key: "name", apply_keys: &["name"], whole_on_apply: true, item: &PLAIN };
static CONTAINERS: ListOf = list("name", &["name"], &CONTAINER);

static METADATA: Schema = Schema(&[("finalizers", Field::Set), ("ownerReferences", Field::List(&BY_UID))]);

static CONTAINER: Schema = Schema(&[
    ("env", Field::List(&ENV)),
    ("ports", Field::List(&CONTAINER_PORTS)),
    ("volumeDevices", Field::List(&BY_DEVICE_PATH)),
    ("volumeMounts", Field::List(&BY_MOUNT_PATH)),
]);

static POD_SPEC: Schema = Schema(&[
    ("containers", Field::List(&CONTAINERS)),
    ("ephemeralContainers", Field::List(&CONTAINERS)),
    ("hostAliases", Field::List(&BY_IP)),
    ("imagePullSecrets", Field::List(&BY_NAME)),
    ("initContainers", Field::List(&CONTAINERS)),
    ("nodeSelector", Field::WholeOnApply),
    ("resourceClaims", Field::List(&BY_NAME)),
    ("schedulingGates", Field::List(&BY_NAME)),
    ("topologySpreadConstraints", Field::List(&BY_TOPOLOGY)),
    ("volumes", Field::List(&VOLUMES)),
]);

static POD_STATUS: Schema = Schema(&[
    ("conditions", Field::List(&BY_TYPE)),
    ("hostIPs", Field::List(&BY_IP)),
    ("podIPs", Field::List(&BY_IP)),
    ("resourceClaimStatuses", Field::List(&BY_NAME)),
]);

static CONDITIONS: Schema = Schema(&[("conditions", Field::List(&BY_TYPE))]);

static POD: Schema = Schema(&[
    ("metadata", Field::Object(&METADATA)),
    ("spec", Field::Object(&POD_SPEC)),
    ("status", Field::Object(&POD_STATUS)),
]);

static TEMPLATE: Schema =
    Schema(&[("metadata", Field::Object(&METADATA)), ("spec", Field::Object(&POD_SPEC))]);

static WORKLOAD: Schema = Schema(&[
    ("metadata", Field::Object(&METADATA)),
    (
        "spec",
        Field::Object(&Schema(&[
            ("selector", Field::WholeOnApply),
            ("strategy", Field::WholeOnApply),
            ("template", Field::Object(&TEMPLATE)),
        ])),
    ),
    ("status", Field::Object(&CONDITIONS)),
]);

static SERVICE: Schema = Schema(&[
    ("metadata", Field::Object(&METADATA)),
    (
        "spec",
        Field::Object(&Schema(&[("ports", Field::List(&SERVICE_PORTS)), ("selector", Field::WholeOnApply)])),
    ),
    ("status", Field::Object(&CONDITIONS)),
]);

static NODE: Schema = Schema(&[
    ("metadata", Field::Object(&METADATA)),
    ("spec", Field::Object(&Schema(&[("podCIDRs", Field::Set)]))),
    (
        "status",
        Field::Object(&Schema(&[
            ("addresses", Field::List(&BY_TYPE)),
            ("conditions", Field::List(&BY_TYPE)),
        ])),
    ),
]);

static NAMESPACE: Schema =
    Schema(&[("metadata", Field::Object(&METADATA)), ("status", Field::Object(&CONDITIONS))]);

static SERVICE_ACCOUNT: Schema =
    Schema(&[("metadata", Field::Object(&METADATA)), ("secrets", Field::List(&BY_NAME))]);

static METADATA_ONLY: Schema = Schema(&[("metadata", Field::Object(&METADATA))]);

/// The schema of a kind's objects.
pub(super) fn of(kind: &Kind) -> &'static Schema {
    match (kind.group, kind.plural) {
        ("", "pods") => &POD,
        ("", "services") => &SERVICE,
        ("", "nodes") => &NODE,
        ("", "namespaces") => &NAMESPACE,
        ("", "serviceaccounts") => &SERVICE_ACCOUNT,
        ("apps", "deployments" | "replicasets") => &WORKLOAD,
        _ => &METADATA_ONLY,
    }
}
