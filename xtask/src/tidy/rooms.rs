//! What a room may touch: rooms that decide do no I/O, and each outside library has one room that talks to it.

use super::Violation;
use super::source::{Source, line_of, words};

/// Rooms of synchronous functions over plain data. A file or folder whose name starts with `driver` is the part beside
/// them that acts.
const PURE: &[&str] = &[
    "agent/src/service/",
    "agent/src/pod/",
    "agent/src/policy/",
    "control/src/resource/",
    "control/src/schedule/",
    "control/src/controller/",
    "ebpf/core/",
    "ebpf/abi/",
];

/// Files of those rooms that act on what was decided and have names of their own.
const ACTORS: &[&str] = &[
    "agent/src/pod/act.rs",
    "agent/src/pod/prober.rs",
    "agent/src/pod/volumes.rs",
    "agent/src/pod/worker.rs",
];

/// What does I/O, starts threads or reads clocks. Address types of `std::net` are plain data.
const IO: &[&str] = &[
    "std::fs",
    "std::process",
    "std::thread",
    "std::os::unix::net",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "ToSocketAddrs",
    "Instant::now",
    "SystemTime::now",
    "tokio",
    "nix",
    "libc",
    "kube",
    "hyper",
    "redb",
    "rand",
];

/// Libraries that one room (and whoever tests it) talks to.
const OWNED: &[(&[&str], &[&str], &str)] = &[
    (
        &["aya", "aya_obj"],
        &["agent/src/dataplane/ebpf/", "agent/src/dataplane/ebpf.rs", "ebpf/", "tests/"],
        "agent/src/dataplane/ebpf",
    ),
    (
        &["netlink_sys", "netlink_packet_core", "netlink_packet_route"],
        &["agent/src/network/netlink/", "agent/src/network/netlink.rs"],
        "agent/src/network/netlink",
    ),
    (&["redb"], &["control/src/store/", "control/src/store.rs"], "control/src/store"),
];

pub(crate) fn check(source: &Source) -> Vec<Violation> {
    let mut found = Vec::new();
    if PURE.iter().any(|room| source.name.starts_with(room)) && !is_driver(&source.name) {
        for word in IO {
            for line in uses(source, word) {
                let text =
                    format!("`{word}` in a pure room; take its result as an argument, or move to a driver");
                found.push(Violation::new(&source.name, line + 1, text));
            }
        }
    }
    for (crates, rooms, owner) in OWNED {
        if rooms.iter().any(|room| source.name.starts_with(room)) {
            continue;
        }
        for name in *crates {
            for line in uses(source, name) {
                let text = format!("`{name}` belongs to {owner}; call that room");
                found.push(Violation::new(&source.name, line + 1, text));
            }
        }
    }
    found
}

fn is_driver(name: &str) -> bool {
    ACTORS.contains(&name) || name.split('/').any(|part| part.starts_with("driver"))
}

/// Lines (from 0), outside tests, where `word` stands as a path or its head (`kube` is one in `kube::Client` and in
/// `use kube;`, not as a variable).
fn uses(source: &Source, word: &str) -> Vec<usize> {
    let code = &source.code;
    let is_path = |at: &usize| {
        let (before, after) = (code[..*at].trim_end(), &code[at + word.len()..]);
        word.contains("::")
            || word.starts_with(|c: char| c.is_ascii_uppercase())
            || after.starts_with("::") && !before.ends_with("::") && !before.ends_with("self")
            || before.ends_with("use") && after.starts_with([';', ' '])
    };
    let lines = words(code, word).filter(is_path).map(|at| line_of(code, at));
    lines.filter(|line| !source.is_test(*line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(name: &str, text: &str) -> Vec<usize> {
        check(&Source::new(name, text.into())).iter().map(|v| v.line).collect()
    }

    #[test]
    fn pure_rooms_do_no_io() {
        let text = "//! X.\nuse std::net::IpAddr;\nuse tokio::fs;\nfn f() { kube::run(); let kube = 1; }\n";
        assert_eq!(lines("agent/src/service/plan.rs", text), [3, 4]);
        assert_eq!(lines("agent/src/service/driver.rs", text), [0; 0]);
        assert_eq!(lines("agent/src/cluster/pods.rs", text), [0; 0]);
    }

    #[test]
    fn tests_of_pure_rooms_may() {
        let text = "//! X.\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n";
        assert_eq!(lines("control/src/resource/x.rs", text), [0; 0]);
    }

    #[test]
    fn libraries_have_one_room() {
        assert_eq!(lines("agent/src/pod/driver.rs", "//! X.\nuse aya::Ebpf;\n"), [2]);
        assert_eq!(lines("agent/src/dataplane/ebpf/load.rs", "//! X.\nuse aya::Ebpf;\n"), [0; 0]);
    }
}
