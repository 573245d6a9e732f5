//! Events about pods and the node. They are told in the background and never hold anything up: repeats
//! are counted on one object, each involved object has a budget, and what can't be told is counted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::client::{Client, chain};
use crate::limits;
use crate::pod::machine::Note;
use crate::pod::status::rfc3339;

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Subject {
    /// `Pod` or `Node`.
    pub kind: &'static str,
    /// Empty for nodes.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; for nodes the name, as kubectl expects it.
    pub uid: String,
}

impl Subject {
    /// The node of that name.
    pub fn node(name: &str) -> Self {
        Subject { kind: "Node", namespace: String::new(), name: name.to_owned(), uid: name.to_owned() }
    }
}

#[derive(Debug)]
struct Told {
    subject: Subject,
    note: Note,
    field_path: Option<String>,
}

/// Where events are handed in; cheap to clone.
#[derive(Debug, Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Told>,
    dropped: Arc<AtomicU64>,
}

impl Recorder {
    /// A recorder and the task that tells what is handed in, until `shutdown`.
    pub fn start(
        client: Client,
        node_name: String,
        shutdown: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, told) = mpsc::channel(limits::EVENTS_QUEUED_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        (Recorder { queue, dropped }, tell(client, node_name, told, shutdown))
    }

    /// Hands in one event.
    pub fn record(&self, subject: Subject, note: Note, init_container: bool) {
        let list = if init_container { "spec.initContainers" } else { "spec.containers" };
        let field_path = note.container.as_ref().map(|name| format!("{list}{{{name}}}"));
        if self.queue.try_send(Told { subject, note, field_path }).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Events that were not told because too many waited.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// What to do with one event.
#[derive(Debug, PartialEq)]
enum Telling {
    Create { name: String },
    Count { name: String, count: u64 },
    Withhold,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    subject: Subject,
    reason: &'static str,
    message: String,
    field_path: Option<String>,
}

#[derive(Debug)]
struct Seen {
    name: String,
    count: u64,
    at: Instant,
}

#[derive(Debug)]
struct Budget {
    left: f64,
    at: Instant,
}

/// Repeats and budgets.
#[derive(Debug, Default)]
struct Ledger {
    seen: HashMap<Key, Seen>,
    budgets: HashMap<Subject, Budget>,
    serial: u64,
}

impl Ledger {
    fn telling(&mut self, key: Key, now: Instant, now_ms: i64) -> Telling {
        let burst = f64::from(limits::EVENTS_BURST_PER_OBJECT);
        let budget = self.budgets.entry(key.subject.clone()).or_insert(Budget { left: burst, at: now });
        let refill =
            now.duration_since(budget.at).as_secs_f64() / limits::secs(limits::EVENT_REFILL_S).as_secs_f64();
        budget.left = (budget.left + refill).min(burst);
        budget.at = now;
        if budget.left < 1.0 {
            return Telling::Withhold;
        }
        budget.left -= 1.0;
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.count += 1;
            seen.at = now;
            return Telling::Count { name: seen.name.clone(), count: seen.count };
        }
        self.forget_oldest();
        self.serial += 1;
        let name = format!("{}.{:x}{:04x}", key.subject.name, now_ms, self.serial & 0xffff);
        self.seen.insert(key, Seen { name: name.clone(), count: 1, at: now });
        Telling::Create { name }
    }

    fn forget_oldest(&mut self) {
        if self.seen.len() < limits::EVENTS_REMEMBERED_MAX {
            return;
        }
        let mut ages: Vec<Instant> = self.seen.values().map(|seen| seen.at).collect();
        ages.sort_unstable();
        let middle = ages[ages.len() / 2];
        self.seen.retain(|_, seen| seen.at > middle);
        self.budgets.retain(|_, budget| budget.at > middle);
    }
}

async fn tell(
    client: Client,
    node_name: String,
    mut told: mpsc::Receiver<Told>,
    shutdown: CancellationToken,
) {
    let mut ledger = Ledger::default();
    loop {
        let next = tokio::select! {
            next = told.recv() => next,
            () = shutdown.cancelled() => return,
        };
        let Some(told) = next else { return };
        let key = Key {
            subject: told.subject.clone(),
            reason: told.note.reason,
            message: told.note.message.clone(),
            field_path: told.field_path.clone(),
        };
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let namespace = match told.subject.namespace.as_str() {
            "" => "default",
            namespace => namespace,
        };
        let path = format!("/api/v1/namespaces/{namespace}/events");
        let result = match ledger.telling(key.clone(), Instant::now(), now_ms) {
            Telling::Withhold => continue,
            Telling::Create { name } => {
                client.create(&path, &event(&told, &name, namespace, &node_name, now_ms)).await
            }
            Telling::Count { name, count } => {
                let patch = json!({"count": count, "lastTimestamp": rfc3339(now_ms)});
                client.merge(&format!("{path}/{name}"), &patch).await
            }
        };
        if let Err(error) = result {
            ledger.seen.remove(&key);
            tracing::debug!(error = chain(&error), reason = told.note.reason, "an event was not told");
        }
    }
}

fn event(told: &Told, name: &str, namespace: &str, node_name: &str, now_ms: i64) -> Value {
    let mut involved = json!({"kind": told.subject.kind, "apiVersion": "v1", "name": told.subject.name,
        "uid": told.subject.uid});
    if !told.subject.namespace.is_empty() {
        involved["namespace"] = json!(told.subject.namespace);
    }
    if let Some(path) = &told.field_path {
        involved["fieldPath"] = json!(path);
    }
    let at = rfc3339(now_ms);
    json!({"apiVersion": "v1", "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": involved,
        "type": if told.note.warning { "Warning" } else { "Normal" },
        "reason": told.note.reason, "message": told.note.message,
        "source": {"component": "sheave-agent", "host": node_name},
        "reportingComponent": "sheave-agent", "reportingInstance": node_name,
        "firstTimestamp": at, "lastTimestamp": at, "count": 1})
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn key(pod: &str, message: &str) -> Key {
        let subject =
            Subject { kind: "Pod", namespace: "n".into(), name: pod.into(), uid: format!("uid-{pod}") };
        Key { subject, reason: "Failed", message: message.into(), field_path: None }
    }

    #[test]
    fn repeats_are_counted_on_one_object() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        let Telling::Create { name } = ledger.telling(key("a", "m"), now, 1) else { panic!("made first") };
        assert_eq!(ledger.telling(key("a", "m"), now, 2), Telling::Count { name, count: 2 });
        assert!(matches!(ledger.telling(key("a", "other"), now, 3), Telling::Create { .. }));
        assert!(matches!(ledger.telling(key("b", "m"), now, 3), Telling::Create { .. }));
    }

    #[test]
    fn an_object_has_a_budget_that_comes_back() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        for i in 0..limits::EVENTS_BURST_PER_OBJECT {
            assert_ne!(ledger.telling(key("a", &i.to_string()), now, 1), Telling::Withhold);
        }
        assert_eq!(ledger.telling(key("a", "x"), now, 1), Telling::Withhold);
        assert_ne!(ledger.telling(key("b", "x"), now, 1), Telling::Withhold);
        let later = now + Duration::from_secs(limits::EVENT_REFILL_S + 1);
        assert_ne!(ledger.telling(key("a", "x"), later, 1), Telling::Withhold);
        assert_eq!(ledger.telling(key("a", "y"), later, 1), Telling::Withhold);
    }

    #[test]
    fn memory_is_bounded() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        for i in 0..5000_u64 {
            ledger.telling(key(&format!("p{i}"), "m"), now + Duration::from_millis(i), 1);
        }
        assert!(ledger.seen.len() <= limits::EVENTS_REMEMBERED_MAX);
        assert!(ledger.budgets.len() <= 2 * limits::EVENTS_REMEMBERED_MAX);
    }

    #[test]
    fn an_event_names_what_it_is_about() {
        let subject = key("a", "m").subject;
        let note =
            Note { warning: true, reason: "BackOff", message: "m".into(), container: Some("c".into()) };
        let told = Told { subject, note, field_path: Some("spec.containers{c}".into()) };
        let event = event(&told, "a.1", "n", "node", 1_700_000_000_000);
        assert_eq!(event["involvedObject"]["uid"], "uid-a");
        assert_eq!(event["involvedObject"]["fieldPath"], "spec.containers{c}");
        assert_eq!((event["type"].as_str(), event["count"].as_u64()), (Some("Warning"), Some(1)));
    }
}
