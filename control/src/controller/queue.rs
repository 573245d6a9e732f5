//! The work queue of the driver, as plain data: which key to look at next, and when. Invariant: a key is never being
//! worked on twice at a time; one that is added while it is being worked on is looked at again afterwards.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::limits;

/// What became of one look at a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All was done; look again after this time, if given.
    Done(Option<Duration>),
    /// Something had changed meanwhile: look again soon.
    Stale,
    /// It went wrong, for this reason.
    Failed(String),
}

/// What is remembered of a key between looks. Keys with nothing to remember are forgotten.
#[derive(Debug, Default)]
struct State {
    is_queued: bool,
    is_running: bool,
    /// Added while it was running.
    is_dirty: bool,
    /// Looks in a row that did not succeed.
    tries: u32,
    /// Why the last look went wrong, until one goes well.
    failure: Option<String>,
    timer: Option<Instant>,
}

/// Keys to look at: now, in order, and later, by time.
#[derive(Debug)]
pub(crate) struct Queue<K> {
    ready: VecDeque<K>,
    states: HashMap<K, State>,
    timers: BTreeSet<(Instant, K)>,
}

impl<K: Clone + Eq + Hash + Ord> Queue<K> {
    pub(crate) fn new() -> Self {
        Queue { ready: VecDeque::new(), states: HashMap::new(), timers: BTreeSet::new() }
    }

    /// Asks for a look at the key. One that is to be tried again later after a failure is looked at at once: what
    /// was in its way may be gone.
    pub(crate) fn add(&mut self, key: K) {
        let state = self.states.entry(key.clone()).or_default();
        if state.is_running {
            state.is_dirty = true;
        } else if !state.is_queued {
            state.is_queued = true;
            self.ready.push_back(key);
        }
    }

    /// The next key to look at. The caller must say [`Queue::done`] when it has.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<K> {
        while let Some((at, key)) = self.timers.first().cloned()
            && at <= now
        {
            self.timers.pop_first();
            if let Some(state) = self.states.get_mut(&key) {
                state.timer = None;
            }
            self.add(key);
        }
        let key = self.ready.pop_front()?;
        let state = self.states.entry(key.clone()).or_default();
        state.is_queued = false;
        state.is_running = true;
        if let Some(at) = state.timer.take() {
            self.timers.remove(&(at, key.clone()));
        }
        Some(key)
    }

    /// When the next key is due that is not ready yet.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Why the last look at the key went wrong, if it did.
    pub(crate) fn failure(&self, key: &K) -> Option<&str> {
        self.states.get(key)?.failure.as_deref()
    }

    /// Ends a look at the key. Tells whether a failure is news: another one than the last time.
    pub(crate) fn done(&mut self, key: K, outcome: Outcome, now: Instant) -> bool {
        let state = self.states.entry(key.clone()).or_default();
        state.is_running = false;
        let mut again = std::mem::take(&mut state.is_dirty);
        let mut is_news = false;
        let wait = match outcome {
            Outcome::Done(wait) => {
                state.tries = 0;
                // The look after a failure sees that it is over.
                again |= state.failure.take().is_some();
                wait
            }
            Outcome::Stale => {
                state.tries = state.tries.saturating_add(1);
                Some(backoff(state.tries))
            }
            Outcome::Failed(why) => {
                state.tries = state.tries.saturating_add(1);
                is_news = state.failure.as_deref() != Some(why.as_str());
                state.failure = Some(why);
                // Events do not shorten the wait: they may be the traces of the failed look itself.
                again = false;
                Some(backoff(state.tries))
            }
        };
        if let Some(at) = wait.and_then(|wait| now.checked_add(wait)) {
            state.timer = Some(at);
            self.timers.insert((at, key.clone()));
        }
        if again {
            self.add(key);
        } else if state.failure.is_none() && state.timer.is_none() {
            self.states.remove(&key);
        }
        is_news
    }
}

/// Doubles from `RETRY_MIN_MS` up to `RETRY_MAX_MS`.
fn backoff(tries: u32) -> Duration {
    let factor = 1_u64.checked_shl(tries.saturating_sub(1)).unwrap_or(u64::MAX);
    Duration::from_millis(limits::RETRY_MIN_MS.saturating_mul(factor).min(limits::RETRY_MAX_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_key_is_worked_on_once_at_a_time() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!((queue.pop(now), queue.pop(now), queue.pop(now)), (Some("a"), Some("b"), None));
        queue.add("a");
        assert_eq!(queue.pop(now), None, "it is running");
        queue.done("a", Outcome::Done(None), now);
        assert_eq!(queue.pop(now), Some("a"), "but not forgotten");
        queue.done("a", Outcome::Done(None), now);
        queue.done("b", Outcome::Done(None), now);
        assert_eq!(queue.pop(now), None);
        assert!(queue.states.is_empty(), "nothing is remembered of idle keys");
    }

    #[test]
    fn a_timer_is_replaced_by_the_next_look() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.add("a");
        queue.pop(now);
        queue.done("a", Outcome::Done(Some(ms(50))), now);
        assert_eq!((queue.pop(now), queue.next_due()), (None, Some(now + ms(50))));
        queue.add("a");
        assert_eq!(queue.pop(now), Some("a"));
        queue.done("a", Outcome::Done(Some(ms(80))), now);
        assert_eq!(queue.pop(now + ms(79)), None);
        assert_eq!(queue.pop(now + ms(80)), Some("a"));
        queue.done("a", Outcome::Done(None), now);
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn failures_back_off_and_are_news_once() {
        let mut now = Instant::now();
        let mut queue = Queue::new();
        queue.add("a");
        let mut waits = Vec::new();
        for tries in 0..14 {
            assert_eq!(queue.pop(now), Some("a"));
            let is_news = queue.done("a", Outcome::Failed("quota".to_owned()), now);
            assert_eq!(is_news, tries == 0);
            let due = queue.next_due().expect("a retry");
            waits.push(u64::try_from((due - now).as_millis()).expect("a wait"));
            now = due;
        }
        assert_eq!(waits[..4], [10, 20, 40, 80]);
        assert_eq!(waits.last(), Some(&limits::RETRY_MAX_MS));
        assert_eq!(queue.failure(&"a"), Some("quota"));
        queue.pop(now);
        assert!(queue.done("a", Outcome::Failed("disk".to_owned()), now), "another failure is news");
        queue.add("a");
        assert_eq!(queue.pop(now), Some("a"), "an event brings a look at once");
        queue.done("a", Outcome::Done(None), now);
        assert_eq!(queue.pop(now), Some("a"), "one more look after a failure, which sees that it is over");
        assert_eq!(queue.failure(&"a"), None);
        queue.done("a", Outcome::Done(None), now);
        assert_eq!(queue.pop(now), None);
    }

    #[test]
    fn events_of_a_failed_look_do_not_spin() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.add("a");
        queue.pop(now);
        queue.add("a");
        queue.done("a", Outcome::Failed("quota".to_owned()), now);
        assert_eq!(queue.pop(now), None);
        assert_eq!(queue.pop(now + ms(limits::RETRY_MIN_MS)), Some("a"));
    }
}
