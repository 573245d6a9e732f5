//! The parts of a pod spec that say where it may run. A rule that the scheduler would not keep is refused: a pod that
//! runs where it must not is worse than one that does not run.

use serde_json::Value;

use super::faults::Faults;
use super::meta;
use crate::resource::names;
use crate::resource::object::{at, int_at, items_at, map_at, str_at};
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
    affinity(spec, path, faults);
}

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

fn affinity(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    let Some(affinity) = spec.get("affinity") else { return };
    let path = path.key("affinity");
    for key in ["podAffinity", "podAntiAffinity"] {
        if !items_at(affinity, &[key, REQUIRED]).is_empty() {
            faults.forbidden(
                &path.key(key).key(REQUIRED),
                "required pod affinity is not kept by this scheduler; use nodeSelector, nodeAffinity or a preferred rule",
            );
        }
    }
    let path = path.key("nodeAffinity");
    if let Some(required) = at(affinity, &["nodeAffinity", REQUIRED]) {
        let path = path.key(REQUIRED);
        if items_at(required, &["nodeSelectorTerms"]).is_empty() {
            faults.required(&path.key("nodeSelectorTerms"), "must have at least one node selector term");
        }
        super::each(required, "nodeSelectorTerms", &path, faults, node_term);
    }
    let preferred = affinity.get("nodeAffinity").unwrap_or(&Value::Null);
    super::each(preferred, PREFERRED, &path, faults, |term, path, faults| {
        match int_at(term, &["weight"]) {
            None => faults.required(&path.key("weight"), ""),
            weight => faults.range(&path.key("weight"), weight, 1, 100),
        }
        if let Some(preference) = term.get("preference") {
            node_term(preference, &path.key("preference"), faults);
        }
    });
}

fn node_term(term: &Value, path: &Path<'_>, faults: &mut Faults) {
    super::each(term, "matchExpressions", path, faults, |rule, path, faults| {
        let key = str_at(rule, &["key"]);
        faults.check(&path.key("key"), key, names::qualified_name(key));
        let values = items_at(rule, &["values"]);
        let field = path.key("values");
        match str_at(rule, &["operator"]) {
            "In" | "NotIn" if values.is_empty() => {
                faults.required(&field, "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                faults
                    .forbidden(&field, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
            "Gt" | "Lt" => match values {
                [Value::String(number)] if number.parse::<i64>().is_ok() => {}
                _ => faults.required(&field, "must be a single integer when `operator` is 'Gt' or 'Lt'"),
            },
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => faults.unsupported(
                &path.key("operator"),
                other,
                &["DoesNotExist", "Exists", "Gt", "In", "Lt", "NotIn"],
            ),
        }
    });
    super::each(term, "matchFields", path, faults, |rule, path, faults| {
        faults.one_of(&path.key("key"), str_at(rule, &["key"]), &["metadata.name"]);
        faults.one_of(&path.key("operator"), str_at(rule, &["operator"]), &["In", "NotIn"]);
        if items_at(rule, &["values"]).len() != 1 {
            faults.required(&path.key("values"), "must be only one value when used on fields");
        }
    });
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
