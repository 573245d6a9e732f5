//! Services and EndpointSlices, watched. Invariant: an object becomes a compact model in the function that got it and is
//! gone after that.

use super::parse::{Place, key, service, slice};
use super::wire::{WireNode, WireService, WireSlice};
use crate::dataplane::{Feed, Notice};
use crate::limits;
use crate::service::{Event, ObjectKey, Refusal};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::events::{Event as ApiEvent, EventType, Recorder, Reporter};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fmt::Debug;
use tokio::sync::{mpsc, watch};

/// Label of a Node: its zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// Annotation of an EndpointSlice: when the last change of its endpoints was made.
const TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Turns watch events into events of the model, and an initial list into one statement of what exists.
async fn forward<K: Resource>(
    objects: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
    present: impl Fn(&K) -> Option<Event>,
    gone: impl Fn(ObjectKey) -> Event,
    synced: impl Fn(BTreeSet<ObjectKey>) -> Event,
    what: &'static str,
    feed: &mpsc::Sender<Feed>,
) {
    let mut listed = BTreeSet::new();
    let mut objects = std::pin::pin!(objects.inspect_err(|error| {
        tracing::warn!(error = error as &dyn std::error::Error, "watching {what}; trying again");
    }));
    while let Some(next) = objects.next().await {
        let Ok(next) = next else { continue };
        let event = match next {
            watcher::Event::Init => {
                listed.clear();
                continue;
            }
            watcher::Event::InitApply(object) => match present(&object) {
                Some(event) => {
                    listed.insert(key(object.meta()));
                    event
                }
                None => gone(key(object.meta())),
            },
            watcher::Event::InitDone => synced(std::mem::take(&mut listed)),
            watcher::Event::Apply(object) => {
                // When the change behind it was made in the cluster, for the programming latency. What was listed is
                // older than this watch and says nothing.
                if let Some(at_s) = triggered(object.meta())
                    && feed.send(Feed::Triggered(at_s)).await.is_err()
                {
                    return;
                }
                present(&object).unwrap_or_else(|| gone(key(object.meta())))
            }
            watcher::Event::Delete(object) => gone(key(object.meta())),
        };
        if feed.send(Feed::Event(event)).await.is_err() {
            return;
        }
    }
}

/// When the change of endpoints that led to this version of an object was made, in seconds since 1970.
fn triggered(meta: &ObjectMeta) -> Option<f64> {
    let text = meta.annotations.as_ref()?.get(TRIGGER)?;
    let at: jiff::Timestamp = text.parse().ok()?;
    Some(at.as_microsecond() as f64 / 1e6)
}

/// Watches all Services for ever.
pub(crate) async fn watch_services(client: Client, feed: mpsc::Sender<Feed>) {
    let objects = watcher(Api::<WireService>::all(client), watcher::Config::default()).default_backoff();
    forward(
        objects,
        |object| service(object).map(Event::Service),
        Event::ServiceGone,
        Event::ServicesSynced,
        "services",
        &feed,
    )
    .await;
}

/// Watches all EndpointSlices for ever, seen from this node and its zone. When the zone changes all are told again.
pub(crate) async fn watch_slices(client: Client, node_name: String, feed: mpsc::Sender<Feed>) {
    let (found, mut zone) = watch::channel(None);
    let looking = watch_zone(client.clone(), &node_name, found);
    let slices = async {
        // The first answer is worth waiting for: without it all slices would have to be listed twice.
        while zone.borrow_and_update().is_none() && zone.changed().await.is_ok() {}
        loop {
            let here = zone.borrow_and_update().clone().flatten();
            let place = Place { node: &node_name, zone: here.as_deref() };
            let api = Api::<WireSlice>::all(client.clone());
            let objects = watcher(api, watcher::Config::default()).default_backoff();
            let told = forward(
                objects,
                |object| slice(object, place).map(Event::Slice),
                Event::SliceGone,
                Event::SlicesSynced,
                "endpointslices",
                &feed,
            );
            tokio::select! {
                () = told => return,
                changed = zone.changed() => if changed.is_err() { return },
            }
        }
    };
    tokio::select! {
        () = looking => {}
        () = slices => {}
    }
}

/// Tells the node's zone as it changes: nothing while it is not known, then the zone or that there is none.
async fn watch_zone(client: Client, node_name: &str, found: watch::Sender<Option<Option<String>>>) {
    let tell = |zone: Option<String>| {
        found.send_if_modified(|held| {
            let changed = held.as_ref() != Some(&zone);
            *held = Some(zone);
            changed
        });
    };
    let config = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    let mut nodes = std::pin::pin!(watcher(Api::<WireNode>::all(client), config).default_backoff());
    let mut listed = None;
    while let Some(next) = nodes.next().await {
        match next {
            Ok(watcher::Event::Init) => listed = None,
            Ok(watcher::Event::InitApply(node)) => listed = zone_of(&node),
            Ok(watcher::Event::InitDone) => tell(listed.take()),
            Ok(watcher::Event::Apply(node)) => tell(zone_of(&node)),
            // The node comes back where it was, or says so.
            Ok(watcher::Event::Delete(_)) => {}
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "watching the node; trying again");
                if found.borrow().is_none() {
                    tell(None);
                }
            }
        }
    }
}

fn zone_of(node: &WireNode) -> Option<String> {
    node.metadata.labels.as_ref()?.get(ZONE).filter(|zone| !zone.is_empty()).cloned()
}

/// Puts refusals on the Services and EndpointSlices that they concern, as Events.
pub(crate) async fn publish_refusals(client: Client, node_name: String, mut notices: mpsc::Receiver<Notice>) {
    let reporter = Reporter { controller: "sheave-agent".to_owned(), instance: Some(node_name) };
    let recorder = Recorder::new(client.clone(), reporter);
    while let Some(notice) = notices.recv().await {
        for (slice, note) in notes(&notice.reasons) {
            let told = match &slice {
                None => tell::<WireService>(&client, &recorder, &notice.service, &note).await,
                Some(slice) => tell::<WireSlice>(&client, &recorder, slice, &note).await,
            };
            if let Err(error) = told {
                let object = slice.as_ref().unwrap_or(&notice.service);
                tracing::warn!(%object, error = &error as &dyn std::error::Error, "event not published");
            }
        }
    }
}

/// What is said of the Service (`None`) and of each of its EndpointSlices.
fn notes(reasons: &[Refusal]) -> Vec<(Option<ObjectKey>, String)> {
    let mut notes: Vec<(Option<ObjectKey>, String)> = Vec::new();
    for reason in reasons {
        let slice = match reason {
            Refusal::Unusable { slice, .. } => slice.clone(),
            _ => None,
        };
        match notes.iter_mut().find(|(held, _)| *held == slice) {
            Some((_, note)) => {
                note.push_str("; ");
                note.push_str(&reason.to_string());
            }
            None => notes.push((slice, reason.to_string())),
        }
    }
    for (_, note) in &mut notes {
        if note.len() > limits::EVENT_NOTE_BYTES_MAX {
            let end = (0..=limits::EVENT_NOTE_BYTES_MAX - 4).rev().find(|at| note.is_char_boundary(*at));
            note.truncate(end.unwrap_or(0));
            note.push_str(" ...");
        }
    }
    notes
}

async fn tell<K>(client: &Client, recorder: &Recorder, key: &ObjectKey, note: &str) -> kube::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let Some((namespace, name)) = key.split_once('/') else { return Ok(()) };
    let object = Api::<K>::namespaced(client.clone(), namespace).get(name).await?;
    let event = ApiEvent {
        type_: EventType::Warning,
        reason: "ServiceNotBalanced".to_owned(),
        note: Some(note.to_owned()),
        action: "Balancing".to_owned(),
        secondary: None,
    };
    recorder.publish(&event, &object.object_ref(&())).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_is_told_what_is_its_own() {
        let slice = |text: &str| Refusal::Unusable { slice: Some("a/slice".into()), text: text.into() };
        let full = Refusal::Full { what: "slots", capacity: 9 };
        let told = notes(&[slice("one"), full, slice("two")]);
        let wanted = [
            (Some("a/slice".into()), "one; two".to_owned()),
            (None, "the table of slots is full (9)".to_owned()),
        ];
        assert_eq!(told, wanted);
        let long = notes(&[slice(&"\u{e9}".repeat(2000))]);
        assert!(long[0].1.len() <= limits::EVENT_NOTE_BYTES_MAX && long[0].1.ends_with(" ..."));
    }
}
