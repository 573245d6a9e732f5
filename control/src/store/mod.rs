//! The store: whatever a caller or a watcher has seen is on disk, and a revision never comes
//! back for another write.
//!
//! [`Store`] is the one trait; [`log::LogStore`] implements it over an [`engine::Engine`] (redb).
//! Objects live in memory as the JSON bytes that are served, beside a small index. Bytes carry
//! their own `resourceVersion`: the registry hands over [`Draft`]s with a gap, the writer
//! fills in the revision.

mod cache;
mod draft;
pub mod engine;
pub mod log;
pub mod redb;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::resource::ObjectIndex;

/// A point in the history of the whole store. Never 0 for a write.
pub type Rev = u64;

/// Name of an object in the store: `/registry/<plural[.group]>/<namespace>/<name>`, with an
/// empty namespace for cluster scope. Ordered bytewise.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

const ROOT: &str = "/registry/";

impl Key {
    /// Builds a key; `namespace` is empty for cluster scope.
    pub fn new(resource: &str, namespace: &str, name: &str) -> Self {
        Self(format!("{ROOT}{resource}/{namespace}/{name}").into())
    }

    /// Takes a key read from disk; `None` when it isn't of the form that [`Key::new`] makes.
    pub fn parse(key: &str) -> Option<Self> {
        let rest = key.strip_prefix(ROOT)?;
        (rest.split('/').count() == 3).then(|| Self(key.into()))
    }

    /// The whole key.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `pods`, `deployments.apps`, …
    pub fn resource(&self) -> &str {
        self.part(0)
    }

    /// Namespace, empty for cluster scope.
    pub fn namespace(&self) -> &str {
        self.part(1)
    }

    /// Name of the object.
    pub fn name(&self) -> &str {
        self.part(2)
    }

    fn part(&self, n: usize) -> &str {
        self.0[ROOT.len()..].split('/').nth(n).unwrap_or_default()
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object as it is cached and served.
#[derive(Debug)]
pub struct Object {
    /// Where it lives.
    pub key: Key,
    /// Its `resourceVersion`.
    pub rev: Rev,
    /// The whole object as JSON, `metadata.resourceVersion` included.
    pub bytes: Bytes,
    /// What is looked at without parsing the bytes.
    pub index: ObjectIndex,
    /// Unix time of the write in seconds.
    pub written_secs: u64,
    /// Offset in `bytes` of the digits of `metadata.resourceVersion`.
    rev_at: u32,
}

/// JSON of an object with a gap where the digits of its `resourceVersion` belong.
#[derive(Clone, Debug)]
pub struct Draft {
    bytes: Vec<u8>,
    rev_at: u32,
    index: ObjectIndex,
}

/// What a write expects to find under its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Absent,
    /// The object at exactly this revision.
    Rev(Rev),
    /// Whatever is there.
    Any,
}

/// What a write does.
#[derive(Clone, Debug)]
pub enum Op {
    /// Store this object.
    Put(Draft),
    /// Remove the object.
    Delete,
}

/// One atomic write, refused unless everything that it expects holds.
#[derive(Clone, Debug)]
pub struct Txn {
    /// What is written.
    pub key: Key,
    /// What must be under `key`.
    pub expect: Expect,
    /// The write.
    pub op: Op,
    /// What must hold elsewhere (a namespace that must still be as it was seen).
    pub guards: Vec<(Key, Expect)>,
}

/// Why a write was not done. Nothing of it was.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TxnError {
    /// `key` was not as expected; what is there now.
    #[error("{key:?} is not as expected")]
    Conflict {
        /// The key that failed its expectation: the written one or a guard.
        key: Key,
        /// What is under that key.
        current: Option<Arc<Object>>,
    },
    /// The medium refused; the store goes on and later writes may succeed.
    #[error("{message}")]
    Io {
        /// File of the store.
        path: String,
        /// What the operating system said.
        message: String,
        /// Whether space was the reason.
        full: bool,
    },
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
}

/// How an object changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there before.
    Added,
    /// It was there before.
    Modified,
    /// It is gone.
    Deleted,
}

/// One step of the history.
#[derive(Debug)]
pub struct Event {
    /// What happened.
    pub change: Change,
    /// The new object; for a deletion the last one, with the revision of the deletion.
    pub object: Arc<Object>,
    /// The object before a modification.
    pub prev: Option<Arc<Object>>,
}

impl Event {
    /// Revision at which it happened.
    pub fn rev(&self) -> Rev {
        self.object.rev
    }
}

/// The history that a watcher asked for is no longer complete: list again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too old resource version: {asked} ({oldest})")]
pub struct Expired {
    /// Revision after which events were asked for.
    pub asked: Rev,
    /// Oldest revision that could be asked for.
    pub oldest: Rev,
}

/// Objects of a listing and the revision at which they were exactly these.
pub type Listing = (Vec<Arc<Object>>, Rev);

/// Where objects live. Reads are of what is committed, and see a write once it was acknowledged.
pub trait Store: Send + Sync + 'static {
    /// Writes; resolves once the write is durable and published. The object stored, or the one
    /// removed with the revision of its removal.
    fn write(&self, txn: Txn) -> BoxFuture<'static, Result<Arc<Object>, TxnError>>;
    /// One object.
    fn get(&self, key: &Key) -> Option<Arc<Object>>;
    /// Objects of a resource, of one namespace or all, ordered by key.
    fn list(&self, resource: &str, namespace: Option<&str>) -> Listing;
    /// Objects of a resource as they were at `rev`, which must not be in the future.
    fn list_at(&self, resource: &str, namespace: Option<&str>, rev: Rev)
    -> Result<Vec<Arc<Object>>, Expired>;
    /// Resolves once everything up to `rev` is visible.
    fn reached(&self, rev: Rev) -> BoxFuture<'static, ()>;
    /// Events of a resource after `from`.
    fn watch(&self, resource: &str, namespace: Option<&str>, from: Rev) -> Result<Watch, Expired>;
    /// Revision of the last write that was published.
    fn revision(&self) -> Rev;
}

/// A place in the history of one resource; see [`Store::watch`].
pub struct Watch {
    inner: Box<dyn WatchSource>,
}

impl Watch {
    /// Wraps an engine's source.
    pub fn new(inner: Box<dyn WatchSource>) -> Self {
        Self { inner }
    }

    /// Waits for events and hands over some, in order, never none. Safe to drop and call again.
    pub async fn next(&mut self) -> Result<Vec<Arc<Event>>, Expired> {
        self.inner.next().await
    }

    /// Events that are there now, without waiting; empty when it is up to date with
    /// [`Watch::rev`].
    pub fn poll(&mut self) -> Result<Vec<Arc<Event>>, Expired> {
        self.inner.poll()
    }

    /// Everything up to this revision has been handed over.
    pub fn rev(&self) -> Rev {
        self.inner.rev()
    }
}

/// What stands behind a [`Watch`].
pub trait WatchSource: Send + Sync {
    /// See [`Watch::next`].
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<Arc<Event>>, Expired>>;
    /// See [`Watch::poll`].
    fn poll(&mut self) -> Result<Vec<Arc<Event>>, Expired>;
    /// See [`Watch::rev`].
    fn rev(&self) -> Rev;
}
