//! Server-side apply without field ownership: what the configuration names is set, lists are merged by their map
//! keys, and what it leaves out stays.

use serde_json::{Map, Value};

use super::schema::{Field, ListOf, PLAIN, Schema};
use crate::resource::error::ApiError;

/// Merges the applied configuration into `target`; a null target stands for an object that does not exist yet.
pub(super) fn merge(target: &mut Value, applied: Value, schema: &'static Schema) -> Result<(), ApiError> {
    let Value::Object(applied) = applied else {
        return Err(ApiError::bad_request("an applied configuration must be a JSON object"));
    };
    merge_map(as_map(target), applied, schema)
}

fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(map) = value else { unreachable!("made an object above") };
    map
}

fn merge_map(
    target: &mut Map<String, Value>,
    applied: Map<String, Value>,
    schema: &'static Schema,
) -> Result<(), ApiError> {
    for (key, value) in applied {
        let field = schema.field(&key);
        match (value, field) {
            (Value::Null, _) => {}
            (whole, Some(Field::WholeOnApply)) => {
                target.insert(key, whole);
            }
            (Value::Object(inner), field) => {
                let schema = if let Some(Field::Object(s)) = field { s } else { &PLAIN };
                merge_map(as_map(target.entry(key).or_insert(Value::Null)), inner, schema)?;
            }
            (Value::Array(items), Some(Field::List(list))) => {
                let slot = target.entry(key).or_insert(Value::Null);
                merge_list(slot, items, list)?;
            }
            (Value::Array(items), Some(Field::Set)) => {
                let slot = target.entry(key).or_insert(Value::Null);
                let present = as_list(slot);
                for item in items {
                    if !present.contains(&item) {
                        present.push(item);
                    }
                }
            }
            (other, _) => {
                target.insert(key, other);
            }
        }
    }
    Ok(())
}

fn as_list(value: &mut Value) -> &mut Vec<Value> {
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    let Value::Array(list) = value else { unreachable!("made a list above") };
    list
}

/// The value of a map key; `protocol` is TCP when left out.
fn key_value<'a>(item: &'a Value, key: &str) -> Option<&'a Value> {
    static TCP: std::sync::LazyLock<Value> = std::sync::LazyLock::new(|| Value::String("TCP".to_owned()));
    match item.get(key) {
        Some(Value::Null) | None if key == "protocol" => Some(&TCP),
        found => found,
    }
}

fn merge_list(slot: &mut Value, items: Vec<Value>, list: &'static ListOf) -> Result<(), ApiError> {
    let target = as_list(slot);
    let mut seen: Vec<usize> = Vec::new();
    for item in items {
        if let Some(missing) = list.apply_keys.iter().find(|k| key_value(&item, k).is_none()) {
            return Err(ApiError::bad_request(format!(
                "an item of the list lacks its key {missing:?}: {item}"
            )));
        }
        let same = |other: &Value| list.apply_keys.iter().all(|k| key_value(other, k) == key_value(&item, k));
        let found = target.iter().position(same);
        if found.is_some_and(|i| seen.contains(&i)) {
            return Err(ApiError::bad_request(format!(
                "two items of the applied list have the same key: {item}"
            )));
        }
        seen.push(found.unwrap_or(target.len()));
        let found = found.map(|i| &mut target[i]);
        match (found, item) {
            (Some(found), item) if list.whole_on_apply => *found = item,
            (Some(found), Value::Object(item)) => merge_map(as_map(found), item, list.item)?,
            (Some(found), item) => *found = item,
            (None, item) => target.push(item),
        }
    }
    Ok(())
}
