//! Network policies and what they are about, watched. Invariant: as for services an object becomes a compact model in
//! the function that got it. Pods of other nodes, and namespaces, are asked for only once there is a policy.

use super::policies_wire::{WireNamespace, WirePeerPod, WirePolicy, key, namespace, pod, policy};
use crate::policy::{Event, Key};
use futures::{Stream, StreamExt as _};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use std::collections::BTreeSet;
use tokio::sync::{mpsc, watch};

use super::pods::Reconnect;

/// Turns watch events into events of the model, and an initial list into one statement of what exists.
async fn forward<K: Resource>(
    objects: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
    present: impl Fn(&K) -> Event,
    gone: fn(Key) -> Event,
    synced: fn(BTreeSet<Key>) -> Event,
    what: &'static str,
    feed: &mpsc::Sender<Event>,
) {
    let mut listed = BTreeSet::new();
    let mut objects = std::pin::pin!(objects);
    while let Some(next) = objects.next().await {
        let event = match next {
            Err(error) => {
                let error = super::chain(&error);
                tracing::warn!(error, "watching {what}; policies stay as they are, trying again");
                continue;
            }
            Ok(watcher::Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed.insert(key(object.meta()));
                present(&object)
            }
            Ok(watcher::Event::InitDone) => synced(std::mem::take(&mut listed)),
            Ok(watcher::Event::Apply(object)) => present(&object),
            Ok(watcher::Event::Delete(object)) => gone(key(object.meta())),
        };
        if feed.send(event).await.is_err() {
            return;
        }
    }
}

/// Watches all NetworkPolicies for ever, and tells when there was one.
pub(crate) async fn watch_policies(client: Client, seen: watch::Sender<bool>, feed: mpsc::Sender<Event>) {
    let api = Api::<WirePolicy>::all(client);
    let objects = watcher(api, watcher::Config::default()).backoff(Reconnect::default());
    let present = |object: &WirePolicy| {
        seen.send_if_modified(|seen| !std::mem::replace(seen, true));
        let (model, problems) = policy(object);
        for problem in problems {
            tracing::warn!(policy = %model.key(), problem, "part of a network policy is not understood");
        }
        Event::Policy(model)
    };
    forward(objects, present, Event::PolicyGone, Event::PoliciesSynced, "networkpolicies", &feed).await;
}

/// Watches all Pods for ever, once there was a policy.
pub(crate) async fn watch_pods(
    client: Client,
    node_name: String,
    mut seen: watch::Receiver<bool>,
    feed: mpsc::Sender<Event>,
) {
    if seen.wait_for(|seen| *seen).await.is_err() {
        return;
    }
    let api = Api::<WirePeerPod>::all(client);
    let objects = watcher(api, watcher::Config::default()).backoff(Reconnect::default());
    let present = |object: &WirePeerPod| match pod(object, &node_name) {
        Some(pod) => Event::Pod(pod),
        None => Event::PodGone(key(&object.metadata)),
    };
    forward(objects, present, Event::PodGone, Event::PodsSynced, "pods", &feed).await;
}

/// Watches all Namespaces for ever, once there was a policy.
pub(crate) async fn watch_namespaces(
    client: Client,
    mut seen: watch::Receiver<bool>,
    feed: mpsc::Sender<Event>,
) {
    if seen.wait_for(|seen| *seen).await.is_err() {
        return;
    }
    let api = Api::<WireNamespace>::all(client);
    let objects = watcher(api, watcher::Config::default()).backoff(Reconnect::default());
    let present = |object: &WireNamespace| Event::Namespace(namespace(object));
    forward(objects, present, Event::NamespaceGone, Event::NamespacesSynced, "namespaces", &feed).await;
}
