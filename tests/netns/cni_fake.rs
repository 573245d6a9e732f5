//! Stand-ins for what is around a plugin: an IPAM plugin that keeps what it was given and does as it is told, and a
//! listener to what the kernel tells about links and rules, in the order in which it happens.

use std::path::PathBuf;
use std::sync::mpsc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};
use serde_json::{Value, json};
use sheave_harness::NetNs;

use crate::cni_bed::{Bed, Ctr, DEBIAN, Outcome, lines, run, with};

/// A shell script of type `fake-ipam` in a directory of its own.
pub(crate) struct FakeIpam {
    dir: tempfile::TempDir,
}

const SCRIPT: &str = r#"#!/bin/sh
dir=$(dirname "$0")/told
cat > "$dir/$CNI_COMMAND.stdin"
env | grep '^CNI_' | sort > "$dir/$CNI_COMMAND.env"
echo "$CNI_COMMAND" >> "$dir/calls"
echo "fake-ipam was asked for $CNI_COMMAND" >&2
if [ -e "$dir/fail-$CNI_COMMAND" ]; then cat "$dir/fail-$CNI_COMMAND"; exit 1; fi
if [ "$CNI_COMMAND" = ADD ]; then cat "$dir/result"; fi
exit 0
"#;

impl FakeIpam {
    pub(crate) fn new() -> FakeIpam {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::Builder::new().prefix("shv-ipam-").tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("told")).expect("a directory");
        let script = dir.path().join("fake-ipam");
        // Renamed into place: a process forked by another thread may hold what is being written.
        let draft = dir.path().join("draft");
        std::fs::write(&draft, SCRIPT).expect("write a script");
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).expect("set its mode");
        std::fs::rename(draft, script).expect("name the script");
        let ipam = FakeIpam { dir };
        ipam.gives("1.0.0", "10.201.0.2", json!({"routes": [{"dst": "0.0.0.0/0"}]}));
        ipam
    }

    fn told(&self, name: &str) -> PathBuf {
        self.dir.path().join("told").join(name)
    }

    /// Sets the result of ADD: a version, an address of a /24, and what else there is to be in it.
    pub(crate) fn gives(&self, version: &str, ip: &str, more: Value) {
        let (net, _) = ip.rsplit_once('.').expect("an IPv4 address");
        let row = json!({"address": format!("{ip}/24"), "gateway": format!("{net}.1")});
        let result = with(json!({"cniVersion": version, "ips": [row]}), more);
        std::fs::write(self.told("result"), result.to_string()).expect("write a result");
    }

    /// Makes a verb fail.
    pub(crate) fn fails(&self, verb: &str, code: u64, msg: &str) {
        let error = json!({"cniVersion": "1.0.0", "code": code, "msg": msg});
        std::fs::write(self.told(&format!("fail-{verb}")), error.to_string()).expect("write an error");
    }

    /// The verbs it was called with, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        lines(&self.told("calls"))
    }

    /// The configuration that the last call of a verb was given.
    pub(crate) fn stdin(&self, verb: &str) -> Value {
        let text = std::fs::read_to_string(self.told(&format!("{verb}.stdin"))).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{verb}: {e}: {text}"))
    }

    /// `CNI_…` variables of the last call of a verb.
    pub(crate) fn environment(&self, verb: &str) -> Vec<String> {
        lines(&self.told(&format!("{verb}.env")))
    }

    /// A configuration that delegates to it.
    pub(crate) fn config(&self, bed: &Bed, name: &str) -> Value {
        with(bed.config(name), json!({"ipam": {"type": "fake-ipam", "example.org/kept": [1, {"a": 2}]}}))
    }

    /// The `CNI_PATH` under which it is found: not in the first directory.
    pub(crate) fn path(&self) -> String {
        format!("{DEBIAN}:{}", self.dir.path().display())
    }

    /// [`Bed::call`] with it in `CNI_PATH`.
    pub(crate) fn call(&self, bed: &Bed, verb: &str, ctr: &Ctr, config: &Value) -> Outcome {
        let mut command = bed.prepared(verb, ctr, config);
        command.env("CNI_PATH", self.path());
        run(command, config.to_string().as_bytes())
    }

    /// [`Bed::verb`] with it in `CNI_PATH`.
    pub(crate) fn verb(&self, bed: &Bed, verb: &str, config: &Value) -> Outcome {
        let mut command = bed.command(&bed.program(config));
        command.env("CNI_COMMAND", verb).env("CNI_PATH", self.path());
        run(command, config.to_string().as_bytes())
    }
}

/// Listens to a namespace's links and nftables rules.
pub(crate) struct Watch {
    stop: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Vec<&'static str>>,
}

const RTM_DELLINK: u16 = 17;
/// Deletions among messages of nf_tables: rules, set elements, chains and tables have them.
const NFT_SUBSYSTEM: u16 = 10;
const NFT_DELETIONS: [u16; 5] = [2, 5, 8, 11, 14];

impl Watch {
    /// Begins to listen.
    pub(crate) fn start(ns: &NetNs) -> Watch {
        // RTMGRP_LINK, and NFNLGRP_NFTABLES (7) as a bit.
        let link = ns.run(|| subscribe(SockProtocol::NetlinkRoute, 1));
        let rules = ns.run(|| subscribe(SockProtocol::NetlinkNetFilter, 1 << 6));
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut events = Vec::new();
            loop {
                let mut fds =
                    [&rules, &link].map(|fd| PollFd::new(std::os::fd::AsFd::as_fd(fd), PollFlags::POLLIN));
                let ready = poll(&mut fds, PollTimeout::from(20_u8)).expect("poll");
                // Rules first: what happened earlier is never taken for later.
                read(&rules, &mut events, |kind| {
                    (kind >> 8 == NFT_SUBSYSTEM && NFT_DELETIONS.contains(&(kind & 0xff))).then_some("rules")
                });
                read(&link, &mut events, |kind| (kind == RTM_DELLINK).then_some("interface"));
                if ready == 0 && stopped.try_recv().is_ok() {
                    return events;
                }
            }
        });
        Watch { stop, thread }
    }

    /// What was heard, once nothing more comes.
    pub(crate) fn end(self) -> Vec<&'static str> {
        self.stop.send(()).expect("the thread listens");
        self.thread.join().expect("the thread listens")
    }
}

fn subscribe(protocol: SockProtocol, groups: u32) -> std::os::fd::OwnedFd {
    use nix::sys::socket::{bind, socket};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol).expect("a netlink socket");
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &NetlinkAddr::new(0, groups)).expect("subscribe");
    fd
}

/// Takes all that is there; `sort` names the messages that count.
fn read(
    fd: &std::os::fd::OwnedFd,
    events: &mut Vec<&'static str>,
    sort: impl Fn(u16) -> Option<&'static str>,
) {
    let mut buffer = vec![0_u8; 65536];
    loop {
        let raw = std::os::fd::AsRawFd::as_raw_fd(fd);
        let Ok(length) = nix::sys::socket::recv(raw, &mut buffer, MsgFlags::empty()) else { return };
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let size = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            events.extend(sort(u16::from_ne_bytes([rest[4], rest[5]])));
            rest = rest.get(size.next_multiple_of(4).max(16)..).unwrap_or_default();
        }
    }
}
