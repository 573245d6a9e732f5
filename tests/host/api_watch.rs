//! Watches over the wire: complete, in order, resumable, and honest when they can't be.

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::api_server::{ControlPlane, DEADLINE, Who};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// The controllers' own map comes when it comes.
const OURS: &str = "fieldSelector=metadata.name!%3Dkube-root-ca.crt";

/// A watch that is being read.
struct Watching(BufReader<TlsStream<TcpStream>>);

impl Watching {
    async fn open(api: &ControlPlane, query: &str, headers: &str) -> Self {
        let mut tls = api.connect(Who::Admin).await;
        let head = format!("GET {MAPS}?watch=true&{query}&{OURS} HTTP/1.0\r\n{headers}\r\n");
        tls.write_all(head.as_bytes()).await.unwrap();
        let mut this = Self(BufReader::new(tls));
        let status = this.line().await.unwrap();
        assert!(status.contains(" 200 "), "{status}");
        while !this.line().await.unwrap().is_empty() {}
        this
    }

    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = tokio::time::timeout(DEADLINE, self.0.read_line(&mut line)).await.unwrap();
        (read.unwrap() > 0).then(|| line.trim_end().to_owned())
    }

    /// The next event; `None` at the end of the watch.
    async fn next(&mut self) -> Option<Value> {
        Some(serde_json::from_str(&self.line().await?).unwrap())
    }

    /// Type, name and data of the next event.
    async fn brief(&mut self) -> (String, String, String) {
        let event = self.next().await.unwrap();
        let text = |v: &Value| v.as_str().unwrap_or("").to_owned();
        let object = &event["object"];
        (text(&event["type"]), text(&object["metadata"]["name"]), text(&object["data"]["k"]))
    }
}

fn map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"v": value}},
        "data": {"k": value}})
}

fn event(kind: &str, name: &str, value: &str) -> (String, String, String) {
    (kind.to_owned(), name.to_owned(), value.to_owned())
}

async fn put(api: &ControlPlane, name: &str, value: &str) -> String {
    let path = format!("{MAPS}/{name}");
    let patch = api.patch("apply-patch+yaml", &path, &map(name, value)).await;
    assert!(patch.code < 300, "{patch:?}");
    patch.json()["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_after_its_revision_also_over_a_restart() {
    let api = ControlPlane::start().await;
    let first = put(&api, "a", "1").await;
    let mut watch = Watching::open(&api, &format!("resourceVersion={first}"), "").await;
    let second = put(&api, "a", "2").await;
    assert_eq!(watch.brief().await, event("MODIFIED", "a", "2"));
    api.request(Who::Admin, &format!("DELETE {MAPS}/a"), "", "").await;
    let gone = watch.next().await.unwrap();
    assert_eq!(gone["type"], "DELETED");
    let gone: u64 = gone["object"]["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    assert!(gone > second.parse().unwrap(), "a deletion has a revision of its own");
    let (dir, address) = api.stop().await;
    assert!(watch.next().await.is_none(), "a stop ends watches");
    let api = ControlPlane::start_in(dir, address).await;
    let mut watch = Watching::open(&api, &format!("resourceVersion={first}"), "").await;
    assert_eq!(watch.brief().await, event("MODIFIED", "a", "2"));
    assert_eq!(watch.brief().await.0, "DELETED");
    put(&api, "b", "1").await;
    assert_eq!(watch.brief().await, event("ADDED", "b", "1"));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn initial_events_end_with_a_mark() {
    let api = ControlPlane::start().await;
    put(&api, "a", "1").await;
    put(&api, "b", "2").await;
    let query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut watch = Watching::open(&api, query, "").await;
    assert_eq!(watch.brief().await, event("ADDED", "a", "1"));
    assert_eq!(watch.brief().await, event("ADDED", "b", "2"));
    let mark = watch.next().await.unwrap();
    assert_eq!(mark["type"], "BOOKMARK");
    assert_eq!(mark["object"]["kind"], "ConfigMap");
    assert_eq!(mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    let rev: u64 = mark["object"]["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    let next: u64 = put(&api, "b", "3").await.parse().unwrap();
    assert!(rev < next);
    assert_eq!(watch.brief().await, event("MODIFIED", "b", "3"));
    let plain = api.get(&format!("{MAPS}?watch=true&sendInitialEvents=true")).await;
    plain.refused(422);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_selector_turns_changes_into_additions_and_deletions() {
    let api = ControlPlane::start().await;
    put(&api, "a", "other").await;
    let mut watch = Watching::open(&api, "labelSelector=v%3Dmine", "").await;
    put(&api, "a", "mine").await;
    let left = put(&api, "a", "other").await;
    put(&api, "a", "mine").await;
    put(&api, "b", "other").await;
    api.request(Who::Admin, &format!("DELETE {MAPS}/b"), "", "").await;
    api.request(Who::Admin, &format!("DELETE {MAPS}/a"), "", "").await;
    assert_eq!(watch.brief().await, event("ADDED", "a", "mine"));
    let gone = watch.next().await.unwrap();
    assert_eq!((&gone["type"], &gone["object"]["data"]["k"]), (&json!("DELETED"), &json!("mine")));
    assert_eq!(gone["object"]["metadata"]["resourceVersion"], left, "at the revision of the change");
    assert_eq!(watch.brief().await, event("ADDED", "a", "mine"));
    assert_eq!(watch.brief().await, event("DELETED", "a", "mine"));
    let mut one = Watching::open(&api, "fieldSelector=metadata.name%3Dc", "").await;
    put(&api, "d", "1").await;
    put(&api, "c", "1").await;
    assert_eq!(one.brief().await, event("ADDED", "c", "1"));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forgotten_is_gone_and_what_is_to_come_is_awaited() {
    let api = ControlPlane::start().await;
    let first = put(&api, "a", "1").await;
    let big = "x".repeat(1_000_000);
    let slow = Watching::open(&api, &format!("resourceVersion={first}"), "").await;
    let object = |n: usize| json!({"metadata": {"name": "a"}, "data": {"big": big, "n": n.to_string()}});
    for n in 0..80 {
        assert_eq!(api.send("PUT", &format!("{MAPS}/a"), &object(n)).await.code, 200);
    }
    let gone = api.get(&format!("{MAPS}?watch=true&resourceVersion={first}")).await;
    assert!(gone.refused(410).contains("too old resource version"));
    assert_eq!(gone.json()["reason"], "Expired");
    api.get(&format!("{MAPS}?resourceVersion={first}&resourceVersionMatch=Exact")).await.refused(410);
    // The watcher that read nothing all the while learns it from its own stream.
    let mut slow = slow;
    let mut last = Value::Null;
    while let Some(event) = slow.next().await {
        last = event;
    }
    assert_eq!((&last["type"], &last["object"]["code"]), (&json!("ERROR"), &json!(410)));
    api.get(&format!("{MAPS}?watch=true&resourceVersion=99999999")).await.refused(504);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_when_asked_with_a_bookmark() {
    let api = ControlPlane::start().await;
    put(&api, "a", "1").await;
    let mut watch = Watching::open(&api, "timeoutSeconds=1&allowWatchBookmarks=true", "").await;
    assert_eq!(watch.brief().await, event("ADDED", "a", "1"));
    // A write to another resource moves the revision that the bookmark tells.
    let made = api.send("POST", "/api/v1/namespaces", &json!({"metadata": {"name": "n"}})).await.json();
    let mark = watch.next().await.unwrap();
    assert_eq!(mark["type"], "BOOKMARK");
    let rev =
        |object: &Value| -> u64 { object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap() };
    assert!(rev(&mark["object"]) >= rev(&made));
    assert!(watch.next().await.is_none());
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_watched_with_columns_once() {
    let api = ControlPlane::start().await;
    put(&api, "a", "1").await;
    let headers = "Accept: application/json;as=Table;v=v1;g=meta.k8s.io,application/json\r\n";
    let mut watch = Watching::open(&api, "", headers).await;
    let first = watch.next().await.unwrap();
    assert_eq!(first["object"]["kind"], "Table");
    assert!(!first["object"]["columnDefinitions"].as_array().unwrap().is_empty());
    put(&api, "a", "2").await;
    let second = watch.next().await.unwrap();
    assert_eq!(second["object"]["rows"][0]["cells"][0], "a");
    assert!(second["object"]["columnDefinitions"].as_array().is_none_or(Vec::is_empty));
    api.stop().await;
}
