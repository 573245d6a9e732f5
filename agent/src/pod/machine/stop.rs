//! How one container is stopped: preStop hook, TERM, KILL, each as soon as the one before is over. A
//! grace period only ever gets shorter, and what is left after the hook is at least
//! `limits::STOP_GRACE_MIN_S`.

use super::super::model::Millis;
use super::super::resources::seconds;
use super::{Action, Hook, Machine};
use crate::limits;

/// How far a stop has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pod) enum Stage {
    /// The hook is running.
    PreStop,
    /// The hook is over, TERM is to be sent.
    Ready,
    /// TERM was sent.
    Asked,
    /// KILL was sent.
    Killed,
}

/// A stop under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    pub(in crate::pod) stage: Stage,
    pub(in crate::pod) deadline: Millis,
    hook_sent: bool,
}

const REPEAT_KILL_MS: Millis = 10_000;

fn grace_min_ms() -> Millis {
    Millis::try_from(limits::STOP_GRACE_MIN_S).map_or(Millis::MAX, seconds)
}

impl Machine {
    /// Begins to stop a container that runs; shortens the stop that is under way otherwise.
    pub(super) fn kill(&mut self, i: usize, grace_s: i64, why: String, now: Millis) {
        if self.units[i].running().is_none() {
            return;
        }
        if self.units[i].stop.is_some() {
            self.shorten(i, grace_s, now);
            return;
        }
        let has_hook = self.spec_of(i).is_some_and(|spec| spec.lifecycle.pre_stop.is_some());
        let stage = if has_hook && grace_s > 0 { Stage::PreStop } else { Stage::Ready };
        let deadline = now + seconds(grace_s.max(0));
        self.units[i].stop = Some(Stop { stage, deadline, hook_sent: false });
        let name = self.units[i].name.clone();
        self.note(false, "Killing", format!("Stopping container {name}: {why}"), Some(i));
    }

    pub(super) fn shorten(&mut self, i: usize, grace_s: i64, now: Millis) {
        if let Some(stop) = &mut self.units[i].stop
            && stop.stage != Stage::Killed
        {
            let floor = if stop.stage == Stage::Asked { grace_min_ms() } else { 0 };
            stop.deadline = stop.deadline.min(now + seconds(grace_s.max(0)).max(floor));
        }
    }

    pub(super) fn pre_stop_done(&mut self, i: usize) {
        if let Some(stop) = &mut self.units[i].stop
            && stop.stage == Stage::PreStop
        {
            stop.stage = Stage::Ready;
        }
    }

    /// Moves a stop on; returns when to look again.
    pub(super) fn drive_stop(&mut self, i: usize, now: Millis, actions: &mut Vec<Action>) -> Option<Millis> {
        let attempt = self.units[i].running()?.attempt;
        let container = self.units[i].name.clone();
        let stop = self.units[i].stop.as_mut()?;
        if stop.stage == Stage::PreStop && now >= stop.deadline {
            stop.stage = Stage::Ready;
        }
        match stop.stage {
            Stage::PreStop => {
                if !stop.hook_sent {
                    stop.hook_sent = true;
                    let timeout_ms = stop.deadline - now;
                    actions.push(Action::RunHook { container, attempt, hook: Hook::PreStop, timeout_ms });
                }
            }
            Stage::Ready => {
                stop.stage = Stage::Asked;
                stop.deadline = stop.deadline.max(now + grace_min_ms());
                actions.push(Action::Terminate { container });
            }
            Stage::Asked | Stage::Killed => {
                if now >= stop.deadline {
                    stop.stage = Stage::Killed;
                    stop.deadline = now + REPEAT_KILL_MS;
                    actions.push(Action::Kill { container });
                }
            }
        }
        Some(stop.deadline)
    }
}
