//! A node with the echo image in it, for benchmarks and soaks: the harness's node plus a client of its API and the few
//! objects that are measured. Everything async runs on threads inside the node's network namespace.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;
use sheave_harness::{Node, image};

/// The image's name after the import.
pub(crate) const IMAGE: &str = image::ECHO;
/// Where the echo server listens.
pub(crate) const PORT: u16 = 8080;

/// Starts a node with its directories on the disk of the working directory, waits until it is Ready and imports the
/// echo image.
pub(crate) fn start_node() -> Result<Node> {
    let mut node = Node::start_in(&std::env::current_dir()?, crate::sheave()?, &[]);
    node.wait_ready();
    node.sheave(&["image", "import", &image::echo().display().to_string(), "--name", IMAGE]);
    Ok(node)
}

/// Runs `work` on a runtime whose threads are inside the node's network namespace.
pub(crate) fn inside<T: Send>(node: &Node, work: impl AsyncFnOnce(Client) -> Result<T> + Send) -> Result<T> {
    let kubeconfig = node.kubeconfig();
    node.netns.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async { work(crate::control_process::client(&kubeconfig).await?).await })
    })
}

/// The pod template's spec of the echo server.
pub(crate) fn echo_spec() -> serde_json::Value {
    json!({
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "echo", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
            "ports": [{"containerPort": PORT}],
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 1}
        }]
    })
}

/// A Deployment of echo servers and the Service in front of it, both named `name`.
pub(crate) async fn deploy(client: &Client, name: &str, replicas: usize) -> Result<()> {
    let labels = json!({"app": name});
    let deployment: Deployment = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": echo_spec()}
        }
    }))?;
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": PORT}]}
    }))?;
    Api::<Deployment>::namespaced(client.clone(), "default")
        .create(&PostParams::default(), &deployment)
        .await
        .context("creating the Deployment")?;
    Api::<Service>::namespaced(client.clone(), "default")
        .create(&PostParams::default(), &service)
        .await
        .context("creating the Service")?;
    Ok(())
}

/// Sets a Deployment's replicas.
pub(crate) async fn scale(client: &Client, name: &str, replicas: usize) -> Result<()> {
    let patch = json!({"spec": {"replicas": replicas}});
    Api::<Deployment>::namespaced(client.clone(), "default")
        .patch_scale(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .context("scaling")?;
    Ok(())
}

/// Pods with the label `app=<name>` that are not on their way out.
pub(crate) async fn pods(client: &Client, name: &str) -> Result<Vec<Pod>> {
    let list = ListParams::default().labels(&format!("app={name}"));
    let pods = Api::<Pod>::namespaced(client.clone(), "default").list(&list).await?;
    Ok(pods.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect())
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

pub(crate) fn ip(pod: &Pod) -> Option<IpAddr> {
    pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok()
}

/// Waits until `count` pods of `name` are Ready, no others are left, and the service's slices list just them.
pub(crate) async fn settled(
    client: &Client,
    name: &str,
    count: usize,
    patience: Duration,
) -> Result<Vec<Pod>> {
    let deadline = Instant::now() + patience;
    loop {
        let pods = pods(client, name).await?;
        let ready: BTreeSet<IpAddr> = pods.iter().filter(|pod| is_ready(pod)).filter_map(ip).collect();
        let slices = Api::<EndpointSlice>::namespaced(client.clone(), "default")
            .list(&ListParams::default().labels(&format!("kubernetes.io/service-name={name}")))
            .await?;
        let listed: BTreeSet<IpAddr> = slices
            .items
            .iter()
            .flat_map(|slice| &slice.endpoints)
            .filter(|endpoint| endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(false))
            .flat_map(|endpoint| endpoint.addresses.iter().filter_map(|address| address.parse().ok()))
            .collect();
        if pods.len() == count && ready.len() == count && listed == ready {
            return Ok(pods);
        }
        if Instant::now() > deadline {
            bail!("{name}: {} pods, Ready {ready:?}, in slices {listed:?}; wanted {count}", pods.len());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A service's ClusterIP.
pub(crate) async fn cluster_ip(client: &Client, name: &str) -> Result<IpAddr> {
    let service = Api::<Service>::namespaced(client.clone(), "default").get(name).await?;
    let ip = service.spec.and_then(|spec| spec.cluster_ip).context("a service without ClusterIP")?;
    Ok(ip.parse()?)
}
