//! What the conformance cases run on: a node in a namespace with an outside, an agent that runs the network alone, and
//! the plugins that a case executes as a runtime does: environment, standard input, standard output, exit status.
//! A case never calls into a plugin and never reads its records: what it claims, it has seen there or in the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use sheave_harness::network::execute;
use sheave_harness::{NetNs, NetworkNode, unique, wait_until};

/// Where Debian's package puts its plugins.
pub(crate) const DEBIAN: &str = "/usr/lib/cni";
/// What containers get their addresses from.
pub(crate) const POD_RANGES: &str = "10.244.0.0/20,fd00:244::/64";

const PATIENCE: Duration = Duration::from_secs(60);

/// Who is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plugin {
    /// `sheave-cni` with an agent behind it.
    Ours,
    /// Debian's `ptp` with `host-local`, and `portmap` and `bandwidth` after it where a case asks for what they do.
    Oracle,
}

/// A node with plugins.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) plugin: Plugin,
    net: NetworkNode,
}

impl std::ops::Deref for Bed {
    type Target = NetworkNode;
    fn deref(&self) -> &NetworkNode {
        &self.net
    }
}

/// Lives while any case uses it: starting an agent for each would take longer than all cases.
static SHARED: [Mutex<Weak<Bed>>; 2] = [Mutex::new(Weak::new()), Mutex::new(Weak::new())];

/// The `sheave-cni` that `cargo xtask test` builds beside the program.
pub(crate) fn our_binary() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_sheave")).with_file_name("sheave-cni");
    assert!(path.exists(), "{} is missing: cargo build -p sheave-cni, for the same target", path.display());
    path
}

/// The lines of a file, or nothing.
pub(crate) fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// `config` with the keys of `more`.
pub(crate) fn with(mut config: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more}: not an object") };
    config.as_object_mut().expect("a configuration is an object").extend(more);
    config
}

impl Bed {
    /// The one that cases share.
    pub(crate) fn shared(plugin: Plugin) -> Arc<Bed> {
        let mut weak = SHARED[plugin as usize].lock().unwrap_or_else(PoisonError::into_inner);
        weak.upgrade().unwrap_or_else(|| {
            let bed = Arc::new(Bed::new(plugin));
            *weak = Arc::downgrade(&bed);
            bed
        })
    }

    /// One of its own, for a case that kills the agent, counts what is on the node or fills the pool.
    pub(crate) fn new(plugin: Plugin) -> Bed {
        Bed::with_flags(plugin, &["--pod-cidr", POD_RANGES])
    }

    /// With these flags for the agent.
    pub(crate) fn with_flags(plugin: Plugin, flags: &[&str]) -> Bed {
        let bed = Bed::stopped(plugin, flags);
        bed.start();
        bed
    }

    /// Without a running agent.
    pub(crate) fn stopped(plugin: Plugin, flags: &[&str]) -> Bed {
        Bed { plugin, net: NetworkNode::prepare(env!("CARGO_BIN_EXE_sheave"), flags) }
    }

    /// Starts the agent and waits until it serves; nothing for plugins that need none.
    pub(crate) fn start(&self) {
        if self.plugin == Plugin::Ours {
            self.launch();
            self.wait_serving();
        }
    }

    /// Waits until STATUS says that ADD would be served.
    pub(crate) fn wait_serving(&self) {
        self.net.wait_serving(&our_binary());
    }

    /// The newest version that both speak, where a case does not ask for another.
    pub(crate) fn newest(&self) -> &'static str {
        match self.plugin {
            Plugin::Ours => "1.1.0",
            Plugin::Oracle => "1.0.0",
        }
    }

    /// A plugin configuration of network `name`, in version 1.0.0.
    pub(crate) fn config(&self, name: &str) -> Value {
        match self.plugin {
            Plugin::Ours => self.net.config(name),
            Plugin::Oracle => json!({
                "cniVersion": "1.0.0", "name": name, "type": "ptp",
                "capabilities": {"ips": true, "dns": true},
                "ipam": {"type": "host-local", "dataDir": self.node.dir().join("ipam"),
                         "ranges": [[{"subnet": format!("{}.0/24", oracle_net(name))}]], "routes": [{"dst": "0.0.0.0/0"}]},
            }),
        }
    }

    /// The plugins of network `name` that do what `runtime` (a `runtimeConfig`) asks for.
    pub(crate) fn list(&self, name: &str, runtime: Value) -> Vec<Value> {
        let first = with(self.config(name), json!({"runtimeConfig": runtime}));
        let mut list = vec![first];
        if self.plugin == Plugin::Oracle {
            for (capability, plugin) in [("portMappings", "portmap"), ("bandwidth", "bandwidth")] {
                if !runtime[capability].is_null() {
                    list.push(json!({"cniVersion": "1.0.0", "name": name, "type": plugin,
                        "capabilities": {capability: true},
                        "runtimeConfig": {capability: runtime[capability]}}));
                }
            }
        }
        list
    }

    /// Where a plugin of this type lies.
    pub(crate) fn program(&self, config: &Value) -> PathBuf {
        match config["type"].as_str() {
            Some("sheave-cni") => our_binary(),
            Some(name) => Path::new(DEBIAN).join(name),
            // Cases that take the type away mean the plugin itself.
            None if self.plugin == Plugin::Ours => our_binary(),
            None => Path::new(DEBIAN).join("ptp"),
        }
    }

    /// The plugin itself, as a command on the node with a clean environment.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        self.node.netns.apply(&mut command);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// The command of a verb about a container, with all that a runtime sets.
    pub(crate) fn prepared(&self, verb: &str, ctr: &Ctr, config: &Value) -> Command {
        let mut command = self.command(&self.program(config));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &ctr.id).env("CNI_IFNAME", &ctr.ifname);
        command.env("CNI_NETNS", ctr.path()).env("CNI_PATH", DEBIAN);
        command
    }

    /// Runs a verb about a container.
    pub(crate) fn call(&self, verb: &str, ctr: &Ctr, config: &Value) -> Outcome {
        run(self.prepared(verb, ctr, config), config.to_string().as_bytes())
    }

    /// Runs a verb about no container: STATUS, GC, VERSION.
    pub(crate) fn verb(&self, verb: &str, config: &Value) -> Outcome {
        let mut command = self.command(&self.program(config));
        command.env("CNI_COMMAND", verb).env("CNI_PATH", DEBIAN);
        run(command, config.to_string().as_bytes())
    }

    /// ADD by a single plugin; panics unless it succeeds.
    #[track_caller]
    pub(crate) fn add(&self, ctr: &Ctr, config: &Value) -> Value {
        self.call("ADD", ctr, config).result()
    }

    /// DEL by a single plugin; panics unless it succeeds in silence.
    #[track_caller]
    pub(crate) fn del(&self, ctr: &Ctr, config: &Value) {
        self.call("DEL", ctr, config).silent();
    }

    /// ADD through a chain as libcni does it, each plugin given the result of the one before it.
    pub(crate) fn add_list(&self, ctr: &Ctr, list: &[Value]) -> Result<Value, Outcome> {
        let mut result: Option<Value> = None;
        for config in list {
            let config = with_prev(config, result.as_ref());
            let outcome = self.call("ADD", ctr, &config);
            if outcome.status != Some(0) {
                return Err(outcome);
            }
            result = Some(outcome.result());
        }
        Ok(result.expect("a chain has a plugin"))
    }

    /// CHECK through a chain: the first failure, if there is one.
    pub(crate) fn check_list(&self, ctr: &Ctr, list: &[Value], result: &Value) -> Result<(), Outcome> {
        for config in list {
            let outcome = self.call("CHECK", ctr, &with_prev(config, Some(result)));
            if outcome.status != Some(0) {
                return Err(outcome);
            }
        }
        Ok(())
    }

    /// DEL through a chain, last plugin first; panics unless each succeeds in silence.
    #[track_caller]
    pub(crate) fn del_list(&self, ctr: &Ctr, list: &[Value], result: Option<&Value>) {
        for config in list.iter().rev() {
            self.call("DEL", ctr, &with_prev(config, result)).silent();
        }
    }

    /// Nothing of an attachment is on the node: neither its links nor a route to its addresses.
    #[track_caller]
    pub(crate) fn assert_gone(&self, result: &Value) {
        wait_until("the attachment to be gone", self.patience(), || {
            let links = node_interfaces(result);
            let there = links_of(&self.node.netns);
            let left: Vec<&String> = links.iter().filter(|name| there.contains(*name)).collect();
            if !left.is_empty() {
                return Err(format!("links {left:?}"));
            }
            let routed = ips_of(result).into_iter().find(|ip| has_route_to(&self.node.netns, *ip));
            routed.map_or(Ok(()), |ip| Err(format!("a route to {ip}")))
        });
    }

    /// The address is free again: another container may ask for it and gets it.
    #[track_caller]
    pub(crate) fn assert_free(&self, network: &str, ip: IpAddr) {
        let ctr = Ctr::new();
        let list = self.list(network, json!({"ips": [self.with_prefix(ip)]}));
        let result = wait_until("the address to be free", self.patience(), || self.add_list(&ctr, &list));
        assert!(ips_of(&result).contains(&ip), "{ip} was asked for: {result}");
        self.del_list(&ctr, &list, Some(&result));
    }

    /// `ip` as a runtime asks for it.
    pub(crate) fn with_prefix(&self, ip: IpAddr) -> String {
        match self.plugin {
            Plugin::Ours => ip.to_string(),
            Plugin::Oracle => format!("{ip}/24"),
        }
    }

    /// An address of the network's range that counting from its start does not reach.
    pub(crate) fn static_ip(&self, network: &str, n: u8) -> IpAddr {
        match self.plugin {
            Plugin::Ours => IpAddr::from([10, 244, 8, n]),
            Plugin::Oracle => format!("{}.{}", oracle_net(network), 100 + n).parse().expect("an address"),
        }
    }

    fn patience(&self) -> Duration {
        match self.plugin {
            Plugin::Ours => PATIENCE,
            // It does all before it ends; what it has left then is left.
            Plugin::Oracle => Duration::from_millis(200),
        }
    }

    /// All that is on the node: links, addresses, routes, neighbours, rules. For beds that no other case uses.
    pub(crate) fn everything(&self) -> BTreeSet<String> {
        self.traces()
    }

    /// [`Bed::everything`] once nothing of the agent's start is still to come.
    pub(crate) fn at_rest(&self) -> BTreeSet<String> {
        match self.plugin {
            Plugin::Ours => self.net.settled(&our_binary()),
            Plugin::Oracle => self.traces(),
        }
    }
}

/// Three bytes of a range of each network's own: `host-local` counts each by itself.
fn oracle_net(network: &str) -> String {
    let hash = network.bytes().fold(7_u16, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    format!("10.{}.{}", 96 + (hash >> 8) % 31, hash & 0xff)
}

/// `config` as the plugin after one with `result` gets it.
pub(crate) fn with_prev(config: &Value, result: Option<&Value>) -> Value {
    match result {
        Some(result) => with(config.clone(), json!({"prevResult": result})),
        None => config.clone(),
    }
}

/// A container: an id and a network namespace.
#[derive(Debug)]
pub(crate) struct Ctr {
    pub(crate) id: String,
    pub(crate) ifname: String,
    netns: Option<NetNs>,
    /// What CNI_NETNS is, where it is not the namespace's own path.
    pub(crate) netns_path: Option<PathBuf>,
}

impl Ctr {
    pub(crate) fn new() -> Ctr {
        Ctr { id: unique("ctr"), ifname: "eth0".to_owned(), netns: Some(NetNs::new()), netns_path: None }
    }

    pub(crate) fn netns(&self) -> &NetNs {
        self.netns.as_ref().expect("the container's namespace is there")
    }

    /// The namespace goes, as when the container's last process ended; its path leads nowhere from now on.
    pub(crate) fn lose_netns(&mut self) {
        self.netns_path = Some(PathBuf::from("/run/netns/gone-with-its-container"));
        self.netns = None;
    }

    pub(crate) fn path(&self) -> PathBuf {
        match &self.netns_path {
            Some(path) => path.clone(),
            None => self.netns().path(),
        }
    }
}

/// What came of one execution.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A CNI error object.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: u64,
    pub(crate) object: Value,
    /// Message and details.
    pub(crate) text: String,
}

impl Outcome {
    /// The result of a successful ADD or VERSION.
    #[track_caller]
    pub(crate) fn result(&self) -> Value {
        assert_eq!(self.status, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// A success that prints nothing.
    #[track_caller]
    pub(crate) fn silent(&self) {
        assert_eq!((self.status, self.stdout.as_str()), (Some(0), ""), "{self:?}");
    }

    /// The error object of a failure.
    #[track_caller]
    pub(crate) fn refusal(&self) -> Refusal {
        assert!(self.status.is_some_and(|status| status != 0), "a failure was due: {self:?}");
        let object: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
        Refusal {
            code: object["code"].as_u64().unwrap_or_else(|| panic!("no code: {self:?}")),
            text: format!("{} {}", text("msg"), text("details")),
            object,
        }
    }

    /// The failure has this code; returns its text.
    #[track_caller]
    pub(crate) fn code(&self, code: u64) -> String {
        let refusal = self.refusal();
        assert_eq!(refusal.code, code, "{self:?}");
        refusal.text
    }
}

/// Runs a prepared command to its end.
pub(crate) fn run(command: Command, stdin: &[u8]) -> Outcome {
    let output = execute(command, stdin);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("plugins print text");
    Outcome { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Addresses of a result, without prefixes.
pub(crate) fn ips_of(result: &Value) -> Vec<IpAddr> {
    let rows = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    let addresses = rows.iter().filter_map(|row| row["address"].as_str()?.split('/').next()?.parse().ok());
    addresses.collect()
}

/// Names of the interfaces of a result that are on the node.
pub(crate) fn node_interfaces(result: &Value) -> Vec<String> {
    let rows = result["interfaces"].as_array().map(Vec::as_slice).unwrap_or_default();
    let on_node = rows.iter().filter(|row| row["sandbox"].as_str().unwrap_or_default().is_empty());
    on_node.filter_map(|row| row["name"].as_str()).map(str::to_owned).collect()
}

/// `ip -j ARGS`, parsed; `Null` where it fails.
pub(crate) fn ip_json(ns: &NetNs, args: &[&str]) -> Value {
    let output = ns.command("ip").arg("-j").args(args).output().expect("start ip");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The link of that name, if there is one.
pub(crate) fn link(ns: &NetNs, name: &str) -> Option<Value> {
    let rows = ip_json(ns, &["-d", "link", "show", "dev", name]);
    rows.as_array()?.first().filter(|row| row["ifname"] == name).cloned()
}

/// Names of all links.
pub(crate) fn links_of(ns: &NetNs) -> BTreeSet<String> {
    let rows = ip_json(ns, &["link", "show"]);
    let names = rows.as_array().into_iter().flatten().filter_map(|row| row["ifname"].as_str());
    names.map(str::to_owned).collect()
}

/// Global addresses of a link.
pub(crate) fn addresses(ns: &NetNs, name: &str) -> Vec<IpAddr> {
    let rows = ip_json(ns, &["address", "show", "dev", name, "scope", "global"]);
    let infos = rows.as_array().into_iter().flatten().filter_map(|row| row["addr_info"].as_array());
    infos.flatten().filter_map(|info| info["local"].as_str()?.parse().ok()).collect()
}

/// Whether there is a route to exactly this address.
pub(crate) fn has_route_to(ns: &NetNs, ip: IpAddr) -> bool {
    let family = if ip.is_ipv4() { "-4" } else { "-6" };
    let rows = ip_json(ns, &[family, "route", "show", "exact", &ip.to_string()]);
    rows.as_array().is_some_and(|rows| !rows.is_empty())
}
