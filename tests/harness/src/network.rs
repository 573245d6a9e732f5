//! A node whose agent does the network alone, for runtimes of others: no API server, no pods, plugins executed beside it.
//! Invariant: what an attachment leaves behind is found by looking at the kernel, not at what the agent believes.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::netns::checked;
use crate::{NetNs, Node, unique, wait_until};

/// How long an agent may take to serve.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node and its agent.
#[derive(Debug)]
pub struct NetworkNode {
    agent: Mutex<Option<Child>>,
    bin: PathBuf,
    flags: Vec<String>,
    /// Namespaces and directories.
    pub node: Node,
}

impl NetworkNode {
    /// Everything but the start of the agent. `flags` are more flags of it; without `--peers` the node is alone.
    pub fn prepare(bin: impl AsRef<Path>, flags: &[&str]) -> Self {
        let node = Node::prepare(&std::env::temp_dir(), &bin, &[]);
        let mut flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        if !flags.iter().any(|flag| flag == "--peers") {
            let peers = node.dir().join("peers.toml");
            std::fs::write(&peers, "").expect("write the peers");
            flags.extend(["--peers".to_owned(), peers.display().to_string()]);
        }
        NetworkNode { agent: Mutex::new(None), bin: bin.as_ref().to_owned(), flags, node }
    }

    /// Starts the agent and does not wait.
    pub fn launch(&self) {
        let log = std::fs::File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let mut command = self.node.command(&self.bin);
        command.args(["agent", "--components", "network", "--node-name", "node-1"]);
        command.args(["--health-listen", "127.0.0.1:0"]);
        command.args(self.node.path_flags()).args(&self.flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        *self.agent() = Some(command.spawn().expect("start the agent"));
    }

    /// Waits until STATUS by the plugin says that ADD would be served.
    pub fn wait_serving(&self, plugin: &Path) {
        let mut status = self.config("wait");
        status["cniVersion"] = json!("1.1.0");
        wait_until("the agent to serve", PATIENCE, || {
            if let Some(ended) = self.ended() {
                panic!("the agent ended with {ended}:\n{}", self.log());
            }
            let mut command = Command::new(plugin);
            self.node.netns.apply(&mut command);
            command.env_clear().env("CNI_COMMAND", "STATUS");
            let output = execute(command, status.to_string().as_bytes());
            if output.status.success() { Ok(()) } else { Err(format!("{output:?}\n{}", self.log())) }
        });
    }

    /// How the agent ended, if it did by itself.
    pub fn ended(&self) -> Option<std::process::ExitStatus> {
        self.agent().as_mut().and_then(|agent| agent.try_wait().ok().flatten())
    }

    /// SIGKILL for the agent, if it runs.
    pub fn kill_agent(&self) {
        if let Some(mut agent) = self.agent().take() {
            // Fails only where it has ended already.
            agent.kill().ok();
            agent.wait().expect("wait for the agent");
        }
    }

    /// The agent's process id.
    pub fn agent_pid(&self) -> u32 {
        self.agent().as_ref().expect("the agent runs").id()
    }

    fn agent(&self) -> MutexGuard<'_, Option<Child>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log_path(&self) -> PathBuf {
        self.node.dir().join("agent.log")
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.node.dir().join("run/cni.sock")
    }

    /// Where the agent keeps attachments.
    pub fn network_dir(&self) -> PathBuf {
        self.node.dir().join("state/network")
    }

    /// A configuration of ours for network `name`, in version 1.0.0.
    pub fn config(&self, name: &str) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": name, "type": "sheave-cni",
            "socket": self.socket(), "spool": self.network_dir().join("spool"),
            "capabilities": {"portMappings": true, "bandwidth": true, "ips": true, "mac": true,
                             "dns": true, "ipRanges": true},
        })
    }

    /// What attachments are made of, as lines: links and routes of the node, neighbours, rules, shaping, records, entries of
    /// maps. Equal before and after means that nothing was left.
    pub fn traces(&self) -> BTreeSet<String> {
        let ns = &self.node.netns;
        let mut all = String::new();
        for args in [
            &["-o", "link", "show"][..],
            &["route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
            &["neigh", "show", "nud", "permanent"],
            &["rule", "show"],
            &["-6", "rule", "show"],
        ] {
            all += &ns.ip(args);
        }
        all += &checked(ns.command("tc").args(["qdisc", "show"]));
        all += &checked(ns.command("nft").args(["list", "ruleset"]));
        // Link-local addresses of the uplink and what goes with them appear when the kernel gets to it.
        let steady =
            |line: &&str| !line.is_empty() && !["fe80:", "ff00::"].iter().any(|own| line.contains(own));
        let mut lines: BTreeSet<String> = all.lines().filter(steady).map(str::to_owned).collect();
        let records = std::fs::read_dir(self.network_dir().join("leases")).into_iter().flatten().flatten();
        lines.extend(records.map(|entry| format!("record {}", entry.file_name().display())));
        // Flows end by themselves.
        let maps = crate::pinned::entries(self.node.pin_dir()).into_iter();
        let lasting = maps.filter(|(path, _)| !path.to_string_lossy().contains("flows"));
        lines.extend(lasting.map(|(path, count)| format!("map {}: {count}", path.display())));
        let pins = crate::pinned::files(self.node.pin_dir()).into_iter();
        lines.extend(pins.map(|path| format!("pin {}", path.display())));
        lines
    }

    /// [`NetworkNode::traces`] of a node at rest: what the agent makes at its start and with its first attachment is there.
    pub fn settled(&self, plugin: &Path) -> BTreeSet<String> {
        self.churn(plugin, 1, 1).unwrap_or_else(|why| panic!("{why}"));
        let mut last = BTreeSet::new();
        wait_until("the node to be at rest", PATIENCE, || {
            let now = self.traces();
            let masquerades = now.iter().any(|line| line.contains("masquerade"));
            let attached = now.iter().any(|line| line.contains(": shv"));
            // The node's own addresses are the first that the programs are told of.
            let told = |line: &String| {
                line.starts_with("map ") && line.contains("shv_net_endpts") && !line.ends_with(": 0")
            };
            let loaded = now.iter().any(told);
            if masquerades && loaded && !attached && now == last {
                return Ok(now);
            }
            last = now;
            Err(format!("masquerades: {masquerades}, programs loaded: {loaded}, attached: {attached}"))
        })
    }

    /// Open descriptors of the agent: sockets, namespaces, files.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.agent_pid())).map_or(0, Iterator::count)
    }

    /// Resident memory of the agent, kB.
    pub fn rss_kb(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.agent_pid())).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kb| kb.parse().ok()).expect("VmRSS of the agent")
    }

    /// Adds and deletes `count` attachments, `in_flight` at a time, each in a namespace of its own; every third maps a
    /// port and is shaped, every seventh loses its namespace before it is deleted. Says what failed first.
    pub fn churn(&self, plugin: &Path, count: usize, in_flight: usize) -> Result<(), String> {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let next = AtomicUsize::new(0);
        let work = || {
            // Children start in the thread's namespace, which is cheaper than moving each.
            let _inside = self.node.netns.enter();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return Ok(());
                }
                self.one_attachment(plugin, n)?;
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..in_flight).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("a worker"))
        })
    }

    fn one_attachment(&self, plugin: &Path, n: usize) -> Result<(), String> {
        let mut config = self.config("churn");
        if n.is_multiple_of(3) {
            let port = 20_000 + n % 10_000;
            config["runtimeConfig"] = json!({
                "portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}],
                "bandwidth": {"ingressRate": 80_000_000, "ingressBurst": 8_000_000,
                              "egressRate": 80_000_000, "egressBurst": 8_000_000},
            });
        }
        let (id, config) = (unique("churn"), config.to_string());
        let mut netns = Some(fresh());
        let path = netns.as_ref().map(NetNs::path).unwrap_or_default();
        for verb in ["ADD", "DEL"] {
            if verb == "DEL" && n.is_multiple_of(7) {
                netns = None;
            }
            let mut command = Command::new(plugin);
            command
                .env_clear()
                .env("CNI_COMMAND", verb)
                .env("CNI_CONTAINERID", &id)
                .env("CNI_IFNAME", "eth0");
            command.env("CNI_NETNS", if netns.is_some() { path.as_os_str() } else { "".as_ref() });
            let output = execute(command, config.as_bytes());
            if !output.status.success() {
                return Err(format!("{verb} of attachment {n}: {}", String::from_utf8_lossy(&output.stdout)));
            }
        }
        Ok(())
    }
}

impl Drop for NetworkNode {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.lines().count().saturating_sub(40);
            eprintln!(
                "the agent's log ends with:\n{}",
                log.lines().skip(from).collect::<Vec<_>>().join("\n")
            );
        }
        self.kill_agent();
    }
}

/// A namespace as a runtime makes it, with everything down, by one system call.
pub fn fresh() -> NetNs {
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace (needs root)");
            NetNs::open("/proc/thread-self/ns/net").expect("open the new network namespace")
        });
        made.join().expect("a namespace")
    })
}

/// Runs a command with this standard input to its end.
pub fn execute(mut command: Command, stdin: &[u8]) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    // A plugin that has seen enough may end before it has read all.
    child.stdin.take().expect("standard input is a pipe").write_all(stdin).ok();
    child.wait_with_output().expect("wait for a plugin")
}
