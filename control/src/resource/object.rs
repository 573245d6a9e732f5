//! Reads of the parts every API object has; nothing here changes or copies an object.

use jiff::Timestamp;
use serde_json::{Map, Value};

/// Follows object keys; `None` as soon as one is missing.
pub fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |v, key| v.get(key))
}

/// The string at a path; empty when absent or not a string.
pub fn str_at<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or("")
}

/// The integer at a path.
pub fn int_at(value: &Value, path: &[&str]) -> Option<i64> {
    at(value, path).and_then(Value::as_i64)
}

/// The boolean at a path; false when absent.
pub fn bool_at(value: &Value, path: &[&str]) -> bool {
    at(value, path).and_then(Value::as_bool).unwrap_or(false)
}

/// The items of the list at a path; empty when absent.
pub fn items_at<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The map at a path.
pub fn map_at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Map<String, Value>> {
    at(value, path).and_then(Value::as_object)
}

/// `metadata.name`, empty when unset.
pub fn name(object: &Value) -> &str {
    str_at(object, &["metadata", "name"])
}

/// `metadata.namespace`, empty when unset.
pub fn namespace(object: &Value) -> &str {
    str_at(object, &["metadata", "namespace"])
}

/// `metadata.uid`, empty when unset.
pub fn uid(object: &Value) -> &str {
    str_at(object, &["metadata", "uid"])
}

/// `metadata.resourceVersion`, empty when unset.
pub fn resource_version(object: &Value) -> &str {
    str_at(object, &["metadata", "resourceVersion"])
}

/// `metadata.labels`.
pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    map_at(object, &["metadata", "labels"])
}

/// Whether the object is on its way out.
pub fn is_deleting(object: &Value) -> bool {
    at(object, &["metadata", "deletionTimestamp"]).is_some_and(|t| !t.is_null())
}

/// A `metav1.Time`; `None` when absent or not RFC 3339.
pub fn time_at(value: &Value, path: &[&str]) -> Option<Timestamp> {
    str_at(value, path).parse().ok()
}

/// RFC 3339 in whole seconds, the form of `metav1.Time`.
pub fn format_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// RFC 3339 with six decimals, the form of `metav1.MicroTime`.
pub fn format_micro_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// The map under `key`, made when absent; a value of another type is replaced.
pub fn map_mut<'a>(value: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(map) = value else { unreachable!("made an object above") };
    let slot = map.entry(key).or_insert_with(|| Value::Object(Map::new()));
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    let Value::Object(inner) = slot else { unreachable!("made an object above") };
    inner
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_tolerate_anything() {
        let v = json!({"a": {"b": [1], "s": "x", "n": 3, "t": true}});
        assert_eq!(str_at(&v, &["a", "s"]), "x");
        assert_eq!(str_at(&v, &["a", "n"]), "");
        assert_eq!(int_at(&v, &["a", "n"]), Some(3));
        assert!(bool_at(&v, &["a", "t"]));
        assert!(items_at(&v, &["a", "missing"]).is_empty());
        assert!(items_at(&v, &["a", "s"]).is_empty());
        assert!(map_at(&v, &["a", "b"]).is_none());
    }

    #[test]
    fn times_have_kubernetes_form() {
        let t: Timestamp = "2026-01-02T03:04:05.987654321Z".parse().unwrap();
        assert_eq!(format_time(t), "2026-01-02T03:04:05Z");
        assert_eq!(format_micro_time(t), "2026-01-02T03:04:05.987654Z");
    }
}
