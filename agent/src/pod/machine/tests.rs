//! Scripted lives of pods.

use serde_json::Value;

use super::*;
use crate::pod::machine::stop::Stage;
use crate::pod::model::Deletion;
use crate::pod::status::Phase;

pub(super) const T0: Millis = 1_700_000_000_000;

pub(super) fn pod(spec: &str) -> Arc<Pod> {
    let json = format!(r#"{{"namespace":"ns","name":"p","uid":"u1","spec":{spec}}}"#);
    Arc::new(serde_json::from_str(&json).expect("a pod"))
}

pub(super) fn deleted(pod: &Pod, grace_s: i64) -> Arc<Pod> {
    Arc::new(Pod { deletion: Some(Deletion { grace_s }), ..pod.clone() })
}

/// A machine, its clock and a world in which everything that is asked for works at once.
struct World {
    machine: Machine,
    now: Millis,
    log: Vec<String>,
    notes: Vec<Note>,
    wake_at: Option<Millis>,
    fail_starts: Vec<StartFailure>,
    hold_hooks: bool,
}

impl World {
    fn new(spec: &str) -> Self {
        Self::of(Machine::new(pod(spec), T0))
    }

    fn of(machine: Machine) -> Self {
        World {
            machine,
            now: T0,
            log: vec![],
            notes: vec![],
            wake_at: None,
            fail_starts: vec![],
            hold_hooks: false,
        }
    }

    /// Carries out everything until nothing is asked for any more; returns what was asked for.
    fn settle(&mut self) -> String {
        let from = self.log.len();
        for _ in 0..100 {
            let step = self.machine.step(self.now);
            self.wake_at = step.wake_at;
            let notes = step.actions.iter().filter(|a| matches!(a, Action::Note(_))).count();
            let acted = step.actions.len() > notes;
            for action in step.actions {
                self.act(action);
            }
            let reported =
                self.machine.present && self.machine.status_is_final() && !self.machine.final_status_accepted;
            if reported {
                self.log.push("report".into());
                self.machine.final_status_accepted();
            }
            if !acted && !reported {
                return self.log[from..].join(" ");
            }
        }
        panic!("never settles: {:?}", self.log);
    }

    fn act(&mut self, action: Action) {
        let now = self.now;
        match action {
            Action::StartSandbox => self.did("sandbox", Outcome::SandboxStarted(Ok(()))),
            Action::Attach => {
                self.did("attach", Outcome::Attached(Ok(vec!["10.0.0.9".parse().expect("ip")])));
            }
            Action::SetUpVolumes => self.did("volumes", Outcome::VolumesReady(Ok(()))),
            Action::RemoveSandbox => self.did("unsandbox", Outcome::SandboxRemoved(Ok(()))),
            Action::TearDown => self.did("teardown", Outcome::TornDown(Ok(()))),
            Action::DeleteObject => self.did("delete", Outcome::ObjectDeleted(Ok(()))),
            Action::Start { container, attempt } => {
                self.log.push(format!("start:{container}#{attempt}"));
                let result = match self.fail_starts.pop() {
                    Some(failure) => Err(failure),
                    None => Ok((self.started(&container, attempt), None)),
                };
                self.machine.outcome(Outcome::Started { container, result, notes: vec![] }, now);
            }
            Action::RunHook { container, attempt, hook, .. } => {
                self.log.push(format!("{hook:?}:{container}"));
                if !self.hold_hooks {
                    let done = Outcome::HookDone { container, attempt, hook, result: Ok(()) };
                    self.machine.outcome(done, now);
                }
            }
            Action::Terminate { container } => self.log.push(format!("term:{container}")),
            Action::Kill { container } => self.log.push(format!("kill:{container}")),
            Action::Note(note) => self.notes.push(note),
        }
    }

    fn did(&mut self, what: &str, outcome: Outcome) {
        self.log.push(what.to_owned());
        self.machine.outcome(outcome, self.now);
    }

    fn started(&self, container: &str, attempt: u32) -> Started {
        Started {
            attempt,
            id: format!("{container}{attempt}"),
            image: "img".into(),
            image_id: "sha256:1".into(),
            started_at: self.now,
        }
    }

    fn exit(&mut self, container: &str, code: i32) {
        let i = self.machine.index(container).expect("the container");
        let attempt = self.machine.units[i].running().expect("it runs").attempt;
        let reason = if code == 0 { "Completed" } else { "Error" };
        let exit =
            Exit { code, signal: None, reason: reason.into(), message: String::new(), finished_at: self.now };
        self.machine.exited(container, attempt, exit, self.now);
    }

    fn probe(&mut self, container: &str, kind: ProbeKind, ok: bool) {
        let target = self
            .machine
            .probes()
            .into_iter()
            .find(|t| t.container == container && t.kind == kind)
            .unwrap_or_else(|| panic!("{kind:?} of {container} is not probed"));
        let result = if ok { ProbeResult::Success } else { ProbeResult::Failure("no".into()) };
        self.machine.probed(&target, &result, self.now);
    }

    fn pass(&mut self, seconds: i64) -> &mut Self {
        self.now += seconds * 1000;
        self
    }

    fn status(&mut self) -> Value {
        self.machine.status(&[], self.now)
    }

    fn reasons(&self) -> Vec<&'static str> {
        self.notes.iter().map(|note| note.reason).collect()
    }

    fn condition(&mut self, kind: &str) -> String {
        let status = self.status();
        let conditions = status["conditions"].as_array().expect("conditions").clone();
        let one = conditions.iter().find(|c| c["type"] == kind).expect("the condition");
        one["status"].as_str().expect("a status").to_owned()
    }
}

#[test]
fn a_plain_pod_comes_up_and_goes() {
    let mut world = World::new(r#"{"containers":[{"name":"a"},{"name":"b"}]}"#);
    assert_eq!(world.machine.phase(), Phase::Pending);
    assert_eq!(world.settle(), "sandbox volumes attach start:a#0 start:b#0");
    assert_eq!(world.machine.phase(), Phase::Running);
    assert!(world.machine.is_ready());
    assert_eq!(world.status()["podIP"], "10.0.0.9");
    world.machine.desired(deleted(&world.machine.pod().clone(), 30), world.now);
    assert_eq!(world.settle(), "term:a term:b");
    world.exit("a", 0);
    assert_eq!(world.settle(), "");
    world.exit("b", 143);
    assert_eq!(world.settle(), "report teardown delete");
    assert!(world.machine.finished());
    assert_eq!(world.machine.phase(), Phase::Failed);
    assert_eq!(world.reasons(), ["Killing", "Killing"]);
}

#[test]
fn init_containers_run_one_after_another_before_the_main_ones() {
    let mut world = World::new(
        r#"{"initContainers":[{"name":"i"},{"name":"side","restartPolicy":"Always","startupProbe":{}},{"name":"j"}],
        "containers":[{"name":"m"}]}"#,
    );
    assert_eq!(world.settle(), "sandbox volumes attach start:i#0");
    assert_eq!(world.status()["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
    assert_eq!(world.condition("Initialized"), "False");
    world.exit("i", 1);
    assert_eq!(world.settle(), "start:i#1", "retried at once the first time");
    world.exit("i", 0);
    assert_eq!(world.settle(), "start:side#0");
    world.probe("side", ProbeKind::Startup, true);
    assert_eq!(world.settle(), "start:j#0");
    world.exit("j", 0);
    assert_eq!(world.settle(), "start:m#0");
    assert_eq!(world.condition("Initialized"), "True");
    world.exit("side", 0);
    assert_eq!(world.settle(), "start:side#1", "a sidecar is restarted whatever its code");
    world.probe("side", ProbeKind::Startup, true);
    assert_eq!(world.condition("Initialized"), "True");
    world.machine.vanished(None, world.now);
    assert_eq!(world.settle(), "term:m", "sidecars go last");
    world.exit("m", 0);
    assert_eq!(world.settle(), "term:side");
    world.exit("side", 0);
    assert_eq!(world.settle(), "teardown", "nothing to report to nor to delete");
    assert!(world.machine.finished());
}

#[test]
fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    let mut world = World::new(
        r#"{"restartPolicy":"Never","initContainers":[{"name":"i"}],"containers":[{"name":"m"}]}"#,
    );
    world.settle();
    world.exit("i", 3);
    assert_eq!(world.settle(), "report teardown");
    assert_eq!(world.machine.phase(), Phase::Failed);
    assert!(!world.machine.finished(), "the object stays until it is deleted");
    assert_eq!(world.status()["initContainerStatuses"][0]["state"]["terminated"]["exitCode"], 3);
    assert!(!world.machine.holds_resources());
    world.machine.desired(deleted(&world.machine.pod().clone(), 30), world.now);
    assert_eq!(world.settle(), "delete");
}

#[test]
fn restart_policies() {
    let table = [
        ("Always", 0, "start:a#1", Phase::Running),
        ("Always", 1, "start:a#1", Phase::Running),
        ("OnFailure", 0, "report teardown", Phase::Succeeded),
        ("OnFailure", 1, "start:a#1", Phase::Running),
        ("Never", 0, "report teardown", Phase::Succeeded),
        ("Never", 1, "report teardown", Phase::Failed),
    ];
    for (policy, code, actions, phase) in table {
        let mut world =
            World::new(&format!(r#"{{"restartPolicy":"{policy}","containers":[{{"name":"a"}}]}}"#));
        world.settle();
        world.exit("a", code);
        assert_eq!((world.settle().as_str(), world.machine.phase()), (actions, phase), "{policy} {code}");
    }
}

#[test]
fn a_crash_loop_backs_off_and_says_so() {
    let mut world = World::new(r#"{"containers":[{"name":"a"}]}"#);
    world.settle();
    world.exit("a", 1);
    assert_eq!(world.settle(), "start:a#1");
    world.exit("a", 1);
    assert_eq!(world.settle(), "");
    let status = world.status();
    let container = &status["containerStatuses"][0];
    assert_eq!(container["state"]["waiting"]["reason"], "CrashLoopBackOff");
    assert_eq!(container["lastState"]["terminated"]["exitCode"], 1);
    assert_eq!(container["restartCount"], 1);
    assert_eq!(world.wake_at, Some(world.now + 10_000));
    assert_eq!(world.pass(9).settle(), "");
    assert_eq!(world.pass(1).settle(), "start:a#2");
    world.pass(601).exit("a", 1);
    assert_eq!(world.settle(), "start:a#3", "ten healthy minutes");
    assert_eq!(world.reasons(), ["BackOff"]);
    assert_eq!(world.machine.phase(), Phase::Running);
}

#[test]
fn a_program_that_does_not_exist_is_reported_and_retried() {
    let mut world = World::new(r#"{"containers":[{"name":"a"}]}"#);
    world.fail_starts = vec![StartFailure::Exec("exec /nope: not found".into())];
    assert_eq!(world.settle(), "sandbox volumes attach start:a#0");
    let status = world.status();
    let waiting = &status["containerStatuses"][0]["state"]["waiting"];
    assert_eq!(waiting["reason"], "RunContainerError");
    assert_eq!(waiting["message"], "exec /nope: not found");
    assert_eq!(world.reasons(), ["Failed"]);
    assert_eq!(world.pass(9).settle(), "");
    assert_eq!(world.pass(1).settle(), "start:a#1");

    let mut never = World::new(r#"{"restartPolicy":"Never","containers":[{"name":"a"}]}"#);
    never.fail_starts = vec![StartFailure::Exec("exec /nope: not found".into())];
    assert_eq!(never.settle(), "sandbox volumes attach start:a#0 report teardown");
    assert_eq!(never.machine.phase(), Phase::Failed);
    assert_eq!(never.status()["containerStatuses"][0]["state"]["terminated"]["exitCode"], 128);
}

#[test]
fn a_missing_image_waits_with_the_reasons_of_the_api() {
    let missing = |never_pull| StartFailure::NoImage { never_pull, message: "no image x".into() };
    let mut world = World::new(r#"{"containers":[{"name":"a","image":"x"}]}"#);
    world.fail_starts = vec![missing(false), missing(false)];
    let reason =
        |world: &mut World| world.status()["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    world.settle();
    assert_eq!(reason(&mut world), "ErrImagePull");
    assert_eq!(world.pass(1).settle(), "start:a#0", "the run was not used up");
    assert_eq!(reason(&mut world), "ImagePullBackOff");
    assert_eq!(world.pass(2).settle(), "start:a#0");
    assert_eq!(world.machine.phase(), Phase::Running);
    assert_eq!(world.status()["containerStatuses"][0]["restartCount"], 0);

    let mut never = World::new(r#"{"restartPolicy":"Never","containers":[{"name":"a","image":"x"}]}"#);
    never.fail_starts = vec![missing(true)];
    never.settle();
    assert_eq!(reason(&mut never), "ErrImageNeverPull");
    assert_eq!(never.machine.phase(), Phase::Pending);
}

#[test]
fn probes_gate_readiness_and_restart() {
    let mut world = World::new(
        r#"{"terminationGracePeriodSeconds":5,"containers":[{"name":"a",
        "startupProbe":{"failureThreshold":2},"livenessProbe":{"failureThreshold":2},
        "readinessProbe":{"failureThreshold":1}}]}"#,
    );
    world.settle();
    assert_eq!(world.machine.probes().len(), 1, "only startup until it passes");
    world.probe("a", ProbeKind::Startup, true);
    let kinds: Vec<ProbeKind> = world.machine.probes().iter().map(|t| t.kind).collect();
    assert_eq!(kinds, [ProbeKind::Liveness, ProbeKind::Readiness]);
    assert!(!world.machine.is_ready());
    world.probe("a", ProbeKind::Readiness, true);
    assert!(world.machine.is_ready());
    world.probe("a", ProbeKind::Readiness, false);
    assert!(!world.machine.is_ready());
    world.probe("a", ProbeKind::Readiness, true);
    world.probe("a", ProbeKind::Liveness, false);
    assert_eq!(world.settle(), "", "one failure is not enough");
    world.probe("a", ProbeKind::Liveness, false);
    assert_eq!(world.settle(), "term:a");
    assert!(world.machine.probes().iter().all(|t| t.kind == ProbeKind::Readiness), "liveness is on hold");
    assert_eq!(world.pass(5).settle(), "kill:a");
    world.exit("a", 137);
    assert_eq!(world.settle(), "start:a#1");
    assert!(!world.machine.is_ready());
    assert_eq!(world.machine.probes()[0].kind, ProbeKind::Startup, "from the beginning");
    assert_eq!(world.reasons(), ["Unhealthy", "Unhealthy", "Unhealthy", "Killing"]);
}

#[test]
fn results_of_an_earlier_run_do_not_count() {
    let mut world = World::new(r#"{"containers":[{"name":"a","livenessProbe":{"failureThreshold":1}}]}"#);
    world.settle();
    let stale = world.machine.probes()[0].clone();
    world.exit("a", 1);
    world.settle();
    world.machine.probed(&stale, &ProbeResult::Failure("old".into()), world.now);
    assert_eq!(world.settle(), "");
}

#[test]
fn grace_is_shared_with_the_hook_and_only_gets_shorter() {
    let spec = r#"{"terminationGracePeriodSeconds":30,"containers":[{"name":"a","lifecycle":{"preStop":{"exec":{}}}}]}"#;
    let mut world = World::new(spec);
    world.hold_hooks = true;
    world.settle();
    world.machine.desired(deleted(&world.machine.pod().clone(), 30), world.now);
    assert_eq!(world.settle(), "PreStop:a");
    assert_eq!(world.pass(29).settle(), "");
    assert_eq!(world.pass(1).settle(), "term:a", "the hook used it all up");
    assert_eq!(world.pass(1).settle(), "");
    assert_eq!(world.pass(1).settle(), "kill:a", "two seconds are left in any case");
    assert_eq!(world.pass(10).settle(), "kill:a", "and again, should it be lost");

    let mut world = World::new(spec);
    world.settle();
    world.machine.desired(deleted(&world.machine.pod().clone(), 30), world.now);
    assert_eq!(world.settle(), "PreStop:a term:a");
    world.machine.desired(deleted(&world.machine.pod().clone(), 3), world.now);
    world.machine.desired(deleted(&world.machine.pod().clone(), 60), world.now);
    assert_eq!(world.pass(2).settle(), "");
    assert_eq!(world.pass(1).settle(), "kill:a");

    let mut forced = World::new(spec);
    forced.settle();
    forced.machine.vanished(Some(0), forced.now);
    assert_eq!(forced.settle(), "term:a", "no hook, but TERM");
    assert_eq!(forced.pass(2).settle(), "kill:a");
}

#[test]
fn a_post_start_hook_holds_readiness_back_and_kills_when_it_fails() {
    let mut world = World::new(r#"{"containers":[{"name":"a","lifecycle":{"postStart":{"exec":{}}}}]}"#);
    world.hold_hooks = true;
    assert_eq!(world.settle(), "sandbox volumes attach start:a#0 PostStart:a");
    assert!(!world.machine.is_ready());
    let done = Outcome::HookDone {
        container: "a".into(),
        attempt: 0,
        hook: Hook::PostStart,
        result: Err("bad".into()),
    };
    world.machine.outcome(done, world.now);
    assert_eq!(world.settle(), "term:a");
    assert_eq!(world.reasons(), ["FailedPostStartHook", "Killing"]);
}

#[test]
fn a_lost_sandbox_is_replaced_and_everything_runs_anew() {
    let mut world = World::new(r#"{"initContainers":[{"name":"i"}],"containers":[{"name":"a"}]}"#);
    world.settle();
    world.exit("i", 0);
    world.settle();
    world.machine.sandbox_died(world.now);
    assert_eq!(world.settle(), "unsandbox sandbox attach start:i#1");
    assert_eq!(
        world.status()["containerStatuses"][0]["state"]["terminated"]["reason"],
        "ContainerStatusUnknown"
    );
    world.exit("i", 0);
    assert_eq!(world.settle(), "start:a#1");
    assert_eq!(world.machine.phase(), Phase::Running);

    let mut never = World::new(r#"{"restartPolicy":"Never","containers":[{"name":"a"}]}"#);
    never.settle();
    never.machine.sandbox_died(never.now);
    assert_eq!(never.settle(), "report teardown");
    assert_eq!(never.machine.phase(), Phase::Failed);
}

#[test]
fn a_deletion_while_things_are_under_way_waits_for_them() {
    let mut machine = Machine::new(pod(r#"{"containers":[{"name":"a"}]}"#), T0);
    let step = machine.step(T0);
    assert_eq!(step.actions, [Action::StartSandbox, Action::SetUpVolumes]);
    machine.desired(deleted(&machine.pod().clone(), 30), T0);
    assert_eq!(machine.step(T0).actions, []);
    machine.outcome(Outcome::SandboxStarted(Ok(())), T0);
    machine.outcome(Outcome::VolumesReady(Err("no".into())), T0);
    machine.final_status_accepted();
    let mut world = World::of(machine);
    world.pass(1);
    assert_eq!(world.settle(), "teardown delete", "it never attached nor started");
}

#[test]
fn preparation_is_retried_more_and_more_slowly() {
    let mut machine = Machine::new(pod(r#"{"containers":[{"name":"a"}]}"#), T0);
    machine.step(T0);
    machine.outcome(Outcome::VolumesReady(Ok(())), T0);
    machine.outcome(Outcome::SandboxStarted(Err("no".into())), T0);
    let step = machine.step(T0);
    assert_eq!(step.wake_at, Some(T0 + 1000));
    assert!(matches!(&step.actions[..], [Action::Note(n)] if n.reason == "FailedCreatePodSandBox"));
    assert_eq!(machine.step(T0 + 1000).actions, [Action::StartSandbox]);
    machine.outcome(Outcome::SandboxStarted(Err("no".into())), T0 + 1000);
    assert_eq!(machine.step(T0 + 1000).wake_at, Some(T0 + 3000));
    let status = machine.status(&[], T0);
    let message = status["containerStatuses"][0]["state"]["waiting"]["message"].as_str().expect("a message");
    assert!(message.contains("no"), "{message}");
}

#[test]
fn what_is_refused_stays_pending_and_can_be_deleted() {
    let mut world = World::new(r#"{"hostPID":true,"containers":[{"name":"a"}]}"#);
    assert_eq!(world.settle(), "");
    assert_eq!(world.reasons(), ["FailedCreatePodSandBox"]);
    assert_eq!(world.machine.phase(), Phase::Pending);
    let status = world.status();
    assert_eq!(status["containerStatuses"][0]["state"]["waiting"]["reason"], "CreateContainerConfigError");
    world.machine.desired(deleted(&world.machine.pod().clone(), 30), world.now);
    assert_eq!(world.settle(), "report teardown delete");
}

#[test]
fn a_rejected_pod_fails_and_a_deadline_ends_one() {
    let mut world = World::new(r#"{"containers":[{"name":"a"}]}"#);
    world.machine.reject(&resources::Rejection { reason: "OutOfcpu", message: "full".into() });
    assert_eq!(world.settle(), "report teardown");
    let status = world.status();
    assert_eq!((status["phase"].as_str(), status["reason"].as_str()), (Some("Failed"), Some("OutOfcpu")));

    let mut late = World::new(r#"{"activeDeadlineSeconds":60,"containers":[{"name":"a"}]}"#);
    late.settle();
    assert_eq!(late.wake_at, Some(T0 + 60_000));
    assert_eq!(late.pass(60).settle(), "term:a");
    late.exit("a", 0);
    assert_eq!(late.settle(), "report teardown");
    assert_eq!(late.status()["reason"], "DeadlineExceeded");
}

#[test]
fn an_exit_that_overtakes_its_start_is_kept() {
    let mut machine = Machine::new(pod(r#"{"restartPolicy":"Never","containers":[{"name":"a"}]}"#), T0);
    machine.step(T0);
    machine.outcome(Outcome::VolumesReady(Ok(())), T0);
    machine.outcome(Outcome::SandboxStarted(Ok(())), T0);
    machine.step(T0);
    machine.outcome(Outcome::Attached(Ok(vec![])), T0);
    machine.step(T0);
    let exit =
        Exit { code: 0, signal: None, reason: "Completed".into(), message: "m".into(), finished_at: T0 };
    machine.exited("a", 0, exit, T0);
    let world = World::of(machine);
    let started = world.started("a", 0);
    let mut machine = world.machine;
    machine
        .outcome(Outcome::Started { container: "a".into(), result: Ok((started, None)), notes: vec![] }, T0);
    machine.step(T0);
    assert_eq!(machine.phase(), Phase::Succeeded);
}

#[test]
fn a_new_image_restarts_only_its_container() {
    let mut world = World::new(r#"{"containers":[{"name":"a","image":"x:1"},{"name":"b","image":"y:1"}]}"#);
    world.settle();
    let next = pod(r#"{"containers":[{"name":"a","image":"x:2"},{"name":"b","image":"y:1"}]}"#);
    world.machine.desired(next, world.now);
    assert_eq!(world.settle(), "term:a");
    world.exit("a", 0);
    assert_eq!(world.settle(), "start:a#1");
}

fn adopted(world: &World) -> Adopted {
    let runs = world.machine.units.iter().filter_map(|unit| {
        let (run, exit) = match &unit.run {
            Run::Running(run) => (run.clone(), None),
            Run::Ended(ended) => (ended.run.clone(), Some(ended.exit.clone())),
            _ => return None,
        };
        Some((unit.name.clone(), AdoptedRun { run, exit }))
    });
    Adopted { alive: true, runs: runs.collect() }
}

#[test]
fn an_adopted_pod_reports_what_it_reported_before() {
    let mut world = World::new(
        r#"{"initContainers":[{"name":"i"}],"containers":[{"name":"a","readinessProbe":{},"livenessProbe":{}},
        {"name":"b"}]}"#,
    );
    world.settle();
    world.exit("i", 0);
    world.settle();
    world.exit("b", 1);
    world.settle();
    world.exit("b", 1);
    world.settle();
    world.probe("a", ProbeKind::Readiness, true);
    let before = world.status();
    let mut pod = (**world.machine.pod()).clone();
    pod.status = serde_json::from_value(before.clone()).expect("a status");
    let memory: Memory =
        serde_json::from_str(&serde_json::to_string(&world.machine.memory()).expect("json")).expect("memory");
    for memory in [Some(&memory), None] {
        let machine = Machine::adopt(Arc::new(pod.clone()), Some(&adopted(&world)), memory, world.now + 500);
        let mut next = World::of(machine);
        next.now = world.now + 500;
        assert!(next.machine.is_ready() == world.machine.is_ready());
        let expected = if memory.is_some() { "attach volumes" } else { "attach volumes start:b#2" };
        assert_eq!(next.settle(), expected, "nothing that runs is touched");
        if memory.is_some() {
            assert_eq!(next.status(), before);
            assert_eq!(next.pass(10).settle(), "start:b#2", "the back-off goes on");
        } else {
            assert_eq!(next.status()["containerStatuses"][0], before["containerStatuses"][0]);
            assert_eq!(next.condition("ContainersReady"), "True");
        }
    }
}

#[test]
fn a_pod_that_the_node_lost_is_started_anew_or_fails() {
    let status = r#"{"phase":"Running","containerStatuses":[{"name":"a","restartCount":4,"ready":true,
        "containerID":"sheave://x","state":{"running":{"startedAt":"2023-11-14T22:00:00Z"}}}]}"#;
    for (policy, actions) in [("Always", "sandbox volumes attach start:a#5"), ("Never", "report teardown")] {
        let mut pod =
            (*pod(&format!(r#"{{"restartPolicy":"{policy}","containers":[{{"name":"a"}}]}}"#))).clone();
        pod.status = serde_json::from_str(status).expect("a status");
        let mut world = World::of(Machine::adopt(Arc::new(pod), None, None, T0));
        assert_eq!(world.settle(), actions, "{policy}");
    }
}

#[test]
fn a_finished_pod_is_not_run_again_by_the_next_agent() {
    let mut pod = (*pod(r#"{"containers":[{"name":"a"}]}"#)).clone();
    pod.status = serde_json::from_str(r#"{"phase":"Succeeded"}"#).expect("a status");
    let mut world = World::of(Machine::adopt(Arc::new(pod), None, None, T0));
    assert_eq!(world.settle(), "teardown", "leftovers are cleared away");
    assert_eq!(world.machine.phase(), Phase::Succeeded);
}

#[test]
fn the_first_stage_of_a_stop_is_the_hook() {
    let mut world = World::new(r#"{"containers":[{"name":"a","lifecycle":{"preStop":{"exec":{}}}}]}"#);
    world.settle();
    world.machine.kill(0, 10, "test".into(), world.now);
    assert_eq!(world.machine.units[0].stop.map(|s| s.stage), Some(Stage::PreStop));
}
