//! `bench connect`: a TCP connect through a ClusterIP beside one to the pod itself, with few and with many services
//! loaded, and the time from a change of endpoints in the API until the kernel's map holds it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use sheave_agent::dataplane;
use sheave_agent::service::Proto;
use sheave_harness::Node;

use crate::cluster::{self, PORT};
use crate::latency::Latencies;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const SIZES: [usize; 2] = [10, 10_000];
const CONNECTS: usize = 10_000;
const CHANGES: usize = 200;
const WRITERS: usize = 32;
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run(json: bool) -> Result<()> {
    let mut report = Report::new("connect", json);
    let bar = spinner("a node with one pod behind a service");
    let node = cluster::start_node()?;
    let (service, pod) = cluster::inside(&node, async |client| {
        cluster::deploy(&client, "web", 1).await?;
        let pods = cluster::settled(&client, "web", 1, PATIENCE).await?;
        let pod = pods.first().and_then(cluster::ip).context("a Ready pod without an address")?;
        Ok((SocketAddr::new(cluster::cluster_ip(&client, "web").await?, 80), SocketAddr::new(pod, PORT)))
    })?;
    // The API server's own service and ours are there already.
    let mut loaded = 2;
    for size in SIZES {
        bar.set_message(format!("{size} services: loading"));
        let start = Instant::now();
        let added = size - loaded;
        cluster::inside(&node, async |client| load(&client, loaded, size).await)?;
        wait_loaded(&node, size)?;
        let params = [("services", json!(size)), ("endpoints_each", json!(2)), ("added", json!(added))];
        report.add("load", start.elapsed().as_secs_f64(), "s", Bar::None, &params);
        loaded = size;
        bar.set_message(format!("{size} services: connects"));
        connects(&node, size, service, pod, &mut report)?;
        bar.set_message(format!("{size} services: changes of endpoints"));
        let pin_dir = node.pin_dir().to_owned();
        let changes = cluster::inside(&node, async |client| changes(&client, &pin_dir).await)?;
        let params = [("services", json!(size)), ("changes", json!(CHANGES))];
        report.add("endpoint_change_p50", changes.ms(0.5), "ms", Bar::None, &params);
        report.add("endpoint_change_p99", changes.ms(0.99), "ms", Bar::AtMost(10.0), &params);
    }
    bar.finish_and_clear();
    report.finish();
    Ok(())
}

fn connects(
    node: &Node,
    size: usize,
    service: SocketAddr,
    pod: SocketAddr,
    report: &mut Report,
) -> Result<()> {
    let output = node
        .command(std::env::current_exe()?)
        .args(["connect-client", "--direct", &pod.to_string(), "--service", &service.to_string()])
        .args(["--count", &CONNECTS.to_string()])
        .output()?;
    ensure!(output.status.success(), "the client: {}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).context("the client's figures")?;
    let us = |which: &str, quantile: &str| said[which][quantile].as_f64().context("a figure of the client");
    let params = [("services", json!(size)), ("connects", json!(CONNECTS))];
    for quantile in ["p50_us", "p99_us"] {
        let name = quantile.trim_end_matches("_us");
        let (direct, service) = (us("direct", quantile)?, us("service", quantile)?);
        report.add(&format!("connect_direct_{name}"), direct, "us", Bar::None, &params);
        report.add(&format!("connect_service_{name}"), service, "us", Bar::None, &params);
        let bar = if name == "p50" { Bar::AtMost(1.05) } else { Bar::None };
        report.add(&format!("connect_service_to_direct_{name}"), service / direct, "x", bar, &params);
    }
    Ok(())
}

/// Adds services until there are `to`: no selector, two endpoints each that are nobody else's.
async fn load(client: &Client, from: usize, to: usize) -> Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    futures::stream::iter(from..to)
        .map(|number| {
            let (services, slices) = (services.clone(), slices.clone());
            async move {
                let name = format!("filler-{number}");
                let service: Service = serde_json::from_value(
                    json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80, "targetPort": 8080}]}}),
                )?;
                services.create(&PostParams::default(), &service).await?;
                let slice = serde_json::from_value(slice(&name, &[address(2 * number), address(2 * number + 1)]))?;
                slices.create(&PostParams::default(), &slice).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(WRITERS)
        .try_collect::<Vec<()>>()
        .await
        .context("creating services")?;
    Ok(())
}

/// Addresses out of the range for benchmarks (RFC 2544), which nothing answers.
fn address(number: usize) -> String {
    format!("198.{}.{}.{}", 18 + ((number >> 16) & 1), (number >> 8) & 255, number & 255)
}

fn slice(service: &str, addresses: &[String]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(
            |address| json!({"addresses": [address], "conditions": {"ready": true}, "nodeName": "elsewhere"}),
        )
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080, "protocol": "TCP"}]
    })
}

fn wait_loaded(node: &Node, size: usize) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let frontends = dataplane::list(node.pin_dir())?;
        let serving = frontends.iter().filter(|frontend| !frontend.ready.is_empty()).count();
        if serving >= size {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{serving} frontends with backends in the kernel, {size} services in the API");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Moves one service's endpoints again and again; from just before the request is sent until the map shows it.
async fn changes(client: &Client, pin_dir: &std::path::Path) -> Result<Latencies> {
    const SERVICE: &str = "filler-2";
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    let frontend = SocketAddr::new(cluster::cluster_ip(client, SERVICE).await?, 80);
    let maps = dataplane::Lookup::open(pin_dir)?;
    let mut latencies = Latencies::new();
    for number in 0..CHANGES {
        let wanted: IpAddr = address(100_000 + number).parse()?;
        let patch =
            json!({"endpoints": [{"addresses": [wanted.to_string()], "conditions": {"ready": true}}]});
        let start = Instant::now();
        slices.patch(&format!("{SERVICE}-1"), &PatchParams::default(), &Patch::Merge(patch)).await?;
        loop {
            let backends = maps.ready(frontend.ip(), frontend.port(), Proto::Tcp)?;
            if backends.len() == 1 && backends[0].0 == wanted {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "{frontend} still has {backends:?}, not {wanted}");
            // Spinning would take the core that the agent needs.
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        latencies.record(start.elapsed());
    }
    Ok(latencies)
}
