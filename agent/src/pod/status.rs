//! What is reported of a pod: `status` as the API wants it, computed from the machine alone. The same
//! machine gives the same status, so that a report that changed nothing is not sent.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::machine::{Ended, Machine, Role, Run, Sandbox, Started, Unit};
use super::model::Millis;
use super::resources;

/// Conditions that the agent owns.
pub const CONDITIONS: &[&str] =
    &["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// `status.phase`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Something has never run yet.
    Pending,
    /// Everything ran at least once and something may run on.
    Running,
    /// Everything ended well, for good.
    Succeeded,
    /// Something ended badly, for good.
    Failed,
}

impl Phase {
    /// As the API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
        }
    }
}

/// An instant as the API writes it: whole seconds, UTC.
pub fn rfc3339(at: Millis) -> String {
    let seconds = at.div_euclid(1000);
    jiff::Timestamp::from_second(seconds).map(|t| t.to_string()).unwrap_or_default()
}

impl Machine {
    /// The pod's phase.
    pub fn phase(&self) -> Phase {
        if let Some(ending) = &self.ending {
            return if ending.succeeded { Phase::Succeeded } else { Phase::Failed };
        }
        let mains = || self.units.iter().filter(|unit| unit.role == Role::Main);
        if self.deleting.is_some() && self.status_is_final() {
            let well = mains().all(|unit| unit.ended().is_some_and(|ended| ended.exit.code == 0));
            return if well { Phase::Succeeded } else { Phase::Failed };
        }
        let never_ran =
            |unit: &Unit| matches!(unit.run, Run::None | Run::Starting { .. }) && unit.next_attempt == 0;
        if mains().any(never_ran) { Phase::Pending } else { Phase::Running }
    }

    /// Whether the pod may get traffic.
    pub fn is_ready(&self) -> bool {
        self.containers_ready() && self.gates_open()
    }

    fn containers_ready(&self) -> bool {
        self.phase() == Phase::Running && self.unready().is_empty()
    }

    fn gates_open(&self) -> bool {
        let conditions = &self.pod.status.conditions;
        self.pod
            .spec
            .readiness_gates
            .iter()
            .all(|gate| conditions.iter().any(|c| c.kind == gate.condition_type && c.status == "True"))
    }

    fn unready(&self) -> Vec<&str> {
        let counts = |(i, unit): &(usize, &Unit)| {
            unit.role != Role::Init && !self.spec_of(*i).is_some_and(|spec| unit.is_ready(spec))
        };
        self.units.iter().enumerate().filter(counts).map(|(_, unit)| unit.name.as_str()).collect()
    }

    fn uninitialized(&self) -> Vec<&str> {
        if self.initialized {
            return Vec::new();
        }
        let pending = |(i, unit): &(usize, &Unit)| match unit.role {
            Role::Main => false,
            Role::Init => unit.ended().is_none_or(|ended| ended.exit.code != 0),
            Role::Sidecar => !self.spec_of(*i).is_some_and(|spec| unit.is_started(spec)),
        };
        self.units.iter().enumerate().filter(pending).map(|(_, unit)| unit.name.as_str()).collect()
    }

    /// The whole status at `now`. `node_ips` are the node's addresses.
    pub fn status(&mut self, node_ips: &[IpAddr], now: Millis) -> Value {
        let phase = self.phase();
        let mut status = Map::new();
        status.insert("phase".into(), json!(phase.as_str()));
        if let Some(ending) = &self.ending {
            insert_text(&mut status, "reason", &ending.reason);
            insert_text(&mut status, "message", &ending.message);
        }
        status.insert("qosClass".into(), json!(resources::qos(&self.pod.spec).as_str()));
        status.insert("startTime".into(), json!(rfc3339(self.start_time)));
        status.insert("conditions".into(), self.conditions_now(phase, now));
        insert_ips(&mut status, "hostIP", "hostIPs", node_ips);
        let pod_ips = if self.pod.spec.host_network { node_ips } else { self.ips.as_slice() };
        insert_ips(&mut status, "podIP", "podIPs", pod_ips);
        let of = |machine: &Machine, main: bool| -> Vec<Value> {
            (0..machine.units.len())
                .filter(|i| (machine.units[*i].role == Role::Main) == main)
                .map(|i| machine.container_status(i))
                .collect()
        };
        status.insert("containerStatuses".into(), Value::Array(of(self, true)));
        let inits = of(self, false);
        if !inits.is_empty() {
            status.insert("initContainerStatuses".into(), Value::Array(inits));
        }
        Value::Object(status)
    }

    fn conditions_now(&mut self, phase: Phase, now: Millis) -> Value {
        let up = match self.sandbox {
            Sandbox::Up { attached } => attached || !self.ips.is_empty(),
            _ => false,
        };
        let names = |names: Vec<&str>| names.join(" ");
        let (uninitialized, unready) = (names(self.uninitialized()), names(self.unready()));
        let over = matches!(phase, Phase::Succeeded | Phase::Failed);
        let over_reason = if phase == Phase::Succeeded { "PodCompleted" } else { "PodFailed" };
        let containers_ready = self.containers_ready();
        let why_unready = |ready: bool| match (ready, over) {
            (true, _) => (String::new(), String::new()),
            (false, true) => (over_reason.to_owned(), String::new()),
            (false, false) => {
                ("ContainersNotReady".to_owned(), format!("containers with unready status: [{unready}]"))
            }
        };
        let initialized = uninitialized.is_empty();
        let why_uninitialized = if initialized {
            (String::new(), String::new())
        } else {
            let message = format!("containers with incomplete status: [{uninitialized}]");
            ("ContainersNotInitialized".to_owned(), message)
        };
        let gates = self.gates_open();
        let why_not_ready = if containers_ready && !gates {
            ("ReadinessGatesNotReady".to_owned(), "a readiness gate's condition is not True".to_owned())
        } else {
            why_unready(containers_ready)
        };
        let all = [
            ("PodReadyToStartContainers", up, (String::new(), String::new())),
            ("Initialized", initialized, why_uninitialized),
            ("Ready", containers_ready && gates, why_not_ready),
            ("ContainersReady", containers_ready, why_unready(containers_ready)),
            ("PodScheduled", true, (String::new(), String::new())),
        ];
        let one = |(kind, holds, (reason, message)): (&'static str, bool, (String, String))| {
            let mut condition = Map::new();
            condition.insert("type".into(), json!(kind));
            condition.insert("status".into(), json!(if holds { "True" } else { "False" }));
            condition.insert("lastProbeTime".into(), Value::Null);
            condition.insert("lastTransitionTime".into(), json!(rfc3339(self.transition(kind, holds, now))));
            insert_text(&mut condition, "reason", &reason);
            insert_text(&mut condition, "message", &message);
            Value::Object(condition)
        };
        Value::Array(all.into_iter().map(one).collect())
    }

    fn transition(&mut self, kind: &'static str, holds: bool, now: Millis) -> Millis {
        match self.conditions.iter_mut().find(|(known, ..)| *known == kind) {
            Some((_, held, at)) => {
                if *held != holds {
                    (*held, *at) = (holds, now);
                }
                *at
            }
            None => {
                self.conditions.push((kind, holds, now));
                now
            }
        }
    }

    fn container_status(&self, i: usize) -> Value {
        let unit = &self.units[i];
        let Some(spec) = self.spec_of(i) else { return Value::Null };
        let waiting = |reason: &str, message: &str| {
            let mut state = Map::new();
            state.insert("reason".into(), json!(reason));
            insert_text(&mut state, "message", message);
            json!({ "waiting": state })
        };
        let (state, last) = match &unit.run {
            Run::Running(run) => {
                (json!({"running": {"startedAt": rfc3339(run.started_at)}}), unit.last.as_ref())
            }
            Run::Ended(ended) => match &unit.waiting {
                Some(why) if !self.winding_down() => (waiting(why.reason, &why.message), Some(ended)),
                _ => (terminated(ended), unit.last.as_ref()),
            },
            Run::Starting { .. } => (waiting("ContainerCreating", ""), unit.last.as_ref()),
            Run::None => {
                let (reason, message) = self.why_waiting(unit);
                (waiting(reason, message), unit.last.as_ref())
            }
        };
        let known: Option<&Started> = match &unit.run {
            Run::Running(run) => Some(run),
            Run::Ended(ended) => Some(&ended.run),
            _ => unit.last.as_ref().map(|ended| &ended.run),
        };
        let id = known.map(|run| run.id.as_str()).filter(|id| !id.is_empty());
        let ready = match unit.role {
            Role::Init => unit.ended().is_some_and(|ended| ended.exit.code == 0),
            _ => unit.is_ready(spec),
        };
        let mut status = json!({
            "name": unit.name,
            "image": spec.image,
            "imageID": known.map_or("", |run| run.image_id.as_str()),
            "ready": ready,
            "started": unit.is_started(spec),
            "restartCount": unit.restart_count(),
            "state": state,
            "lastState": last.map_or_else(|| json!({}), terminated),
        });
        if let (Some(id), Some(map)) = (id, status.as_object_mut()) {
            map.insert("containerID".into(), json!(format!("sheave://{id}")));
        }
        status
    }

    fn why_waiting<'a>(&'a self, unit: &'a Unit) -> (&'static str, &'a str) {
        if let Some(refusal) = &self.refusal {
            return ("CreateContainerConfigError", &refusal.message);
        }
        if let Some(why) = &unit.waiting {
            return (why.reason, &why.message);
        }
        let message = self.prepare_error.as_deref().unwrap_or("");
        let has_inits = self.units.iter().any(|unit| unit.role != Role::Main);
        if unit.role == Role::Main && has_inits && !self.initialized {
            ("PodInitializing", message)
        } else {
            ("ContainerCreating", message)
        }
    }
}

fn terminated(ended: &Ended) -> Value {
    let mut state = Map::new();
    state.insert("exitCode".into(), json!(ended.exit.code));
    if let Some(signal) = ended.exit.signal {
        state.insert("signal".into(), json!(signal));
    }
    insert_text(&mut state, "reason", &ended.exit.reason);
    insert_text(&mut state, "message", &ended.exit.message);
    state.insert("startedAt".into(), json!(rfc3339(ended.run.started_at)));
    state.insert("finishedAt".into(), json!(rfc3339(ended.exit.finished_at)));
    if !ended.run.id.is_empty() {
        state.insert("containerID".into(), json!(format!("sheave://{}", ended.run.id)));
    }
    json!({ "terminated": state })
}

fn insert_text(map: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        map.insert(key.to_owned(), json!(text));
    }
}

fn insert_ips(map: &mut Map<String, Value>, one: &str, all: &str, ips: &[IpAddr]) {
    if let Some(first) = ips.first() {
        map.insert(one.to_owned(), json!(first.to_string()));
        let list: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
        map.insert(all.to_owned(), Value::Array(list));
    }
}

/// What has to be patched so that a status that was accepted becomes `new`: the fields that differ, and
/// null for those that are gone. `None` if nothing differs. Lists that the API merges by key (`podIPs`,
/// `hostIPs`) are replaced whole.
pub fn difference(accepted: Option<&Value>, new: &Value) -> Option<Value> {
    let empty = Map::new();
    let old = accepted.and_then(Value::as_object).unwrap_or(&empty);
    let new = new.as_object().unwrap_or(&empty);
    let mut patch = Map::new();
    for (key, value) in new {
        if old.get(key) == Some(value) {
            continue;
        }
        let replaced = accepted.is_none_or(|_| old.contains_key(key));
        let value = match (key.as_str(), value) {
            ("podIPs" | "hostIPs", Value::Array(list)) if replaced => {
                let mut list = list.clone();
                list.insert(0, json!({"$patch": "replace"}));
                Value::Array(list)
            }
            _ => value.clone(),
        };
        patch.insert(key.clone(), value);
    }
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_sent() {
        let old = json!({"phase": "Pending", "qosClass": "Burstable", "podIPs": [{"ip": "1.1.1.1"}], "reason": "x"});
        assert_eq!(difference(Some(&old), &old), None);
        let new = json!({"phase": "Running", "qosClass": "Burstable", "podIPs": [{"ip": "2.2.2.2"}]});
        assert_eq!(
            difference(Some(&old), &new),
            Some(json!({"phase": "Running", "reason": null,
                "podIPs": [{"$patch": "replace"}, {"ip": "2.2.2.2"}]}))
        );
        let first = difference(None, &json!({"phase": "Running"}));
        assert_eq!(first, Some(json!({"phase": "Running"})));
        let added = difference(Some(&json!({})), &new).expect("a patch");
        assert_eq!(added["podIPs"], json!([{"ip": "2.2.2.2"}]));
    }

    #[test]
    fn times_are_whole_seconds() {
        assert_eq!(rfc3339(1_700_000_000_999), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
    }
}
