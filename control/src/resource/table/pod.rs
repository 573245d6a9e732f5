//! The pod columns; STATUS tells the most telling fact about the pod, not just its phase.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{AGE, NAME, Printer, age, name, string_or, text, wide};
use crate::resource::object::{self, bool_at, int_at, items_at, str_at};

pub(super) static POD: Printer = Printer {
    columns: &[
        NAME,
        text("Ready", "Ready containers of all containers."),
        text("Status", "What the pod is doing, or why it is not."),
        text("Restarts", "Restarts of all containers, and when the last one was."),
        AGE,
        wide("IP", "Address of the pod."),
        wide("Node", "Node that runs the pod."),
        wide("Nominated Node", "Node that the pod waits for."),
        wide("Readiness Gates", "Readiness gates that are passed of all."),
    ],
    cells,
};

#[derive(Default)]
struct Summary {
    status: String,
    ready: usize,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

impl Summary {
    fn count(&mut self, status: &Value) {
        self.restarts += int_at(status, &["restartCount"]).unwrap_or(0);
        let finished = object::time_at(status, &["lastState", "terminated", "finishedAt"]);
        self.last_restart = self.last_restart.max(finished);
    }

    fn restarts(&self, now: Timestamp) -> String {
        match self.last_restart {
            Some(last) if self.restarts > 0 => {
                let ago = age::short_duration(now.as_second() - last.as_second());
                format!("{} ({ago} ago)", self.restarts)
            }
            _ => self.restarts.to_string(),
        }
    }
}

fn is_sidecar(pod: &Value, container: &str) -> bool {
    items_at(pod, &["spec", "initContainers"])
        .iter()
        .any(|c| str_at(c, &["name"]) == container && str_at(c, &["restartPolicy"]) == "Always")
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    items_at(pod, &["status", "conditions"]).iter().find(|c| str_at(c, &["type"]) == kind)
}

fn condition_true(pod: &Value, kind: &str) -> bool {
    condition(pod, kind).is_some_and(|c| str_at(c, &["status"]) == "True")
}

fn exit_text(terminated: &Value) -> String {
    let reason = str_at(terminated, &["reason"]);
    match (reason, int_at(terminated, &["signal"]).unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", int_at(terminated, &["exitCode"]).unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

/// What the first init container that is not through says; `None` when all are.
fn init_status(pod: &Value, summary: &mut Summary, sidecars: &mut Summary) -> Option<String> {
    let total = items_at(pod, &["spec", "initContainers"]).len();
    for (i, status) in items_at(pod, &["status", "initContainerStatuses"]).iter().enumerate() {
        summary.count(status);
        let sidecar = is_sidecar(pod, str_at(status, &["name"]));
        if sidecar {
            sidecars.count(status);
        }
        let terminated = object::at(status, &["state", "terminated"]);
        if terminated.is_some_and(|t| int_at(t, &["exitCode"]) == Some(0)) {
            continue;
        }
        if sidecar && bool_at(status, &["started"]) {
            if bool_at(status, &["ready"]) {
                summary.ready += 1;
                sidecars.ready += 1;
            }
            continue;
        }
        let waiting = str_at(status, &["state", "waiting", "reason"]);
        return Some(match (terminated, waiting) {
            (Some(terminated), _) => format!("Init:{}", exit_text(terminated)),
            (None, "" | "PodInitializing") => format!("Init:{i}/{total}"),
            (None, reason) => format!("Init:{reason}"),
        });
    }
    None
}

fn container_status(pod: &Value, summary: &mut Summary) {
    let mut running = false;
    for status in items_at(pod, &["status", "containerStatuses"]).iter().rev() {
        summary.count(status);
        let waiting = str_at(status, &["state", "waiting", "reason"]);
        if !waiting.is_empty() {
            waiting.clone_into(&mut summary.status);
        } else if let Some(terminated) = object::at(status, &["state", "terminated"]) {
            summary.status = exit_text(terminated);
        } else if bool_at(status, &["ready"]) && object::at(status, &["state", "running"]).is_some() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.status == "Completed" && running {
        summary.status = if condition_true(pod, "Ready") { "Running" } else { "NotReady" }.to_owned();
    }
}

fn summarize(pod: &Value) -> Summary {
    let phase = str_at(pod, &["status", "phase"]);
    let reason = str_at(pod, &["status", "reason"]);
    let first = if reason.is_empty() { phase } else { reason };
    let mut summary = Summary { status: first.to_owned(), ..Summary::default() };
    if condition(pod, "PodScheduled").is_some_and(|c| str_at(c, &["reason"]) == "SchedulingGated") {
        summary.status = "SchedulingGated".to_owned();
    }
    let mut sidecars = Summary::default();
    let initializing = init_status(pod, &mut summary, &mut sidecars);
    let busy = initializing.is_some();
    if let Some(text) = initializing {
        summary.status = text;
    }
    if !busy || condition_true(pod, "Initialized") {
        // Once the pod runs, only the init containers that run along with it still count.
        summary = Summary { status: summary.status, ..sidecars };
        container_status(pod, &mut summary);
    }
    if object::is_deleting(pod) {
        if reason == "NodeLost" {
            summary.status = "Unknown".to_owned();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            summary.status = "Terminating".to_owned();
        }
    }
    summary
}

fn readiness_gates(pod: &Value) -> Value {
    let gates = items_at(pod, &["spec", "readinessGates"]);
    if gates.is_empty() {
        return json!("<none>");
    }
    let passed = gates.iter().filter(|g| condition_true(pod, str_at(g, &["conditionType"]))).count();
    json!(format!("{passed}/{}", gates.len()))
}

fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summarize(pod);
    let sidecars = items_at(pod, &["spec", "initContainers"])
        .iter()
        .filter(|c| str_at(c, &["restartPolicy"]) == "Always")
        .count();
    let total = items_at(pod, &["spec", "containers"]).len() + sidecars;
    let first_ip = items_at(pod, &["status", "podIPs"]).first().map_or("", |ip| str_at(ip, &["ip"]));
    let ip = if first_ip.is_empty() { str_at(pod, &["status", "podIP"]) } else { first_ip };
    vec![
        name(pod),
        json!(format!("{}/{total}", summary.ready)),
        json!(summary.status),
        json!(summary.restarts(now)),
        age::age(pod, now),
        string_or(ip, "<none>"),
        string_or(str_at(pod, &["spec", "nodeName"]), "<none>"),
        string_or(str_at(pod, &["status", "nominatedNodeName"]), "<none>"),
        readiness_gates(pod),
    ]
}
