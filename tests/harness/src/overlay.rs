//! Nodes of one cluster as namespaces on one switch, each with the real agent, and a control plane in a namespace of
//! its own. Pods are attached by the real plugin. Everything goes when the bed is dropped.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{NetNs, unique, wait_for};
use serde_json::{Value, json};

/// Patience of one connect or read that is expected to work soon: callers repeat it.
const TRY: Duration = Duration::from_millis(1500);
/// Where the control plane is.
pub const HUB_IP4: &str = "192.0.2.9";

/// A program that is killed when nobody wants it any more.
#[derive(Debug)]
pub struct Program {
    child: Child,
}

impl Program {
    fn start(command: &mut Command, log: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(log).expect("open a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Program { child: command.spawn().expect("start sheave") }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and the wait for the end.
    pub fn kill9(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("wait")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A pod that the plugin attached.
#[derive(Debug)]
pub struct Pod {
    /// Where it lives.
    pub netns: NetNs,
    /// What the plugin knows it by.
    pub id: String,
    /// IPv4 first.
    pub ips: Vec<IpAddr>,
    /// Of its link, as it was attached.
    pub mtu: u32,
}

/// A node.
#[derive(Debug)]
pub struct Host {
    /// Name of its Node.
    pub name: String,
    /// Where it lives.
    pub netns: NetNs,
    /// Its addresses on the switch.
    pub ip4: String,
    /// See `ip4`.
    pub ip6: String,
    bin: PathBuf,
    dir: PathBuf,
    args: Vec<String>,
    components: &'static str,
    /// Where the agent pins its maps, programs and links.
    pins: PathBuf,
    agent: Option<Program>,
}

impl Host {
    /// Starts the agent; it must not be running.
    pub fn start(&mut self) {
        assert!(self.agent.is_none(), "{} runs", self.name);
        let mut command = self.netns.command(&self.bin);
        command.args(["agent", "--components", self.components, "--node-name", &self.name]);
        command.args(["--state-dir", &self.path("state"), "--run-dir", &self.path("run")]);
        command.args(["--log-dir", &self.path("log"), "--uplink", "eth0"]);
        command.arg("--pin-dir").arg(&self.pins).args(&self.args);
        self.agent = Some(Program::start(&mut command, &self.dir.join("agent.log")));
    }

    /// What the agent does from its next start on.
    pub fn set_components(&mut self, components: &'static str, args: &[&str]) {
        self.components = components;
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    }

    /// SIGKILL for the agent.
    pub fn kill9(&mut self) {
        self.agent.take().expect("a running agent").kill9();
    }

    /// The agent's process.
    pub fn pid(&self) -> u32 {
        self.agent.as_ref().expect("a running agent").pid()
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Where the agent's `--run-dir` is.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The end of the agent's log.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// What the agent tells of the overlay.
    pub fn status(&self) -> Value {
        let text = std::fs::read(self.dir.join("run/network/overlay.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Waits until the agent serves the plugin.
    #[track_caller]
    pub fn wait_serving(&mut self) {
        let socket = self.dir.join("run/cni.sock");
        wait_for(&format!("the agent of {} to serve", self.name), || {
            if let Some(status) = self.agent.as_mut().and_then(Program::ended) {
                panic!("the agent of {} ended with {status}:\n{}", self.name, self.log());
            }
            match self.netns.run(|| std::os::unix::net::UnixStream::connect(&socket)) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("{error}\n{}", self.log())),
            }
        });
    }

    /// Waits until so many ranges of peers are reached.
    #[track_caller]
    pub fn wait_ways(&self, count: usize) {
        wait_for(&format!("{} to reach {count} ranges", self.name), || {
            let status = self.status();
            let ways = status["peers"].as_array().map_or(0, Vec::len);
            if ways == count && status["synced"] == true {
                Ok(())
            } else {
                Err(format!("{status}\n{}", self.log()))
            }
        });
    }

    /// Calls the plugin; its answer, or what it said on failing.
    pub fn cni(&self, verb: &str, id: &str, netns: &Path) -> Result<Value, String> {
        let plugin = self.bin.with_file_name("sheave-cni");
        let config = json!({
            "cniVersion": "1.0.0", "name": "pods", "type": "sheave-cni",
            "socket": self.dir.join("run/cni.sock"), "spool": self.dir.join("state/network/spool"),
        });
        let mut command = self.netns.command(plugin);
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", netns).env("CNI_PATH", "/nonexistent");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start sheave-cni");
        let mut stdin = child.stdin.take().expect("its input");
        stdin.write_all(config.to_string().as_bytes()).expect("tell it the configuration");
        drop(stdin);
        let output = child.wait_with_output().expect("wait for sheave-cni");
        if output.status.success() {
            return Ok(serde_json::from_slice(&output.stdout).unwrap_or_default());
        }
        Err(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
    }

    /// Where the agent pins its maps, programs and links.
    pub fn pin_dir(&self) -> &Path {
        &self.pins
    }

    /// `sheave ARGS` with the node's directories; what it printed, or that and why it failed.
    pub fn sheave(&self, args: &[&str]) -> Result<String, String> {
        let mut command = self.netns.command(&self.bin);
        command.args(args).args(["--state-dir", &self.path("state"), "--run-dir", &self.path("run")]);
        command.arg("--pin-dir").arg(&self.pins);
        let output = command.output().map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(text) } else { Err(text + &String::from_utf8_lossy(&output.stderr)) }
    }

    /// Makes a pod.
    #[track_caller]
    pub fn pod(&self) -> Pod {
        let made = self.try_pod(NetNs::new(), unique("pod"));
        made.unwrap_or_else(|(_, _, why)| panic!("ADD on {}: {why}\n{}", self.name, self.log()))
    }

    /// Makes a pod of a namespace and a name; both come back with the reason where the plugin fails.
    pub fn try_pod(&self, netns: NetNs, id: String) -> Result<Pod, (NetNs, String, String)> {
        let result = match self.cni("ADD", &id, &netns.path()) {
            Ok(result) => result,
            Err(why) => return Err((netns, id, why)),
        };
        let rows = result["ips"].as_array().cloned().unwrap_or_default();
        let address = |row: &Value| row["address"].as_str()?.split('/').next()?.parse().ok();
        let mut ips: Vec<IpAddr> = rows.iter().filter_map(address).collect();
        ips.sort();
        let mtu = mtu(&netns, "eth0");
        Ok(Pod { netns, id, ips, mtu })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.agent.take());
        // Not there where the agent pinned nothing.
        std::fs::remove_dir_all(&self.pins).ok();
    }
}

/// MTU of a link.
#[track_caller]
pub fn mtu(netns: &NetNs, link: &str) -> u32 {
    let text = netns.ip(&["-o", "link", "show", link]);
    let mut words = text.split_whitespace().skip_while(|word| *word != "mtu");
    words.nth(1).and_then(|mtu| mtu.parse().ok()).unwrap_or_else(|| panic!("no MTU in {text}"))
}

/// Where the control plane runs, and the switch.
#[derive(Debug)]
pub struct Bed {
    /// Where the bridge is, with a port a node.
    pub switch: NetNs,
    /// Where the control plane runs.
    pub hub: NetNs,
    /// Where everything is kept.
    pub dir: tempfile::TempDir,
    bin: PathBuf,
    control: Option<Program>,
    hosts: usize,
}

impl Bed {
    /// A switch, and nothing on it. `bin` is the program; the plugin is beside it.
    pub fn new(bin: impl AsRef<Path>) -> Self {
        let (switch, hub) = (NetNs::new(), NetNs::new());
        switch.ip(&["link", "add", "br0", "type", "bridge"]);
        switch.ip(&["link", "set", "br0", "up"]);
        let dir = tempfile::Builder::new().prefix("shv-").tempdir().expect("a directory");
        Bed { switch, hub, dir, bin: bin.as_ref().to_owned(), control: None, hosts: 0 }
    }

    fn plug(&self, netns: &NetNs, port: &str, ips: [&str; 2]) {
        netns.veth("eth0", &self.switch, port);
        self.switch.ip(&["link", "set", port, "master", "br0"]);
        // IPv6 addresses are to survive what happens to the link, as IPv4 addresses do.
        netns
            .run(|| std::fs::write("/proc/sys/net/ipv6/conf/eth0/keep_addr_on_down", "1"))
            .expect("keep addresses");
        netns.ip(&["addr", "add", &format!("{}/24", ips[0]), "dev", "eth0"]);
        netns.ip(&["addr", "add", &format!("{}/64", ips[1]), "dev", "eth0", "nodad"]);
    }

    /// Starts the control plane.
    pub fn control(&mut self) {
        self.plug(&self.hub, "hub", [HUB_IP4, "2001:db8::9"]);
        let mut command = self.hub.command(&self.bin);
        command.args([
            "control",
            "--advertise-address",
            HUB_IP4,
            "--cluster-cidr",
            "10.244.0.0/16,fd00:244::/48",
        ]);
        command.args(["--state-dir", &self.dir.path().join("control").display().to_string()]);
        self.control = Some(Program::start(&mut command, &self.dir.path().join("control.log")));
        wait_for("the control plane", || self.raw("GET", "/readyz", None).map(drop));
    }

    /// A request of the administrator.
    pub fn raw(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        let text = self.text(method, path, body)?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// [`Bed::raw`], its answer as it came.
    pub fn text(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String, String> {
        let kubeconfig = self.dir.path().join("control/admin.kubeconfig");
        if !kubeconfig.exists() {
            return Err("no kubeconfig yet".to_owned());
        }
        let mut command = self.hub.command(&self.bin);
        command.args(["raw", method, path, "--kubeconfig"]).arg(kubeconfig);
        if let Some(body) = body {
            command.args(["--data", &body.to_string()]);
        }
        let output = command.output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The kubeconfig of agents.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("control/agent.kubeconfig")
    }

    /// A node on the switch, its agent not started. `args` are more flags.
    pub fn host(&mut self, args: &[&str]) -> Host {
        self.hosts += 1;
        let n = self.hosts;
        let name = format!("node-{n}");
        let (ip4, ip6) = (format!("192.0.2.{}", 10 + n), format!("2001:db8::{:x}", 0x10 + n));
        let netns = NetNs::new();
        self.plug(&netns, &format!("port{n}"), [&ip4, &ip6]);
        let dir = self.dir.path().join(&name);
        std::fs::create_dir(&dir).expect("make the node's directory");
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let pins = Path::new("/sys/fs/bpf").join(unique("sheave-host"));
        let (bin, components) = (self.bin.clone(), "network");
        Host { name, netns, ip4, ip6, bin, dir, args, components, pins, agent: None }
    }

    /// Makes the Node, as a kubelet would, with these addresses.
    #[track_caller]
    pub fn register(&self, host: &Host, ips: &[&str]) {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": host.name},
            "status": {"addresses": ips}});
        self.raw("POST", "/api/v1/nodes", Some(&node)).expect("make the Node");
    }

    /// A node that is registered with these addresses and runs.
    #[track_caller]
    pub fn join(&mut self, ips: Ips, args: &[&str]) -> Host {
        let kubeconfig = self.kubeconfig().display().to_string();
        let mut host = self.host(&[&["--kubeconfig", kubeconfig.as_str()], args].concat());
        let ips: Vec<String> = match ips {
            Ips::Both => vec![host.ip4.clone(), host.ip6.clone()],
            Ips::V6 => vec![host.ip6.clone()],
        };
        host.args.extend(["--node-ip".to_owned(), ips.join(",")]);
        self.register(&host, &ips.iter().map(String::as_str).collect::<Vec<_>>());
        host.start();
        host.wait_serving();
        host
    }

    /// Removes a Node.
    #[track_caller]
    pub fn unregister(&self, host: &Host) {
        self.raw("DELETE", &format!("/api/v1/nodes/{}", host.name), None).expect("delete the Node");
    }
}

/// Which addresses a node tells the cluster.
#[derive(Debug, Clone, Copy)]
pub enum Ips {
    /// One of each family.
    Both,
    /// The IPv6 one alone.
    V6,
}

/// Connects and says something; the address that `to` saw.
pub fn try_talk(from: &NetNs, to: &NetNs, ip: IpAddr) -> Result<IpAddr, String> {
    let listener = to.run(|| TcpListener::bind((ip, 0))).map_err(|e| format!("listen on {ip}: {e}"))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let mut out = from
        .run(|| TcpStream::connect_timeout(&address, TRY))
        .map_err(|e| format!("connect to {address}: {e}"))?;
    let (mut back, peer) = listener.accept().map_err(|e| e.to_string())?;
    back.set_read_timeout(Some(TRY)).map_err(|e| e.to_string())?;
    // More than one packet, so that one that is too large for the way shows.
    let text = [7_u8; 6000];
    out.write_all(&text).map_err(|e| format!("send: {e}"))?;
    let mut said = [0; 6000];
    back.read_exact(&mut said).map_err(|e| format!("receive on {ip}: {e}"))?;
    assert_eq!(text, said);
    Ok(peer.ip())
}

/// Waits until `from` reaches `ip`, an address of `to`.
#[track_caller]
pub fn wait_talk(from: &NetNs, to: &NetNs, ip: IpAddr) -> IpAddr {
    wait_for(&format!("a connection to {ip}"), || try_talk(from, to, ip))
}

/// Every pod reaches every other over both families, and is seen with its own address.
#[track_caller]
pub fn all_pairs(pods: &[&Pod]) {
    for from in pods {
        for to in pods.iter().filter(|to| to.id != from.id) {
            for (mine, yours) in from.ips.iter().zip(&to.ips) {
                assert_eq!(
                    wait_talk(&from.netns, &to.netns, *yours),
                    *mine,
                    "{yours} sees another's address"
                );
            }
        }
    }
}

/// One TCP connection that has to survive.
#[derive(Debug)]
pub struct Stream {
    near: TcpStream,
    far: TcpStream,
}

impl Stream {
    /// Connects; `family` is an index of addresses.
    #[track_caller]
    pub fn open(from: &Pod, to: &Pod, family: usize) -> Self {
        let ip = to.ips[family];
        let listener = to.netns.run(|| TcpListener::bind((ip, 0))).expect("listen");
        let address = listener.local_addr().expect("an address");
        let near = wait_for("the stream", || from.netns.run(|| TcpStream::connect_timeout(&address, TRY)));
        let (far, _) = listener.accept().expect("accept");
        for side in [&near, &far] {
            side.set_read_timeout(Some(crate::wait::PATIENCE)).expect("set a timeout");
        }
        Stream { near, far }
    }

    /// Says something there and back, however long it takes.
    #[track_caller]
    pub fn beat(&mut self) {
        let mut said = [0; 4];
        self.near.write_all(b"ping").expect("send");
        self.far.read_exact(&mut said).expect("the connection lives");
        self.far.write_all(b"pong").expect("send back");
        self.near.read_exact(&mut said).expect("the connection lives");
        assert_eq!(&said, b"pong");
    }
}
