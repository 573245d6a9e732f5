//! What the tests of network policies stand on: a control plane and an agent that does the network only, in a node's
//! namespace of its own, and namespaces that stand for pods. Their Pod objects are made here, as another runtime's
//! would be. Everything goes with the bed.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sheave_agent::cluster::Client;
use sheave_harness::{NetNs, unique, wait_for, wait_until};

/// Name of the node that the agent is on.
pub(crate) const NODE: &str = "policy-node";
/// How long processes may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Addresses of the node on its uplink, and the outside's.
pub(crate) const NODE_IP: &str = "192.0.2.10";
pub(crate) const OUTSIDE_IP: &str = "192.0.2.1";

/// A namespace that stands for a pod.
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) ns: NetNs,
    pub(crate) ips: [IpAddr; 2],
    pub(crate) link: String,
}

/// A node, its API and its pods.
pub(crate) struct Bed {
    pub(crate) node: NetNs,
    pub(crate) outside: NetNs,
    pub(crate) pods: Vec<Pod>,
    runtime: tokio::runtime::Runtime,
    client: Client,
    dir: tempfile::TempDir,
    pin_dir: PathBuf,
    control: Child,
    agent: Option<Child>,
    flags: Vec<String>,
}

fn end(child: &mut Child) {
    // Both fail only when it has ended already.
    child.kill().ok();
    child.wait().ok();
}

fn log(dir: &Path, name: &str) -> std::fs::File {
    let path = dir.join(name);
    std::fs::File::options().create(true).append(true).open(path).expect("open a log")
}

impl Bed {
    /// The API answers and the agent runs; `flags` are more of the agent's.
    pub(crate) fn new(flags: &[&str]) -> Self {
        let (node, outside) = (NetNs::new(), NetNs::new());
        node.veth("eth0", &outside, "eth0");
        for (ns, ip4, ip6) in [(&node, NODE_IP, "2001:db8::10"), (&outside, OUTSIDE_IP, "2001:db8::1")] {
            ns.ip(&["address", "add", &format!("{ip4}/24"), "dev", "eth0"]);
            ns.ip(&["address", "add", &format!("{ip6}/64"), "dev", "eth0", "nodad"]);
        }
        node.ip(&["route", "add", "default", "via", OUTSIDE_IP]);
        outside.ip(&["route", "add", "10.7.0.0/16", "via", NODE_IP]);
        outside.ip(&["-6", "route", "add", "fd07::/64", "via", "2001:db8::10"]);
        let dir = tempfile::Builder::new().prefix("shv-policy-").tempdir().expect("a directory");
        let state = dir.path().join("state");
        let mut command = node.command(env!("CARGO_BIN_EXE_sheave"));
        command.args(["control", "--listen", "127.0.0.1:0", "--state-dir"]).arg(&state);
        let control =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log(dir.path(), "control.log"));
        let control = control.spawn().expect("start the control plane");
        let runtime = node.run(|| {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(2).enable_all().build().expect("a runtime")
        });
        let client = connect(&runtime, &state.join("admin.kubeconfig"));
        let pin_dir = Path::new("/sys/fs/bpf").join(unique("sheave-policy"));
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mut bed = Bed {
            node,
            outside,
            pods: Vec::new(),
            runtime,
            client,
            dir,
            pin_dir,
            control,
            agent: None,
            flags,
        };
        bed.start();
        bed
    }

    fn path_flags(&self) -> Vec<String> {
        let dir = |name: &str| self.dir.path().join(name).display().to_string();
        let flags = [
            ("--state-dir", dir("agent")),
            ("--run-dir", dir("run")),
            ("--pin-dir", self.pin_dir.display().to_string()),
        ];
        flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    /// Starts the agent; it must not be running.
    pub(crate) fn start(&mut self) {
        assert!(self.agent.is_none(), "the agent is running");
        let kubeconfig = self.dir.path().join("state/admin.kubeconfig");
        let mut command = self.node.command(env!("CARGO_BIN_EXE_sheave"));
        command.args(["agent", "--components", "network", "--node-name", NODE, "--pod-link", "tp"]);
        command.args(["--pod-cidr", "10.9.0.0/24", "--pod-cidr", "fd09::/64"]);
        command.args(["--health-listen", "127.0.0.1:0", "--agent-listen", "127.0.0.1:0", "--kubeconfig"]);
        command.arg(kubeconfig).args(self.path_flags()).args(&self.flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log(self.dir.path(), "agent.log"));
        self.agent = Some(command.spawn().expect("start the agent"));
    }

    /// SIGKILL for the agent.
    pub(crate) fn kill(&mut self) {
        end(&mut self.agent.take().expect("the agent is running"));
    }

    /// Directory of the network object's pins.
    pub(crate) fn net_pins(&self) -> PathBuf {
        sheave_agent::dataplane::ebpf::versioned(&self.pin_dir).join("net")
    }

    /// Where the agent's pins are.
    pub(crate) fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// What `sheave status` says here.
    pub(crate) fn status(&self) -> String {
        let mut command = self.node.command(env!("CARGO_BIN_EXE_sheave"));
        command.arg("status").args(self.path_flags()).arg("--kubeconfig");
        let output = command.arg(self.dir.path().join("state/admin.kubeconfig")).output();
        let output = output.expect("start sheave status");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    /// Waits until the kernel's tables know every pod's device.
    pub(crate) fn wait_known(&self) {
        wait_for("every pod to be known", || {
            let status = sheave_agent::dataplane::ebpf::guard_status(&self.pin_dir);
            let pods = status.ok().flatten().map_or(0, |status| status.pods);
            if pods == self.pods.len() * 2 { Ok(()) } else { Err(format!("{pods}; {}", self.log_tail())) }
        });
    }

    /// The end of the agent's log.
    pub(crate) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// One request; panics with the server's words if it is refused.
    #[track_caller]
    pub(crate) fn request(&self, method: &str, path: &str, body: Value) -> Value {
        self.try_request(method, path, body).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn try_request(&self, method: &str, path: &str, body: Value) -> Result<Value, String> {
        let (client, path) = (self.client.clone(), path.to_owned());
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let method = method.parse().expect("a method");
        let task = async move { client.send::<Value>(method, &path, kind, Some(&body)).await };
        let done = self.runtime.block_on(self.runtime.spawn(task)).expect("the request's task");
        done.map_err(|error| sheave_agent::cluster::chain(&error))
    }

    pub(crate) fn add_namespace(&self, name: &str, labels: Value) {
        let object = json!({"metadata": {"name": name, "labels": labels}});
        self.request("POST", "/api/v1/namespaces", object);
    }

    /// Makes a pod: its namespace, its link and routes, and its object with addresses.
    pub(crate) fn add_pod(&mut self, namespace: &str, name: &str, labels: Value, ports: Value) -> usize {
        let n = self.pods.len() + 2;
        let ips: [IpAddr; 2] =
            [format!("10.7.0.{n}").parse().expect("IPv4"), format!("fd07::{n:x}").parse().expect("IPv6")];
        let (ns, link) = (NetNs::new(), format!("tp{n}"));
        self.node.veth(&link, &ns, "eth0");
        let [ip4, ip6] = ips.map(|ip| ip.to_string());
        ns.ip(&["address", "add", &format!("{ip4}/32"), "dev", "eth0"]);
        ns.ip(&["address", "add", &format!("{ip6}/128"), "dev", "eth0", "nodad"]);
        ns.ip(&["route", "add", "169.254.1.1", "dev", "eth0"]);
        ns.ip(&["route", "add", "default", "via", "169.254.1.1", "dev", "eth0"]);
        let mac = self.node.ip(&["-br", "link", "show", &link]);
        let mac = mac.split_whitespace().nth(2).expect("a hardware address").to_owned();
        ns.ip(&["-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0"]);
        for gateway in ["169.254.1.1", "fe80::1"] {
            ns.ip(&["neighbour", "add", gateway, "lladdr", &mac, "dev", "eth0", "nud", "permanent"]);
        }
        self.node.ip(&["route", "add", &ip4, "dev", &link]);
        self.node.ip(&["-6", "route", "add", &ip6, "dev", &link]);
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let container = json!({"name": "c", "image": "none", "ports": ports});
        let object = json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"nodeName": NODE, "containers": [container]},
        });
        self.request("POST", &path, object);
        let status = json!({"status": {
            "phase": "Running", "podIP": ip4, "podIPs": [{"ip": ip4}, {"ip": ip6}],
        }});
        self.request("PATCH", &format!("{path}/{name}/status"), status);
        self.pods.push(Pod { namespace: namespace.to_owned(), name: name.to_owned(), ns, ips, link });
        self.pods.len() - 1
    }

    /// Makes or replaces a policy.
    #[track_caller]
    pub(crate) fn put_policy(&self, namespace: &str, name: &str, spec: &Value) {
        let path = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies");
        let object = json!({"metadata": {"name": name}, "spec": spec});
        self.request("POST", &path, object);
    }

    #[track_caller]
    pub(crate) fn delete_policy(&self, namespace: &str, name: &str) {
        let path = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}");
        self.request("DELETE", &path, json!({}));
    }

    /// Waits until every pod's link has its programs.
    pub(crate) fn wait_attached(&self) {
        let links = self.net_pins().join("links");
        for pod in &self.pods {
            let shown = self.node.ip(&["-o", "link", "show", &pod.link]);
            let index = shown.split(':').next().expect("an index").to_owned();
            wait_for(&format!("programs at {}", pod.link), || {
                let there = |kind: &str| {
                    ["ingress", "egress"]
                        .iter()
                        .all(|way| links.join(format!("{kind}_{index}_{way}")).exists())
                };
                if there("tcx") || there("clsact") { Ok(()) } else { Err(self.log_tail()) }
            });
        }
    }
}

fn connect(runtime: &tokio::runtime::Runtime, path: &Path) -> Client {
    wait_until("the control plane", PATIENCE, || {
        let path = path.to_owned();
        let task = async move {
            let file = kube::config::Kubeconfig::read_from(path).map_err(|error| error.to_string())?;
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(file, &options).await;
            let client = kube::Client::try_from(config.map_err(|error| error.to_string())?);
            let client = client.map_err(|error| error.to_string())?;
            client.apiserver_version().await.map_err(|error| error.to_string())?;
            Ok::<_, String>(Client::new(client))
        };
        runtime.block_on(runtime.spawn(task)).expect("the task")
    })
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent's log ends with:\n{}", self.log_tail());
        }
        if let Some(mut agent) = self.agent.take() {
            end(&mut agent);
        }
        end(&mut self.control);
        let errors = sheave_agent::dataplane::uninstall(&self.pin_dir);
        if let Err(errors) = errors {
            // A second panic would abort the whole suite and hide the first.
            assert!(std::thread::panicking(), "pins stay: {errors:?}");
            eprintln!("pins stay: {errors:?}");
        }
    }
}
