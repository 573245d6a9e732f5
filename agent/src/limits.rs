//! Every bound and timeout of the agent, units last. Nothing outside this file hides a number that
//! an operator could run into.
use std::time::Duration;

/// Pods that one node can be configured for.
pub const PODS_PER_NODE_MAX: u32 = 1024;
/// How often the Lease in `kube-node-lease` is renewed.
pub const LEASE_RENEW_PERIOD_S: u64 = 10;
/// `spec.leaseDurationSeconds` of that Lease.
pub const LEASE_DURATION_S: i32 = 40;
/// A Node whose conditions did not change is still reported after this long.
pub const NODE_STATUS_PERIOD_S: u64 = 300;
/// How often the pressure conditions are looked at.
pub const NODE_PRESSURE_PERIOD_S: u64 = 10;
/// Slow pass over every pod that repairs what an event was lost for.
pub const POD_RESYNC_PERIOD_S: u64 = 60;
/// First pause after a container failed.
pub const RESTART_BACKOFF_FIRST_S: u64 = 10;
/// Longest pause after a container failed.
pub const RESTART_BACKOFF_MAX_S: u64 = 300;
/// A container that ran this long starts again without history.
pub const RESTART_BACKOFF_RESET_S: u64 = 600;
/// Pause after a sandbox, its network, a volume, an image or a configuration could not be had; doubles up to
/// [`PREPARE_BACKOFF_MAX_S`].
pub const PREPARE_BACKOFF_FIRST_S: u64 = 1;
/// Longest pause between two such tries. Short, because nothing tells the agent that an image was
/// imported or a ConfigMap made.
pub const PREPARE_BACKOFF_MAX_S: u64 = 30;
/// What a container gets between TERM and KILL at least, however it is deleted.
pub const STOP_GRACE_MIN_S: u64 = 2;
/// How long pods that failed or vanished wait for their last status to be accepted.
pub const API_RETRY_FIRST_MS: u64 = 100;
/// Longest pause between two tries of one API request.
pub const API_RETRY_MAX_S: u64 = 10;
/// One API request that is not a watch.
pub const API_REQUEST_TIMEOUT_S: u64 = 10;
/// Read from a probe's http response at most.
pub const PROBE_BODY_BYTES_MAX: usize = 10 * 1024;
/// Probes in flight on one node.
pub const PROBES_IN_FLIGHT_MAX: usize = 64;
/// Length of a probe's or hook's output in an event.
pub const PROBE_OUTPUT_BYTES_MAX: usize = 1024;
/// Pods that are brought up at the same time.
pub const POD_STARTS_IN_FLIGHT_MAX: usize = 16;
/// Distinct events remembered for counting repeats.
pub const EVENTS_REMEMBERED_MAX: usize = 1024;
/// Events that one object may emit at once.
pub const EVENTS_BURST_PER_OBJECT: u32 = 25;
/// Pause after which an object with a used-up burst may emit another event.
pub const EVENT_REFILL_S: u64 = 300;
/// Events waiting to be sent; more are dropped and counted.
pub const EVENTS_QUEUED_MAX: usize = 1024;
/// Bytes of a container's termination message.
pub const TERMINATION_MESSAGE_BYTES_MAX: usize = 4096;
/// Bytes of log used where a termination message falls back to it.
pub const TERMINATION_LOG_BYTES_MAX: usize = 2048;
/// Lines of log used where a termination message falls back to it.
pub const TERMINATION_LOG_LINES_MAX: usize = 80;
/// Connections to the https listener at once.
pub const SERVER_CONNECTIONS_MAX: usize = 256;
/// TLS handshake and request head of one connection.
pub const SERVER_HANDSHAKE_TIMEOUT_S: u64 = 10;

/// Bytes of a log record's text; longer lines come in pieces.
pub const LOG_LINE_BYTES_MAX: usize = 16 * 1024;
/// A container's log file is rotated beyond this.
pub const LOG_FILE_BYTES_MAX: u64 = 10 * 1024 * 1024;
/// Log files of one run of a container, the current one included.
pub const LOG_FILES_MAX: usize = 5;
/// From the request until a container's program is executed.
pub const CONTAINER_START_TIMEOUT_MS: u64 = 60_000;
/// How long output is waited for after a container or an exec ended.
pub const OUTPUT_DRAIN_TIMEOUT_MS: u64 = 1_000;
/// From the end of a pod until its last process is gone.
pub const POD_KILL_TIMEOUT_MS: u64 = 10_000;
/// From starting a shim until its sandbox is up.
pub const SANDBOX_START_TIMEOUT_MS: u64 = 30_000;
/// How long a starting agent waits for the lock of one that was just killed.
pub const RUNTIME_LOCK_TIMEOUT_MS: u64 = 2_000;
/// Answer of a shim to a request that makes it wait for nothing.
pub const SHIM_ANSWER_TIMEOUT_MS: u64 = 10_000;
/// Size of a pod's `/dev/shm`.
pub const POD_SHM_BYTES: u64 = 64 * 1024 * 1024;
/// Events that a shim keeps for an agent that comes back.
pub const SHIM_EVENTS_KEPT_MAX: usize = 256;
/// Connections that a shim serves at once.
pub const SHIM_CONNECTIONS_MAX: usize = 8;
/// Commands run in one pod at once.
pub const EXECS_PER_POD_MAX: usize = 64;
/// Output of an exec that is kept; the rest is read and thrown away.
pub const EXEC_OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// A number of whole seconds from this file as a [`Duration`].
pub const fn secs(s: u64) -> Duration {
    Duration::from_secs(s)
}
/// A number of whole milliseconds from this file as a [`Duration`].
pub const fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
/// Layers of one image: what overlayfs stacks with room for the container's own.
pub const IMAGE_LAYERS_MAX: usize = 127;
/// Unpacked bytes of one layer.
pub const IMAGE_LAYER_BYTES_MAX: u64 = 32 << 30;
/// Entries of one layer.
pub const IMAGE_LAYER_ENTRIES_MAX: u64 = 2_000_000;
/// A layer may unpack to this many times its size once it is larger than [`IMAGE_LAYER_RATIO_FLOOR_BYTES`].
pub const IMAGE_LAYER_RATIO_MAX: u64 = 200;
/// Below this size a layer may be compressed as well as it likes.
pub const IMAGE_LAYER_RATIO_FLOOR_BYTES: u64 = 1 << 30;
/// Names and attributes of one entry of a layer.
pub const IMAGE_ENTRY_HEADER_BYTES_MAX: u64 = 1 << 20;
/// An index, a manifest or a configuration.
pub const IMAGE_DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Files in an image archive.
pub const IMAGE_ARCHIVE_MEMBERS_MAX: usize = 100_000;
/// Indexes inside indexes.
pub const IMAGE_INDEX_DEPTH_MAX: usize = 4;
/// One answer of the kernel on a netlink socket.
pub const NETLINK_TIMEOUT_MS: i64 = 5_000;
/// Times that a netlink dump which changed under way is taken.
pub const NETLINK_DUMP_TRIES_MAX: usize = 30;
/// From a pod's link being up at both ends to packets passing.
pub const LINK_READY_TIMEOUT_MS: u64 = 2_000;
/// How long a pod's freed address is not given to another: long enough for peers to notice resets.
pub const ADDRESS_QUARANTINE_MS: u64 = 10_000;

/// How often it is said that a node still waits for its pod ranges.
pub const RANGES_REMINDER_PERIOD_S: u64 = 30;

/// How long one wait for changes of links and routes lasts before the waiter looks whether it is still needed.
pub const NETLINK_EVENTS_WAIT_MS: i64 = 500;
/// How often a peers file is looked at.
pub const PEERS_FILE_LOOK_PERIOD_MS: u64 = 500;
/// How often the overlay is compared with the kernel where no event asks for it.
pub const OVERLAY_RESYNC_PERIOD_S: u64 = 10;
/// How often the nftables table of pods is looked at.
pub const NAT_LOOK_PERIOD_S: u64 = 1;
/// How long events of the kernel are gathered before the overlay is looked at.
pub const OVERLAY_GATHER_MS: u64 = 5;
/// First pause after a step of the overlay failed; doubles up to [`OVERLAY_RETRY_MAX_MS`].
pub const OVERLAY_RETRY_FIRST_MS: u64 = 100;
/// Longest such pause.
pub const OVERLAY_RETRY_MAX_MS: u64 = 5_000;

/// Map elements in one system call.
pub const BPF_BATCH_ELEMENTS: usize = 4096;
/// Events waiting for the data plane; the watches wait when it is full. Also the most in one round.
pub const DATAPLANE_EVENTS_QUEUED_MAX: usize = 4096;
/// Bytes of an Event's note (events.k8s.io/v1).
pub const EVENT_NOTE_BYTES_MAX: usize = 1024;
/// Refused services waiting to be told to the API; more are only logged.
pub const DATAPLANE_NOTICES_QUEUED_MAX: usize = 256;
/// Services whose changes are made in one round, where the data plane can work in rounds: what bounds the memory that
/// the first fill takes.
pub const DATAPLANE_SERVICES_PER_ROUND_MAX: usize = 10_000;
/// Rounds after one batch of events; in all but the first few, freed room lets refused services in.
pub const DATAPLANE_ROUNDS_MAX: usize = 1024;
/// How long after sockets of gone backends were ended they are looked for once more.
pub const STALE_SOCKETS_AGAIN_MS: u64 = 200;
/// How often memory that is no longer used goes back to the system.
pub const MEMORY_TRIM_PERIOD_S: u64 = 5;
/// How often links and node addresses are looked after.
pub const DATAPLANE_REPAIR_PERIOD_S: u64 = 10;
/// A moment is quiet when links, queues, addresses and routes have not changed for so long.
pub const POLICY_QUIET_MS: u64 = 500;
/// How long the kernel's changes are gathered while looks are put off.
pub const POLICY_PUT_OFF_MS: u64 = 20;
/// Devices of new pods that get the programs in one look after everything while pods keep coming and no policy is there.
pub const POLICY_ATTACHED_WHILE_BUSY_MAX: usize = 8;
/// After a look at the node's links it rests so many times as long as it took.
pub const POLICY_REST_FACTOR: u32 = 4;
/// At most: a new pod waits for its policies that much longer.
pub const POLICY_REST_MS_MAX: u64 = 50;
/// Longest pause between two tries of a watch.
pub const WATCH_RETRY_MAX_S: u64 = 5;
/// With less memory available the node reports MemoryPressure; pods are not promised it.
pub const NODE_MEMORY_AVAILABLE_BYTES_MIN: i64 = 100 << 20;
/// A status that is about to change again is held back this long at most.
pub const STATUS_HOLD_MS: u64 = 250;
/// First pause between readiness probes of a container that was never ready; doubles up to the period.
pub const PROBE_EAGER_FIRST_MS: u64 = 10;
/// Pieces in which logs are read and sent.
pub const LOG_CHUNK_BYTES: usize = 32 * 1024;
/// Pieces of a log waiting for a slow reader.
pub const LOG_CHUNKS_QUEUED_MAX: usize = 4;
/// How often a followed log is looked at.
pub const LOG_FOLLOW_MS: u64 = 100;
/// How long the agent waits for its own parts to end.
pub const SHUTDOWN_TIMEOUT_S: u64 = 5;
/// TCP and TLS to the API server.
pub const API_CONNECT_TIMEOUT_S: u64 = 5;
/// A disk with this much free is not scarce, however large it is.
pub const NODE_DISK_AVAILABLE_BYTES_MIN: u64 = 1 << 30;

/// Ports that masquerading takes first, above Linux' default range for ephemeral ports (32,768 to 60,999).
pub const SNAT_PORTS: (u16, u16) = (61_000, 65_535);
/// Ports that masquerading takes when those are used up, below the default range of NodePorts.
pub const SNAT_MORE_PORTS: (u16, u16) = (10_000, 29_999);

/// Fewest entries that a map of the data plane can be configured for.
pub const MAP_ENTRIES_MIN: u32 = 2;
/// Most entries that a map of the data plane can be configured for.
pub const MAP_ENTRIES_MAX: u32 = 1 << 26;
/// Share of the host's memory that the connection table may take: a 512th.
pub const FLOWS_MEMORY_SHARE: u64 = 512;
/// Sets of the connection table whose entries are counted to tell how full it is.
pub const FLOW_SETS_COUNTED: u32 = 4096;
/// Share of the host's memory that clients with session affinity may take: a 4096th.
pub const AFFINITY_MEMORY_SHARE: u64 = 4096;
/// Share of the host's memory that slots may take: a 4096th.
pub const SLOTS_MEMORY_SHARE: u64 = 4096;
/// Most connection table entries that memory alone makes, two a connection.
pub const FLOWS_DEFAULT_MAX: u32 = 1 << 22;
/// Most affinity entries that memory alone makes.
pub const AFFINITY_DEFAULT_MAX: u32 = 1 << 20;
/// Most slots that memory alone makes.
pub const SLOTS_DEFAULT_MAX: u32 = 1 << 22;
/// How long after the last second of listening the programs go on writing events.
pub const EVENTS_PERMISSION_S: u32 = 3;
/// Changes that wait longer than this make the service proxy unhealthy (kube-proxy: twice its sync period).
pub const PROXY_STALE_S: u64 = 60;
/// Pause before a health check port that was taken is tried again.
pub const PROXY_LISTEN_RETRY_S: u64 = 2;
/// Share of a map's entries in use from which on it is warned of.
pub const MAP_PRESSURE_WARN_PERCENT: u64 = 90;
/// Distinct times of changes that are remembered within one round, for the programming latency.
pub const TRIGGERS_A_ROUND_MAX: usize = 4096;

/// Calls of the plugin that are served at once; more wait in the socket's queue. The kernel does one at a time.
pub const CNI_CALLS_IN_FLIGHT_MAX: usize = 16;
/// How long the plugin may take to say what it wants, and to take the answer.
pub const CNI_RECEIVE_TIMEOUT_MS: u64 = 5_000;
/// Pause after a connection could not be accepted.
pub const CNI_ACCEPT_PAUSE_MS: u64 = 20;
/// How often what runtimes connected is looked after.
pub const CNI_RECONCILE_PERIOD_S: u64 = 30;
/// How long the spool's lock is waited for; a plugin holds it for milliseconds.
pub const CNI_SPOOL_LOCK_TIMEOUT_MS: u64 = 5_000;
/// How long the removal of a link may take; the kernel is busy then.
pub const LINK_REMOVE_TIMEOUT_MS: u64 = 5_000;
/// Links that are removed at once: while they are, nothing else changes in the network.
pub const LINKS_REMOVED_AT_ONCE_MAX: usize = 256;
