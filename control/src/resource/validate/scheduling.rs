//! The parts of a pod spec that say where it may run. A rule that the scheduler would not keep is refused: a pod that
//! runs where it must not is worse than one that does not run.

use serde_json::Value;

use super::faults::Faults;
use super::meta;
use crate::resource::names;
use crate::resource::object::{int_at, items_at, map_at, str_at};
use crate::resource::path::Path;

pub(super) fn scheduling(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    if let Some(map) = map_at(spec, &["nodeSelector"]) {
        meta::labels(map, &path.key("nodeSelector"), faults);
    }
    let node = str_at(spec, &["nodeName"]);
    if !node.is_empty() {
        faults.check(&path.key("nodeName"), node, names::dns1123_subdomain(node));
    }
    super::each(spec, "tolerations", path, faults, toleration);
    for (key, what) in [("schedulingGates", "scheduling gates"), ("resourceClaims", "resource claims")] {
        if !items_at(spec, &[key]).is_empty() {
            faults.forbidden(&path.key(key), format_args!("{what} are not supported"));
        }
    }
    super::each(spec, "topologySpreadConstraints", path, faults, |spread, path, faults| {
        if str_at(spread, &["whenUnsatisfiable"]) != "ScheduleAnyway" {
            faults.forbidden(
                &path.key("whenUnsatisfiable"),
                "spread constraints are not kept by this scheduler; only ScheduleAnyway is accepted",
            );
        }
    });
    let path = path.key("affinity");
    for key in ["nodeAffinity", "podAffinity", "podAntiAffinity"] {
        const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
        let rule = spec.get("affinity").and_then(|a| a.get(key)).and_then(|a| a.get(REQUIRED));
        if rule.is_some_and(|r| r.as_array().is_none_or(|list| !list.is_empty())) {
            faults.forbidden(
                &path.key(key).key(REQUIRED),
                "required affinity is not kept by this scheduler; use nodeSelector, or a preferred rule",
            );
        }
    }
}

fn toleration(toleration: &Value, path: &Path<'_>, faults: &mut Faults) {
    let text = |key: &str| str_at(toleration, &[key]);
    let (key, operator, effect) = (text("key"), text("operator"), text("effect"));
    if !key.is_empty() {
        faults.check(&path.key("key"), key, names::qualified_name(key));
    } else if operator != "Exists" {
        faults.invalid_text(
            &path.key("operator"),
            operator,
            "must be Exists when `key` is empty, which means \"match all values and all keys\"",
        );
    }
    faults.one_of(&path.key("operator"), operator, &["Equal", "Exists"]);
    match operator {
        "Exists" if !text("value").is_empty() => {
            faults.invalid_text(
                &path.key("value"),
                text("value"),
                "must be empty when `operator` is 'Exists'",
            );
        }
        "Exists" => {}
        _ => faults.check(&path.key("value"), text("value"), names::label_value(text("value"))),
    }
    faults.one_of(&path.key("effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
    if int_at(toleration, &["tolerationSeconds"]).is_some() && effect != "NoExecute" {
        faults.invalid_text(
            &path.key("effect"),
            effect,
            "must be 'NoExecute' when `tolerationSeconds` is set",
        );
    }
}
