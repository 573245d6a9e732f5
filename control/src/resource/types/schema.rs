//! The field table as OpenAPI schemas, for `kubectl explain`: names and types, no descriptions.

use serde_json::{Map, Value, json};

use super::{Message, Shape, Type, index_of, message};
use crate::resource::kinds::Kind;

/// The schemas of these kinds and of all that they hold, by name.
pub fn schemas<'k>(kinds: impl Iterator<Item = &'k Kind>) -> Map<String, Value> {
    let mut out = Map::new();
    for kind in kinds {
        let Some(index) = index_of(kind.kind) else { continue };
        add(index, &mut out);
        if let Some(schema) = out.get_mut(kind.kind) {
            let text = json!({"type": "string"});
            schema["properties"]["apiVersion"] = text.clone();
            schema["properties"]["kind"] = text;
            let gvk = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
            schema["x-kubernetes-group-version-kind"] = json!([gvk]);
        }
    }
    out
}

fn add(index: usize, out: &mut Map<String, Value>) {
    let shape = message(index);
    if out.contains_key(shape.name) {
        return;
    }
    out.insert(shape.name.to_owned(), object(shape));
    for (_, _, ty) in &shape.members {
        if let Type::Message(inner) = ty {
            add(*inner, out);
        }
    }
}

fn object(shape: &Message) -> Value {
    let properties: Map<String, Value> = shape
        .members
        .iter()
        .map(|(name, shape, ty)| {
            let one = value(*ty);
            let schema = match shape {
                Shape::List => json!({"type": "array", "items": one}),
                Shape::Map => json!({"type": "object", "additionalProperties": one}),
                _ => one,
            };
            ((*name).to_owned(), schema)
        })
        .collect();
    json!({"type": "object", "properties": properties})
}

fn value(ty: Type) -> Value {
    match ty {
        Type::Str => json!({"type": "string"}),
        Type::Bool => json!({"type": "boolean"}),
        Type::Int32 => json!({"type": "integer", "format": "int32"}),
        Type::Int64 => json!({"type": "integer", "format": "int64"}),
        Type::Bytes => json!({"type": "string", "format": "byte"}),
        Type::Quantity => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        Type::Time | Type::MicroTime => json!({"type": "string", "format": "date-time"}),
        Type::IntOrString => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        Type::Raw => json!({"type": "object"}),
        Type::Message(inner) => json!({"$ref": format!("#/components/schemas/{}", message(inner).name)}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::kinds::{CONFIG_MAPS, DEPLOYMENTS, PODS};

    fn check_refs(value: &Value, schemas: &Map<String, Value>) {
        match value {
            Value::Object(map) => {
                if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
                    let name = reference.strip_prefix("#/components/schemas/").unwrap();
                    assert!(schemas.contains_key(name), "{name} is missing");
                }
                map.values().for_each(|v| check_refs(v, schemas));
            }
            Value::Array(items) => items.iter().for_each(|v| check_refs(v, schemas)),
            _ => {}
        }
    }

    #[test]
    fn schemas_are_whole() {
        let got = schemas([&PODS, &DEPLOYMENTS].into_iter());
        check_refs(&Value::Object(got.clone()), &got);
        assert_eq!(
            got["Deployment"]["properties"]["spec"],
            json!({"$ref": "#/components/schemas/DeploymentSpec"})
        );
        assert_eq!(
            got["DeploymentSpec"]["properties"]["replicas"],
            json!({"type": "integer", "format": "int32"})
        );
        let gvk = json!([{"group": "apps", "version": "v1", "kind": "Deployment"}]);
        assert_eq!(got["Deployment"]["x-kubernetes-group-version-kind"], gvk);
        assert!(got.contains_key("Container"));
        assert!(!schemas([&CONFIG_MAPS].into_iter()).contains_key("Container"));
    }

    #[test]
    fn shapes_and_inlined_members() {
        let got = schemas([&PODS].into_iter());
        let volume = &got["Volume"]["properties"];
        assert_eq!(
            volume["emptyDir"],
            json!({"$ref": "#/components/schemas/EmptyDirVolumeSource"}),
            "inlined"
        );
        let containers = json!({"type": "array", "items": {"$ref": "#/components/schemas/Container"}});
        assert_eq!(got["PodSpec"]["properties"]["containers"], containers);
        assert_eq!(
            got["PodSpec"]["properties"]["nodeSelector"]["additionalProperties"],
            json!({"type": "string"})
        );
    }
}
