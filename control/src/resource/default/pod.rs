//! Defaults of pods and pod templates, and the quality-of-service class of a pod.

use serde_json::{Map, Value, json};

use super::{canonical_quantities, canonical_quantity, child, items, set};
use crate::resource::object;
use crate::resource::quantity::Quantity;

/// Mode of files that come from config maps, secrets and the like: 0644.
const FILE_MODE_DEFAULT: i64 = 0o644;
/// Lifetime of a projected service account token, in seconds.
const TOKEN_DEFAULT_SECONDS: i64 = 3600;
/// How long a pod stays on a node that stopped answering, in seconds.
const UNREACHABLE_TOLERATION_SECONDS: i64 = 300;

pub(super) fn pod(object: &mut Value) {
    let Some(pod_spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    spec(pod_spec);
    admitted(pod_spec);
    let class = object.get("spec").map_or("BestEffort", qos_class);
    if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
        set(status, "qosClass", class);
    }
}

/// Defaults the pod template of a workload's spec.
pub(super) fn template(workload: &mut Map<String, Value>) {
    if let Some(pod_spec) = child(workload, "template").and_then(|t| child(t, "spec")) {
        spec(pod_spec);
    }
}

/// What admission adds to pods, and not to templates.
fn admitted(spec: &mut Map<String, Value>) {
    if !spec.contains_key("serviceAccountName") {
        let old_name = spec.get("serviceAccount").cloned().unwrap_or_else(|| json!("default"));
        spec.insert("serviceAccountName".to_owned(), old_name);
    }
    if let Some(name) = spec.get("serviceAccountName").cloned() {
        spec.insert("serviceAccount".to_owned(), name);
    }
    set(spec, "priority", 0);
    set(spec, "preemptionPolicy", "PreemptLowerPriority");
    set(spec, "tolerations", json!([]));
    let Some(tolerations) = spec.get_mut("tolerations").and_then(Value::as_array_mut) else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = tolerations.iter().any(|t| {
            let (own, effect) = (object::str_at(t, &["key"]), object::str_at(t, &["effect"]));
            let every_key = own.is_empty() && object::str_at(t, &["operator"]) == "Exists";
            (own == key || every_key) && matches!(effect, "" | "NoExecute")
        });
        if !tolerated {
            tolerations.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": UNREACHABLE_TOLERATION_SECONDS}));
        }
    }
}

fn spec(spec: &mut Map<String, Value>) {
    set(spec, "restartPolicy", "Always");
    set(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "schedulerName", "default-scheduler");
    set(spec, "securityContext", json!({}));
    set(spec, "enableServiceLinks", true);
    let host_network = spec.get("hostNetwork").is_some_and(|v| v == true);
    for list in ["initContainers", "containers"] {
        for c in items(spec, list) {
            container(c, host_network);
        }
    }
    for v in items(spec, "volumes") {
        volume(v);
    }
}

fn container(c: &mut Map<String, Value>, host_network: bool) {
    if let Some(policy) = c.get("image").and_then(Value::as_str).map(pull_policy) {
        set(c, "imagePullPolicy", policy);
    }
    set(c, "terminationMessagePath", "/dev/termination-log");
    set(c, "terminationMessagePolicy", "File");
    set(c, "resources", json!({}));
    if let Some(resources) = child(c, "resources") {
        canonical_quantities(child(resources, "limits"));
        canonical_quantities(child(resources, "requests"));
        if let Some(Value::Object(limits)) = resources.get("limits").cloned() {
            set(resources, "requests", json!({}));
            if let Some(requests) = child(resources, "requests") {
                for (name, limit) in limits {
                    requests.entry(name).or_insert(limit);
                }
            }
        }
    }
    for port in items(c, "ports") {
        set(port, "protocol", "TCP");
        if host_network && let Some(number) = port.get("containerPort").cloned() {
            set(port, "hostPort", number);
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(p) = child(c, name) {
            set(p, "timeoutSeconds", 1);
            set(p, "periodSeconds", 10);
            set(p, "successThreshold", 1);
            set(p, "failureThreshold", 3);
            handler(p);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(h) = child(c, "lifecycle").and_then(|l| child(l, hook)) {
            handler(h);
        }
    }
    for variable in items(c, "env") {
        if let Some(field) = child(variable, "valueFrom").and_then(|v| child(v, "fieldRef")) {
            set(field, "apiVersion", "v1");
        }
    }
}

fn handler(h: &mut Map<String, Value>) {
    if let Some(http) = child(h, "httpGet") {
        set(http, "path", "/");
        set(http, "scheme", "HTTP");
    }
    if let Some(grpc) = child(h, "grpc") {
        set(grpc, "service", "");
    }
}

/// `Always` for the tag `latest`, written or implied; else what is on the node is used.
fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.split_once(':') {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

fn volume(v: &mut Map<String, Value>) {
    if v.keys().all(|k| k == "name") {
        v.insert("emptyDir".to_owned(), json!({}));
    }
    for source in ["configMap", "secret", "downwardAPI", "projected"] {
        if let Some(s) = child(v, source) {
            set(s, "defaultMode", FILE_MODE_DEFAULT);
        }
    }
    if let Some(limit) = child(v, "emptyDir").and_then(|e| e.get_mut("sizeLimit")) {
        canonical_quantity(limit);
    }
    if let Some(path) = child(v, "hostPath") {
        set(path, "type", "");
    }
    if let Some(downward) = child(v, "downwardAPI") {
        downward_items(downward);
    }
    if let Some(projected) = child(v, "projected") {
        for source in items(projected, "sources") {
            if let Some(token) = child(source, "serviceAccountToken") {
                set(token, "expirationSeconds", TOKEN_DEFAULT_SECONDS);
            }
            if let Some(downward) = child(source, "downwardAPI") {
                downward_items(downward);
            }
        }
    }
}

fn downward_items(source: &mut Map<String, Value>) {
    for item in items(source, "items") {
        if let Some(field) = child(item, "fieldRef") {
            set(field, "apiVersion", "v1");
        }
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`, from a pod's spec: Guaranteed when every container limits CPU and
/// memory and requests as much, BestEffort when none asks for either.
pub fn qos_class(spec: &Value) -> &'static str {
    let containers = ["initContainers", "containers"].iter().flat_map(|list| object::items_at(spec, &[list]));
    let (mut any, mut all) = (false, true);
    for c in containers {
        for resource in ["cpu", "memory"] {
            let get = |list: &str| {
                object::at(c, &["resources", list, resource])
                    .and_then(|v| Quantity::from_json(v).ok())
                    .filter(|q| !q.is_zero())
            };
            let (limit, request) = (get("limits"), get("requests"));
            any |= limit.is_some() || request.is_some();
            all &= limit.is_some() && request.is_none_or(|r| Some(r) == limit);
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}
