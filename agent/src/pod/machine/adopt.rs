//! Taking over a pod that an earlier agent ran. What runs keeps running and keeps its readiness; what
//! ended meanwhile ended with the status that the runtime kept; what the API reports as running and
//! nobody knows any more is lost.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::*;
use crate::pod::model::{PriorContainer, PriorTerminated};

/// Reasons that are kept while a container waits on.
const WAITING_REASONS: [&str; 7] = [
    "CrashLoopBackOff",
    "RunContainerError",
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
];

/// What an agent writes down of a pod for its successor, beside what the runtime keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// `status.startTime`.
    pub start_time: Millis,
    /// The last status was accepted and said how the pod ended.
    pub final_status_accepted: bool,
    /// By container.
    pub units: BTreeMap<String, UnitMemory>,
}

/// What is remembered of one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnitMemory {
    /// The run that `started` and `ready` speak of.
    pub attempt: u32,
    /// Past its startup probe.
    pub started: bool,
    /// Past its readiness probe.
    pub ready: bool,
    /// Failures in a row.
    pub backoff: Backoff,
    /// May not start before.
    pub not_before: Millis,
    /// The run before the present one.
    pub last: Option<Ended>,
    /// The present one, if it ended: one that never started is in no other record.
    pub ended: Option<Ended>,
}

/// What the runtime knows of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Its namespaces are alive.
    pub alive: bool,
    /// Latest run of each container.
    pub runs: BTreeMap<String, AdoptedRun>,
}

/// What the runtime knows of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptedRun {
    /// The run.
    pub run: Started,
    /// Its end, if it ended.
    pub exit: Option<Exit>,
}

impl Machine {
    /// What the next agent should know.
    pub fn memory(&self) -> Memory {
        let unit_memory = |i: usize| {
            let unit = &self.units[i];
            let spec = self.spec_of(i);
            let memory = UnitMemory {
                attempt: unit.running().map_or(0, |run| run.attempt),
                started: spec.is_some_and(|spec| unit.is_started(spec)),
                ready: spec.is_some_and(|spec| unit.is_ready(spec)),
                backoff: unit.backoff,
                not_before: unit.not_before,
                last: unit.last.clone(),
                ended: unit.ended().cloned(),
            };
            (unit.name.clone(), memory)
        };
        Memory {
            start_time: self.start_time,
            final_status_accepted: self.final_status_accepted,
            units: (0..self.units.len()).map(unit_memory).collect(),
        }
    }

    /// A pod that an earlier agent handled, by what it reported (`pod.status`), what the runtime has and
    /// what was written down.
    pub fn adopt(pod: Arc<Pod>, adopted: Option<&Adopted>, memory: Option<&Memory>, now: Millis) -> Self {
        let mut machine = Machine::new(pod, now);
        let reported_start = machine.pod.status.start_time.as_deref().and_then(parse_time);
        machine.start_time =
            memory.map(|m| m.start_time).filter(|t| *t > 0).or(reported_start).unwrap_or(now);
        for i in 0..machine.units.len() {
            machine.adopt_unit(i, adopted, memory, now);
        }
        machine.ips = machine.pod.status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect();
        match adopted {
            Some(Adopted { alive: true, .. }) => {
                machine.sandbox = Sandbox::Up { attached: machine.pod.spec.host_network };
            }
            Some(_) => machine.sandbox = Sandbox::Dead,
            None => machine.ips.clear(),
        }
        let main_ran = |unit: &Unit| unit.role == Role::Main && unit.run != Run::None;
        machine.initialized = adopted.is_some_and(|a| a.alive) && machine.units.iter().any(main_ran);
        if adopted.is_none_or(|a| !a.alive) {
            machine.forget_inits();
        }
        machine.final_status_accepted = memory.is_some_and(|m| m.final_status_accepted);
        machine.adopt_conditions();
        if machine.pod.was_terminal() {
            machine.ending = Some(Ending {
                succeeded: machine.pod.status.phase == "Succeeded",
                reason: machine.pod.status.reason.clone(),
                message: machine.pod.status.message.clone(),
            });
            machine.final_status_accepted = true;
        }
        machine
    }

    fn adopt_conditions(&mut self) {
        for kind in crate::pod::status::CONDITIONS {
            let prior = self.pod.status.conditions.iter().find(|c| c.kind == *kind);
            if let Some(prior) = prior
                && let Some(at) = prior.last_transition_time.as_deref().and_then(parse_time)
            {
                self.conditions.push((kind, prior.status == "True", at));
            }
        }
    }

    fn forget_inits(&mut self) {
        let any_main_ended_for_good = self.natural_end().is_some();
        if any_main_ended_for_good {
            return;
        }
        for unit in self.units.iter_mut().filter(|unit| unit.role == Role::Init) {
            if let Run::Ended(ended) = std::mem::replace(&mut unit.run, Run::None) {
                unit.last = Some(ended);
            }
        }
    }

    fn adopt_unit(&mut self, i: usize, adopted: Option<&Adopted>, memory: Option<&Memory>, now: Millis) {
        let name = self.units[i].name.clone();
        let prior = {
            let status = &self.pod.status;
            let mut all = status.init_container_statuses.iter().chain(&status.container_statuses);
            all.find(|prior| prior.name == name).cloned()
        };
        let remembered = memory.and_then(|memory| memory.units.get(&name)).cloned();
        if let Some(remembered) = &remembered {
            self.units[i].backoff = remembered.backoff;
            self.units[i].not_before = remembered.not_before;
            self.units[i].last = remembered.last.clone();
        } else if let Some(prior) = &prior {
            self.units[i].last = prior.last_state.terminated.as_ref().map(|t| from_terminated(prior, t, now));
        }
        let known = adopted.and_then(|adopted| adopted.runs.get(&name));
        match (known, &prior) {
            (Some(known), _) => {
                self.units[i].next_attempt = known.run.attempt + 1;
                match &known.exit {
                    Some(exit) => self.adopt_ended(i, known, exit, remembered.as_ref(), now),
                    None if adopted.is_some_and(|a| a.alive) => {
                        self.units[i].run = Run::Running(known.run.clone());
                        self.adopt_readiness(i, known, remembered.as_ref(), prior.as_ref());
                    }
                    None => {
                        let run = known.run.clone();
                        let exit = lost_exit(now, "its end was not seen");
                        self.end(i, Ended { run, exit }, now);
                    }
                }
            }
            (None, prior) => {
                if let Some(ended) = remembered.and_then(|m| m.ended) {
                    self.units[i].next_attempt = ended.run.attempt + 1;
                    self.units[i].run = Run::Ended(ended);
                } else if let Some(prior) = prior {
                    self.adopt_reported(i, prior, now);
                }
            }
        }
        let waiting = prior.and_then(|prior| prior.state.waiting);
        if self.units[i].running().is_none()
            && let Some(waiting) = waiting
            && let Some(reason) = WAITING_REASONS.iter().find(|known| **known == waiting.reason)
        {
            self.units[i].waiting = Some(Waiting { reason, message: waiting.message });
        }
    }

    fn adopt_ended(
        &mut self,
        i: usize,
        known: &AdoptedRun,
        exit: &Exit,
        remembered: Option<&UnitMemory>,
        now: Millis,
    ) {
        let ended = Ended { run: known.run.clone(), exit: exit.clone() };
        let counted = remembered.is_some_and(|m| m.not_before >= exit.finished_at);
        if counted {
            self.units[i].run = Run::Ended(ended);
        } else {
            self.end(i, ended, now);
        }
    }

    fn adopt_readiness(
        &mut self,
        i: usize,
        known: &AdoptedRun,
        remembered: Option<&UnitMemory>,
        prior: Option<&PriorContainer>,
    ) {
        let by_memory = remembered.filter(|m| m.attempt == known.run.attempt).map(|m| (m.started, m.ready));
        let by_api = prior
            .filter(|prior| prior.container_id.ends_with(&known.run.id))
            .map(|prior| (prior.started.unwrap_or(false), prior.ready));
        let (started, ready) = by_memory.or(by_api).unwrap_or((false, false));
        let verdict = |passing| if passing { Verdict::Passing } else { Verdict::Undecided };
        self.units[i].startup = Tally::starting_at(verdict(started));
        self.units[i].readiness = Tally::starting_at(verdict(ready));
        self.units[i].post_start = PostStart::Done;
    }

    /// A container that only the API remembers: its run is over, known or lost.
    fn adopt_reported(&mut self, i: usize, prior: &PriorContainer, now: Millis) {
        let ended = match (&prior.state.terminated, &prior.state.running) {
            (Some(terminated), _) => from_terminated(prior, terminated, now),
            (None, Some(running)) => {
                let run = Started {
                    attempt: prior.restart_count,
                    id: prior.container_id.trim_start_matches("sheave://").to_owned(),
                    image: self.spec_of(i).map(|spec| spec.image.clone()).unwrap_or_default(),
                    image_id: prior.image_id.clone(),
                    started_at: running.started_at.as_deref().and_then(parse_time).unwrap_or(now),
                };
                Ended { run, exit: lost_exit(now, "it was not running any more when the agent started") }
            }
            (None, None) => {
                self.units[i].next_attempt = prior.restart_count + u32::from(self.units[i].last.is_some());
                return;
            }
        };
        self.units[i].next_attempt = prior.restart_count + 1;
        self.units[i].run = Run::Ended(ended);
    }
}

fn from_terminated(prior: &PriorContainer, terminated: &PriorTerminated, now: Millis) -> Ended {
    let time = |text: &Option<String>| text.as_deref().and_then(parse_time).unwrap_or(now);
    Ended {
        run: Started {
            attempt: prior.restart_count,
            id: terminated.container_id.trim_start_matches("sheave://").to_owned(),
            image: String::new(),
            image_id: prior.image_id.clone(),
            started_at: time(&terminated.started_at),
        },
        exit: Exit {
            code: terminated.exit_code,
            signal: terminated.signal,
            reason: terminated.reason.clone(),
            message: terminated.message.clone(),
            finished_at: time(&terminated.finished_at),
        },
    }
}

/// An RFC 3339 time of the API in milliseconds.
pub(in crate::pod) fn parse_time(text: &str) -> Option<Millis> {
    text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_millisecond)
}
