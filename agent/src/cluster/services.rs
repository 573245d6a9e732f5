//! Services and EndpointSlices, watched. Invariant: a typed object becomes a compact model in the function that got
//! it and is gone after that.

use crate::dataplane::{Feed, Notice};
use crate::service::{
    Endpoint, Event, Hint, ObjectKey, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::events::{Event as ApiEvent, EventType, Recorder, Reporter};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource as _};
use std::collections::BTreeSet;
use std::net::IpAddr;
use tokio::sync::mpsc;

/// Label that gives a Service to another proxy.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of an EndpointSlice: the Service that it belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

fn key(meta: &ObjectMeta) -> ObjectKey {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let name = meta.name.as_deref().unwrap_or_default();
    format!("{namespace}/{name}").into()
}

/// SCTP is not balanced yet.
fn proto(name: Option<&str>) -> Option<Proto> {
    Proto::from_name(name.unwrap_or("TCP")).filter(|proto| *proto != Proto::Sctp)
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

/// The model of a Service; `None` when it is none to balance (headless, ExternalName, another proxy's).
pub fn service(object: &core::Service) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    let foreign = object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(PROXY_NAME));
    if foreign || spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let mut texts: Vec<&String> = spec.cluster_ips.iter().flatten().collect();
    if texts.is_empty() {
        texts.extend(&spec.cluster_ip);
    }
    let cluster_ips: Box<[IpAddr]> = texts.into_iter().filter_map(|text| text.parse().ok()).collect();
    if cluster_ips.is_empty() {
        return None;
    }
    let ports = spec.ports.iter().flatten().filter_map(|at| {
        Some(ServicePort {
            name: at.name.as_deref().unwrap_or_default().into(),
            port: port(at.port)?,
            node_port: at.node_port.and_then(port).unwrap_or(0),
            proto: proto(at.protocol.as_deref())?,
        })
    });
    Some(Service {
        key: key(&object.metadata),
        cluster_ips,
        ports: ports.collect(),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        ..Service::default()
    })
}

/// The model of an EndpointSlice; `None` when it belongs to no Service or holds no addresses of a family we balance.
pub fn slice(object: &discovery::EndpointSlice, node_name: &str) -> Option<Slice> {
    let labels = object.metadata.labels.as_ref()?;
    let owner = labels.get(SERVICE_NAME).filter(|owner| !owner.is_empty())?;
    if object.address_type == "FQDN" {
        return None;
    }
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let ports = object.ports.iter().flatten().filter_map(|at| {
        Some(SlicePort {
            name: at.name.as_deref().unwrap_or_default().into(),
            port: at.port.and_then(port)?,
            proto: proto(at.protocol.as_deref())?,
        })
    });
    Some(Slice {
        key: key(&object.metadata),
        service: format!("{namespace}/{owner}").into(),
        ports: ports.collect(),
        endpoints: object.endpoints.iter().filter_map(|at| endpoint(at, node_name)).collect(),
        weight: 1,
        problems: Box::default(),
    })
}

fn endpoint(object: &discovery::Endpoint, node_name: &str) -> Option<Endpoint> {
    let conditions = object.conditions.as_ref();
    // Absent conditions: ready counts as true, serving as what ready is, terminating as false (discovery/v1).
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    let readiness = if ready {
        Readiness::Ready
    } else if serving && terminating {
        Readiness::Terminating
    } else {
        return None;
    };
    // Consumers use the first address only (discovery/v1).
    let addr = object.addresses.first()?.parse().ok()?;
    let on_this_node = object.node_name.as_deref() == Some(node_name);
    Some(Endpoint { addr, on_this_node, readiness, hint: Hint::None })
}

/// Turns watch events into events of the model, and an initial list into one statement of what exists.
async fn forward<K>(
    objects: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
    meta: impl Fn(&K) -> &ObjectMeta,
    present: impl Fn(&K) -> Option<Event>,
    gone: impl Fn(ObjectKey) -> Event,
    synced: impl Fn(BTreeSet<ObjectKey>) -> Event,
    what: &'static str,
    feed: mpsc::Sender<Feed>,
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
            watcher::Event::InitApply(object) => {
                listed.insert(key(meta(&object)));
                present(&object).unwrap_or_else(|| gone(key(meta(&object))))
            }
            watcher::Event::InitDone => synced(std::mem::take(&mut listed)),
            watcher::Event::Apply(object) => present(&object).unwrap_or_else(|| gone(key(meta(&object)))),
            watcher::Event::Delete(object) => gone(key(meta(&object))),
        };
        if feed.send(Feed::Event(event)).await.is_err() {
            return;
        }
    }
}

/// Watches all Services for ever.
pub(crate) async fn watch_services(client: Client, feed: mpsc::Sender<Feed>) {
    let objects = watcher(Api::<core::Service>::all(client), watcher::Config::default()).default_backoff();
    forward(
        objects,
        |object| &object.metadata,
        |object| service(object).map(Event::Service),
        Event::ServiceGone,
        Event::ServicesSynced,
        "services",
        feed,
    )
    .await;
}

/// Watches all EndpointSlices for ever.
pub(crate) async fn watch_slices(client: Client, node_name: String, feed: mpsc::Sender<Feed>) {
    let objects =
        watcher(Api::<discovery::EndpointSlice>::all(client), watcher::Config::default()).default_backoff();
    forward(
        objects,
        |object| &object.metadata,
        |object| slice(object, &node_name).map(Event::Slice),
        Event::SliceGone,
        Event::SlicesSynced,
        "endpointslices",
        feed,
    )
    .await;
}

/// Puts refusals on the Services that they concern, as Events.
pub(crate) async fn publish_refusals(client: Client, node_name: String, mut notices: mpsc::Receiver<Notice>) {
    let reporter = Reporter { controller: "sheave-agent".to_owned(), instance: Some(node_name) };
    let recorder = Recorder::new(client.clone(), reporter);
    while let Some(notice) = notices.recv().await {
        let Some((namespace, name)) = notice.service.split_once('/') else { continue };
        let services = Api::<core::Service>::namespaced(client.clone(), namespace);
        let reasons: Vec<String> = notice.reasons.iter().map(ToString::to_string).collect();
        let event = ApiEvent {
            type_: EventType::Warning,
            reason: "ServiceNotBalanced".to_owned(),
            note: Some(reasons.join("; ")),
            action: "Balancing".to_owned(),
            secondary: None,
        };
        let published = match services.get(name).await {
            Ok(object) => recorder.publish(&event, &object.object_ref(&())).await,
            Err(error) => Err(error),
        };
        if let Err(error) = published {
            tracing::warn!(service = %notice.service, error = &error as &dyn std::error::Error, "event not published");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse_service(value: serde_json::Value) -> Option<Service> {
        service(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_service_keeps_what_balancing_needs() {
        let found = parse_service(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {
                "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00:96::5"],
                "type": "NodePort", "externalTrafficPolicy": "Local",
                "ports": [
                    {"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"},
                    {"name": "sctp", "port": 99, "protocol": "SCTP"},
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                ],
            },
        }))
        .unwrap();
        assert_eq!(&*found.key, "default/web");
        assert_eq!(found.cluster_ips.len(), 2);
        let ports: Vec<_> = found.ports.iter().map(|p| (&*p.name, p.port, p.node_port, p.proto)).collect();
        assert_eq!(ports, [("http", 80, 30080, Proto::Tcp), ("dns", 53, 0, Proto::Udp)]);
        assert!(found.external_local && !found.internal_local);
    }

    #[test]
    fn some_services_are_not_balanced() {
        for (labels, spec) in [
            (json!({}), json!({"clusterIP": "None", "ports": [{"port": 80}]})),
            (json!({}), json!({"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.1"})),
            (json!({PROXY_NAME: "other"}), json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]})),
            (json!({}), json!({"ports": [{"port": 80}]})),
        ] {
            let object = json!({"metadata": {"namespace": "a", "name": "b", "labels": labels}, "spec": spec});
            assert_eq!(parse_service(object.clone()), None, "{object}");
        }
    }

    fn parse_slice(endpoints: serde_json::Value) -> Option<Slice> {
        let object = json!({
            "metadata": {"namespace": "default", "name": "web-abc", "labels": {SERVICE_NAME: "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}, {"name": "", "port": null}],
            "endpoints": endpoints,
        });
        slice(&serde_json::from_value(object).unwrap(), "node-1")
    }

    #[test]
    fn conditions_decide_whether_an_endpoint_counts() {
        use Readiness::{Ready, Terminating};
        let condition = |c: serde_json::Value| json!([{"addresses": ["10.244.0.1"], "conditions": c}]);
        for (conditions, wanted) in [
            (json!({}), Some(Ready)),
            (json!({"ready": true}), Some(Ready)),
            (json!({"ready": true, "serving": true, "terminating": true}), Some(Ready)),
            (json!({"ready": false}), None),
            (json!({"ready": false, "serving": true, "terminating": true}), Some(Terminating)),
            (json!({"ready": false, "serving": true, "terminating": false}), None),
            (json!({"ready": false, "serving": false, "terminating": true}), None),
        ] {
            let found = parse_slice(condition(conditions.clone())).unwrap();
            assert_eq!(found.endpoints.first().map(|e| e.readiness), wanted, "{conditions}");
        }
    }

    #[test]
    fn a_slice_knows_its_service_and_which_endpoints_are_here() {
        let found = parse_slice(json!([
            {"addresses": ["10.244.0.1", "10.244.0.9"], "nodeName": "node-1"},
            {"addresses": ["10.244.1.1"], "nodeName": "node-2"},
            {"addresses": ["junk"]},
            {"addresses": []},
        ]))
        .unwrap();
        assert_eq!((&*found.key, &*found.service), ("default/web-abc", "default/web"));
        let here: Vec<_> = found.endpoints.iter().map(|e| (e.addr.to_string(), e.on_this_node)).collect();
        assert_eq!(here, [("10.244.0.1".to_owned(), true), ("10.244.1.1".to_owned(), false)]);
        assert_eq!(found.ports.len(), 1);
    }
}
