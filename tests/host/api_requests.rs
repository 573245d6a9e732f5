//! The API over the wire: objects' lives, forms of answers, identities, and input that is wrong.

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::api_server::{ControlPlane, Who, read_answer};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// The controllers' own map comes when it comes.
const OURS: &str = "fieldSelector=metadata.name!%3Dkube-root-ca.crt";
const TABLE: &str = "Accept: application/json;as=Table;v=v1;g=meta.k8s.io,application/json\r\n";

fn map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": value}})
}

fn deployment(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "i", "env": [{"name": "A", "value": "1"}]}]}}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_is_made_changed_and_deleted() {
    let api = ControlPlane::start().await;
    let made = api.send("POST", MAPS, &map("a", "1")).await;
    assert_eq!(made.code, 201);
    let path = format!("{MAPS}/a");
    let got = api.get(&path).await.json();
    assert_eq!(got, made.json());
    assert!(api.send("POST", MAPS, &map("a", "1")).await.refused(409).contains("already exists"));
    let mut new = got.clone();
    new["data"]["k"] = json!("2");
    assert_eq!(api.send("PUT", &path, &new).await.code, 200);
    assert!(api.send("PUT", &path, &new).await.refused(409).contains("has been modified"));
    let patch = json!({"data": {"k": null, "l": "3"}});
    let patched = api.patch("merge-patch+json", &path, &patch).await.json();
    assert_eq!(patched["data"], json!({"l": "3"}));
    let patch = json!([{"op": "replace", "path": "/data/l", "value": "4"}]);
    assert_eq!(api.patch("json-patch+json", &path, &patch).await.json()["data"]["l"], "4");
    let wrong = json!({"preconditions": {"uid": "someone-else"}});
    api.send("DELETE", &path, &wrong).await.refused(409);
    let gone = api.send("DELETE", &path, &json!({"propagationPolicy": "Background"})).await.json();
    assert_eq!((&gone["kind"], &gone["status"]), (&json!("Status"), &json!("Success")));
    assert_eq!(gone["details"]["uid"], got["metadata"]["uid"]);
    assert_eq!(api.get(&path).await.refused(404), "configmaps \"a\" not found");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_runs_change_nothing() {
    let api = ControlPlane::start().await;
    let all = format!("{MAPS}?dryRun=All");
    assert_eq!(api.send("POST", &all, &map("a", "1")).await.code, 201);
    api.get(&format!("{MAPS}/a")).await.refused(404);
    api.send("POST", MAPS, &map("a", "1")).await;
    let before = api.get(&format!("{MAPS}/a")).await.json();
    let item = format!("{MAPS}/a?dryRun=All");
    let as_if = api.patch("merge-patch+json", &item, &json!({"data": {"k": "2"}})).await.json();
    assert_eq!(as_if["data"]["k"], "2");
    assert_eq!(as_if["metadata"]["resourceVersion"], before["metadata"]["resourceVersion"]);
    assert_eq!(api.send("PUT", &item, &map("a", "3")).await.json()["data"]["k"], "3");
    assert_eq!(api.send("DELETE", &item, &json!({})).await.code, 200);
    assert_eq!(api.send("DELETE", &format!("{MAPS}/a"), &json!({"dryRun": ["All"]})).await.code, 200);
    assert_eq!(api.get(&format!("{MAPS}/a")).await.json(), before);
    api.send("POST", &format!("{MAPS}?dryRun=Maybe"), &map("b", "1")).await.refused(400);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deployments_patch_strategically_scale_and_report() {
    let api = ControlPlane::start().await;
    let all = "/apis/apps/v1/namespaces/default/deployments";
    api.send("POST", all, &deployment("d")).await;
    let path = format!("{all}/d");
    let patch = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "j"}]}}}});
    let patched = api.patch("strategic-merge-patch+json", &path, &patch).await.json();
    let container = &patched["spec"]["template"]["spec"]["containers"][0];
    assert_eq!((&container["image"], &container["env"][0]["value"]), (&json!("j"), &json!("1")));
    assert_eq!(patched["metadata"]["generation"], 2);
    let scale = api.get(&format!("{path}/scale")).await.json();
    assert_eq!((&scale["kind"], &scale["spec"]["replicas"]), (&json!("Scale"), &json!(1)));
    let patch = json!({"spec": {"replicas": 5}});
    let scaled = api.patch("merge-patch+json", &format!("{path}/scale"), &patch).await.json();
    assert_eq!(scaled["spec"]["replicas"], 5);
    let patch = json!({"status": {"replicas": 5}, "spec": {"replicas": 9}});
    let status = api.patch("merge-patch+json", &format!("{path}/status"), &patch).await.json();
    assert_eq!((&status["status"]["replicas"], &status["spec"]["replicas"]), (&json!(5), &json!(5)));
    assert_eq!(status["metadata"]["generation"], 3);
    let apply = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": 2}});
    let applied = api.patch("apply-patch+yaml", &format!("{path}?fieldManager=t&force=true"), &apply).await;
    assert_eq!((applied.code, &applied.json()["spec"]["replicas"]), (200, &json!(2)));
    let fresh = format!("{MAPS}/fresh?fieldManager=t");
    assert_eq!(api.patch("apply-patch+yaml", &fresh, &map("fresh", "1")).await.code, 201);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn misspelt_fields_are_refused_when_asked() {
    let api = ControlPlane::start().await;
    let mut typo = map("t", "1");
    typo["dada"] = json!({"k": "2"});
    let told = api.send("POST", &format!("{MAPS}?fieldValidation=Strict"), &typo).await.refused(400);
    assert!(told.contains("unknown field \"dada\""), "{told}");
    api.get(&format!("{MAPS}/t")).await.refused(404);
    assert_eq!(api.send("POST", &format!("{MAPS}?fieldValidation=Ignore"), &typo).await.code, 201);
    assert_eq!(api.get(&format!("{MAPS}/t")).await.json().get("dada"), None, "dropped, not stored");
    let path = format!("{MAPS}/t?fieldValidation=Strict");
    for media in ["merge-patch+json", "strategic-merge-patch+json"] {
        api.patch(media, &path, &json!({"dada": {}})).await.refused(400);
        assert_eq!(api.patch(media, &path, &json!({"data": {"more": media}})).await.code, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bindings_and_graceful_deletion_of_pods() {
    let api = ControlPlane::start().await;
    let all = "/api/v1/namespaces/default/pods";
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    api.send("POST", all, &pod).await;
    api.get(&format!("{all}/p/log")).await.refused(400);
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n"}});
    assert_eq!(api.send("POST", &format!("{all}/p/binding"), &binding).await.code, 201);
    api.send("POST", &format!("{all}/p/binding"), &binding).await.refused(409);
    let marked = api.send("DELETE", &format!("{all}/p"), &json!({"gracePeriodSeconds": 7})).await.json();
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 7);
    let by_node = api.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn,status.phase!%3DFailed").await.json();
    assert_eq!(by_node["items"].as_array().unwrap().len(), 1);
    let last = api.request(Who::Agent, &format!("DELETE {all}/p?gracePeriodSeconds=0"), "", "").await;
    assert_eq!(last.json()["status"], "Success");
    api.get(&format!("{all}/p")).await.refused(404);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_page_through_one_revision_and_select() {
    let api = ControlPlane::start().await;
    for n in 0..5 {
        let mut object = map(&format!("m{n}"), "1");
        object["metadata"]["labels"] = json!({"odd": (n % 2 == 1).to_string()});
        api.send("POST", MAPS, &object).await;
    }
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().iter();
        items.map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let first = api.get(&format!("{MAPS}?limit=2&{OURS}")).await.json();
    assert_eq!(names(&first), ["m0", "m1"]);
    let token = first["metadata"]["continue"].as_str().unwrap();
    api.request(Who::Admin, &format!("DELETE {MAPS}/m3"), "", "").await;
    api.send("POST", MAPS, &map("m2b", "1")).await;
    let rest = api.get(&format!("{MAPS}?limit=500&continue={token}&{OURS}")).await.json();
    assert_eq!(names(&rest), ["m2", "m3", "m4"], "the rest is of the revision of the first page");
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let odd = api.get(&format!("{MAPS}?labelSelector=odd%20in%20(true)")).await.json();
    assert_eq!(names(&odd), ["m1"]);
    let one = api.get(&format!("{MAPS}?fieldSelector=metadata.name%3Dm4")).await.json();
    assert_eq!(names(&one), ["m4"]);
    api.get(&format!("{MAPS}?fieldSelector=spec.nothing%3Dx")).await.refused(400);
    api.get(&format!("{MAPS}?resourceVersion=999999")).await.refused(504);
    api.get(&format!("{MAPS}?sendInitialEvents=true")).await.refused(422);
    let table = api.request(Who::Admin, &format!("GET {MAPS}?{OURS}"), TABLE, "").await.json();
    assert_eq!((&table["kind"], table["rows"].as_array().unwrap().len()), (&json!("Table"), 5));
    assert_eq!(table["rows"][0]["cells"][0], "m0");
    let gone =
        api.request(Who::Admin, &format!("DELETE {MAPS}?labelSelector=odd%3Dfalse"), "", "").await.json();
    assert_eq!(names(&gone), ["m0", "m2", "m4"]);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_lists_are_whole() {
    let api = ControlPlane::start().await;
    let big = "x".repeat(30_000);
    for n in 0..20 {
        api.send("POST", MAPS, &map(&format!("m{n}"), &big)).await;
    }
    let list = api.get(&format!("{MAPS}?{OURS}")).await.json();
    assert_eq!(list["items"].as_array().unwrap().len(), 20);
    assert_eq!(list["items"][19]["data"]["k"].as_str().unwrap().len(), big.len());
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_are_certificates() {
    let api = ControlPlane::start().await;
    for path in ["/healthz", "/livez", "/readyz", "/version"] {
        let answer = api.request(Who::Nobody, &format!("GET {path}"), "", "").await;
        assert_eq!(answer.code, 200, "{path}");
    }
    for path in ["/api", "/api/v1/pods", "/metrics", "/openapi/v3", "/nonsense"] {
        api.request(Who::Nobody, &format!("GET {path}"), "", "").await.refused(401);
    }
    assert_eq!(api.request(Who::Agent, "GET /api/v1/pods", "", "").await.code, 200);
    let json = "Content-Type: application/json\r\n";
    let refused = api.request(Who::Agent, &format!("POST {MAPS}"), json, &map("a", "1").to_string()).await;
    assert!(refused.refused(403).contains("cannot create resource \"configmaps\""));
    let node = json!({"metadata": {"name": "n"}}).to_string();
    assert_eq!(api.request(Who::Agent, "POST /api/v1/nodes", json, &node).await.code, 201);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_schemas_and_metrics() {
    let api = ControlPlane::start().await;
    let aggregated =
        "Accept: application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json\r\n";
    let answer = api.request(Who::Admin, "GET /apis", aggregated, "").await;
    assert!(answer.head.contains("g=apidiscovery.k8s.io;v=v2;as=apigroupdiscoverylist"));
    assert_eq!(answer.json()["kind"], "APIGroupDiscoveryList");
    assert_eq!(api.get("/apis").await.json()["kind"], "APIGroupList");
    assert_eq!(api.get("/api/v1").await.json()["kind"], "APIResourceList");
    assert_eq!(api.get("/apis/apps/v1").await.json()["groupVersion"], "apps/v1");
    let index = api.get("/openapi/v3").await.json();
    let url = index["paths"]["api/v1"]["serverRelativeURL"].as_str().unwrap();
    let document = api.get(url).await;
    assert!(document.json()["paths"].is_object());
    let tag = document.head.lines().find(|l| l.starts_with("etag: ")).unwrap();
    let known = format!("If-None-Match: {}\r\n", tag.trim_start_matches("etag: ").to_uppercase());
    assert_eq!(api.request(Who::Admin, &format!("GET {url}"), &known, "").await.code, 304);
    api.get("/openapi/v2").await.refused(404);
    api.get("/apis/nothing.example.com/v1").await.refused(404);
    api.send("POST", "/apis", &json!({})).await.refused(405);
    let metrics = api.get("/metrics").await.body;
    for name in [
        "apiserver_request_total{",
        "sheave_store_commits_total",
        "process_resident_memory_bytes",
        "apiserver_storage_objects{resource=\"namespaces\"} 4",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bodies_get_a_clear_answer_and_do_no_harm() {
    let api = ControlPlane::start().await;
    let json = "Content-Type: application/json\r\n";
    let post = format!("POST {MAPS}");
    let junk = api.request(Who::Admin, &post, json, "junk").await;
    assert!(junk.refused(400).contains("is not valid JSON"));
    let cut = api.request(Who::Admin, &post, json, "{\"metadata\": {\"name\": \"a\"").await;
    assert!(cut.refused(400).contains("ends too early"));
    assert!(api.request(Who::Admin, &post, json, "[1]").await.refused(400).contains("JSON object"));
    let empty = api.request(Who::Admin, &post, json, "").await;
    assert!(empty.refused(400).contains("ends too early"));
    let protobuf = "Content-Type: application/vnd.kubernetes.protobuf\r\n";
    let cut = api.request(Who::Admin, &post, protobuf, "k8s\0\u{a}\u{7f}").await;
    assert!(cut.refused(400).contains("malformed protobuf"));
    let cbor = "Content-Type: application/cbor\r\n";
    let refused = api.request(Who::Admin, &post, cbor, "x").await;
    assert!(refused.refused(415).contains("accepted media types include: application/json"));
    assert!(api.send("POST", MAPS, &json!({"metadata": {}})).await.refused(422).contains("name"));
    let other = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}});
    api.send("POST", MAPS, &other).await.refused(400);
    api.send("POST", "/api/v1/namespaces/nope/configmaps", &map("a", "1")).await.refused(404);
    api.send("PUT", MAPS, &map("a", "1")).await.refused(405);
    api.patch("unknown+json", &format!("{MAPS}/a"), &json!({})).await.refused(415);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    api.request(Who::Admin, &post, json, &deep).await.refused(400);

    let huge = map("a", &"x".repeat(4 << 20));
    let refused = api.send("POST", MAPS, &huge).await.refused(413);
    assert!(refused.contains("limit is 3145728"), "{refused}");
    let stored = map("a", &"x".repeat(2 << 20));
    assert!(api.send("POST", MAPS, &stored).await.refused(422).contains("Too long"));

    // The connection ends in the middle of what was announced.
    let mut tls = api.connect(Who::Admin).await;
    let head = format!("{post} HTTP/1.1\r\nHost: api\r\nContent-Length: 100\r\n{json}\r\n{{\"metadata\"");
    tls.write_all(head.as_bytes()).await.unwrap();
    tls.shutdown().await.unwrap();
    drop(tls);
    // Not HTTP, and not TLS either.
    let answer = api.raw(Who::Admin, b"\x00\x01\x02 nonsense\r\n\r\n").await;
    assert_eq!(answer.code, 400);
    let mut tcp = tokio::net::TcpStream::connect(api.ready.address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    drop(tcp);
    assert_eq!(api.get(&format!("{MAPS}?{OURS}")).await.json()["items"], json!([]));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_may_stay_silent() {
    let api = ControlPlane::start().await;
    let tls = api.connect(Who::Admin).await;
    let asked = api.get("/version").await;
    assert_eq!(asked.code, 200);
    let mut tls = tls;
    tls.write_all(b"GET /version HTTP/1.0\r\n\r\n").await.unwrap();
    assert_eq!(read_answer(tls).await.code, 200);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_and_a_taken_directory_are_named() {
    let api = ControlPlane::start().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let mut config = sheave_control::ControlConfig {
        state_dir: elsewhere.path().to_owned(),
        listen: api.ready.address,
        ..sheave_control::ControlConfig::default()
    };
    let run = |config| sheave_control::run(config, tokio_util::sync::CancellationToken::new());
    let text = |error: sheave_control::ControlError| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        text
    };
    let taken = text(run(config.clone()).await.unwrap_err());
    assert!(taken.contains(&api.ready.address.to_string()) && taken.contains("--listen"), "{taken}");
    assert_eq!(taken.matches("in use").count(), 1, "{taken}");
    config.listen.set_port(0);
    config.state_dir = api.dir.path().to_owned();
    let taken = text(run(config).await.unwrap_err());
    assert!(taken.contains("--state-dir"), "{taken}");
    api.stop().await;
}
