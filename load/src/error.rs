//! Why a run could not be made. Each says what was tried, and on what.

use std::io;

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A flag that makes no sense.
    #[error("--{flag}: {problem}")]
    Flag {
        /// The flag, without its dashes.
        flag: &'static str,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// Not run by root.
    #[error("this needs root: it makes network namespaces, a cgroup and eBPF programs of its own (try sudo)")]
    NeedsRoot,
    /// The host refused something.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: String,
        /// Why not.
        source: io::Error,
    },
    /// A program of the host failed.
    #[error("{program} failed: {said}")]
    Tool {
        /// The program with its first arguments.
        program: String,
        /// Its last words.
        said: String,
    },
    /// One of our own processes failed or ended.
    #[error("the {who} process {said}")]
    Worker {
        /// Its part.
        who: String,
        /// What became of it.
        said: String,
    },
    /// A way to balance that this host does not have.
    #[error("{0}")]
    Unavailable(String),
    /// SIGINT or SIGTERM.
    #[error("interrupted; everything that was made is gone")]
    Interrupted,
}

/// Names what was tried.
pub(crate) trait Doing<T> {
    /// Turns an error of the host into ours; `op` completes "cannot …".
    fn doing(self, op: impl Into<String>) -> Result<T, LoadError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, op: impl Into<String>) -> Result<T, LoadError> {
        self.map_err(|e| LoadError::Host { op: op.into(), source: e.into() })
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    text
}
