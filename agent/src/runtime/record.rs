//! What the runtime knows about pods. A record never says more than has happened: `started` is set after
//! the program was executed, `exit` after its status was collected and written down.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::spec::SandboxSpec;

/// Whether a pod's namespaces are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// Its shim and its namespaces are alive.
    Ready,
    /// Its shim or the holder of its namespaces died; only `stop_sandbox` is possible.
    Dead,
}

/// A pod on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// What was asked for.
    pub spec: SandboxSpec,
    /// Process that holds the namespaces; 0 for a dead pod.
    pub init_pid: i32,
    /// See [`PodState`].
    pub state: PodState,
    /// Every container's latest run, in the order of their first start.
    pub containers: Vec<ContainerRecord>,
}

/// One run of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its name in the pod.
    pub name: String,
    /// Counts its runs, from 0.
    pub attempt: u32,
    /// 64 hexadecimal digits; differs for each run.
    pub id: String,
    /// Image as named by the pod.
    pub image: String,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// Its first process, in the node's process namespace; 0 after it ended.
    pub pid: i32,
    /// When the start was asked for.
    pub created: Timestamp,
    /// When the program was executed.
    pub started: Option<Timestamp>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// File that its output goes to.
    pub log: PathBuf,
    /// Directories of its image, the lowest first; in use as long as the record exists.
    pub layers: Vec<PathBuf>,
}

/// How a container's first process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub code: i32,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// The kernel killed a process of this container for want of memory and it ended in failure.
    pub oom_killed: bool,
    /// The status was not collected because the shim was killed; `code` is 137 then.
    pub lost: bool,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Content of the termination message file, at most
    /// [`TERMINATION_MESSAGE_BYTES_MAX`](crate::limits::TERMINATION_MESSAGE_BYTES_MAX) bytes.
    pub message: String,
}

/// What `start_sandbox` made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxInfo {
    /// `/proc/<pid>/ns/net`; valid as long as the sandbox lives.
    pub netns: PathBuf,
    /// Process that holds the namespaces.
    pub init_pid: i32,
}

/// Outcome of a command run by `exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutput {
    /// Exit status, or 128 + signal.
    pub code: i32,
    /// Killed because `timeout_ms` passed.
    pub timed_out: bool,
    /// Both output streams as they came, at most
    /// [`EXEC_OUTPUT_BYTES_MAX`](crate::limits::EXEC_OUTPUT_BYTES_MAX) bytes; the rest is thrown away.
    pub output: String,
    /// More was written than `output` holds.
    pub truncated: bool,
}

/// What the runtime says without being asked. Sent after the fact is in the records and, for exits, on
/// disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// A container that had been started ended.
    ContainerExited {
        /// Its pod.
        uid: String,
        /// Its name.
        name: String,
        /// Its run.
        attempt: u32,
        /// How.
        exit: Exit,
    },
    /// The pod's namespaces are lost. What was left of it is killed; `stop_sandbox` clears it away.
    SandboxDied {
        /// The pod.
        uid: String,
    },
}
