//! Containers: names, images, ports, environment, mounts, resources and security.

use serde_json::Value;

use super::faults::Faults;
use super::probe::{self, PORT_MAX};
use super::volume::inside;
use crate::resource::names;
use crate::resource::object::{bool_at, int_at, items_at, map_at, str_at};
use crate::resource::path::Path;
use crate::resource::quantity::Quantity;

/// What a container has to fit into.
pub(super) struct Surroundings<'v> {
    pub volumes: Vec<&'v str>,
    pub host_network: bool,
    /// Names of the containers before this one.
    pub names: Vec<&'v str>,
    /// Host ports taken so far: address, port, protocol.
    pub host_ports: Vec<(&'v str, i64, &'v str)>,
}

pub(super) fn container<'v>(
    c: &'v Value,
    init: bool,
    around: &mut Surroundings<'v>,
    path: &Path<'_>,
    faults: &mut Faults,
) {
    let name = str_at(c, &["name"]);
    let name_path = path.key("name");
    if name.is_empty() {
        faults.required(&name_path, "");
    } else if around.names.contains(&name) {
        faults.duplicate(&name_path, format_args!("{name:?}"));
    } else {
        faults.check(&name_path, name, names::dns1123_label(name));
    }
    around.names.push(name);
    let image = str_at(c, &["image"]);
    if image.is_empty() {
        faults.required(&path.key("image"), "");
    } else if image.trim() != image || image.chars().any(|ch| ch.is_whitespace() || ch.is_control()) {
        faults.invalid_text(&path.key("image"), image, "must not contain whitespace");
    }
    faults.one_of(
        &path.key("imagePullPolicy"),
        str_at(c, &["imagePullPolicy"]),
        &["Always", "IfNotPresent", "Never"],
    );
    faults.one_of(
        &path.key("terminationMessagePolicy"),
        str_at(c, &["terminationMessagePolicy"]),
        &["File", "FallbackToLogsOnError"],
    );
    restart_policy(c, init, path, faults);
    ports(c, around, path, faults);
    super::each(c, "env", path, faults, variable);
    super::each(c, "envFrom", path, faults, variables_from);
    mounts(c, around, path, faults);
    resources(c, path, faults);
    security(c, path, faults);
    if !items_at(c, &["volumeDevices"]).is_empty() {
        faults.forbidden(&path.key("volumeDevices"), "raw block volumes are not supported; use volumeMounts");
    }
}

fn restart_policy(c: &Value, init: bool, path: &Path<'_>, faults: &mut Faults) {
    let policy = str_at(c, &["restartPolicy"]);
    let field = path.key("restartPolicy");
    if init {
        faults.one_of(&field, policy, &["Always"]);
    } else if !policy.is_empty() {
        faults.forbidden(&field, "may be set for init containers only; set it for the pod");
    }
    if !init || policy == "Always" {
        return probe::all(c, path, faults);
    }
    for key in ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle"] {
        if c.get(key).is_some() {
            faults
                .forbidden(&path.key(key), "may not be set for init containers without restartPolicy=Always");
        }
    }
}

fn ports<'v>(c: &'v Value, around: &mut Surroundings<'v>, path: &Path<'_>, faults: &mut Faults) {
    let mut seen: Vec<&str> = Vec::new();
    super::each(c, "ports", path, faults, |port, path, faults| {
        let name = str_at(port, &["name"]);
        if !name.is_empty() {
            let path = path.key("name");
            if seen.contains(&name) {
                faults.duplicate(&path, format_args!("{name:?}"));
            }
            faults.check(&path, name, names::port_name(name));
            seen.push(name);
        }
        let number = int_at(port, &["containerPort"]);
        match number {
            None => faults.required(&path.key("containerPort"), ""),
            number => faults.range(&path.key("containerPort"), number, 1, PORT_MAX),
        }
        let protocol = str_at(port, &["protocol"]);
        faults.one_of(&path.key("protocol"), protocol, &["TCP", "UDP", "SCTP"]);
        let Some(host) = int_at(port, &["hostPort"]).filter(|n| *n != 0) else { return };
        let field = path.key("hostPort");
        faults.range(&field, Some(host), 1, PORT_MAX);
        if around.host_network && Some(host) != number {
            faults.invalid(&field, host, "must match containerPort when hostNetwork is true");
        }
        let taken = (str_at(port, &["hostIP"]), host, protocol);
        if around.host_ports.contains(&taken) {
            faults.duplicate(&field, format_args!("{host}/{protocol}"));
        }
        around.host_ports.push(taken);
    });
}

fn variable(env: &Value, path: &Path<'_>, faults: &mut Faults) {
    let name = str_at(env, &["name"]);
    if name.is_empty() {
        faults.required(&path.key("name"), "");
    } else {
        faults.check(&path.key("name"), name, names::env_var(name));
    }
    let Some(from) = env.get("valueFrom") else { return };
    let path = path.key("valueFrom");
    if !str_at(env, &["value"]).is_empty() {
        faults.forbidden(&path, "may not be specified when `value` is not empty");
    }
    let keys: Vec<&String> = from.as_object().into_iter().flat_map(serde_json::Map::keys).collect();
    let [key] = keys.as_slice() else {
        return faults.invalid(
            &path,
            from,
            "must specify exactly one of fieldRef, resourceFieldRef, configMapKeyRef and secretKeyRef",
        );
    };
    let source = &from[key.as_str()];
    let path = path.key(key);
    match key.as_str() {
        "fieldRef" => field_path(str_at(source, &["fieldPath"]), &path.key("fieldPath"), faults),
        "resourceFieldRef" => {
            let resource = str_at(source, &["resource"]);
            let known = ["limits", "requests"].iter().any(|list| {
                resource
                    .strip_prefix(list)
                    .is_some_and(|r| matches!(r, ".cpu" | ".memory" | ".ephemeral-storage"))
            });
            if !known {
                faults.unsupported(
                    &path.key("resource"),
                    resource,
                    &["limits.cpu", "limits.memory", "requests.cpu", "requests.memory"],
                );
            }
        }
        "configMapKeyRef" | "secretKeyRef" => {
            if str_at(source, &["name"]).is_empty() {
                faults.required(&path.key("name"), "");
            }
            let data = str_at(source, &["key"]);
            if data.is_empty() {
                faults.required(&path.key("key"), "");
            } else {
                faults.check(&path.key("key"), data, names::data_key(data));
            }
        }
        other => faults.forbidden(&path, format_args!("{other} is not supported")),
    }
}

/// Fields of a pod that a variable may show.
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn field_path(text: &str, path: &Path<'_>, faults: &mut Faults) {
    if text.is_empty() {
        return faults.required(path, "");
    }
    let subscript = ["metadata.labels['", "metadata.annotations['"].iter().find_map(|p| text.strip_prefix(p));
    match subscript.map(|rest| rest.strip_suffix("']")) {
        Some(Some(key)) => faults.check(path, text, names::qualified_name(&key.to_ascii_lowercase())),
        Some(None) => faults.invalid_text(path, text, "must end with ']"),
        None if ENV_FIELDS.contains(&text) => {}
        None => faults.unsupported(path, text, &ENV_FIELDS),
    }
}

fn variables_from(env: &Value, path: &Path<'_>, faults: &mut Faults) {
    let prefix = str_at(env, &["prefix"]);
    if !prefix.is_empty() {
        faults.check(&path.key("prefix"), prefix, names::env_var(prefix));
    }
    match (env.get("configMapRef"), env.get("secretRef")) {
        (Some(_), Some(_)) => faults.forbidden(path, "may not specify both configMapRef and secretRef"),
        (None, None) => faults.required(path, "must specify one of configMapRef and secretRef"),
        (Some(source), None) if str_at(source, &["name"]).is_empty() => {
            faults.required(&path.key("configMapRef").key("name"), "");
        }
        (None, Some(source)) if str_at(source, &["name"]).is_empty() => {
            faults.required(&path.key("secretRef").key("name"), "");
        }
        _ => {}
    }
}

fn mounts<'v>(c: &'v Value, around: &Surroundings<'v>, path: &Path<'_>, faults: &mut Faults) {
    let mut seen: Vec<&str> = Vec::new();
    super::each(c, "volumeMounts", path, faults, |mount, path, faults| {
        let name = str_at(mount, &["name"]);
        if name.is_empty() {
            faults.required(&path.key("name"), "");
        } else if !around.volumes.contains(&name) {
            faults.not_found(&path.key("name"), name);
        }
        let target = str_at(mount, &["mountPath"]);
        let field = path.key("mountPath");
        if target.is_empty() {
            faults.required(&field, "");
        } else if seen.contains(&target) {
            faults.invalid_text(&field, target, "must be unique");
        } else if target.contains(':') {
            faults.invalid_text(&field, target, "must not contain ':'");
        }
        seen.push(target);
        for key in ["subPath", "subPathExpr"] {
            inside(str_at(mount, &[key]), &path.key(key), faults);
        }
        if mount.get("subPath").is_some() && mount.get("subPathExpr").is_some() {
            faults.invalid(
                &path.key("subPathExpr"),
                &mount["subPathExpr"],
                "subPathExpr and subPath are mutually exclusive",
            );
        }
        let propagation = str_at(mount, &["mountPropagation"]);
        let field = path.key("mountPropagation");
        faults.one_of(&field, propagation, &["None", "HostToContainer", "Bidirectional"]);
        if propagation == "Bidirectional" && !bool_at(c, &["securityContext", "privileged"]) {
            faults.forbidden(
                &field,
                "Bidirectional mount propagation is available only to privileged containers",
            );
        }
        let recursive = str_at(mount, &["recursiveReadOnly"]);
        faults.one_of(&path.key("recursiveReadOnly"), recursive, &["Disabled", "IfPossible"]);
    });
}

fn is_known_resource(name: &str) -> bool {
    matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-")
}

fn resources(c: &Value, path: &Path<'_>, faults: &mut Faults) {
    let path = path.key("resources");
    let Some(resources) = c.get("resources") else { return };
    if !items_at(resources, &["claims"]).is_empty() {
        faults.forbidden(&path.key("claims"), "dynamic resource allocation is not supported");
    }
    let limits = map_at(resources, &["limits"]);
    for list in ["limits", "requests"] {
        let list_path = path.key(list);
        for (name, value) in map_at(resources, &[list]).into_iter().flatten() {
            let path = list_path.key(name);
            let Ok(quantity) = Quantity::from_json(value) else { continue };
            let extended = name.contains('/') && names::qualified_name(name).is_ok();
            if !is_known_resource(name) && !extended {
                faults.invalid_text(&path, name, "must be cpu, memory, ephemeral-storage, hugepages-<size> or a name with a domain (such as 'example.com/gpu')");
            }
            if quantity.is_negative() {
                faults.invalid_text(&path, &quantity.to_string(), "must be greater than or equal to 0");
            }
            let whole = name.contains('/') || name.starts_with("hugepages-");
            if whole && !quantity.is_integer() {
                faults.invalid_text(&path, &quantity.to_string(), "must be an integer");
            }
            if list == "limits" {
                continue;
            }
            let limit = limits.and_then(|l| l.get(name)).and_then(|v| Quantity::from_json(v).ok());
            match limit {
                Some(limit) if whole && quantity != limit => {
                    faults.invalid_text(
                        &path,
                        &quantity.to_string(),
                        format_args!("must be equal to {name} limit of {limit}"),
                    );
                }
                Some(limit) if quantity > limit => {
                    faults.invalid_text(
                        &path,
                        &quantity.to_string(),
                        format_args!("must be less than or equal to {name} limit of {limit}"),
                    );
                }
                None if whole => {
                    faults.required(&path, "a limit must be set for resources that are not overcommitted")
                }
                _ => {}
            }
        }
    }
}

/// Checks that a pod's and a container's security context share.
pub(super) fn identity(context: &Value, path: &Path<'_>, faults: &mut Faults) {
    for key in ["runAsUser", "runAsGroup", "fsGroup"] {
        faults.range(&path.key(key), int_at(context, &[key]), 0, i64::from(i32::MAX));
    }
    for (i, group) in items_at(context, &["supplementalGroups"]).iter().enumerate() {
        faults.range(&path.key("supplementalGroups").at(i), group.as_i64(), 0, i64::from(i32::MAX));
    }
    if let Some(profile) = context.get("seccompProfile") {
        let path = path.key("seccompProfile");
        let kind = str_at(profile, &["type"]);
        match (kind, str_at(profile, &["localhostProfile"])) {
            ("", _) => faults.required(&path.key("type"), ""),
            ("Localhost", "") => {
                faults.required(&path.key("localhostProfile"), "must be set when seccomp type is Localhost")
            }
            ("Localhost", local) => inside(local, &path.key("localhostProfile"), faults),
            (_, "") => faults.one_of(&path.key("type"), kind, &["Localhost", "RuntimeDefault", "Unconfined"]),
            _ => faults.invalid(
                &path.key("localhostProfile"),
                &profile["localhostProfile"],
                "can only be set when seccomp type is Localhost",
            ),
        }
    }
}

fn security(c: &Value, path: &Path<'_>, faults: &mut Faults) {
    let Some(context) = c.get("securityContext") else { return };
    let path = path.key("securityContext");
    identity(context, &path, faults);
    let escalation = context.get("allowPrivilegeEscalation").and_then(Value::as_bool);
    if escalation == Some(false) {
        let field = path.key("allowPrivilegeEscalation");
        if bool_at(context, &["privileged"]) {
            faults.invalid(&field, false, "cannot be false when `privileged` is true");
        }
        let added = items_at(context, &["capabilities", "add"]);
        if added.iter().any(|c| c == "SYS_ADMIN" || c == "CAP_SYS_ADMIN") {
            faults.invalid(&field, false, "cannot be false when `capabilities.add` holds SYS_ADMIN");
        }
    }
    faults.one_of(&path.key("procMount"), str_at(context, &["procMount"]), &["Default"]);
}
