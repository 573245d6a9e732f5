//! Every bound and timeout of the control plane in one place, units last.

/// Operations that one commit of the store takes at most.
pub const COMMIT_OPS_MAX: usize = 512;
/// Object bytes that one commit of the store takes at most (one object may always exceed it).
pub const COMMIT_BYTES_MAX: usize = 8 << 20;
/// How long a commit waits for writers that were there at the last one.
pub const COMMIT_LINGER_MICROS: u64 = 1_000;
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
/// Objects of a collection that are deleted at the same time, so that they share commits.
pub const COLLECTION_WRITES_AT_ONCE: usize = 64;
/// Attempts at a write whose object changes between the look at it and the commit.
pub const WRITE_TRIES: usize = 64;
/// How long a read waits for a revision that the store has not reached.
pub const FUTURE_REV_WAIT_MS: u64 = 3_000;
/// Largest request body in bytes.
pub const BODY_BYTES_MAX: usize = 3 << 20;
/// Bytes of a body that is too large anyway that are still read, so that its client sees the answer.
pub const BODY_DRAIN_BYTES_MAX: usize = 64 << 20;
/// Reads answered at the same time, watches left out; more are turned away with 429.
pub const READS_IN_FLIGHT_MAX: usize = 400;
/// Writes answered at the same time; more are turned away with 429.
pub const WRITES_IN_FLIGHT_MAX: usize = 400;
/// Open connections; more wait to be accepted.
pub const CONNECTIONS_MAX: usize = 4096;
/// How long a client may take for the TLS handshake.
pub const HANDSHAKE_TIMEOUT_MS: u64 = 10_000;
/// How long a client may take to send the head of a request.
pub const REQUEST_HEAD_TIMEOUT_MS: u64 = 30_000;
/// How long a request other than a watch or a log may take.
pub const REQUEST_TIMEOUT_MS: u64 = 60_000;
/// How long a client may refuse to take bytes before its connection is closed.
pub const STALLED_WRITE_TIMEOUT_MS: u64 = 60_000;
/// How long a stop waits for requests to end.
pub const DRAIN_TIMEOUT_MS: u64 = 5_000;
/// Requests that one HTTP/2 connection may carry at once.
pub const H2_STREAMS_MAX: u32 = 1_000;
/// Size of a piece of a streamed body in bytes.
pub const PIECE_BYTES: usize = 64 << 10;
/// Shortest time that a watch lasts when the client names none; the longest is twice that.
pub const WATCH_TIMEOUT_MIN_SECS: u64 = 1_800;
/// Longest time between bookmarks of a watch that wants them.
pub const BOOKMARK_SECS: u64 = 60;
/// How long a connection to an agent may take.
pub const AGENT_CONNECT_TIMEOUT_MS: u64 = 5_000;
/// How long events are kept after the last write to them.
pub const EVENT_TTL_SECS: u64 = 3_600;
/// How often expired events are looked for.
pub const EVENT_SWEEP_SECS: u64 = 60;
/// Pods that one look at a ReplicaSet creates or deletes at most.
pub const REPLICA_BURST_MAX: usize = 500;
/// Endpoints in one EndpointSlice at most.
pub const ENDPOINTS_PER_SLICE_MAX: usize = 100;
/// Objects of a Namespace that is being deleted, deleted at once.
pub const NAMESPACE_DELETE_BURST_MAX: usize = 256;
/// A node that has not renewed its Lease for so long is taken for unreachable.
pub const NODE_GRACE_SECS: u64 = 40;
/// How long a pod stays on a node that is not ready or unreachable, if it does not say so itself.
pub const POD_EVICTION_DEFAULT_SECS: i64 = 300;
/// How long a Node has to be missing until its pods are taken for lost.
pub const NODE_MISSING_SECS: u64 = 40;
/// Shortest wait before a controller tries again what went wrong; it doubles with each failure.
pub const RETRY_MIN_MS: u64 = 10;
/// Longest wait before a controller tries again what went wrong.
pub const RETRY_MAX_MS: u64 = 30_000;
/// Keys that the controllers work on at a time.
pub const CONTROLLER_WORK_MAX: usize = 128;
/// Wait before the controllers or the scheduler list everything again after they missed events.
pub const DRIVER_RESTART_MS: u64 = 500;
/// Bindings of pods that are under way at a time.
pub const BINDINGS_MAX: usize = 256;
/// Pods that the scheduler places before it looks at events again.
pub const PLACEMENTS_AT_ONCE_MAX: usize = 64;
