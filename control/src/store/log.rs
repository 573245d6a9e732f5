//! The store over an [`Engine`]: one writer thread takes what waits, commits it as one batch,
//! and only then publishes and acknowledges; nobody sees a write that could still be lost.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{oneshot, watch};

use super::cache::{Cache, Resource, Step, Trim};
use super::engine::{Batch, Engine, EngineError, Row};
use super::{
    Change, Event, Expect, Expired, Key, Listing, Object, Op, Rev, Store, Txn, TxnError, Watch, WatchSource,
};
use crate::limits::{
    COMMIT_BYTES_MAX, COMMIT_LINGER_MICROS, COMMIT_OPS_MAX, HISTORY_TRIM_IDLE_STEPS, HISTORY_TRIM_STEPS,
    STORE_TRIM_SECS,
};
use crate::resource::ObjectIndex;

/// Builds the index of an object read back from disk; `None` when the bytes aren't an object of
/// that resource.
pub type Indexer = fn(&Key, &[u8]) -> Option<ObjectIndex>;

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The medium failed.
    #[error("open the store")]
    Engine(#[from] EngineError),
    /// What is on disk isn't what this program wrote.
    #[error("the store holds {key:?} at revision {rev} in a form that can't be read")]
    Row {
        /// The object's key.
        key: Key,
        /// The row.
        rev: Rev,
    },
    /// No thread could be started.
    #[error("start the store's writer")]
    Thread(#[source] std::io::Error),
}

/// Counters since the start, for `/metrics`.
#[derive(Debug, Default)]
pub struct StoreStats {
    /// Commits that succeeded.
    pub commits: AtomicU64,
    /// Writes in them.
    pub writes: AtomicU64,
    /// Commits that failed.
    pub failures: AtomicU64,
    /// Time spent in commits in microseconds.
    pub commit_micros: AtomicU64,
}

type Reply = oneshot::Sender<Result<Arc<Object>, TxnError>>;

/// What a caller gets once the batch is durable.
type Answer = (Reply, Result<Arc<Object>, TxnError>);

struct Request {
    txn: Txn,
    reply: Reply,
}

/// See the module.
pub struct LogStore {
    cache: Arc<RwLock<Cache>>,
    queue: Mutex<Option<Sender<Request>>>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
    stats: Arc<StoreStats>,
    progress: watch::Sender<Rev>,
}

impl LogStore {
    /// Reads everything back and starts the writer.
    pub fn open(mut engine: impl Engine, indexer: Indexer) -> Result<Self, OpenError> {
        let loaded = engine.load()?;
        let mut cache = Cache::default();
        for (resource, horizon) in &loaded.horizons {
            cache.restore_horizon(resource, *horizon);
        }
        for row in loaded.rows {
            restore(&mut cache, row, indexer)?;
        }
        cache.rev = loaded.last_rev;
        let cache = Arc::new(RwLock::new(cache));
        let stats = Arc::new(StoreStats::default());
        let (queue, requests) = channel();
        let progress = watch::Sender::new(loaded.last_rev);
        let writer = Writer {
            engine,
            cache: Arc::clone(&cache),
            stats: Arc::clone(&stats),
            progress: progress.clone(),
            in_doubt: None,
        };
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(&requests))
            .map_err(OpenError::Thread)?;
        Ok(Self { cache, queue: Mutex::new(Some(queue)), writer: Mutex::new(Some(thread)), stats, progress })
    }

    /// Counters since the start.
    pub fn stats(&self) -> &StoreStats {
        &self.stats
    }

    /// Objects and watchers of each resource.
    pub fn counts(&self) -> Vec<(String, usize, usize)> {
        read(&self.cache).counts()
    }

    /// Refuses further writes, finishes those that were accepted and closes the medium.
    pub fn close(&self) {
        drop(lock(&self.queue).take());
        if let Some(thread) = lock(&self.writer).take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

impl Drop for LogStore {
    fn drop(&mut self) {
        self.close();
    }
}

impl Store for LogStore {
    fn write(&self, txn: Txn) -> BoxFuture<'static, Result<Arc<Object>, TxnError>> {
        let (reply, answer) = oneshot::channel();
        let sent = match &*lock(&self.queue) {
            Some(queue) => queue.send(Request { txn, reply }).is_ok(),
            None => false,
        };
        async move {
            if !sent {
                return Err(TxnError::Closed);
            }
            answer.await.unwrap_or(Err(TxnError::Closed))
        }
        .boxed()
    }

    fn get(&self, key: &Key) -> Option<Arc<Object>> {
        read(&self.cache).get(key).cloned()
    }

    fn list(&self, resource: &str, namespace: Option<&str>) -> Listing {
        read(&self.cache).list(resource, namespace)
    }

    fn list_at(
        &self,
        resource: &str,
        namespace: Option<&str>,
        rev: Rev,
    ) -> Result<Vec<Arc<Object>>, Expired> {
        let cache = read(&self.cache);
        match cache.resource(resource) {
            Some(_) => cache.list_at(resource, namespace, rev),
            None => Ok(Vec::new()),
        }
    }

    fn reached(&self, rev: Rev) -> BoxFuture<'static, ()> {
        let mut progress = self.progress.subscribe();
        async move {
            if progress.wait_for(|now| *now >= rev).await.is_err() {
                // The store is closed, so it never will be.
                std::future::pending::<()>().await;
            }
        }
        .boxed()
    }

    fn watch(&self, resource: &str, namespace: Option<&str>, from: Rev) -> Result<Watch, Expired> {
        let subscribe = |r: &Resource| r.check(from).map(|()| r.subscribe());
        let known = read(&self.cache).resource(resource).map(subscribe);
        let wake = match known {
            Some(wake) => wake?,
            None => subscribe(write(&self.cache).resource_mut(resource))?,
        };
        Ok(Watch::new(Box::new(Cursor {
            cache: Arc::clone(&self.cache),
            resource: resource.into(),
            namespace: namespace.map(Into::into),
            rev: from,
            wake,
        })))
    }

    fn revision(&self) -> Rev {
        read(&self.cache).rev
    }
}

/// A watcher pulls from the shared history, so a slow one costs nothing but its own expiry.
struct Cursor {
    cache: Arc<RwLock<Cache>>,
    resource: Box<str>,
    namespace: Option<Box<str>>,
    rev: Rev,
    wake: watch::Receiver<Rev>,
}

impl WatchSource for Cursor {
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<Arc<Event>>, Expired>> {
        async move {
            loop {
                self.wake.borrow_and_update();
                let events = self.poll()?;
                if !events.is_empty() {
                    return Ok(events);
                }
                if self.wake.changed().await.is_err() {
                    // The store is gone; whoever holds a watch is being stopped too.
                    std::future::pending::<()>().await;
                }
            }
        }
        .boxed()
    }

    fn poll(&mut self) -> Result<Vec<Arc<Event>>, Expired> {
        let cache = read(&self.cache);
        let (events, stopped_at) = match cache.resource(&self.resource) {
            Some(resource) => resource.after(self.rev, self.namespace.as_deref())?,
            None => (Vec::new(), None),
        };
        self.rev = stopped_at.unwrap_or(cache.rev).max(self.rev);
        Ok(events)
    }

    fn rev(&self) -> Rev {
        self.rev
    }
}

/// A batch whose fate the medium has not told yet.
struct Prepared {
    batch: Batch,
    steps: Vec<Step>,
    trims: Vec<(Box<str>, Trim)>,
}

struct Writer<E> {
    engine: E,
    cache: Arc<RwLock<Cache>>,
    stats: Arc<StoreStats>,
    progress: watch::Sender<Rev>,
    /// Set from a failed commit until the medium could be opened again.
    in_doubt: Option<Prepared>,
}

impl<E: Engine> Writer<E> {
    fn run(mut self, requests: &Receiver<Request>) {
        let mut expected = 1;
        loop {
            match requests.recv_timeout(Duration::from_secs(STORE_TRIM_SECS)) {
                Ok(first) => {
                    let batch = gather(first, requests, expected);
                    expected = batch.len();
                    self.serve(batch);
                }
                Err(RecvTimeoutError::Timeout) => self.serve(Vec::new()),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn serve(&mut self, requests: Vec<Request>) {
        if self.in_doubt.is_some()
            && let Err(error) = self.recover()
        {
            return refuse(requests.into_iter().map(|r| r.reply), &error);
        }
        let (prepared, replies) = self.prepare(requests);
        let trimmed: usize = prepared.trims.iter().map(|(_, trim)| trim.steps).sum();
        if !prepared.batch.rows.is_empty() || trimmed >= HISTORY_TRIM_STEPS {
            let started = Instant::now();
            let writes = prepared.batch.rows.len() as u64;
            let outcome = match self.engine.commit(&prepared.batch) {
                Ok(()) => {
                    self.publish(prepared);
                    Ok(())
                }
                Err(error) => {
                    self.stats.failures.fetch_add(1, Ordering::Relaxed);
                    self.in_doubt = Some(prepared);
                    match self.recover() {
                        Ok(true) => Ok(()),
                        Ok(false) | Err(_) => Err(error),
                    }
                }
            };
            if let Err(error) = outcome {
                tracing::error!(error = %chain(&error), "commit failed");
                return refuse(replies.into_iter().map(|(reply, _)| reply), &error);
            }
            self.stats.commits.fetch_add(1, Ordering::Relaxed);
            self.stats.writes.fetch_add(writes, Ordering::Relaxed);
            let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.stats.commit_micros.fetch_add(micros, Ordering::Relaxed);
        }
        for (reply, result) in replies {
            // The caller may have gone away; the write stands.
            drop(reply.send(result));
        }
    }

    /// Opens the medium again; whether the batch in doubt turned out to be on it. If so it is
    /// published, for what is on disk and what is seen never differ.
    fn recover(&mut self) -> Result<bool, EngineError> {
        let durable = self.engine.recover()?;
        let Some(prepared) = self.in_doubt.take() else { return Ok(false) };
        if prepared.batch.last_rev > read(&self.cache).rev && durable >= prepared.batch.last_rev {
            self.publish(prepared);
            return Ok(true);
        }
        Ok(false)
    }

    fn publish(&self, prepared: Prepared) {
        let mut touched: Vec<Key> = Vec::new();
        for step in &prepared.steps {
            let key = &step.event.object.key;
            if !touched.iter().any(|t| t.resource() == key.resource()) {
                touched.push(key.clone());
            }
        }
        write(&self.cache).publish(prepared.steps, &prepared.trims, prepared.batch.last_rev);
        let cache = read(&self.cache);
        for key in touched {
            cache.wake(key.resource());
        }
        self.progress.send_replace(cache.rev);
    }

    /// Checks every expectation against what will be there by then, in the order of arrival.
    fn prepare(&self, requests: Vec<Request>) -> (Prepared, Vec<Answer>) {
        let cache = read(&self.cache);
        let now_secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut overlay: HashMap<Key, Option<Arc<Object>>> = HashMap::new();
        let mut rev = cache.rev;
        let mut batch = Batch::default();
        let mut steps = Vec::with_capacity(requests.len());
        let mut replies = Vec::with_capacity(requests.len());
        for Request { txn, reply } in requests {
            let now = |key: &Key| match overlay.get(key) {
                Some(pending) => pending.clone(),
                None => cache.get(key).cloned(),
            };
            let refused = std::iter::once((&txn.key, txn.expect))
                .chain(txn.guards.iter().map(|(key, expect)| (key, *expect)))
                .map(|(key, expect)| (key, expect, now(key)))
                .find(|(_, expect, current)| !holds(*expect, current.as_deref()));
            if let Some((key, _, current)) = refused {
                replies.push((reply, Err(TxnError::Conflict { key: key.clone(), current })));
                continue;
            }
            let prev = now(&txn.key);
            let (change, object) = match (txn.op, &prev) {
                (Op::Delete, None) => {
                    replies.push((reply, Err(TxnError::Conflict { key: txn.key, current: None })));
                    continue;
                }
                (Op::Delete, Some(prev)) => (Change::Deleted, prev.at_rev(rev + 1, now_secs)),
                (Op::Put(draft), prev) => {
                    let change = if prev.is_some() { Change::Modified } else { Change::Added };
                    (change, draft.finish(txn.key.clone(), rev + 1, now_secs))
                }
            };
            rev += 1;
            let object = Arc::new(object);
            let deleted = change == Change::Deleted;
            batch.rows.push(Row {
                rev,
                key: txn.key.clone(),
                written_secs: now_secs,
                body: (!deleted).then(|| (object.bytes.clone(), object.rev_at())),
            });
            overlay.insert(txn.key, (!deleted).then(|| Arc::clone(&object)));
            steps.push(Step::new(change, Arc::clone(&object), prev));
            replies.push((reply, Ok(object)));
        }
        batch.last_rev = rev;
        let trims = plan_trims(&cache, &steps, &mut batch, now_secs);
        (Prepared { batch, steps, trims }, replies)
    }
}

/// Trims the histories that the batch touches, or all of them when it is empty.
fn plan_trims(cache: &Cache, steps: &[Step], batch: &mut Batch, now_secs: u64) -> Vec<(Box<str>, Trim)> {
    let mut trims = Vec::new();
    for name in cache.names() {
        let coming = steps.iter().filter(|s| s.event.object.key.resource() == name).count();
        let Some(resource) = cache.resource(name) else { continue };
        if coming == 0 && !steps.is_empty() {
            continue;
        }
        let max = if steps.is_empty() { HISTORY_TRIM_IDLE_STEPS } else { HISTORY_TRIM_STEPS + 2 * coming };
        let trim = resource.plan_trim(now_secs, coming, max);
        if trim.steps > 0 {
            batch.forget.extend(&trim.rows);
            batch.horizons.push((name.into(), trim.horizon));
            trims.push((name.into(), trim));
        }
    }
    trims
}

fn holds(expect: Expect, current: Option<&Object>) -> bool {
    match (expect, current) {
        (Expect::Any, _) | (Expect::Absent, None) => true,
        (Expect::Rev(rev), Some(object)) => object.rev == rev,
        (Expect::Absent, Some(_)) | (Expect::Rev(_), None) => false,
    }
}

/// Takes what waits. As long as fewer are there than were in the batch before, the others are on
/// their way most likely: waiting for them a moment is cheaper than a commit for each half of them.
fn gather(first: Request, requests: &Receiver<Request>, expected: usize) -> Vec<Request> {
    let size = |request: &Request| match &request.txn.op {
        Op::Put(draft) => draft.len(),
        Op::Delete => 0,
    };
    let deadline = Instant::now() + Duration::from_micros(COMMIT_LINGER_MICROS);
    let mut bytes = size(&first);
    let mut batch = vec![first];
    while batch.len() < COMMIT_OPS_MAX && bytes < COMMIT_BYTES_MAX {
        let request = match requests.try_recv() {
            Ok(request) => request,
            Err(_) if batch.len() < expected => {
                let left = deadline.saturating_duration_since(Instant::now());
                match requests.recv_timeout(left) {
                    Ok(request) => request,
                    Err(_) => break,
                }
            }
            Err(_) => break,
        };
        bytes += size(&request);
        batch.push(request);
    }
    batch
}

fn refuse(replies: impl Iterator<Item = Reply>, error: &EngineError) {
    for reply in replies {
        let io = TxnError::Io { path: error.path.clone(), message: chain(error), full: error.full };
        // The caller may have gone away.
        drop(reply.send(Err(io)));
    }
}

fn chain(error: &EngineError) -> String {
    format!("{error}: {}", error.source)
}

fn restore(cache: &mut Cache, row: Row, indexer: Indexer) -> Result<(), OpenError> {
    let unreadable = || OpenError::Row { key: row.key.clone(), rev: row.rev };
    let prev = cache.get(&row.key).cloned();
    match &row.body {
        Some((bytes, rev_at)) => {
            let index = indexer(&row.key, bytes).ok_or_else(unreadable)?;
            let key = row.key.clone();
            let object = Object::from_parts(key, row.rev, bytes.clone(), index, row.written_secs, *rev_at)
                .ok_or_else(unreadable)?;
            let change = if prev.is_some() { Change::Modified } else { Change::Added };
            cache.restore(object, prev, change);
        }
        None => {
            let last = prev.ok_or_else(unreadable)?;
            let object = Arc::new(last.at_rev(row.rev, row.written_secs));
            cache.restore(object, Some(last), Change::Deleted);
        }
    }
    Ok(())
}

// A panic while one of these is held would be a defect of this module; the data behind them is
// replaced as a whole or not at all, so going on is right.
fn read(cache: &RwLock<Cache>) -> RwLockReadGuard<'_, Cache> {
    cache.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(cache: &RwLock<Cache>) -> RwLockWriteGuard<'_, Cache> {
    cache.write().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
