//! The agent's end of one pod's socket: a task that sends calls, matches answers, keeps the records and
//! passes events on. Invariant: a record changes before the event about it is sent, and a lost connection
//! to a living shim is made again without losing an event.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::error::{Result, RuntimeError};
use super::launch;
use super::layout::Layout;
use super::protocol::{
    Answer, Call, Event, Fault, Message, Request, Snapshot, VERSION, decode, encode, names,
};
use super::record::{PodRecord, PodState, RuntimeEvent};
use super::spec::SandboxSpec;
use crate::limits::{SANDBOX_START_TIMEOUT_MS, SHIM_ANSWER_TIMEOUT_MS};

type Reply = std::result::Result<Box<Answer>, Fault>;
type CallSlot = (Request, oneshot::Sender<Reply>);

/// A pod that this agent knows.
#[derive(Debug)]
pub(super) struct Pod {
    record: Mutex<PodRecord>,
    calls: mpsc::UnboundedSender<CallSlot>,
}

impl Pod {
    /// A pod whose shim is dead.
    pub(super) fn dead(record: PodRecord) -> Arc<Pod> {
        let (calls, _) = mpsc::unbounded_channel();
        Arc::new(Pod { record: Mutex::new(record), calls })
    }

    /// Connects to a pod's living shim and learns what it knows.
    pub(super) async fn connect(
        layout: Arc<Layout>,
        uid: &str,
        events: mpsc::UnboundedSender<RuntimeEvent>,
    ) -> Result<Arc<Pod>> {
        let (wire, snapshot) =
            within(uid, "connecting", SHIM_ANSWER_TIMEOUT_MS, Wire::open(&layout, uid, None)).await?;
        let state = if snapshot.init_pid == 0 { PodState::Dead } else { PodState::Ready };
        let record = PodRecord {
            spec: snapshot.spec,
            init_pid: snapshot.init_pid,
            state,
            containers: snapshot.containers,
        };
        let (calls, slots) = mpsc::unbounded_channel();
        let pod = Arc::new(Pod { record: Mutex::new(record), calls });
        let link = Link {
            layout,
            uid: uid.to_owned(),
            pod: Arc::downgrade(&pod),
            events,
            seq: snapshot.seq,
            next_id: 1,
            pending: HashMap::new(),
        };
        tokio::spawn(link.run(wire, slots));
        Ok(pod)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, PodRecord> {
        // A record is replaced field by field with whole values; it is usable after a panic elsewhere.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn spec(&self) -> SandboxSpec {
        self.lock().spec.clone()
    }

    /// Asks the shim and waits for the answer.
    pub(super) async fn call(
        &self,
        uid: &str,
        op: &'static str,
        timeout_ms: u64,
        request: Request,
    ) -> Result<Answer> {
        let gone = || RuntimeError::ShimGone { uid: uid.to_owned() };
        let (sender, receiver) = oneshot::channel();
        self.calls.send((request, sender)).map_err(|_| gone())?;
        let answer = within(uid, op, timeout_ms, async { receiver.await.map_err(|_| gone()) }).await?;
        answer.map(|answer| *answer).map_err(|fault| launch::fault_error(uid, fault))
    }
}

async fn within<T>(
    uid: &str,
    op: &'static str,
    timeout_ms: u64,
    future: impl Future<Output = Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(Duration::from_millis(timeout_ms), future).await {
        Ok(result) => result,
        Err(_) => Err(RuntimeError::Timeout { uid: uid.to_owned(), op, timeout_ms }),
    }
}

/// A connection and what came over it but was not decoded.
struct Wire {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Wire {
    /// Connects through a descriptor of the directory: the path may be longer than a socket address.
    async fn open(layout: &Layout, uid: &str, after: Option<u64>) -> Result<(Wire, Snapshot)> {
        let path = layout.pod(uid).join(names::SOCKET);
        let failed = |e| launch::io_error("connect to", &path, e);
        let dir = std::fs::File::open(layout.pod(uid)).map_err(failed)?;
        let short = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), names::SOCKET);
        let stream = UnixStream::connect(Path::new(&short)).await.map_err(failed)?;
        let mut wire = Wire { stream, received: Vec::new() };
        wire.send(0, Request::Hello { after }).await.map_err(failed)?;
        match wire.next().await.map_err(failed)? {
            Message::Answer { result: Ok(answer), .. } => match *answer {
                Answer::Hello(snapshot) if snapshot.version == VERSION => Ok((wire, snapshot)),
                other => Err(RuntimeError::Protocol {
                    uid: uid.to_owned(),
                    what: format!("expected a greeting of version {VERSION}, got {other:?}"),
                }),
            },
            other => Err(RuntimeError::Protocol {
                uid: uid.to_owned(),
                what: format!("expected a greeting, got {other:?}"),
            }),
        }
    }

    async fn send(&mut self, id: u64, request: Request) -> std::io::Result<()> {
        self.stream.write_all(&encode(&Call { id, request })?).await
    }

    /// The next message. Loses nothing when dropped halfway.
    async fn next(&mut self) -> std::io::Result<Message> {
        loop {
            if let Some(message) = decode(&mut self.received)? {
                return Ok(message);
            }
            if self.received.is_empty() {
                self.received = Vec::new();
            }
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// The task of one pod.
struct Link {
    layout: Arc<Layout>,
    uid: String,
    pod: std::sync::Weak<Pod>,
    events: mpsc::UnboundedSender<RuntimeEvent>,
    /// Last event that was seen.
    seq: u64,
    next_id: u64,
    pending: HashMap<u64, oneshot::Sender<Reply>>,
}

impl Link {
    async fn run(mut self, mut wire: Wire, mut slots: mpsc::UnboundedReceiver<CallSlot>) {
        loop {
            let error = match self.serve(&mut wire, &mut slots).await {
                Ok(()) => return,
                Err(error) => error,
            };
            // Whoever waits learns that the shim is gone; what it was asked may or may not have happened.
            self.pending.clear();
            match self.reconnect().await {
                Some(new) => {
                    tracing::warn!(pod = self.uid, %error, "connection to the shim lost and made again");
                    wire = new;
                }
                None => return self.bury().await,
            }
        }
    }

    /// Serves one connection; `Ok` once nobody holds the pod anymore.
    async fn serve(
        &mut self,
        wire: &mut Wire,
        slots: &mut mpsc::UnboundedReceiver<CallSlot>,
    ) -> std::io::Result<()> {
        loop {
            tokio::select! {
                slot = slots.recv() => {
                    let Some((request, reply)) = slot else { return Ok(()) };
                    let id = self.next_id;
                    self.next_id += 1;
                    self.pending.retain(|_, waiting| !waiting.is_closed());
                    self.pending.insert(id, reply);
                    wire.send(id, request).await?;
                }
                message = wire.next() => self.message(message?),
            }
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Answer { id, result } => {
                if let (Ok(Answer::Container(record)), Some(pod)) = (result.as_deref(), self.pod.upgrade()) {
                    let mut pod = pod.lock();
                    match pod.containers.iter_mut().find(|c| c.name == record.name) {
                        Some(old) => old.clone_from(record),
                        None => pod.containers.push(record.clone()),
                    }
                }
                if let Some(reply) = self.pending.remove(&id)
                    && reply.send(result).is_err()
                {
                    tracing::debug!(pod = self.uid, "an answer came after its time");
                }
            }
            Message::Event { seq, event } => {
                if seq > self.seq {
                    self.seq = seq;
                    self.event(event);
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        let Some(pod) = self.pod.upgrade() else { return };
        let uid = self.uid.clone();
        let event = match event {
            Event::Exited { name, attempt, exit } => {
                let mut record = pod.lock();
                let run = record.containers.iter_mut().find(|c| c.name == name && c.attempt == attempt);
                if let Some(run) = run {
                    run.pid = 0;
                    run.exit = Some(exit.clone());
                }
                RuntimeEvent::ContainerExited { uid, name, attempt, exit }
            }
            Event::HolderDied => {
                let mut record = pod.lock();
                record.state = PodState::Dead;
                record.init_pid = 0;
                RuntimeEvent::SandboxDied { uid }
            }
        };
        self.publish(event);
    }

    fn publish(&self, event: RuntimeEvent) {
        if self.events.send(event).is_err() {
            tracing::debug!(pod = self.uid, "nobody listens to events");
        }
    }

    async fn reconnect(&mut self) -> Option<Wire> {
        let mut wait = Duration::from_millis(1);
        loop {
            if !is_alive(&self.layout, &self.uid).await {
                return None;
            }
            let opened = Wire::open(&self.layout, &self.uid, Some(self.seq));
            match within(&self.uid, "connecting", SHIM_ANSWER_TIMEOUT_MS, opened).await {
                Ok((wire, snapshot)) => {
                    // Starts whose answer was lost.
                    if let Some(pod) = self.pod.upgrade() {
                        merge(&mut pod.lock(), snapshot);
                    }
                    return Some(wire);
                }
                Err(error) => tracing::debug!(pod = self.uid, %error, "connecting again"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(1));
        }
    }

    /// The shim is dead: what it looked after is killed, and its containers have ended.
    async fn bury(self) {
        let Some(pod) = self.pod.upgrade() else { return };
        let (layout, uid) = (self.layout.clone(), self.uid.clone());
        let killed = tokio::task::spawn_blocking(move || launch::kill_processes(&layout, &uid)).await;
        match killed {
            Ok(Err(error)) => tracing::warn!(pod = self.uid, %error, "killing what a dead shim left"),
            Err(error) => tracing::warn!(pod = self.uid, %error, "killing what a dead shim left"),
            Ok(Ok(())) => {}
        }
        let (layout, uid) = (self.layout.clone(), self.uid.clone());
        let found = tokio::task::spawn_blocking(move || launch::autopsy(&layout, &uid)).await;
        {
            let mut record = pod.lock();
            if let Ok(Ok(Some((_, containers)))) = found {
                record.containers = containers;
            }
            for container in record.containers.iter_mut().filter(|c| c.exit.is_none()) {
                container.pid = 0;
                container.exit = Some(launch::lost());
            }
            if record.state == PodState::Dead {
                return;
            }
            record.state = PodState::Dead;
            record.init_pid = 0;
        }
        self.publish(RuntimeEvent::SandboxDied { uid: self.uid.clone() });
    }
}

/// Takes over runs that a snapshot knows and the record does not; exits arrive as events.
fn merge(record: &mut PodRecord, snapshot: Snapshot) {
    for new in snapshot.containers {
        match record.containers.iter_mut().find(|c| c.name == new.name) {
            Some(old) if old.attempt < new.attempt => *old = new,
            Some(_) => {}
            None => record.containers.push(new),
        }
    }
}

async fn is_alive(layout: &Arc<Layout>, uid: &str) -> bool {
    let (layout, uid) = (layout.clone(), uid.to_owned());
    let asked = tokio::task::spawn_blocking(move || launch::shim_pid(&layout, &uid)).await;
    matches!(asked, Ok(Ok(Some(_))))
}

/// Waits until a shim that may still be starting can be connected to; false if there is none.
pub(super) async fn wait_ready(layout: &Arc<Layout>, uid: &str) -> bool {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(SANDBOX_START_TIMEOUT_MS);
    while tokio::time::Instant::now() < deadline {
        if !is_alive(layout, uid).await {
            return false;
        }
        if layout.pod(uid).join(names::SOCKET).exists() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    false
}
