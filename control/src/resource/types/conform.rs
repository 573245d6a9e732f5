//! Makes JSON have the types of the API: wrong types are refused with the path of each, nulls and unknown members
//! are dropped (a typed server would not keep them either).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::{Shape, Type, body_of, message};
use crate::resource::error::{ApiError, Cause, CauseReason};
use crate::resource::kinds::{Kind, Subresource};
use crate::resource::path::Path;
use crate::resource::quantity::Quantity;

/// Most faults that one answer names.
const FAULTS_MAX: usize = 10;

/// Checks the types of a body for an endpoint of `kind`, and drops nulls and members that the type does not have.
/// Errors are 400s that name every wrong member (up to a bound).
pub fn conform(kind: &Kind, sub: Subresource, body: &mut Value) -> Result<(), ApiError> {
    let Some(root) = body_of(kind, sub) else { return Ok(()) };
    let Some(map) = body.as_object_mut() else {
        return Err(ApiError::bad_request(format!(
            "the body must be a JSON object of kind {}",
            message(root).name
        )));
    };
    let mut faults = Vec::new();
    conform_map(root, map, &Path::Root, true, &mut faults);
    if faults.is_empty() {
        return Ok(());
    }
    Err(ApiError::bad_request(format!("unable to decode {}: {}", message(root).name, faults.join("; "))))
}

fn conform_map(
    index: usize,
    map: &mut Map<String, Value>,
    path: &Path<'_>,
    root: bool,
    faults: &mut Vec<String>,
) {
    let shape = message(index);
    map.retain(|key, value| {
        if value.is_null() {
            return false;
        }
        if root && matches!(key.as_str(), "apiVersion" | "kind") {
            check_scalar(Type::Str, value, &path.key(key), faults);
            return true;
        }
        let Some((shape, ty)) = shape.member(key) else { return false };
        conform_member(shape, ty, value, &path.key(key), faults);
        true
    });
}

fn fault(path: &Path<'_>, wanted: &str, value: &Value, faults: &mut Vec<String>) {
    if faults.len() < FAULTS_MAX {
        let found = match value {
            Value::Null => "null".to_owned(),
            Value::Bool(b) => b.to_string(),
            Value::Number(n) => n.to_string(),
            Value::String(s) => format!("the string {:?}", s.chars().take(64).collect::<String>()),
            Value::Array(_) => "a list".to_owned(),
            Value::Object(_) => "an object".to_owned(),
        };
        faults.push(format!("{path} must be {wanted}, not {found}"));
    }
}

fn conform_member(shape: Shape, ty: Type, value: &mut Value, path: &Path<'_>, faults: &mut Vec<String>) {
    match (shape, value) {
        (Shape::List, Value::Array(items)) => {
            for (i, item) in items.iter_mut().enumerate() {
                conform_one(ty, item, &path.at(i), faults);
            }
        }
        (Shape::List, other) => fault(path, "a list", other, faults),
        (Shape::Map, Value::Object(map)) => map.retain(|key, item| {
            if item.is_null() {
                return false;
            }
            conform_one(ty, item, &path.key(key), faults);
            true
        }),
        (Shape::Map, other) => fault(path, "an object", other, faults),
        (_, value) => conform_one(ty, value, path, faults),
    }
}

fn conform_one(ty: Type, value: &mut Value, path: &Path<'_>, faults: &mut Vec<String>) {
    match (ty, value) {
        (Type::Message(index), Value::Object(map)) => conform_map(index, map, path, false, faults),
        (Type::Message(_), other) => fault(path, "an object", other, faults),
        (scalar, value) => check_scalar(scalar, value, path, faults),
    }
}

fn check_scalar(ty: Type, value: &Value, path: &Path<'_>, faults: &mut Vec<String>) {
    let text = value.as_str();
    let (good, wanted) = match ty {
        Type::Str => (text.is_some(), "a string"),
        Type::Bool => (value.is_boolean(), "true or false"),
        Type::Int32 => (value.as_i64().is_some_and(|n| i32::try_from(n).is_ok()), "a 32-bit integer"),
        Type::Int64 => (value.as_i64().is_some(), "an integer"),
        Type::Bytes => (text.is_some_and(|s| STANDARD.decode(s).is_ok()), "base64 text"),
        Type::Quantity => (
            Quantity::from_json(value).is_ok(),
            "a quantity: a number with an optional suffix (such as '500m', '1.5' or '64Mi')",
        ),
        Type::Time | Type::MicroTime => {
            (text.is_some_and(|s| s.parse::<Timestamp>().is_ok()), "a time (such as '2006-01-02T15:04:05Z')")
        }
        Type::IntOrString => (
            text.is_some() || value.as_i64().is_some_and(|n| i32::try_from(n).is_ok()),
            "an integer or a string",
        ),
        Type::Raw | Type::Message(_) => (true, ""),
    };
    if !good {
        fault(path, wanted, value, faults);
    }
}

/// What to do about members that a type does not have (`fieldValidation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Drop them.
    #[default]
    Ignore,
    /// Drop them, and tell.
    Warn,
    /// Refuse the request.
    Strict,
}

impl FieldValidation {
    /// Reads the query parameter; absent is `Warn`. 422 for others than the three.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        match text {
            "Ignore" => Ok(Self::Ignore),
            "" | "Warn" => Ok(Self::Warn),
            "Strict" => Ok(Self::Strict),
            other => {
                let cause = Cause {
                    reason: CauseReason::NotSupported,
                    message: format!(
                        "Unsupported value: {other:?}: supported values: \"Ignore\", \"Strict\", \"Warn\""
                    ),
                    field: "fieldValidation".to_owned(),
                };
                Err(ApiError::invalid_as("meta.k8s.io", "PatchOptions", "", vec![cause]))
            }
        }
    }

    /// Carries the mode out on a body that is not conformed yet: the warnings to tell, or a 400.
    pub fn check(self, kind: &Kind, sub: Subresource, body: &Value) -> Result<Vec<String>, ApiError> {
        if self == Self::Ignore {
            return Ok(Vec::new());
        }
        let told: Vec<String> =
            unknown_fields(kind, sub, body).iter().map(|field| format!("unknown field {field:?}")).collect();
        if self == Self::Warn || told.is_empty() {
            return Ok(told);
        }
        let shown = told[..told.len().min(FAULTS_MAX)].join(", ");
        Err(ApiError::bad_request(format!("strict decoding error: {shown}")))
    }
}

/// The paths of members that the type does not have, for `fieldValidation=Strict` (refuse) and `Warn` (tell).
/// Members of wrong types are left to [`conform`].
pub fn unknown_fields(kind: &Kind, sub: Subresource, body: &Value) -> Vec<String> {
    let mut out = Vec::new();
    if let (Some(root), Some(map)) = (body_of(kind, sub), body.as_object()) {
        unknown_in(root, map, &Path::Root, true, &mut out);
    }
    out
}

fn unknown_in(index: usize, map: &Map<String, Value>, path: &Path<'_>, root: bool, out: &mut Vec<String>) {
    for (key, value) in map {
        if root && matches!(key.as_str(), "apiVersion" | "kind") {
            continue;
        }
        let path = path.key(key);
        match message(index).member(key) {
            None => out.push(path.to_string()),
            Some((shape, Type::Message(inner))) => match (shape, value) {
                (Shape::List, Value::Array(items)) => {
                    for (i, item) in items.iter().enumerate() {
                        if let Some(map) = item.as_object() {
                            unknown_in(inner, map, &path.at(i), false, out);
                        }
                    }
                }
                (Shape::Map, Value::Object(map)) => {
                    for (key, item) in map {
                        if let Some(map) = item.as_object() {
                            unknown_in(inner, map, &path.key(key), false, out);
                        }
                    }
                }
                (_, Value::Object(map)) => unknown_in(inner, map, &path, false, out),
                _ => {}
            },
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::kinds::{CONFIG_MAPS, DEPLOYMENTS, NODES, PODS, SECRETS, SERVICES, kinds};
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn wrong_types_are_named() {
        let cases = [
            (
                &DEPLOYMENTS,
                json!({"spec": {"replicas": "3"}}),
                "spec.replicas must be a 32-bit integer, not the string \"3\"",
            ),
            (
                &DEPLOYMENTS,
                json!({"spec": {"replicas": 1.5}}),
                "spec.replicas must be a 32-bit integer, not 1.5",
            ),
            (&DEPLOYMENTS, json!({"spec": {"replicas": 4_294_967_296_i64}}), "32-bit"),
            (&PODS, json!({"spec": {"containers": {}}}), "spec.containers must be a list, not an object"),
            (
                &PODS,
                json!({"spec": {"containers": [null]}}),
                "spec.containers[0] must be an object, not null",
            ),
            (
                &PODS,
                json!({"spec": {"containers": [{"env": [{"name": "A", "value": 1}]}]}}),
                "spec.containers[0].env[0].value must be a string, not 1",
            ),
            (&PODS, json!({"spec": {"hostNetwork": "yes"}}), "spec.hostNetwork must be true or false"),
            (
                &PODS,
                json!({"spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}}),
                "spec.containers[0].resources.limits.cpu must be a quantity",
            ),
            (
                &PODS,
                json!({"metadata": {"labels": {"a.b/c": true}}}),
                "metadata.labels[a.b/c] must be a string, not true",
            ),
            (&PODS, json!({"metadata": {"creationTimestamp": "now"}}), "must be a time"),
            (&SECRETS, json!({"data": {"k": "!"}}), "data.k must be base64 text"),
            (&SERVICES, json!({"spec": {"ports": [{"targetPort": []}]}}), "an integer or a string"),
            (&CONFIG_MAPS, json!({"kind": 1}), "kind must be a string"),
            (
                &CONFIG_MAPS,
                json!({"data": {"a": 1}, "binaryData": {"b": "?"}}),
                "binaryData.b must be base64 text, not the string \"?\"; data.a",
            ),
            (&CONFIG_MAPS, json!([]), "must be a JSON object"),
        ];
        for (kind, mut body, says) in cases {
            let error = conform(kind, Subresource::Main, &mut body).expect_err(says);
            assert_eq!(error.code, 400);
            assert!(error.message.contains(says), "{} lacks {says}", error.message);
        }
    }

    #[test]
    fn nulls_and_unknown_members_go() {
        let mut body = json!({"apiVersion": "v1", "kind": "Pod", "junk": 1, "status": null,
            "metadata": {"creationTimestamp": null, "labels": {"a": "b", "c": null}},
            "spec": {"typo": {}, "containers": [{"name": "a", "livenessProbe": {"httpGet": {"port": "http", "x": 1}}}],
                "volumes": [{"name": "v", "emptyDir": {"y": 1}}]}});
        assert_eq!(
            unknown_fields(&PODS, Subresource::Main, &body),
            ["junk", "spec.containers[0].livenessProbe.httpGet.x", "spec.typo", "spec.volumes[0].emptyDir.y"]
        );
        conform(&PODS, Subresource::Main, &mut body).unwrap();
        assert_eq!(
            body,
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "a", "livenessProbe": {"httpGet": {"port": "http"}}}],
                    "volumes": [{"name": "v", "emptyDir": {}}]}})
        );
        assert!(unknown_fields(&PODS, Subresource::Main, &body).is_empty());
    }

    #[test]
    fn field_validation() {
        let body = json!({"data": {"free": "key"}, "dada": 1, "metadata": {"nam": "x"}});
        let check =
            |mode: &str| FieldValidation::parse(mode).unwrap().check(&CONFIG_MAPS, Subresource::Main, &body);
        assert_eq!(check("Ignore").unwrap(), Vec::<String>::new());
        assert_eq!(check("").unwrap(), ["unknown field \"dada\"", "unknown field \"metadata.nam\""]);
        let error = check("Strict").unwrap_err();
        assert_eq!(
            error.message,
            "strict decoding error: unknown field \"dada\", unknown field \"metadata.nam\""
        );
        assert_eq!(error.code, 400);
        assert_eq!(FieldValidation::parse("Maybe").unwrap_err().code, 422);
        let good = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"free": "key"}});
        assert!(FieldValidation::Strict.check(&CONFIG_MAPS, Subresource::Main, &good).unwrap().is_empty());
    }

    #[test]
    fn many_faults_are_cut() {
        let items: Vec<Value> = (0..100).map(|i| json!(i)).collect();
        let error =
            conform(&PODS, Subresource::Main, &mut json!({"spec": {"containers": items}})).unwrap_err();
        assert_eq!(error.message.matches("must be an object").count(), FAULTS_MAX);
    }

    #[test]
    fn subresources_have_their_own_types() {
        let mut scale = json!({"spec": {"replicas": 3, "template": {}}});
        conform(&DEPLOYMENTS, Subresource::Scale, &mut scale).unwrap();
        assert_eq!(scale, json!({"spec": {"replicas": 3}}));
        let mut binding = json!({"target": {"name": 1}});
        assert!(conform(&PODS, Subresource::Binding, &mut binding).is_err());
        let mut node = json!({"status": {"capacity": {"cpu": 2}, "volumesAttached": [], "images": [{"names": ["a"], "sizeBytes": 5}]}});
        conform(&NODES, Subresource::Status, &mut node).unwrap();
        assert_eq!(node["status"]["capacity"]["cpu"], 2);
    }

    fn junk() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z]{0,4}".prop_map(Value::from),
        ];
        let key = prop::sample::select(vec![
            "metadata",
            "spec",
            "status",
            "containers",
            "name",
            "labels",
            "ports",
            "template",
            "env",
            "resources",
            "x",
        ]);
        leaf.prop_recursive(5, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..5)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_conforms_stays(body in junk()) {
            for kind in kinds() {
                let mut once = body.clone();
                if conform(kind, Subresource::Main, &mut once).is_ok() {
                    prop_assert!(unknown_fields(kind, Subresource::Main, &once).is_empty());
                    let mut twice = once.clone();
                    prop_assert!(conform(kind, Subresource::Main, &mut twice).is_ok());
                    prop_assert_eq!(&twice, &once);
                }
            }
        }
    }
}
