//! Strategic merge patch. Whatever the patch says about lists and maps is carried out here; no directive, and no
//! null, gets into the result.

use serde_json::{Map, Value};

use super::schema::{Field, ListOf, PLAIN, Schema};
use crate::resource::error::ApiError;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const ELEMENT_ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVE: &str = "$deleteFromPrimitiveList/";

/// Merges `patch` into `target`.
pub(super) fn merge(target: &mut Value, patch: Value, schema: &'static Schema) -> Result<(), ApiError> {
    let Value::Object(patch) = patch else {
        return Err(ApiError::bad_request("a strategic merge patch must be a JSON object"));
    };
    merge_map(as_map(target), patch, schema)
}

fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(map) = value else { unreachable!("made an object above") };
    map
}

fn as_list(value: &mut Value) -> &mut Vec<Value> {
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    let Value::Array(list) = value else { unreachable!("made a list above") };
    list
}

/// What `$patch` asks for.
#[derive(PartialEq)]
enum Directive {
    Merge,
    Replace,
    Delete,
}

fn take_directive(patch: &mut Map<String, Value>) -> Result<Directive, ApiError> {
    match patch.remove(PATCH) {
        None => Ok(Directive::Merge),
        Some(Value::String(s)) if s == "merge" => Ok(Directive::Merge),
        Some(Value::String(s)) if s == "replace" => Ok(Directive::Replace),
        Some(Value::String(s)) if s == "delete" => Ok(Directive::Delete),
        Some(other) => Err(ApiError::bad_request(format!(
            "$patch must be \"merge\", \"replace\" or \"delete\", got {other}"
        ))),
    }
}

fn merge_map(
    target: &mut Map<String, Value>,
    mut patch: Map<String, Value>,
    schema: &'static Schema,
) -> Result<(), ApiError> {
    match take_directive(&mut patch)? {
        Directive::Merge => {}
        Directive::Replace => target.clear(),
        Directive::Delete => {
            target.clear();
            return Ok(());
        }
    }
    if let Some(keys) = patch.remove(RETAIN_KEYS) {
        retain_keys(target, &patch, &keys)?;
    }
    let mut orders = Vec::new();
    let mut plain = Vec::with_capacity(patch.len());
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(ELEMENT_ORDER) {
            orders.push((field.to_owned(), list_of(&key, value)?));
        } else if let Some(field) = key.strip_prefix(DELETE_PRIMITIVE) {
            let gone = list_of(&key, value)?;
            if let Some(Value::Array(items)) = target.get_mut(field) {
                items.retain(|item| !gone.contains(item));
            }
        } else {
            plain.push((key, value));
        }
    }
    for (key, value) in plain {
        merge_member(target, key, value, schema)?;
    }
    for (field, order) in orders {
        if let Some(Value::Array(items)) = target.get_mut(&field) {
            let key = match schema.field(&field) {
                Some(Field::List(list)) => Some(list.merge_key),
                Some(Field::Set) => None,
                // An atomic list came whole and in its order.
                _ => continue,
            };
            reorder(items, &order, key);
        }
    }
    Ok(())
}

fn list_of(key: &str, value: Value) -> Result<Vec<Value>, ApiError> {
    match value {
        Value::Array(items) => Ok(items),
        other => Err(ApiError::bad_request(format!("{key} must be a list, got {other}"))),
    }
}

fn retain_keys(
    target: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    keys: &Value,
) -> Result<(), ApiError> {
    let Some(keys) = keys.as_array() else {
        return Err(ApiError::bad_request(format!("{RETAIN_KEYS} must be a list of keys, got {keys}")));
    };
    let kept = |key: &str| keys.iter().any(|k| k == key);
    if let Some((key, _)) = patch.iter().find(|(k, v)| !v.is_null() && !k.starts_with('$') && !kept(k)) {
        return Err(ApiError::bad_request(format!(
            "{RETAIN_KEYS} must name every key of the patch; {key:?} is missing"
        )));
    }
    target.retain(|key, _| kept(key));
    Ok(())
}

fn merge_member(
    target: &mut Map<String, Value>,
    key: String,
    value: Value,
    schema: &'static Schema,
) -> Result<(), ApiError> {
    match value {
        Value::Null => {
            target.remove(&key);
        }
        Value::Object(patch) => {
            let inner = match schema.field(&key) {
                Some(Field::Object(inner)) => inner,
                _ => &PLAIN,
            };
            let slot = target.entry(key).or_insert(Value::Null);
            merge_map(as_map(slot), patch, inner)?;
        }
        Value::Array(items) => {
            let field = schema.field(&key);
            let slot = target.entry(key).or_insert(Value::Null);
            match field {
                Some(Field::List(list)) => merge_list(as_list(slot), items, list)?,
                Some(Field::Set) => {
                    let present = as_list(slot);
                    for item in items {
                        if !item.is_null() && !present.contains(&item) {
                            present.push(item);
                        }
                    }
                }
                _ => *slot = Value::Array(replaced(items)?),
            }
        }
        scalar => {
            target.insert(key, scalar);
        }
    }
    Ok(())
}

/// The items of an atomic list, free of directives.
fn replaced(items: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Value::Object(mut map) => {
                let marked = map.contains_key(PATCH);
                match take_directive(&mut map)? {
                    Directive::Delete => continue,
                    Directive::Replace | Directive::Merge if marked && map.is_empty() => continue,
                    _ => {}
                }
                let mut fresh = Map::new();
                merge_map(&mut fresh, map, &PLAIN)?;
                out.push(Value::Object(fresh));
            }
            Value::Array(inner) => out.push(Value::Array(replaced(inner)?)),
            scalar => out.push(scalar),
        }
    }
    Ok(out)
}

fn merge_list(target: &mut Vec<Value>, items: Vec<Value>, list: &'static ListOf) -> Result<(), ApiError> {
    let mut deletions = Vec::new();
    let mut changes = Vec::new();
    let mut whole = false;
    for item in items {
        let Value::Object(mut map) = item else {
            return Err(ApiError::bad_request(format!(
                "the items of a list that is merged by {:?} must be objects, got {item}",
                list.merge_key
            )));
        };
        match take_directive(&mut map)? {
            Directive::Replace if !map.contains_key(list.merge_key) => whole = true,
            Directive::Delete => deletions.push(key_of(&map, list)?.clone()),
            change => changes.push((change == Directive::Replace, map)),
        }
    }
    if whole {
        target.clear();
    }
    if !deletions.is_empty() {
        target.retain(|item| item.get(list.merge_key).is_none_or(|key| !deletions.contains(key)));
    }
    for (replace, change) in changes {
        let key = key_of(&change, list)?;
        match target.iter_mut().find(|item| item.get(list.merge_key) == Some(key)) {
            // A list given as a whole may hold one key twice, as a Node's addresses of two families do.
            Some(found) if !whole => {
                let found = as_map(found);
                if replace {
                    found.clear();
                }
                merge_map(found, change, list.item)?;
            }
            _ => {
                let mut fresh = Map::new();
                merge_map(&mut fresh, change, list.item)?;
                target.push(Value::Object(fresh));
            }
        }
    }
    Ok(())
}

fn key_of<'a>(item: &'a Map<String, Value>, list: &ListOf) -> Result<&'a Value, ApiError> {
    item.get(list.merge_key).filter(|k| !k.is_null()).ok_or_else(|| {
        ApiError::bad_request(format!(
            "an item lacks its merge key {:?}: {}",
            list.merge_key,
            Value::Object(item.clone())
        ))
    })
}

/// Puts the items that `order` names into that order; those it does not name keep their place among the others.
fn reorder(items: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    let identity = |item: &Value| match key {
        Some(key) => item.get(key).cloned().unwrap_or(Value::Null),
        None => item.clone(),
    };
    let wanted: Vec<Value> = order.iter().map(identity).collect();
    let mut named: Vec<(usize, usize, Value)> = Vec::new();
    let mut others: Vec<(usize, Value)> = Vec::new();
    for (place, item) in std::mem::take(items).into_iter().enumerate() {
        let id = identity(&item);
        match wanted.iter().position(|w| *w == id) {
            Some(rank) => named.push((rank, place, item)),
            None => others.push((place, item)),
        }
    }
    named.sort_by_key(|(rank, ..)| *rank);
    let mut others = others.into_iter().peekable();
    for (_, place, item) in named {
        while let Some((_, other)) = others.next_if(|(p, _)| *p < place) {
            items.push(other);
        }
        items.push(item);
    }
    items.extend(others.map(|(_, item)| item));
}
