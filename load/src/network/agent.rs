//! Nodes of a run: the real agent in a namespace, and pods that it connects as it does for any runtime. Invariant: an
//! agent lives no longer than this, and what it keeps lies in a directory that only the run can see.

use crate::LoadError;
use crate::bed::Ground;
use crate::error::Doing as _;
use crate::spawn::{Guarded, NetNs, check_interrupted};
use serde_json::{Value, json};
use sheave_cni::wire;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for an agent to come up.
const START: Duration = Duration::from_secs(20);
/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// One of the nodes that know each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Its name.
    pub(super) name: &'static str,
    /// Its address.
    pub(super) ip: &'static str,
    /// Its pods' range.
    pub(super) range: &'static str,
}

/// A running agent.
#[derive(Debug)]
pub(super) struct Agent {
    place: Place,
    dir: PathBuf,
    child: Guarded,
}

impl Agent {
    /// Starts one in `host`; `nodes` are all of them.
    ///
    /// # Errors
    /// When it can't be started, or ends at once: with the last of its log.
    pub(super) fn start(
        ground: &Ground,
        bed: &str,
        host: &NetNs,
        place: Place,
        nodes: &[Place],
        overlay: &str,
    ) -> Result<Self, LoadError> {
        let dir = ground.dir().join(bed).join(place.name);
        fs::create_dir_all(&dir).doing(format!("make {}", dir.display()))?;
        let peers = dir.join("peers.toml");
        fs::write(&peers, peers_file(nodes)).doing(format!("write {}", peers.display()))?;
        let log = fs::File::create(dir.join("log")).doing("make an agent's log")?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["agent", "--components", "network", "--node-name", place.name]);
        command.args(["--pod-cidr", place.range, "--node-ip", place.ip, "--overlay", overlay]);
        command.args(["--health-listen", "127.0.0.1:0", "--masquerade", "false"]);
        command.arg("--peers").arg(&peers);
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--log-dir", "pods")] {
            command.arg(flag).arg(dir.join(name));
        }
        command.arg("--pin-dir").arg(ground.pins().join(format!("{bed}-{}", place.name)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        host.apply(&mut command)?;
        let child = Guarded::start(command, format!("agent ({bed}, {})", place.name))?;
        let mut agent = Self { place, dir, child };
        agent.wait()?;
        Ok(agent)
    }

    fn wait(&mut self) -> Result<(), LoadError> {
        let start = Instant::now();
        loop {
            check_interrupted()?;
            let told = match self.call("STATUS", "", None) {
                Ok(_) => return Ok(()),
                Err(told) => told,
            };
            if self.child.ended() || start.elapsed() > START {
                return Err(LoadError::Unavailable(format!(
                    "the agent is not ready: {told}; {}",
                    self.said()
                )));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Warnings and errors of its log, or its end.
    fn said(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let bad = |line: &&str| line.contains("ERROR") || line.contains("rror:");
        let last = log.lines().rev().find(bad).or_else(|| log.lines().last());
        last.unwrap_or("its log is empty").to_owned()
    }

    /// Connects `pod` and returns where it is reached.
    ///
    /// # Errors
    /// When the agent refuses.
    pub(super) fn attach(&self, id: &str, pod: &NetNs) -> Result<SocketAddr, LoadError> {
        let refused = |what: String| LoadError::Unavailable(format!("pod {id}: {what}"));
        let result = self.call("ADD", id, Some(pod)).map_err(refused)?;
        let ips = result["ips"].as_array().into_iter().flatten();
        let first =
            ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse::<IpAddr>().ok()).next();
        let ip = first.ok_or_else(|| refused(format!("no address in {result}")))?;
        Ok(SocketAddr::new(ip, super::traffic::PORT))
    }

    fn call(&self, command: &str, id: &str, pod: Option<&NetNs>) -> Result<Value, String> {
        let deadline = Instant::now() + ANSWER;
        let text = |error: std::io::Error| error.to_string();
        let request = wire::Request {
            command: command.to_owned(),
            container_id: id.to_owned(),
            netns: pod.map(NetNs::path).unwrap_or_default(),
            ifname: if pod.is_some() { "eth0".to_owned() } else { String::new() },
            args: String::new(),
            config: json!({"cniVersion": "1.1.0", "name": "load", "type": "sheave-cni"}),
            ipam: None,
        };
        let socket: &Path = &self.dir.join("run/cni.sock");
        let stream = wire::dial(socket, deadline).map_err(text)?;
        wire::send(&stream, &request.encode(), pod.map(NetNs::fd), deadline).map_err(text)?;
        let (answer, _) = wire::receive(&stream, deadline).map_err(text)?;
        match wire::decode_reply(&answer) {
            Ok(result) => Ok(result.unwrap_or_default()),
            Err(error) => Err(format!("{} on {}: {error}", command, self.place.name)),
        }
    }
}

fn peers_file(nodes: &[Place]) -> String {
    let mut text = String::new();
    for node in nodes {
        // Writing to a String can't fail.
        writeln!(
            text,
            "[[node]]\nname = \"{}\"\nnode-ips = [\"{}\"]\npod-cidrs = [\"{}\"]",
            node.name, node.ip, node.range
        )
        .unwrap_or_default();
    }
    text
}
