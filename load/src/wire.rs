//! What the run and its processes say to each other: a JSON value a line, requests on standard input, answers on
//! standard output. Invariant: every request gets one answer; the end of input ends the process.

use crate::LoadError;
use crate::options::{IptablesKind, Way};
use crate::spec::Spec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

/// What a process is for: its first line.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Answer TCP and UDP on the target port of every address of the namespace.
    Serve {
        cpu: usize,
        /// The CPU is no client's.
        awake: bool,
    },
    /// Drive traffic as [`Drive`]s say.
    Connect {
        cpu: usize,
    },
    Program(Program),
    /// Receive streams and answer requests.
    Receive {
        cpu: usize,
    },
    /// Send what [`crate::network::Turn`]s say.
    Send {
        cpu: usize,
    },
    /// Put one service in.
    Frontend(crate::network::Frontend),
}

/// Put services into the kernel as [`Ask`]s say.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    pub(crate) way: Way,
    pub(crate) spec: Spec,
    pub(crate) pin_dir: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) iptables: Option<IptablesKind>,
    pub(crate) pod_packets: bool,
    pub(crate) host_routing: bool,
}

/// Kinds of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// From making a socket until it is connected; reset after that.
    Connect,
    /// A connection for one request: until it is closed again.
    Short,
    /// Requests on one connection.
    Keepalive,
    /// A datagram and its answer, on a socket of their own.
    Udp,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Short => "short",
            Self::Keepalive => "keepalive",
            Self::Udp => "udp",
        }
    }
}

/// A block of traffic: `rounds` times every target once, in a random order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Drive {
    pub(crate) kind: Kind,
    /// Addresses of each target; one of them is taken each time.
    pub(crate) targets: Vec<Vec<SocketAddr>>,
    /// Rounds that are counted.
    pub(crate) rounds: u32,
    /// Rounds before, that are not.
    pub(crate) warm_up: u32,
    pub(crate) seed: u64,
}

/// What came of it, by target.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Driven {
    pub(crate) targets: Vec<Samples>,
    /// The first failure in words.
    pub(crate) failure: Option<String>,
}

/// Samples of one target.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Samples {
    /// How long each took.
    pub(crate) ns: Vec<u64>,
    /// Of short requests: until the answer to the request was there.
    pub(crate) answer_ns: Vec<u64>,
    pub(crate) failed: u64,
}

/// Requests to the process that programs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Put everything in.
    Fill,
    /// Change an endpoint, `changes` times one after the other, but not for longer than `budget_ms`.
    Change { changes: u32, budget_ms: u64 },
    /// Change so many endpoints a second from now on.
    Churn { per_s: u32 },
    /// Stop that.
    Quiet,
}

/// The answers to them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Told {
    Filled {
        /// Opening the data plane: loading programs, adopting.
        open_s: f64,
        /// Everything, opening included.
        program_s: f64,
        rss_mb: f64,
        rss_peak_mb: f64,
        /// Which iptables, and similar remarks.
        note: Option<String>,
    },
    Changed {
        ns: Vec<u64>,
    },
    Churning,
    Quieted {
        changes: u64,
        /// The longest that one took.
        longest_ns: u64,
        /// What went wrong first, if anything did.
        failure: Option<String>,
    },
    /// The host can't do it.
    Unavailable(String),
}

/// Reads one value; `None` at the end of input.
///
/// # Errors
/// [`LoadError::Worker`] when the line is none of ours.
pub(crate) fn read<T: DeserializeOwned>(from: &mut impl BufRead, who: &str) -> Result<Option<T>, LoadError> {
    let mut line = String::new();
    let failed = |said: String| LoadError::Worker { who: who.to_owned(), said };
    match from.read_line(&mut line) {
        Ok(0) => Ok(None),
        Ok(_) => serde_json::from_str(&line).map(Some).map_err(|e| failed(format!("said {line:?}: {e}"))),
        Err(error) => Err(failed(format!("can't be read from: {error}"))),
    }
}

/// Writes one value.
///
/// # Errors
/// When the other side is gone.
pub(crate) fn write(to: &mut impl Write, value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}
