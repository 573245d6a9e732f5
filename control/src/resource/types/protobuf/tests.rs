//! Bodies as kubectl 1.33 sends them, and what must not be read.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::resource::kinds::find_by_gvk;
use crate::resource::{Subresource, conform, unknown_fields};

const CONFIG_MAP: &str =
    "azhzAAoPCgJ2MRIJQ29uZmlnTWFwEisKEgoCY20SABoAIgAqADIAOABCABIGCgFhEgFiGg0KA2JpbhIGAAH/YmluGgAiAA==";
const DEPLOYMENT: &str = concat!(
    "azhzAAoVCgdhcHBzL3YxEgpEZXBsb3ltZW50ErwBCh8KA3dlYhIAGgAiACoAMgA4AEIAWgoKA2FwcBIDd2ViEooBCAASDAoK",
    "CgNhcHASA3dlYhpwChwKABIAGgAiACoAMgA4AEIAWgoKA2FwcBIDd2ViElASMgoFbmdpbngSCW5naW54OjEuMioAMgoKABAA",
    "GFAiACoAQgBqAHIAgAEAiAEAkAEAogEAGgAyAEIASgBSAFgAYABoAIIBAIoBAJoBAMIBACICCgAoADgAGgwIABAAGAAgACgA",
    "OAAaACIA",
);
const NAMESPACE: &str = "azhzAAoPCgJ2MRIJTmFtZXNwYWNlEhwKFAoEdGVhbRIAGgAiACoAMgA4AEIAEgAaAgoAGgAiAA==";
const SECRET: &str = concat!(
    "azhzAAoMCgJ2MRIGU2VjcmV0EjIKEwoDc2VjEgAaACIAKgAyADgAQgASDAoCcHcSBnMzY3JldBoNZXhhbXBsZS5jb20vdBoA",
    "IgA=",
);
const NODE_PORT: &str = concat!(
    "azhzAAoNCgJ2MRIHU2VydmljZRKJAQodCgJucBIAGgAiACoAMgA4AEIAWgkKA2FwcBICbnASZAogCgc4MC1odHRwEgNUQ1AY",
    "UCIKCAEQABoEaHR0cCix6gEKHQoHNTMtNTM1MxIDVENQGDUiBwgAEOkpGgAoseoBEgkKA2FwcBICbnAaACIITm9kZVBvcnQ6",
    "AEIAUgBaAGAAaAAaAgoAGgAiAA==",
);

fn bytes(base64: &str) -> Vec<u8> {
    STANDARD.decode(base64).unwrap()
}

fn decoded(base64: &str) -> Value {
    let mut value = to_json(&bytes(base64)).unwrap();
    let kind = find_by_gvk(value["apiVersion"].as_str().unwrap(), value["kind"].as_str().unwrap()).unwrap();
    assert_eq!(unknown_fields(kind, Subresource::Main, &value), Vec::<String>::new());
    conform(kind, Subresource::Main, &mut value).unwrap();
    value
}

#[test]
fn kubectl_bodies() {
    for (body, expected) in [
        (NAMESPACE, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})),
        (
            CONFIG_MAP,
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"a": "b"},
                "binaryData": {"bin": "AAH/Ymlu"}}),
        ),
        (
            SECRET,
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "sec"}, "type": "example.com/t",
                "data": {"pw": "czNjcmV0"}}),
        ),
        (
            DEPLOYMENT,
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"app": "web"}},
                "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "web"}},
                    "template": {"metadata": {"labels": {"app": "web"}},
                        "spec": {"containers": [{"name": "nginx", "image": "nginx:1.2", "ports": [{"containerPort": 80}]}]}}}}),
        ),
        (
            NODE_PORT,
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "np", "labels": {"app": "np"}},
                "spec": {"type": "NodePort", "selector": {"app": "np"}, "ports": [
                    {"name": "80-http", "port": 80, "protocol": "TCP", "targetPort": "http", "nodePort": 30001},
                    {"name": "53-5353", "port": 53, "protocol": "TCP", "targetPort": 5353, "nodePort": 30001}]}}),
        ),
    ] {
        assert_eq!(decoded(body), expected);
    }
}

fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
    out.extend(content);
    out
}

fn envelope(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
    [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
}

#[test]
fn special_types() {
    let quantity = [field(1, b"cpu"), field(2, &field(1, b"500m"))].concat();
    let status = field(1, &quantity);
    let node = to_json(&envelope("v1", "Node", &field(3, &status))).unwrap();
    assert_eq!(node["status"]["capacity"], json!({"cpu": "500m"}));
    // renewTime 1.5 s after the epoch, leaseDurationSeconds -1.
    let renewed = [8, 1, 16, 0x80, 0xca, 0xb5, 0xee, 0x01];
    let spec = [field(4, &renewed), vec![2 << 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1]].concat();
    let lease = to_json(&envelope("coordination.k8s.io/v1", "Lease", &field(2, &spec))).unwrap();
    assert_eq!(
        lease["spec"],
        json!({"renewTime": "1970-01-01T00:00:01.500000Z", "leaseDurationSeconds": -1})
    );
    let pod = to_json(&envelope("v1", "Pod", &field(3, &field(8, &[5 << 3, 0, 4 << 3, 0])))).unwrap();
    assert_eq!(
        pod["status"]["containerStatuses"],
        json!([{"restartCount": 0, "ready": false}]),
        "written zeros stay"
    );
}

#[test]
fn refused() {
    for (body, error) in [
        (b"".to_vec(), ProtobufError::Magic),
        (b"{}".to_vec(), ProtobufError::Magic),
        (
            envelope("v9", "Gadget", &[]),
            ProtobufError::UnknownKind { api_version: "v9".to_owned(), kind: "Gadget".to_owned() },
        ),
        (MAGIC.to_vec(), ProtobufError::UnknownKind { api_version: String::new(), kind: String::new() }),
        ([MAGIC.to_vec(), vec![0x12, 200]].concat(), ProtobufError::Malformed { message: "the envelope" }),
        ([MAGIC.to_vec(), vec![0xff; 12]].concat(), ProtobufError::Malformed { message: "the envelope" }),
        (
            [MAGIC.to_vec(), field(3, b"gzip")].concat(),
            ProtobufError::Encoding { encoding: "gzip".to_owned() },
        ),
        (envelope("v1", "Pod", &[1 << 3, 1]), ProtobufError::Malformed { message: "Pod" }),
        (envelope("v1", "Pod", &[1 << 3 | 3]), ProtobufError::Malformed { message: "Pod" }),
        (
            envelope("v1", "Pod", &field(1, &field(1, &[0xff]))),
            ProtobufError::Utf8 { message: "ObjectMeta", field: "name" },
        ),
    ] {
        assert_eq!(to_json(&body), Err(error));
    }
}

proptest! {
    #[test]
    fn damaged_bodies_are_answers(cut in 0usize..250, at in 0usize..250, byte in any::<u8>()) {
        let mut body = bytes(DEPLOYMENT);
        if let Some(b) = body.get_mut(at) {
            *b = byte;
        }
        body.truncate(body.len() - cut.min(body.len()));
        prop_assert!(to_json(&body).map_or_else(|_| true, |v| v["kind"].is_string()));
    }

    #[test]
    fn random_bodies_are_answers(raw in prop::collection::vec(any::<u8>(), 0..100)) {
        let body = envelope("v1", "Pod", &raw);
        prop_assert!(to_json(&body).map_or_else(|_| true, |v| v["kind"] == "Pod"));
    }
}
