//! The desired table, in the kernel. Invariant: a data plane does what it is told and decides nothing; what is to be
//! done is decided in [`crate::service`].
//!
//! Restart, resync and first start are one path: open (adopting what is pinned), observe, diff, apply, attach.

mod driver;
pub mod ebpf;
mod stats;

pub(crate) use driver::Notice;
pub use driver::{Driver, Feed, run};
pub use ebpf::{Lookup, ServiceRow, list, uninstall};
pub use stats::{DataplaneStats, StatsHandle};

use crate::service::{Capacity, Changes, Observed};
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// Settings of the data plane.
#[derive(Clone, Debug)]
pub struct DataplaneConfig {
    /// Directory on a bpffs for the pins; a versioned directory is made below it. A bpffs is mounted where there is
    /// none (at `/sys/fs/bpf` for paths below it, else at the directory itself).
    pub pin_dir: PathBuf,
    /// The cgroup whose processes are served, and those below it; `None` means the root of the v2 hierarchy.
    pub cgroup_path: Option<PathBuf>,
    /// Ethernet devices on which NodePort traffic arrives from outside.
    pub uplinks: Vec<String>,
    /// Name of this node, by which endpoints are local.
    pub node_name: String,
    /// Addresses of this node in addition to those found on its interfaces.
    pub node_ips: Vec<IpAddr>,
    /// First and last NodePort.
    pub node_port_range: (u16, u16),
    /// Where the current figures are put for `/metrics`; keep a clone.
    pub stats: StatsHandle,
}

/// Why the data plane could not do something.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The host lacks something.
    #[error("this host lacks {what}: {hint}")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// What was seen, or what to do.
        hint: String,
    },
    /// A pin could not be made, opened or removed.
    #[error("cannot {op} {}", path.display())]
    Pin {
        /// What was tried.
        op: &'static str,
        /// The pin.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A pinned map is not of this build's making.
    #[error("{} has another layout ({held}) than this program's ({wanted}); `uninstall` removes it", path.display())]
    PinnedMapShape {
        /// The pin.
        path: PathBuf,
        /// What it is.
        held: String,
        /// What it must be.
        wanted: String,
    },
    /// A map operation failed.
    #[error("cannot {op} map {map}")]
    Map {
        /// What was tried.
        op: &'static str,
        /// The map's name.
        map: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused a program.
    #[error("cannot load {what}")]
    Load {
        /// The program.
        what: String,
        /// The loader's or verifier's words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program could not be attached.
    #[error("cannot attach {hook}")]
    Attach {
        /// Where.
        hook: String,
        /// Why not.
        source: io::Error,
    },
    /// Something else of the host failed.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// What became of [`Dataplane::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// Traffic flows through the table.
    Yes,
    /// Somebody took the table away. There is an empty one now, to be filled before the next attempt.
    TableIsNew,
}

/// One way to balance services on a node. Implementations block; they are driven from a thread of their own.
pub trait Dataplane: Send {
    /// What there is room for.
    fn capacity(&self) -> Capacity;
    /// Reads all that the kernel holds.
    fn observe(&mut self) -> Result<Observed, DataplaneError>;
    /// Makes the changes, in the order of their fields. After an error the kernel may hold any part of them.
    fn apply(&mut self, changes: &Changes) -> Result<(), DataplaneError>;
    /// Says which addresses NodePorts are reached on.
    fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), DataplaneError>;
    /// Makes traffic flow through the table, if it does not yet: attaches, upgrades in place, re-attaches what was
    /// severed. To be called after the first [`Dataplane::apply`] and then from time to time.
    fn attach(&mut self) -> Result<Attached, DataplaneError>;
}
