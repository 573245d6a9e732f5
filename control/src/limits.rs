//! Every bound and timeout of the control plane in one place, units last.

/// Operations that one commit of the store takes at most.
pub const COMMIT_OPS_MAX: usize = 512;
/// Object bytes that one commit of the store takes at most (one object may always exceed it).
pub const COMMIT_BYTES_MAX: usize = 8 << 20;
/// Writes that may wait for the store's writer before callers wait themselves.
pub const COMMIT_QUEUE_OPS: usize = 4096;
/// Largest object that is stored, in bytes of JSON.
pub const OBJECT_BYTES_MAX: usize = 1_500_000;
/// Memory that redb may use to cache pages; objects are cached by us, so this is small.
pub const REDB_CACHE_BYTES: usize = 16 << 20;
/// How long an event stays in the history of its resource, so that a watcher may resume from it.
pub const HISTORY_AGE_MIN_SECS: u64 = 90;
/// Events kept in a resource's history however old they are.
pub const HISTORY_EVENTS_MIN: usize = 200;
/// Events that a resource's history holds at most, however young they are.
pub const HISTORY_EVENTS_MAX: usize = 100_000;
/// Bytes of superseded objects that a resource's history holds at most, however young they are.
pub const HISTORY_BYTES_MAX: usize = 32 << 20;
/// Events handed to a watcher at once.
pub const WATCH_BATCH_EVENTS: usize = 256;
/// Steps of a resource's history that one commit forgets at most, beside two for each write.
pub const HISTORY_TRIM_STEPS: usize = 128;
/// Steps of a resource's history that an idle store forgets at once.
pub const HISTORY_TRIM_IDLE_STEPS: usize = 8192;
/// How often an idle store looks for history to forget.
pub const STORE_TRIM_SECS: u64 = 30;
/// Names that are tried for a `generateName` before the create fails.
pub const GENERATE_NAME_TRIES: usize = 8;
/// Attempts at a write whose object changes between the look at it and the commit.
pub const WRITE_TRIES: usize = 64;
