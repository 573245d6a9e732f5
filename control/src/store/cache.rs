//! What is committed, in memory: the objects of every resource and the recent history of each,
//! changed only by the writer after a commit, a whole batch at a time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::watch;

use super::{Change, Event, Expired, Key, Listing, Object, Rev};
use crate::limits::{
    HISTORY_AGE_MIN_SECS, HISTORY_BYTES_MAX, HISTORY_EVENTS_MAX, HISTORY_EVENTS_MIN, WATCH_BATCH_EVENTS,
};

/// An event with what it takes to forget it.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) event: Arc<Event>,
    /// Row that held the state before; 0 when there was none.
    pub(super) superseded: Rev,
    /// Bytes that are in memory only because of this step.
    pub(super) bytes: usize,
}

/// Everything of one resource.
#[derive(Debug)]
pub(super) struct Resource {
    objects: BTreeMap<Key, Arc<Object>>,
    history: VecDeque<Step>,
    history_bytes: usize,
    /// Newest revision that was dropped from the history.
    horizon: Rev,
    wake: watch::Sender<Rev>,
}

/// What to forget of a resource's history.
#[derive(Debug, Default)]
pub(super) struct Trim {
    pub(super) steps: usize,
    pub(super) horizon: Rev,
    pub(super) rows: Vec<Rev>,
}

impl Resource {
    fn new() -> Self {
        Self {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            history_bytes: 0,
            horizon: 0,
            wake: watch::Sender::new(0),
        }
    }

    /// Decides which steps, at most `max`, are neither young enough nor few enough to be kept.
    pub(super) fn plan_trim(&self, now_secs: u64, coming: usize, max: usize) -> Trim {
        let mut trim = Trim::default();
        let mut bytes = self.history_bytes;
        let mut left = self.history.len() + coming;
        for step in self.history.iter().take(max) {
            let old = now_secs.saturating_sub(step.event.object.written_secs) > HISTORY_AGE_MIN_SECS;
            let over = left > HISTORY_EVENTS_MAX || bytes > HISTORY_BYTES_MAX;
            let spare = old && left > HISTORY_EVENTS_MIN;
            if !over && !spare {
                break;
            }
            trim.steps += 1;
            trim.horizon = step.event.rev();
            if step.superseded != 0 {
                trim.rows.push(step.superseded);
            }
            if step.event.change == Change::Deleted {
                trim.rows.push(step.event.rev());
            }
            bytes -= step.bytes;
            left -= 1;
        }
        trim
    }

    fn trim(&mut self, trim: &Trim) {
        for step in self.history.drain(..trim.steps) {
            self.history_bytes -= step.bytes;
        }
        if trim.steps > 0 {
            self.horizon = trim.horizon;
        }
    }

    fn apply(&mut self, step: Step) {
        let object = &step.event.object;
        match step.event.change {
            Change::Deleted => drop(self.objects.remove(&object.key)),
            Change::Added | Change::Modified => {
                drop(self.objects.insert(object.key.clone(), Arc::clone(object)));
            }
        }
        self.history_bytes += step.bytes;
        self.history.push_back(step);
    }

    /// Whether the history after `from` is complete.
    pub(super) fn check(&self, from: Rev) -> Result<(), Expired> {
        if from < self.horizon { Err(Expired { asked: from, oldest: self.horizon }) } else { Ok(()) }
    }

    /// Events after `from`, of one namespace or all, some of them, and where that leaves off;
    /// `None` as the place when the history is exhausted.
    pub(super) fn after(
        &self,
        from: Rev,
        namespace: Option<&str>,
    ) -> Result<(Vec<Arc<Event>>, Option<Rev>), Expired> {
        self.check(from)?;
        let start = self.history.partition_point(|step| step.event.rev() <= from);
        let mut events = Vec::new();
        for step in self.history.range(start..) {
            if namespace.is_some_and(|ns| step.event.object.key.namespace() != ns) {
                continue;
            }
            if events.len() == WATCH_BATCH_EVENTS {
                return Ok((events, Some(step.event.rev() - 1)));
            }
            events.push(Arc::clone(&step.event));
        }
        Ok((events, None))
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Rev> {
        self.wake.subscribe()
    }
}

/// The whole store as of one revision.
#[derive(Debug, Default)]
pub(super) struct Cache {
    resources: HashMap<Box<str>, Resource>,
    pub(super) rev: Rev,
}

impl Cache {
    pub(super) fn get(&self, key: &Key) -> Option<&Arc<Object>> {
        self.resources.get(key.resource())?.objects.get(key)
    }

    pub(super) fn resource(&self, name: &str) -> Option<&Resource> {
        self.resources.get(name)
    }

    pub(super) fn resource_mut(&mut self, name: &str) -> &mut Resource {
        if !self.resources.contains_key(name) {
            self.resources.insert(name.into(), Resource::new());
        }
        self.resources.entry(name.into()).or_insert_with(Resource::new)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.resources.keys().map(|name| &**name)
    }

    pub(super) fn counts(&self) -> Vec<(String, usize, usize)> {
        let resources = self.resources.iter();
        resources.map(|(name, r)| (name.to_string(), r.objects.len(), r.wake.receiver_count())).collect()
    }

    pub(super) fn list(&self, resource: &str, namespace: Option<&str>) -> Listing {
        let Some(resource_of) = self.resources.get(resource) else {
            return (Vec::new(), self.rev);
        };
        let objects = &resource_of.objects;
        let found = match namespace {
            None => objects.values().cloned().collect(),
            Some(ns) => objects
                .range(Key::new(resource, ns, "")..)
                .take_while(|(key, _)| key.namespace() == ns)
                .map(|(_, object)| Arc::clone(object))
                .collect(),
        };
        (found, self.rev)
    }

    /// Undoes the history after `rev`, for an exact listing of the past.
    pub(super) fn list_at(
        &self,
        resource: &str,
        namespace: Option<&str>,
        rev: Rev,
    ) -> Result<Vec<Arc<Object>>, Expired> {
        let (now, _) = self.list(resource, namespace);
        let Some(resource) = self.resources.get(resource) else { return Ok(now) };
        resource.check(rev)?;
        let mut then: BTreeMap<Key, Arc<Object>> =
            now.into_iter().map(|object| (object.key.clone(), object)).collect();
        let inside = |step: &&Step| namespace.is_none_or(|ns| step.event.object.key.namespace() == ns);
        for step in resource.history.iter().rev().take_while(|s| s.event.rev() > rev).filter(inside) {
            let object = &step.event.object;
            match (step.event.change, &step.event.prev) {
                (Change::Deleted, _) => {
                    let last = object.at_rev(step.superseded, object.written_secs);
                    then.insert(object.key.clone(), Arc::new(last));
                }
                (Change::Modified, Some(prev)) => drop(then.insert(object.key.clone(), Arc::clone(prev))),
                (Change::Added | Change::Modified, _) => drop(then.remove(&object.key)),
            }
        }
        Ok(then.into_values().collect())
    }

    /// Makes a committed batch visible, trims included. Who waits is woken by [`Cache::wake`].
    pub(super) fn publish(&mut self, steps: Vec<Step>, trims: &[(Box<str>, Trim)], rev: Rev) {
        for (resource, trim) in trims {
            self.resource_mut(resource).trim(trim);
        }
        for step in steps {
            let key = step.event.object.key.clone();
            self.resource_mut(key.resource()).apply(step);
        }
        self.rev = rev;
    }

    /// Wakes the watchers of a resource.
    pub(super) fn wake(&self, resource: &str) {
        if let Some(resource) = self.resources.get(resource) {
            resource.wake.send_replace(self.rev);
        }
    }

    /// Puts back one row at start. Rows come in ascending order.
    pub(super) fn restore(&mut self, object: Arc<Object>, prev: Option<Arc<Object>>, change: Change) {
        let resource = self.resource_mut(object.key.resource());
        let in_history = object.rev > resource.horizon;
        let step = Step::new(change, object, prev);
        if in_history {
            resource.apply(step);
        } else if change != Change::Deleted {
            let object = &step.event.object;
            resource.objects.insert(object.key.clone(), Arc::clone(object));
        }
    }

    /// Sets the lower end of a history at start.
    pub(super) fn restore_horizon(&mut self, resource: &str, horizon: Rev) {
        self.resource_mut(resource).horizon = horizon;
    }
}

impl Step {
    /// One step; `prev` is the state before it.
    pub(super) fn new(change: Change, object: Arc<Object>, prev: Option<Arc<Object>>) -> Self {
        let superseded = prev.as_ref().map_or(0, |p| p.rev);
        // A deletion's event has the last state's content, so the state before isn't kept as well.
        let (prev, bytes) = match change {
            Change::Added => (None, 0),
            Change::Modified => {
                let bytes = prev.as_ref().map_or(0, |p| p.bytes.len());
                (prev, bytes)
            }
            Change::Deleted => (None, object.bytes.len()),
        };
        Self { event: Arc::new(Event { change, object, prev }), superseded, bytes }
    }
}
