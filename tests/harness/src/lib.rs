//! What the suites share. Everything made here is undone when its guard is dropped, also while a test panics;
//! what a killed test leaves behind is found by the residue scan of `cargo xtask test`.
//!
//! Helpers panic instead of returning errors: a suite has nothing better to do, and a panic keeps the place.

pub mod cgroup;
pub mod http;
pub mod image;
pub mod isolate;
pub mod netns;
pub mod network;
pub mod node;
pub mod overlay;
pub mod pinned;
pub mod report;
pub mod wait;

#[cfg(test)]
mod selftest;

pub use cgroup::Cgroup;
pub use isolate::isolated;
pub use netns::{NetNs, checksum_in_stack};
pub use network::NetworkNode;
pub use node::Node;
pub use report::{set_apart, skip};
pub use wait::{wait_for, wait_until};

/// A short name that no other process and no other call of this process has used: `<label>-<pid>-<n>`.
pub fn unique(label: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{label}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// True for root; otherwise reports the test as skipped. Use as `if !require_root() { return; }`.
pub fn require_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("needs root");
    }
    root
}

/// True if `program` is in PATH; otherwise reports the test as skipped. For programs of other people that a test drives.
pub fn require_program(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}
