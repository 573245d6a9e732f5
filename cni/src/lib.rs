//! The container network interface (CNI): what runtimes say, what they are answered, and how the plugin passes it on
//! to the agent. Invariant: what is said on standard output is JSON in the caller's own version of the interface.
//!
//! The types are pure and shared with the agent; the plugin is [`plugin::run`]. Only the standard library,
//! `serde_json` and system calls: starting this program is part of the time that every container waits.

pub mod call;
pub mod config;
pub mod delegate;
pub mod error;
pub mod plugin;
pub mod result;
pub mod spool;
mod value;
pub mod version;
pub mod wire;

pub use call::{Call, Command};
pub use config::Config;
pub use error::{Error, code};
pub use result::Outcome;
pub use version::Version;
