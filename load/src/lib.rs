//! The load tester: puts services with endpoints on this host and measures every way to balance them side by side, or
//! pods on two nodes and measures every road between them.
//! Invariant: everything lives in namespaces and cgroups of its own, which end with the processes that hold them;
//! nothing of the host's own network is touched, and nothing stays behind.
//!
//! One run, a number of services: a *bed* (client, pod, node and backends as network namespaces) a mode, all of them at
//! once; a process each that programs, serves and connects; and small blocks of work for one bed after the other, so
//! that whatever else the machine does meets all modes alike.

mod bed;
mod blocks;
mod client;
mod error;
mod html;
mod iptables;
mod measure;
mod network;
mod options;
mod program;
mod row;
mod serve;
mod spawn;
mod spec;
mod stats;
mod table;
mod wire;
mod worker;

pub use error::LoadError;
pub use measure::run;
pub use network::{NetworkOptions, Road, run as run_network};
pub use options::{Backends, IptablesKind, Options, Output, Way};
pub use worker::main as worker;
