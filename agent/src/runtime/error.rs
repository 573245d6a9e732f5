//! Why something could not be done to a pod: operation, object, cause. A start that failed names the stage
//! it failed in, because that is what ends up in the pod's status.

use std::path::PathBuf;

/// Result of the runtime.
pub type Result<T> = std::result::Result<T, RuntimeError>;

/// See the module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// Neither running nor left over.
    #[error("pod {uid}: no such pod")]
    NoSuchPod {
        /// The pod.
        uid: String,
    },
    /// The pod has no such container, or it does not run.
    #[error("pod {uid}: container {container} is not running")]
    NotRunning {
        /// The pod.
        uid: String,
        /// The container.
        container: String,
    },
    /// The same name is in use.
    #[error("pod {uid}: {what} exists already")]
    Exists {
        /// The pod.
        uid: String,
        /// What exists.
        what: String,
    },
    /// The specification cannot be met by any node.
    #[error("pod {uid}: {what}")]
    Invalid {
        /// The pod.
        uid: String,
        /// What is wrong with it.
        what: String,
    },
    /// A step on the way to a running sandbox, container or command failed.
    #[error("pod {uid}: {stage}: {message}")]
    Start {
        /// The pod.
        uid: String,
        /// The step, in words: `exec`, `mount /proc`, `cgroup`.
        stage: String,
        /// What happened, with the object: `/bin/x: command not found`.
        message: String,
        /// System error number, 0 where none is involved.
        errno: i32,
    },
    /// The pod's shim is gone or does not answer.
    #[error("pod {uid}: its shim is gone")]
    ShimGone {
        /// The pod.
        uid: String,
    },
    /// The shim did not answer in time.
    #[error("pod {uid}: {op} took longer than {timeout_ms} ms")]
    Timeout {
        /// The pod.
        uid: String,
        /// What was asked.
        op: &'static str,
        /// How long was waited.
        timeout_ms: u64,
    },
    /// What the shim says cannot be understood.
    #[error("pod {uid}: bad message from its shim: {what}")]
    Protocol {
        /// The pod.
        uid: String,
        /// What is wrong.
        what: String,
    },
    /// A file operation of the agent's own failed.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another agent works with the same run directory.
    #[error("{path}: another agent holds it")]
    InUse {
        /// The lock.
        path: PathBuf,
    },
    /// The node lacks something that pods need.
    #[error("this node cannot run pods: {what}")]
    Node {
        /// What is missing.
        what: String,
    },
}
