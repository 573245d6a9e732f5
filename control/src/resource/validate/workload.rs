//! Deployments and replica sets.

use serde_json::{Map, Value};

use super::faults::Faults;
use super::{changed, pod};
use crate::resource::object::{self, at, int_at, map_at, str_at};
use crate::resource::path::Path;
use crate::resource::selector::LabelSelector;

pub(super) fn deployment(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    if !changed("spec", new, old) {
        return;
    }
    let path = Path::Root.key("spec");
    let Some(spec) = common(new, old, &path, faults) else { return };
    faults.range(&path.key("revisionHistoryLimit"), int_at(spec, &["revisionHistoryLimit"]), 0, i64::MAX);
    let ready = int_at(spec, &["minReadySeconds"]).unwrap_or(0);
    if let Some(deadline) = int_at(spec, &["progressDeadlineSeconds"]) {
        let path = path.key("progressDeadlineSeconds");
        faults.range(&path, Some(deadline), 0, i64::MAX);
        if deadline <= ready {
            faults.invalid(&path, deadline, "must be greater than minReadySeconds");
        }
    }
    strategy(spec, &path.key("strategy"), faults);
}

pub(super) fn replica_set(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    if changed("spec", new, old) {
        common(new, old, &Path::Root.key("spec"), faults);
    }
}

fn common<'v>(
    new: &'v Value,
    old: Option<&Value>,
    path: &Path<'_>,
    faults: &mut Faults,
) -> Option<&'v Value> {
    let Some(spec) = new.get("spec") else {
        faults.required(path, "");
        return None;
    };
    for key in ["replicas", "minReadySeconds"] {
        faults.range(&path.key(key), int_at(spec, &[key]), 0, i64::MAX);
    }
    selector(spec, old, path, faults);
    pod::template(spec.get("template"), &path.key("template"), faults);
    Some(spec)
}

fn selector(spec: &Value, old: Option<&Value>, path: &Path<'_>, faults: &mut Faults) {
    let field = path.key("selector");
    let Some(selector) = spec.get("selector") else { return faults.required(&field, "") };
    match LabelSelector::from_json(selector) {
        Err(why) => faults.invalid(&field, selector, why),
        Ok(parsed) if parsed.is_everything() => {
            faults.invalid(&field, selector, "empty selector is invalid; name the labels of the template");
        }
        Ok(parsed) => {
            let empty = Map::new();
            let labels = map_at(spec, &["template", "metadata", "labels"]).unwrap_or(&empty);
            if !parsed.matches_labels(Some(labels)) {
                let shown = Value::Object(labels.clone());
                faults.invalid(
                    &path.key("template").key("metadata").key("labels"),
                    shown,
                    "`selector` does not match template `labels`",
                );
            }
        }
    }
    if let Some(before) = old.and_then(|o| at(o, &["spec", "selector"]))
        && before != selector
    {
        faults.invalid(&field, selector, "field is immutable");
    }
}

fn strategy(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    let Some(strategy) = spec.get("strategy") else { return };
    let rolling = path.key("rollingUpdate");
    match str_at(strategy, &["type"]) {
        "Recreate" => {
            if strategy.get("rollingUpdate").is_some() {
                faults.forbidden(&rolling, "may not be specified when strategy `type` is 'Recreate'");
            }
        }
        "RollingUpdate" => {
            let given = |key: &str| object::at(strategy, &["rollingUpdate", key]);
            let surge = share(given("maxSurge"), i64::from(i32::MAX), &rolling.key("maxSurge"), faults);
            let down_path = rolling.key("maxUnavailable");
            let down = share(given("maxUnavailable"), 100, &down_path, faults);
            if surge == Some(0) && down == Some(0) {
                faults.invalid(&down_path, 0, "may not be 0 when `maxSurge` is 0");
            }
        }
        "" => faults.required(&path.key("type"), ""),
        other => faults.unsupported(&path.key("type"), other, &["Recreate", "RollingUpdate"]),
    }
}

/// A count or a percentage; `None` when absent or malformed.
fn share(value: Option<&Value>, percent_max: i64, path: &Path<'_>, faults: &mut Faults) -> Option<i64> {
    match value? {
        Value::String(text) => {
            let digits = text.strip_suffix('%').filter(|d| d.bytes().all(|c| c.is_ascii_digit()));
            let number = digits.and_then(|d| d.parse::<i64>().ok());
            if number.is_none() {
                faults.invalid_text(path, text, "must be an integer or a percentage (such as 1 or '25%')");
            } else if number.is_some_and(|n| n > percent_max) {
                faults.invalid_text(path, text, format_args!("must not be greater than {percent_max}%"));
            }
            number
        }
        number => {
            faults.range(path, number.as_i64(), 0, i64::MAX);
            number.as_i64()
        }
    }
}
