//! Random lives of pods against the module's invariants.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::tests::{T0, deleted, pod};
use super::*;
use crate::pod::status::Phase;

/// One thing that can happen to a pod.
#[derive(Debug, Clone)]
enum Event {
    Answer { which: usize, ok: bool },
    Exit { which: usize, code: i32 },
    Probe { which: usize, ok: bool },
    SandboxDied,
    Delete { grace_s: i64 },
    Vanish,
    Pass { seconds: i64 },
    Report,
    Restart,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        12 => (0..8_usize, prop::bool::weighted(0.85)).prop_map(|(which, ok)| Event::Answer { which, ok }),
        4 => (0..4_usize, prop_oneof![Just(0), Just(1)]).prop_map(|(which, code)| Event::Exit { which, code }),
        3 => (0..6_usize, any::<bool>()).prop_map(|(which, ok)| Event::Probe { which, ok }),
        1 => Just(Event::SandboxDied),
        1 => (0..40_i64).prop_map(|grace_s| Event::Delete { grace_s }),
        1 => Just(Event::Vanish),
        4 => (0..40_i64).prop_map(|seconds| Event::Pass { seconds }),
        3 => Just(Event::Report),
        1 => Just(Event::Restart),
    ];
    prop::collection::vec(event, 0..120)
}

const SPECS: &[&str] = &[
    r#"{"containers":[{"name":"a","livenessProbe":{"failureThreshold":1},"readinessProbe":{}},{"name":"b"}]}"#,
    r#"{"restartPolicy":"Never","initContainers":[{"name":"i"}],"containers":[{"name":"a"},{"name":"b"}]}"#,
    r#"{"restartPolicy":"OnFailure","initContainers":[{"name":"i"},{"name":"s","restartPolicy":"Always",
        "startupProbe":{"failureThreshold":2}}],
        "containers":[{"name":"a","lifecycle":{"preStop":{"exec":{}},"postStart":{"exec":{}}}}]}"#,
    r#"{"hostNetwork":true,"activeDeadlineSeconds":300,"containers":[{"name":"a"}]}"#,
];

/// Random events, and what must hold after each.
struct Chaos {
    machine: Machine,
    now: Millis,
    open: Vec<Action>,
    running: BTreeSet<(String, u32)>,
    attempts: std::collections::BTreeMap<String, u32>,
    phase: Phase,
    reported: bool,
}

impl Chaos {
    fn step(&mut self) {
        let winding_down = self.machine.winding_down();
        let step = self.machine.step(self.now);
        let winding_down = winding_down || self.machine.winding_down();
        for action in step.actions {
            match &action {
                Action::Note(_) => continue,
                Action::Terminate { container } | Action::Kill { container } => {
                    assert!(self.running.iter().any(|(name, _)| name == container), "signals what runs");
                    continue;
                }
                Action::Start { container, attempt } => {
                    assert!(!winding_down, "starts while winding down");
                    let open = self
                        .open
                        .iter()
                        .any(|a| matches!(a, Action::Start { container: c, .. } if c == container));
                    assert!(
                        !open && !self.running.iter().any(|(name, _)| name == container),
                        "one run at a time"
                    );
                    assert!(
                        self.attempts.get(container).is_none_or(|last| attempt > last),
                        "runs are counted up"
                    );
                    self.check_init_order(container);
                }
                Action::StartSandbox | Action::Attach => assert!(!winding_down),
                Action::TearDown => {
                    assert!(winding_down && self.running.is_empty(), "tears down what runs");
                    assert!(self.reported || !self.machine.present, "tears down before it was reported");
                }
                Action::RemoveSandbox => assert!(self.running.is_empty()),
                Action::DeleteObject => assert!(self.machine.deleting.is_some() && self.machine.present),
                Action::SetUpVolumes | Action::RunHook { .. } => {}
            }
            assert!(!self.open.contains(&action), "asked for twice: {action:?}");
            self.open.push(action);
        }
        let again: Vec<Action> = self.machine.clone().step(self.now).actions;
        assert!(again.is_empty(), "a second look asks for more: {again:?}");
        let phase = self.machine.phase();
        if matches!(self.phase, Phase::Succeeded | Phase::Failed) {
            assert_eq!(phase, self.phase, "a final phase was left");
        }
        self.phase = phase;
        let quiet = self.open.is_empty() && self.running.is_empty() && step.wake_at.is_none();
        let waits_for_report = self.machine.status_is_final() && !self.reported && self.machine.present;
        let over = self.machine.finished() || self.machine.ending.is_some();
        assert!(!quiet || waits_for_report || over, "stuck: {:?}", self.machine);
        if self.machine.holds_resources() {
            let status = self.machine.clone().status(&[], self.now);
            assert!(status["conditions"].is_array());
        }
    }

    fn check_init_order(&self, container: &str) {
        let i = self.machine.index(container).expect("known");
        if self.machine.units[i].role == Role::Main {
            for (j, unit) in self.machine.units.iter().enumerate() {
                let done = unit.ended().is_some_and(|e| e.exit.code == 0);
                assert!(unit.role != Role::Init || done, "main {i} before init {j}");
            }
        }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Answer { which, ok } if !self.open.is_empty() => {
                let action = self.open.remove(which % self.open.len());
                self.answer(action, *ok);
            }
            Event::Exit { which, code } if !self.running.is_empty() => {
                let (name, attempt) =
                    self.running.iter().nth(which % self.running.len()).cloned().expect("one");
                self.running.remove(&(name.clone(), attempt));
                self.exit(&name, attempt, *code);
            }
            Event::Probe { which, ok } => {
                let targets = self.machine.probes();
                if let Some(target) = targets.get(*which) {
                    let result = if *ok { ProbeResult::Success } else { ProbeResult::Failure("x".into()) };
                    self.machine.probed(target, &result, self.now);
                }
            }
            Event::SandboxDied => {
                if matches!(self.machine.sandbox, Sandbox::Up { .. }) {
                    self.running.clear();
                    self.machine.sandbox_died(self.now);
                }
            }
            Event::Delete { grace_s } if self.machine.present => {
                let pod = deleted(&self.machine.pod().clone(), *grace_s);
                self.machine.desired(pod, self.now);
            }
            Event::Vanish => self.machine.vanished(None, self.now),
            Event::Pass { seconds } => self.now += seconds * 1000,
            Event::Report if self.machine.status_is_final() => {
                self.reported = true;
                self.machine.final_status_accepted();
            }
            _ => {}
        }
    }

    fn exit(&mut self, name: &str, attempt: u32, code: i32) {
        let exit =
            Exit { code, signal: None, reason: "x".into(), message: String::new(), finished_at: self.now };
        self.machine.exited(name, attempt, exit, self.now);
    }

    fn answer(&mut self, action: Action, ok: bool) {
        let unit = if ok { Ok(()) } else { Err("no".to_owned()) };
        let outcome = match action {
            Action::StartSandbox => Outcome::SandboxStarted(unit),
            Action::Attach => Outcome::Attached(unit.map(|()| vec![])),
            Action::SetUpVolumes => Outcome::VolumesReady(unit),
            Action::RemoveSandbox => Outcome::SandboxRemoved(unit),
            Action::TearDown => Outcome::TornDown(unit),
            Action::DeleteObject => Outcome::ObjectDeleted(unit),
            Action::RunHook { container, attempt, hook, .. } => {
                Outcome::HookDone { container, attempt, hook, result: unit }
            }
            Action::Start { container, attempt } => {
                let started = Started {
                    attempt,
                    id: "x".into(),
                    image: String::new(),
                    image_id: String::new(),
                    started_at: self.now,
                };
                if ok {
                    self.attempts.insert(container.clone(), attempt);
                    if self.machine.sandbox != Sandbox::Dead {
                        self.running.insert((container.clone(), attempt));
                    }
                }
                let result = if ok { Ok((started, None)) } else { Err(StartFailure::Create("no".into())) };
                Outcome::Started { container, result, notes: vec![] }
            }
            Action::Terminate { .. } | Action::Kill { .. } | Action::Note(_) => return,
        };
        self.machine.outcome(outcome, self.now);
    }

    /// Everything is answered, everything exits, time passes: a deleted pod must come to its end.
    fn finish(&mut self) {
        let pod = deleted(&self.machine.pod().clone(), 5);
        self.machine.desired(pod, self.now);
        for _ in 0..200 {
            self.step();
            if self.machine.finished() {
                return;
            }
            while let Some(action) = self.open.pop() {
                self.answer(action, true);
            }
            for (name, attempt) in std::mem::take(&mut self.running) {
                self.exit(&name, attempt, 0);
            }
            self.happen(&Event::Report);
            self.now += 1000;
        }
        panic!("a deleted pod does not end: {:?}", self.machine);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_schedule_breaks_the_invariants(which in 0..SPECS.len(), schedule in events()) {
        let machine = Machine::new(pod(SPECS[which]), T0);
        let phase = machine.phase();
        let mut chaos = Chaos {
            machine, now: T0, open: vec![], running: BTreeSet::new(),
            attempts: std::collections::BTreeMap::new(), phase, reported: false,
        };
        for event in &schedule {
            chaos.step();
            chaos.happen(event);
        }
        chaos.finish();
    }
}
