//! The API as the demo sees it: read through `sheave raw`, so that it works where no kubectl is; changed through
//! kubectl where there is one.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::place::Place;
use crate::proc;

const PODS: &str = "/api/v1/namespaces/default/pods";

/// A pod, as far as the demo looks.
#[derive(Clone)]
pub(super) struct Pod {
    pub(super) name: String,
    pub(super) ip: String,
    pub(super) phase: String,
    pub(super) ready: bool,
    pub(super) restarts: u64,
    /// Exit code of the container's previous life.
    pub(super) last_exit: Option<i64>,
    /// What keeps it from running, in the words of the scheduler or the node.
    waits_for: String,
}

impl Pod {
    fn read(object: &Value) -> Pod {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let container = &object["status"]["containerStatuses"][0];
        Pod {
            name: text(&object["metadata"]["name"]),
            ip: text(&object["status"]["podIP"]),
            phase: text(&object["status"]["phase"]),
            ready: conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"),
            restarts: container["restartCount"].as_u64().unwrap_or(0),
            last_exit: container["lastState"]["terminated"]["exitCode"].as_i64(),
            waits_for: waits_for(conditions, &container["state"]["waiting"]),
        }
    }
}

fn waits_for(conditions: &[Value], waiting: &Value) -> String {
    let unscheduled = conditions.iter().find(|c| c["type"] == "PodScheduled" && c["status"] == "False");
    let from = unscheduled.unwrap_or(waiting);
    let words = [&from["reason"], &from["message"]].map(|word| word.as_str().unwrap_or_default());
    words.join(" ").trim().to_owned()
}

impl std::fmt::Display for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ready = if self.ready { "Ready" } else { "not Ready" };
        write!(f, "{} is {}, {ready}", self.name, self.phase)?;
        if self.waits_for.is_empty() { Ok(()) } else { write!(f, " ({})", self.waits_for) }
    }
}

/// GET, as parsed JSON.
pub(super) fn get(place: &Place, path: &str) -> Result<Value> {
    let text = raw(place, &["GET", path])?;
    serde_json::from_str(&text).with_context(|| format!("GET {path} gave no JSON"))
}

/// Any request; an error carries the server's message.
pub(super) fn raw(place: &Place, words: &[&str]) -> Result<String> {
    let mut command = place.inside(&place.programs.sheave);
    command.arg("raw").arg("--kubeconfig").arg(place.kubeconfig()).args(words);
    let output = proc::capture(&mut command)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(output.status.success(), "{}", text(&output.stderr));
    Ok(text(&output.stdout))
}

/// Pods with label `app=<app>`, by name.
pub(super) fn pods(place: &Place, app: &str) -> Result<Vec<Pod>> {
    let list = get(place, &format!("{PODS}?labelSelector=app%3D{app}"))?;
    let items = list["items"].as_array().context("a list has items")?;
    let mut pods: Vec<Pod> = items.iter().map(Pod::read).collect();
    pods.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pods)
}

pub(super) fn pod(place: &Place, name: &str) -> Result<Pod> {
    Ok(Pod::read(&get(place, &format!("{PODS}/{name}"))?))
}

pub(super) fn log(place: &Place, pod: &str) -> Result<String> {
    raw(place, &["GET", &format!("{PODS}/{pod}/log")])
}

/// How changes are made: by kubectl if the host has one.
pub(super) struct Changes {
    kubectl: bool,
}

impl Changes {
    pub(super) fn find() -> Changes {
        Changes { kubectl: proc::find("kubectl").is_some() }
    }

    /// The command line to show for applying `file`.
    pub(super) fn apply(&self, place: &Place, file: &Path) -> Result<String> {
        let mut command =
            self.command(place, if self.kubectl { &["apply", "-f"] } else { &["apply", "--filename"] });
        command.arg(file);
        proc::output(&mut command)?;
        let program = if self.kubectl { "kubectl apply -f" } else { "sheave apply -f" };
        Ok(format!("{program} {}", file.strip_prefix(proc::root()).unwrap_or(file).display()))
    }

    /// The command line to show for scaling the deployment.
    pub(super) fn scale(&self, place: &Place, deployment: &str, replicas: u64) -> Result<String> {
        if self.kubectl {
            let (what, count) = (format!("deployment/{deployment}"), format!("--replicas={replicas}"));
            proc::output(self.command(place, &["scale", &what, &count]).env("KUBECACHEDIR", "/nonexistent"))?;
            return Ok(format!("kubectl scale {what} {count}"));
        }
        let path = format!("/apis/apps/v1/namespaces/default/deployments/{deployment}/scale");
        let patch = format!(r#"{{"spec":{{"replicas":{replicas}}}}}"#);
        raw(place, &["PATCH", &path, "--data", &patch])?;
        Ok(format!("PATCH {path} {patch}"))
    }

    /// `words` are a verb and its arguments.
    fn command(&self, place: &Place, words: &[&str]) -> Command {
        let mut command =
            if self.kubectl { place.inside("kubectl") } else { place.inside(&place.programs.sheave) };
        let (verb, rest) = words.split_at(1);
        command.args(verb).arg(format!("--kubeconfig={}", place.kubeconfig().display())).args(rest);
        command
    }
}
