//! What the store asks of a medium: a batch of rows is on it whole or not at all, and after a
//! failure the medium can say which of the two it was.

use bytes::Bytes;

use super::{Key, Rev};

/// One step of the history as it is kept. A row stays until it is neither the current state of
/// its key nor part of the history that watchers may ask for.
#[derive(Clone, Debug)]
pub struct Row {
    /// Revision, unique in the store.
    pub rev: Rev,
    /// The object's key.
    pub key: Key,
    /// Unix time in seconds.
    pub written_secs: u64,
    /// The object with the offset of its revision's digits; `None` for a removal.
    pub body: Option<(Bytes, u32)>,
}

/// What a commit changes.
#[derive(Debug, Default)]
pub struct Batch {
    /// Rows to add, ascending.
    pub rows: Vec<Row>,
    /// Revisions of rows to forget.
    pub forget: Vec<Rev>,
    /// New lower ends of histories: resource and the newest revision that was dropped from it.
    pub horizons: Vec<(Box<str>, Rev)>,
    /// Last revision after this batch.
    pub last_rev: Rev,
}

/// What a medium held when it was opened.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Every row, ascending.
    pub rows: Vec<Row>,
    /// Lower ends of histories.
    pub horizons: Vec<(Box<str>, Rev)>,
    /// Last revision that was ever committed.
    pub last_rev: Rev,
}

/// Why the medium failed.
#[derive(Debug, thiserror::Error)]
#[error("{op} {path}")]
pub struct EngineError {
    /// What was tried.
    pub op: &'static str,
    /// The file.
    pub path: String,
    /// Whether space or quota was the reason.
    pub full: bool,
    /// The cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// A durable medium with one user: the writer thread.
pub trait Engine: Send + 'static {
    /// Reads everything, once, before the first commit.
    fn load(&mut self) -> Result<Loaded, EngineError>;
    /// Makes the batch durable. After an error [`Engine::recover`] must be called.
    fn commit(&mut self, batch: &Batch) -> Result<(), EngineError>;
    /// Makes the medium usable again after a failure; gives the last revision that is durable.
    fn recover(&mut self) -> Result<Rev, EngineError>;
}
