//! What the demo shows, step by step. A step looks, compares with what must be, and only then prints what it saw.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::api::{self, Changes, Pod};
use super::place::{NODE, Place};
use super::{table, until};
use crate::proc;

/// Requests a path; many enough that a backend without any would be a fault and no accident (with 5 backends chosen at
/// random the chance is below 1 in 10^27).
const REQUESTS: &str = "300";

/// The exit code of what SIGKILL ended.
const KILLED: i64 = 137;

pub(super) fn tell(place: &mut Place) -> Result<()> {
    bring_up(place)?;
    let changes = Changes::find();
    let pods = deploy(place, &changes)?;
    let service = Service::read(place)?;
    balance(place, &service, &pods)?;
    restart(place, &pods)?;
    scale(place, &changes, &service, 5)?;
    scale(place, &changes, &service, 1)
}

fn bring_up(place: &mut Place) -> Result<()> {
    let start = Instant::now();
    place.start_node()?;
    until("the node to be Ready", || {
        place.check_node()?;
        let node = api::get(place, &format!("/api/v1/nodes/{NODE}"))?;
        let conditions = node["status"]["conditions"].as_array().context("the node has no conditions yet")?;
        ensure!(conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"), "not Ready yet");
        Ok(())
    })
    .or_else(|error| place.check_node().and(Err(error)))?;
    claim(&format!("sheave up: node {NODE} is Ready"), start);
    let start = Instant::now();
    let mut import = place.inside(&place.programs.sheave);
    import.args(["image", "import"]).arg(&place.programs.image).args(place.path_flags());
    let said = proc::output(&mut import)?;
    ensure!(
        said.contains(crate::image::ECHO_NAME),
        "image import names no {}: {said}",
        crate::image::ECHO_NAME
    );
    claim(&format!("sheave image import: {}", crate::image::ECHO_NAME), start);
    Ok(())
}

fn deploy(place: &Place, changes: &Changes) -> Result<Vec<Pod>> {
    let start = Instant::now();
    let said = changes.apply(place, &proc::root().join("examples/web.yaml"))?;
    let pods = until("3 pods to be Ready", || ready_pods(place, 3))?;
    claim(&format!("{said}: 3 pods are Ready"), start);
    let rows: Vec<_> =
        pods.iter().map(|pod| vec![pod.name.clone(), pod.ip.clone(), pod.phase.clone()]).collect();
    table::print(&["pod", "address", "phase"], &rows);
    Ok(pods)
}

/// The pods of the deployment, if they are exactly `count` and all Ready.
fn ready_pods(place: &Place, count: usize) -> Result<Vec<Pod>> {
    let pods = api::pods(place, "web")?;
    let ready = pods.iter().filter(|pod| pod.ready).count();
    let described: Vec<_> = pods.iter().map(ToString::to_string).collect();
    let described = described.join("; ");
    ensure!(pods.len() == count && ready == count, "{} pods, {ready} of them Ready: {described}", pods.len());
    Ok(pods)
}

/// Where the example's services are reached.
struct Service {
    cluster_ip: String,
    node_ip: String,
    node_port: u64,
}

impl Service {
    fn read(place: &Place) -> Result<Service> {
        let services = "/api/v1/namespaces/default/services";
        let (web, port) = (
            api::get(place, &format!("{services}/web"))?,
            api::get(place, &format!("{services}/web-nodeport"))?,
        );
        let node = api::get(place, &format!("/api/v1/nodes/{NODE}"))?;
        let addresses = node["status"]["addresses"].as_array().context("the node has no addresses")?;
        let internal = addresses.iter().find(|address| address["type"] == "InternalIP");
        Ok(Service {
            cluster_ip: web["spec"]["clusterIP"].as_str().context("service web has no clusterIP")?.to_owned(),
            node_ip: internal
                .and_then(|a| a["address"].as_str())
                .context("the node has no InternalIP")?
                .to_owned(),
            node_port: port["spec"]["ports"][0]["nodePort"]
                .as_u64()
                .context("web-nodeport has no nodePort")?,
        })
    }

    fn cluster_url(&self) -> String {
        format!("http://{}/", self.cluster_ip)
    }

    fn node_url(&self) -> String {
        format!("http://{}:{}/", self.node_ip, self.node_port)
    }
}

/// Requests on every way to the service; each pod must answer on each.
fn balance(place: &Place, service: &Service, pods: &[Pod]) -> Result<()> {
    let start = Instant::now();
    let (cluster, port) = (service.cluster_url(), service.node_url());
    let mut ways = vec![
        ("node → ClusterIP", ask(place.inside(&place.programs.echo), &cluster)?),
        ("node → NodePort", ask(place.inside(&place.programs.echo), &port)?),
        (
            "node → ClusterIP, UDP",
            ask(place.inside(&place.programs.echo), &format!("udp://{}:7", service.cluster_ip))?,
        ),
        ("pod → ClusterIP", ask_from_a_pod(place, "asker", &cluster)?),
        ("pod → NodePort", ask_from_a_pod(place, "asker-port", &port)?),
    ];
    if let Some(command) = place.outside(&place.programs.echo) {
        ways.push(("outside → NodePort", ask(command, &port)?));
    }
    let mut rows = Vec::new();
    for (way, answers) in &ways {
        check_answers(way, answers, pods)?;
        rows.extend(rows_of(way, answers));
    }
    claim(
        &format!("{} × {REQUESTS} requests, none failed, every pod answered on every way", ways.len()),
        start,
    );
    table::print(&["way", "pod", "answers", "p50", "p99"], &rows);
    let frontends = proc::output(
        place.inside(&place.programs.sheave).args(["service", "list"]).args(place.path_flags()),
    )?;
    ensure!(
        frontends.contains(&service.cluster_ip),
        "the kernel's maps do not hold {}:\n{frontends}",
        service.cluster_ip
    );
    Ok(())
}

/// What the echo client counted.
struct Answers {
    failed: u64,
    errors: String,
    pods: BTreeMap<String, Value>,
}

impl Answers {
    fn read(text: &str) -> Result<Answers> {
        let line = text
            .lines()
            .find(|line| line.starts_with('{'))
            .with_context(|| format!("no answers in {text:?}"))?;
        let value: Value = serde_json::from_str(line).with_context(|| format!("read {line}"))?;
        let pods = value["pods"].as_object().context("answers name pods")?;
        Ok(Answers {
            failed: value["failed"].as_u64().context("answers count failures")?,
            errors: value["errors"].to_string(),
            pods: pods.iter().map(|(pod, figures)| (pod.clone(), figures.clone())).collect(),
        })
    }
}

fn ask(mut command: Command, url: &str) -> Result<Answers> {
    // Failures are in what it prints, with reasons.
    let output = proc::capture(command.args(["client", url, REQUESTS]))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Answers::read(&out).with_context(|| format!("{}: {}", proc::line(&command), err.trim()))
}

/// Runs the client as a pod and reads its log.
fn ask_from_a_pod(place: &Place, name: &str, url: &str) -> Result<Answers> {
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "client", "image": crate::image::ECHO_NAME, "imagePullPolicy": "Never",
                "args": ["client", url, REQUESTS],
            }],
        },
    });
    api::raw(place, &["POST", "/api/v1/namespaces/default/pods", "--data", &pod.to_string()])?;
    until(&format!("pod {name} to end"), || {
        let pod = api::pod(place, name)?;
        ensure!(["Succeeded", "Failed"].contains(&pod.phase.as_str()), "it is {}", pod.phase);
        Ok(())
    })?;
    let log = api::log(place, name)?;
    api::raw(place, &["DELETE", &format!("/api/v1/namespaces/default/pods/{name}")])?;
    Answers::read(&log).with_context(|| format!("log of pod {name}"))
}

fn check_answers(way: &str, answers: &Answers, pods: &[Pod]) -> Result<()> {
    if answers.failed > 0 {
        bail!("{way}: {} of {REQUESTS} requests failed: {}", answers.failed, answers.errors);
    }
    let answered: Vec<&str> = answers.pods.keys().map(String::as_str).collect();
    let expected: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
    ensure!(answered == expected, "{way}: {answered:?} answered, {expected:?} should");
    Ok(())
}

fn rows_of(way: &str, answers: &Answers) -> Vec<Vec<String>> {
    let figure = |value: &Value| value.as_u64().map_or_else(|| "?".to_owned(), |number| number.to_string());
    let row = |(pod, figures): (&String, &Value)| {
        let us = |name: &str| format!("{} µs", figure(&figures[name]));
        vec![way.to_owned(), pod.clone(), figure(&figures["answers"]), us("p50_us"), us("p99_us")]
    };
    answers.pods.iter().map(row).collect()
}

/// Kills a container's process and waits for its next life.
fn restart(place: &Place, pods: &[Pod]) -> Result<()> {
    let victim = pods.first().context("there is a pod")?;
    let pid = container_pid(place, &victim.name)?;
    let start = Instant::now();
    proc::output(Command::new("kill").args(["-KILL", &pid.to_string()]))?;
    let pod = until("the container to be restarted", || {
        let pod = api::pod(place, &victim.name)?;
        ensure!(
            pod.restarts == victim.restarts + 1 && pod.ready,
            "{} restarts, ready: {}",
            pod.restarts,
            pod.ready
        );
        Ok(pod)
    })?;
    ensure!(pod.last_exit == Some(KILLED), "its last exit code is {:?}, not {KILLED}", pod.last_exit);
    ensure!(pod.ip == victim.ip, "its address changed from {} to {}", victim.ip, pod.ip);
    let next = container_pid(place, &victim.name)?;
    ensure!(next != pid, "process {pid} is still there");
    let answers = ask(place.inside(&place.programs.echo), &format!("http://{}:8080/", pod.ip))?;
    check_answers("node → the restarted pod", &answers, std::slice::from_ref(victim))?;
    let what = format!(
        "kill -9 {pid}: the container of {} was restarted as {next}, keeps its address, serves",
        pod.name
    );
    claim(&what, start);
    Ok(())
}

/// The process of the echo server in a pod, known by the name in its environment.
fn container_pid(place: &Place, pod: &str) -> Result<u32> {
    let mark = format!("POD_NAME={pod}");
    let is_server = |pid: &u32| {
        let dir = Path::new("/proc").join(pid.to_string());
        let environment = std::fs::read(dir.join("environ")).unwrap_or_default();
        let words = std::fs::read(dir.join("cmdline")).unwrap_or_default();
        words.starts_with(b"/echo")
            && environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
    };
    place.pids().into_iter().find(is_server).with_context(|| format!("pod {pod} has no running server"))
}

fn scale(place: &Place, changes: &Changes, service: &Service, replicas: u64) -> Result<()> {
    let start = Instant::now();
    let said = changes.scale(place, "web", replicas)?;
    let count = usize::try_from(replicas)?;
    let pods = until(&format!("{replicas} pods"), || ready_pods(place, count))?;
    let reached = start.elapsed();
    // The API knows the pods a moment before the kernel has the backends: look until exactly they answer.
    let answers = until("exactly these pods to answer", || {
        let answers = ask(place.inside(&place.programs.echo), &service.cluster_url())?;
        check_answers("node → ClusterIP", &answers, &pods).map(|()| answers)
    })?;
    claim(
        &format!("{said}: {replicas} Ready after {:.1} s, and exactly these serve", reached.as_secs_f64()),
        start,
    );
    table::print(&["way", "pod", "answers", "p50", "p99"], &rows_of("node → ClusterIP", &answers));
    Ok(())
}

/// Prints what was checked.
pub(super) fn claim(what: &str, since: Instant) {
    println!("✓ {what} ({:.2} s)", since.elapsed().as_secs_f64());
}
