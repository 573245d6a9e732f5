//! The pods that are bound to this node, as a stream of compact models. The stream never ends by itself:
//! it reconnects, and after every reconnect it says which pods there are.

use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use serde::Deserialize;

use crate::limits;
use crate::pod::model::{Container, Deletion, Pod, PodSpec, PriorStatus};

/// What the watch says.
#[derive(Debug, Clone, PartialEq)]
pub enum PodEvent {
    /// A full list begins.
    ListBegins,
    /// A pod, listed or changed.
    Seen(Box<Pod>),
    /// The list is complete: pods that were not seen since it began are gone.
    ListEnds,
    /// A pod is gone; as it was last.
    Gone(Box<Pod>),
}

/// A pod on the wire; only what the model has is decoded.
#[derive(Debug, Clone, Deserialize)]
pub struct WirePod {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PriorStatus,
}

impl kube::Resource for WirePod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> std::borrow::Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> std::borrow::Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl From<WirePod> for Pod {
    fn from(wire: WirePod) -> Self {
        let meta = wire.metadata;
        let used = used_annotations(&wire.spec);
        let annotations = meta.annotations.unwrap_or_default();
        let deletion = meta.deletion_timestamp.is_some().then(|| Deletion {
            grace_s: meta.deletion_grace_period_seconds.unwrap_or(wire.spec.termination_grace_period_seconds),
        });
        Pod {
            namespace: meta.namespace.unwrap_or_default(),
            name: meta.name.unwrap_or_default(),
            uid: meta.uid.unwrap_or_default(),
            labels: meta.labels.unwrap_or_default(),
            annotations: annotations.into_iter().filter(|(key, _)| used.contains(key)).collect(),
            deletion,
            spec: wire.spec,
            status: wire.status,
        }
    }
}

fn used_annotations(spec: &PodSpec) -> Vec<String> {
    let refs = |container: &Container| -> Vec<String> {
        let sources = container.env.iter().filter_map(|var| var.value_from.as_ref());
        let paths = sources.filter_map(|source| source.field_ref.as_ref());
        let keys = paths
            .filter_map(|field| field.field_path.strip_prefix("metadata.annotations['")?.strip_suffix("']"));
        keys.map(str::to_owned).collect()
    };
    spec.init_containers.iter().chain(&spec.containers).flat_map(refs).collect()
}

/// Pauses between reconnects: short, because a node that does not hear from its API server can't do what
/// it is there for.
#[derive(Debug, Clone)]
pub struct Reconnect {
    next: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Reconnect { next: Duration::from_millis(limits::API_RETRY_FIRST_MS) }
    }
}

impl Iterator for Reconnect {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = self.next;
        self.next = (now * 2).min(Duration::from_secs(limits::WATCH_RETRY_MAX_S));
        Some(now)
    }
}

impl Backoff for Reconnect {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Watches the pods of a node.
pub fn watch(client: kube::Client, node_name: &str) -> impl Stream<Item = PodEvent> + Send + use<> {
    let api: kube::Api<WirePod> = kube::Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node_name}"));
    let events = watcher(api, config).backoff(Reconnect::default());
    events.filter_map(async |event| match event {
        Ok(watcher::Event::Init) => Some(PodEvent::ListBegins),
        Ok(watcher::Event::InitDone) => Some(PodEvent::ListEnds),
        Ok(watcher::Event::InitApply(pod) | watcher::Event::Apply(pod)) => {
            Some(PodEvent::Seen(Box::new(pod.into())))
        }
        Ok(watcher::Event::Delete(pod)) => Some(PodEvent::Gone(Box::new(pod.into()))),
        Err(error) => {
            tracing::warn!(
                error = super::client::chain(&error),
                "pod watch interrupted; what runs keeps running"
            );
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(json: &str) -> Pod {
        serde_json::from_str::<WirePod>(json).expect("a pod").into()
    }

    #[test]
    fn a_pod_is_cut_down_to_what_is_used() {
        let pod = decode(
            r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","namespace":"n","uid":"u",
            "annotations":{"a":"1","b":"2"},"managedFields":[],"creationTimestamp":"2023-11-14T22:13:20Z"},
            "spec":{"containers":[{"name":"c","env":[{"name":"A","valueFrom":
            {"fieldRef":{"fieldPath":"metadata.annotations['a']"}}}]}]},"status":{"phase":"Running"}}"#,
        );
        assert_eq!(pod.annotations.len(), 1);
        assert_eq!(pod.annotations["a"], "1");
        assert_eq!(pod.deletion, None);
        assert_eq!(pod.status.phase, "Running");
    }

    #[test]
    fn a_deletion_carries_its_grace() {
        let with = |grace: &str| {
            decode(&format!(
                r#"{{"metadata":{{"name":"p","deletionTimestamp":"2023-11-14T22:13:20Z"{grace}}},
                "spec":{{"terminationGracePeriodSeconds":7}}}}"#
            ))
        };
        assert_eq!(with(r#","deletionGracePeriodSeconds":3"#).deletion, Some(Deletion { grace_s: 3 }));
        assert_eq!(with("").deletion, Some(Deletion { grace_s: 7 }));
    }

    #[test]
    fn reconnects_get_slower_up_to_a_bound() {
        let pauses: Vec<u128> = Reconnect::default().take(8).map(|d| d.as_millis()).collect();
        assert_eq!(pauses[..3], [100, 200, 400]);
        assert_eq!(pauses.last().copied(), Some(u128::from(limits::WATCH_RETRY_MAX_S) * 1000));
    }
}
