//! What to do now. `step` marks what it asks for as under way, so that asking twice gives nothing new.

use super::super::model::Millis;
use super::super::resources::seconds;
use super::*;

/// The API gives postStart hooks no bound of their own; a hook that hangs must not hold a pod for ever.
const HOOK_TIMEOUT_MIN_MS: Millis = 120_000;

impl Machine {
    /// What to do at `now`.
    pub fn step(&mut self, now: Millis) -> Step {
        let mut step = Step::default();
        if self.finished {
            return step;
        }
        if !self.winding_down() {
            self.ending = self.past_deadline(now).or_else(|| self.natural_end());
        }
        if self.winding_down() {
            self.stop_everything(now);
        } else {
            self.prepare_step(now, &mut step);
            self.containers_step(now, &mut step);
        }
        for i in 0..self.units.len() {
            self.post_start_step(i, &mut step);
            let at = self.drive_stop(i, now, &mut step.actions);
            step.wake(at);
        }
        if self.winding_down() {
            self.leave_step(now, &mut step);
        } else if let Some(limit_s) = self.pod.spec.active_deadline_seconds {
            step.wake(Some(self.start_time + seconds(limit_s)));
        }
        step.actions.extend(self.notes.drain(..).map(Action::Note));
        step
    }

    fn past_deadline(&self, now: Millis) -> Option<Ending> {
        let limit_s = self.pod.spec.active_deadline_seconds?;
        (now >= self.start_time + seconds(limit_s)).then(|| Ending {
            succeeded: false,
            reason: "DeadlineExceeded".to_owned(),
            message: format!("the pod was active for longer than its deadline of {limit_s} s"),
        })
    }

    pub(super) fn natural_end(&self) -> Option<Ending> {
        let ended = |i: usize| -> Option<i32> {
            let code = self.units[i].ended()?.exit.code;
            (!self.restarts(i, code)).then_some(code)
        };
        let failed = |i: &usize| self.units[*i].role == Role::Init && ended(*i).is_some_and(|code| code != 0);
        let mut mains = (0..self.units.len()).filter(|i| self.units[*i].role == Role::Main).peekable();
        let init_failed = !self.initialized && (0..self.units.len()).any(|i| failed(&i));
        if init_failed {
            return Some(Ending { succeeded: false, reason: String::new(), message: String::new() });
        }
        mains.peek()?;
        let codes: Option<Vec<i32>> = mains.map(ended).collect();
        let succeeded = codes?.iter().all(|code| *code == 0);
        Some(Ending { succeeded, reason: String::new(), message: String::new() })
    }

    /// Asks for the sandbox, its network and the volumes.
    fn prepare_step(&mut self, now: Millis, step: &mut Step) {
        if self.refusal.is_some() {
            return;
        }
        if now < self.prepare_at {
            step.wake(Some(self.prepare_at));
            return;
        }
        match self.sandbox {
            Sandbox::None => {
                self.sandbox = Sandbox::Starting;
                step.actions.push(Action::StartSandbox);
            }
            Sandbox::Dead if !self.attaching && !self.units.iter().any(Unit::busy) => {
                self.sandbox = Sandbox::Removing;
                step.actions.push(Action::RemoveSandbox);
            }
            Sandbox::Up { attached: false } if !self.attaching => {
                self.attaching = true;
                step.actions.push(Action::Attach);
            }
            Sandbox::Starting | Sandbox::Removing | Sandbox::Up { .. } | Sandbox::Dead => {}
        }
        if self.volumes == Once::Todo {
            self.volumes = Once::UnderWay;
            step.actions.push(Action::SetUpVolumes);
        }
    }

    fn containers_step(&mut self, now: Millis, step: &mut Step) {
        let up = matches!(self.sandbox, Sandbox::Up { attached: true });
        if !up || self.volumes != Once::Done {
            return;
        }
        for i in 0..self.units.len() {
            let role = self.units[i].role;
            let init_over = self.initialized && role == Role::Init;
            if !init_over && !self.units[i].busy() {
                self.start_if_due(i, now, step);
            }
            if role != Role::Main && !self.initialized && !self.init_passed(i) {
                return;
            }
        }
    }

    /// Whether the next init container may start after this one.
    fn init_passed(&self, i: usize) -> bool {
        let unit = &self.units[i];
        match unit.role {
            Role::Init => unit.ended().is_some_and(|ended| ended.exit.code == 0),
            Role::Sidecar => self.spec_of(i).is_some_and(|spec| unit.is_started(spec)),
            Role::Main => true,
        }
    }

    fn start_if_due(&mut self, i: usize, now: Millis, step: &mut Step) {
        if let Some(ended) = self.units[i].ended()
            && !self.restarts(i, ended.exit.code)
        {
            return;
        }
        let pod = self.pod.key();
        let unit = &mut self.units[i];
        if now < unit.not_before {
            step.wake(Some(unit.not_before));
            if let Run::Ended(ended) = &unit.run
                && unit.waiting.is_none()
            {
                let pause_s = (unit.not_before - ended.exit.finished_at) / 1000;
                let reason =
                    if ended.exit.reason == "StartError" { "RunContainerError" } else { "CrashLoopBackOff" };
                let message = match reason {
                    "RunContainerError" => ended.exit.message.clone(),
                    _ => format!("back-off {pause_s}s restarting failed container={} pod={pod}", unit.name),
                };
                unit.waiting = Some(Waiting { reason, message });
                let message =
                    format!("Back-off of {pause_s} s before container {} of {pod} starts again", unit.name);
                self.note(true, "BackOff", message, Some(i));
            }
            return;
        }
        let attempt = unit.next_attempt;
        if let Run::Ended(ended) =
            std::mem::replace(&mut unit.run, Run::Starting { attempt, early_exit: None })
        {
            unit.last = Some(ended);
        }
        unit.reset_probes();
        if unit.role == Role::Main {
            self.initialized = true;
        }
        let container = self.units[i].name.clone();
        step.actions.push(Action::Start { container, attempt });
    }

    fn post_start_step(&mut self, i: usize, step: &mut Step) {
        let unit = &mut self.units[i];
        if let Run::Running(run) = &unit.run
            && unit.post_start == PostStart::Due
        {
            unit.post_start = PostStart::Running;
            let timeout_ms = seconds(self.pod.spec.termination_grace_period_seconds).max(HOOK_TIMEOUT_MIN_MS);
            step.actions.push(Action::RunHook {
                container: unit.name.clone(),
                attempt: run.attempt,
                hook: Hook::PostStart,
                timeout_ms,
            });
        }
    }

    /// Stops what runs: main containers at once, then sidecars in the reverse order of their start.
    fn stop_everything(&mut self, now: Millis) {
        let grace_s = self.deleting.unwrap_or(self.pod.spec.termination_grace_period_seconds);
        let why = match (&self.ending, self.deleting) {
            (_, Some(_)) => "the pod is being deleted",
            (Some(ending), None) if !ending.reason.is_empty() => "the pod has failed",
            _ => "the pod has ended",
        };
        let others_busy = self.units.iter().any(|unit| unit.role != Role::Sidecar && unit.busy());
        let last_sidecar = (0..self.units.len())
            .rev()
            .find(|i| self.units[*i].role == Role::Sidecar && self.units[*i].busy());
        for i in 0..self.units.len() {
            let due = match self.units[i].role {
                Role::Sidecar => !others_busy && last_sidecar == Some(i),
                Role::Init | Role::Main => true,
            };
            if due && self.units[i].stop.is_none() {
                self.kill(i, grace_s, why.to_owned(), now);
            }
        }
    }

    /// The last steps of a pod: status, clean-up, deletion of the object.
    fn leave_step(&mut self, now: Millis, step: &mut Step) {
        let in_flight = matches!(self.sandbox, Sandbox::Starting | Sandbox::Removing)
            || self.attaching
            || self.volumes == Once::UnderWay;
        let must_report = self.present && !self.final_status_accepted;
        if self.units.iter().any(Unit::busy) || in_flight || must_report {
            return;
        }
        if now < self.prepare_at {
            step.wake(Some(self.prepare_at));
            return;
        }
        match (self.tear_down, self.delete) {
            (Once::Todo, _) => {
                self.tear_down = Once::UnderWay;
                step.actions.push(Action::TearDown);
            }
            (Once::UnderWay, _) => {}
            (Once::Done, _) if self.deleting.is_none() => {}
            (Once::Done, _) if !self.present => self.finished = true,
            (Once::Done, Once::Todo) => {
                self.delete = Once::UnderWay;
                step.actions.push(Action::DeleteObject);
            }
            (Once::Done, Once::UnderWay) => {}
            (Once::Done, Once::Done) => self.finished = true,
        }
    }

    /// An action was carried out, or failed.
    pub fn outcome(&mut self, outcome: Outcome, now: Millis) {
        match outcome {
            Outcome::SandboxStarted(Ok(())) => {
                let attached = self.pod.spec.host_network;
                self.sandbox = Sandbox::Up { attached };
                self.prepared();
            }
            Outcome::SandboxStarted(Err(why)) => {
                self.sandbox = Sandbox::None;
                self.preparation_failed(
                    "FailedCreatePodSandBox",
                    format!("Making the sandbox failed: {why}"),
                    now,
                );
            }
            Outcome::Attached(result) => self.attached(result, now),
            Outcome::VolumesReady(Ok(())) => {
                self.volumes = Once::Done;
                self.prepared();
            }
            Outcome::VolumesReady(Err(why)) => {
                self.volumes = Once::Todo;
                self.preparation_failed("FailedMount", why, now);
            }
            Outcome::Started { container, result, notes } => {
                self.notes.extend(notes);
                self.start_result(&container, result, now);
            }
            Outcome::HookDone { container, attempt, hook, result } => {
                self.hook_done(&container, attempt, hook, result, now);
            }
            Outcome::SandboxRemoved(Ok(())) => self.sandbox_gone(),
            Outcome::SandboxRemoved(Err(why)) => {
                self.sandbox = Sandbox::Dead;
                self.preparation_failed(
                    "FailedKillPod",
                    format!("Removing the lost sandbox failed: {why}"),
                    now,
                );
            }
            Outcome::TornDown(Ok(())) => {
                self.tear_down = Once::Done;
                self.sandbox = Sandbox::None;
                self.volumes = Once::Todo;
                self.prepare.reset();
            }
            Outcome::TornDown(Err(why)) => {
                self.tear_down = Once::Todo;
                self.preparation_failed(
                    "FailedKillPod",
                    format!("Cleaning up after the pod failed: {why}"),
                    now,
                );
            }
            Outcome::ObjectDeleted(Ok(())) => self.delete = Once::Done,
            Outcome::ObjectDeleted(Err(_)) => {
                self.delete = Once::Todo;
                self.prepare_at = now + self.prepare.after_preparation();
            }
        }
    }

    fn attached(&mut self, result: Result<Vec<IpAddr>, String>, now: Millis) {
        self.attaching = false;
        if !matches!(self.sandbox, Sandbox::Up { .. }) {
            return;
        }
        match result {
            Ok(ips) => {
                self.sandbox = Sandbox::Up { attached: true };
                self.ips = ips;
                self.prepared();
            }
            Err(why) => {
                let message = format!("Connecting the pod to the network failed: {why}");
                self.preparation_failed("FailedCreatePodSandBox", message, now);
            }
        }
    }

    fn prepared(&mut self) {
        if matches!(self.sandbox, Sandbox::Up { attached: true }) && self.volumes == Once::Done {
            self.prepare.reset();
            self.prepare_error = None;
        }
    }

    fn preparation_failed(&mut self, reason: &'static str, message: String, now: Millis) {
        self.prepare_at = now + self.prepare.after_preparation();
        self.prepare_error = Some(message.clone());
        self.note(true, reason, message, None);
    }

    /// Every container runs anew in the next sandbox, init containers included.
    fn sandbox_gone(&mut self) {
        self.sandbox = Sandbox::None;
        self.ips.clear();
        self.initialized = false;
        for unit in self.units.iter_mut().filter(|unit| unit.role == Role::Init) {
            if let Run::Ended(ended) = std::mem::replace(&mut unit.run, Run::None) {
                unit.last = Some(ended);
            }
        }
    }

    fn start_result(
        &mut self,
        container: &str,
        result: Result<(Started, Option<Exit>), StartFailure>,
        now: Millis,
    ) {
        let Some(i) = self.index(container) else { return };
        let Run::Starting { attempt, early_exit } = std::mem::replace(&mut self.units[i].run, Run::None)
        else {
            return;
        };
        match result {
            Ok((started, exit)) => {
                let has_hook = self.spec_of(i).is_some_and(|spec| spec.lifecycle.post_start.is_some());
                let unit = &mut self.units[i];
                unit.next_attempt = attempt + 1;
                unit.prepare.reset();
                unit.waiting = None;
                unit.post_start = if has_hook { PostStart::Due } else { PostStart::Done };
                unit.run = Run::Running(started.clone());
                if let Some(exit) = exit.or(early_exit) {
                    self.end(i, Ended { run: started, exit }, now);
                } else if self.sandbox == Sandbox::Dead {
                    let exit = lost_exit(now, "the pod's namespaces were lost");
                    self.end(i, Ended { run: started, exit }, now);
                }
            }
            Err(failure) => self.start_failed(i, attempt, failure, now),
        }
    }

    fn start_failed(&mut self, i: usize, attempt: u32, failure: StartFailure, now: Millis) {
        let image = self.spec_of(i).map(|spec| spec.image.clone()).unwrap_or_default();
        let unit = &mut self.units[i];
        let (reason, message) = match failure {
            StartFailure::Exec(message) => {
                unit.next_attempt = attempt + 1;
                unit.not_before = now + unit.backoff.after_start_failure();
                let exit = Exit {
                    code: 128,
                    signal: None,
                    reason: "StartError".to_owned(),
                    message: message.clone(),
                    finished_at: now,
                };
                let run =
                    Started { attempt, id: String::new(), image, image_id: String::new(), started_at: now };
                unit.run = Run::Ended(Ended { run, exit });
                unit.waiting = Some(Waiting { reason: "RunContainerError", message: message.clone() });
                self.note(true, "Failed", format!("Error: {message}"), Some(i));
                return;
            }
            StartFailure::NoImage { never_pull: true, message } => ("ErrImageNeverPull", message),
            StartFailure::NoImage { never_pull: false, message } if unit.prepare.failures() == 0 => {
                ("ErrImagePull", message)
            }
            StartFailure::NoImage { message, .. } => ("ImagePullBackOff", message),
            StartFailure::Config(message) => ("CreateContainerConfigError", message),
            StartFailure::Create(message) => ("CreateContainerError", message),
        };
        let unchanged = unit.waiting.as_ref().is_some_and(|known| known.message == message);
        unit.not_before = now + unit.prepare.after_preparation();
        unit.waiting = Some(Waiting { reason, message: message.clone() });
        if reason == "ImagePullBackOff" && unchanged {
            self.note(false, "BackOff", format!("Back-off looking for image {image:?}"), Some(i));
        } else {
            self.note(true, "Failed", message, Some(i));
        }
    }

    fn hook_done(
        &mut self,
        container: &str,
        attempt: u32,
        hook: Hook,
        result: Result<(), String>,
        now: Millis,
    ) {
        let Some(i) = self.index(container) else { return };
        if self.units[i].running().is_none_or(|run| run.attempt != attempt) {
            return;
        }
        match (hook, result) {
            (Hook::PreStop, result) => {
                if let Err(why) = result {
                    self.note(true, "FailedPreStopHook", format!("PreStopHook failed: {why}"), Some(i));
                }
                self.pre_stop_done(i);
            }
            (Hook::PostStart, Ok(())) => self.units[i].post_start = PostStart::Done,
            (Hook::PostStart, Err(why)) => {
                self.note(true, "FailedPostStartHook", format!("PostStartHook failed: {why}"), Some(i));
                let grace_s = self.pod.spec.termination_grace_period_seconds;
                self.kill(i, grace_s, "its postStart hook failed".to_owned(), now);
            }
        }
    }
}

impl Step {
    fn wake(&mut self, at: Option<Millis>) {
        if let Some(at) = at {
            self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
        }
    }
}
