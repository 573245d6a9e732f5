//! Runtimes of others on our network: podman and containerd as Debian has them, with runc, on two hosts with an agent
//! each. Every host is a namespace of networks, mounts and processes, so that nothing of a runtime outlives its test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use sheave_harness::netns::checked;
use sheave_harness::{NetNs, http, image, require_program, require_root, unique, wait_for};

use crate::cni_bed::our_binary;

const SHEAVE: &str = env!("CARGO_BIN_EXE_sheave");
/// The address of the outside, which knows no pod.
const OUTSIDE: &str = "192.0.2.1";
const HOSTS: [(&str, &str, &str); 2] =
    [("a", "192.0.2.10", "10.244.1.0/24"), ("b", "192.0.2.20", "10.244.2.0/24")];
/// What a container that serves does.
const SERVE: &str = "mkdir -p /www && echo here > /www/index.html && exec /bin/httpd -f -p 80 -h /www";

/// Directories of the machine that each host has of its own, and what runtimes want to find there.
const PREPARE: &str = "
set -e
mount --make-rprivate /
for dir in /run /var/lib /opt /etc/cni /mnt; do mount -t tmpfs tmpfs $dir; done
mount -t bpf bpf /sys/fs/bpf
mkdir -p /run/netns /etc/cni/net.d /opt/cni/bin
echo ready > /run/ready
exec sleep infinity";

const CONTAINERD: &str = r#"
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
"#;

const PODMAN: &str = r#"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
default_network = "sheave"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
"#;

/// A host; dropping it ends all that runs there.
struct Host {
    netns: NetNs,
    /// `unshare`, whose death is that of all inside.
    outer: Child,
    /// The first process inside.
    init: u32,
    ip: &'static str,
}

impl Host {
    fn new(lan: &NetNs, (name, ip, _): (&str, &'static str, &str)) -> Self {
        let netns = NetNs::new();
        netns.veth("up0", lan, &format!("to-{name}"));
        lan.ip(&["link", "set", &format!("to-{name}"), "master", "br0"]);
        netns.ip(&["addr", "add", &format!("{ip}/24"), "dev", "up0"]);
        netns.ip(&["route", "add", "default", "via", OUTSIDE]);
        let mut command = netns.command("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", PREPARE]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let outer = command.spawn().expect("start unshare");
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let init = wait_for("the host's first process", || {
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            text.trim().parse::<u32>().map_err(|_| format!("{text:?}"))
        });
        let host = Host { netns, outer, init, ip };
        wait_for("the host's file systems", || {
            let ready = PathBuf::from(format!("/proc/{init}/root/run/ready"));
            if ready.exists() { Ok(()) } else { Err("not mounted") }
        });
        host
    }

    /// A command inside.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--mount", "--pid", "--net", "--", program]);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command of the shell inside.
    fn try_sh(&self, line: &str) -> Output {
        self.command("timeout").args(["60", "sh", "-c", line]).output().expect("start nsenter")
    }

    #[track_caller]
    fn sh(&self, line: &str) -> String {
        let output = self.try_sh(line);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            return text(&output.stdout);
        }
        let log = self.try_sh("cat /run/agent.log");
        panic!(
            "{line}: {}: {}{}\nagent: {}",
            output.status,
            text(&output.stdout),
            text(&output.stderr),
            text(&log.stdout)
        );
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::write(format!("/proc/{}/root{path}", self.init), text).expect("write a file of the host");
    }

    /// Starts what goes on by itself; its output goes to `/run/NAME.log`.
    fn start(&self, name: &str, line: &str) {
        let line = format!("{line} > /run/{name}.log 2>&1 < /dev/null");
        let mut command = self.command("sh");
        command.args(["-c", &line]).stdout(Stdio::null()).stderr(Stdio::null());
        // It ends with the host.
        drop(command.spawn().unwrap_or_else(|e| panic!("start {name}: {e}")));
    }

    /// The agent, and the plugin as `sheave install cni` leaves it.
    fn join(&self, name: &str) {
        let nodes: Vec<String> = HOSTS
            .iter()
            .map(|(name, ip, range)| {
                format!("[[node]]\nname = \"{name}\"\nnode-ips = [\"{ip}\"]\npod-cidrs = [\"{range}\"]\n")
            })
            .collect();
        self.write("/run/peers.toml", &nodes.concat());
        let flags = "--peers /run/peers.toml --overlay vxlan --health-listen 127.0.0.1:0";
        self.start("agent", &format!("{SHEAVE} agent --components network --node-name {name} {flags}"));
        self.sh(&format!("{SHEAVE} install cni --plugin {}", our_binary().display()));
        wait_for("the agent", || {
            let socket = format!("/proc/{}/root/run/sheave/cni.sock", self.init);
            if std::path::Path::new(&socket).exists() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&self.try_sh("cat /run/agent.log").stdout).into_owned())
            }
        });
    }

    /// Fails where something of a container is still on the host.
    #[track_caller]
    fn assert_nothing_left(&self) {
        wait_for("the host to be as it was", || {
            let links = self.sh("ip -br link");
            let leases = self.sh("ls /var/lib/sheave/network/leases");
            let ports = self.sh("nft list table inet sheave-net | grep comment || true");
            if links.lines().any(|link| link.starts_with("shv"))
                || !leases.trim().is_empty()
                || !ports.trim().is_empty()
            {
                Err(format!("{links}{leases}{ports}"))
            } else {
                Ok(())
            }
        });
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.outer.kill());
        drop(self.outer.wait());
    }
}

struct World {
    hosts: [Host; 2],
    lan: NetNs,
    /// Name of the cgroups that runtimes make, in every hierarchy.
    cgroup: String,
}

impl World {
    fn new() -> Self {
        let lan = NetNs::new();
        lan.ip(&["link", "add", "br0", "type", "bridge"]);
        lan.ip(&["addr", "add", &format!("{OUTSIDE}/24"), "dev", "br0"]);
        lan.ip(&["link", "set", "br0", "up"]);
        let hosts = HOSTS.map(|host| Host::new(&lan, host));
        for (host, (name, ..)) in hosts.iter().zip(HOSTS) {
            host.join(name);
        }
        World { hosts, lan, cgroup: unique("sheave-callers") }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            drop(host.outer.kill());
            drop(host.outer.wait());
        }
        let line = format!(
            "for dir in /sys/fs/cgroup/*/{0} /sys/fs/cgroup/{0}; do [ -d $dir ] && find $dir -depth -type d -exec rmdir {{}} \\; ; done; true",
            self.cgroup
        );
        // Dying processes may take a moment to leave their cgroups.
        wait_for("the runtimes' cgroups to be gone", || {
            checked(Command::new("sh").args(["-c", &line]).stderr(Stdio::null()));
            let left = checked(Command::new("sh").args([
                "-c",
                &format!("ls -d /sys/fs/cgroup/*/{0} /sys/fs/cgroup/{0} 2>/dev/null || true", self.cgroup),
            ]));
            if left.trim().is_empty() { Ok(()) } else { Err(left) }
        });
    }
}

/// What a container says that asks `ip:port`; `nc` ends with the answer, and its input a moment later.
fn asking(ip: &str, port: u16) -> String {
    format!(r"(printf 'GET / HTTP/1.0\r\n\r\n'; sleep 2) | nc -w 5 {ip} {port}")
}

#[test]
fn containerd_runs_containers_on_two_hosts() {
    if !require_root() || !require_program("containerd") || !require_program("runc") {
        return;
    }
    let world = World::new();
    let [a, b] = &world.hosts;
    let archive = image::busybox();
    for host in &world.hosts {
        host.write("/run/containerd.toml", CONTAINERD);
        host.start("containerd", "containerd --config /run/containerd.toml");
        wait_for("containerd", || {
            let asked = host.try_sh("ctr version");
            if asked.status.success() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&asked.stderr).into_owned())
            }
        });
        host.sh(&format!("ctr images import --snapshotter native {}", archive.display()));
    }
    let run = "ctr run --rm --cni --cgroup '' --snapshotter native localhost/busybox:1";
    b.start("server", &format!("{run} server /bin/sh -c 'ip -o -4 addr show eth0; {SERVE}'"));
    let server = wait_for("the server's address", || {
        // Who writes it may not have begun yet.
        let said = String::from_utf8_lossy(&b.try_sh("cat /run/server.log").stdout).into_owned();
        let ip = said.split_whitespace().find_map(|word| word.strip_suffix("/32")).map(str::to_owned);
        ip.ok_or(said)
    });
    assert!(server.starts_with("10.244.2."), "{server}");
    let at = SocketAddr::new(server.parse().expect("an address"), 80);
    wait_for("the server", || http::get_in(&b.netns, at, "/").map(drop));
    // Across hosts, the other host, the own one, and the outside, which can't answer to a pod's address.
    let client = format!(
        "for ip in {server} {} {} {OUTSIDE}; do ping -c 1 -W 5 $ip || exit 7; done; {}",
        b.ip,
        a.ip,
        asking(&server, 80)
    );
    a.write("/run/client.sh", &client);
    let mount = "--mount type=bind,src=/run/client.sh,dst=/client.sh,options=rbind:ro";
    let said = a.sh(&run
        .replace("run --rm", &format!("run --rm {mount}"))
        .replace("busybox:1", "busybox:1 client /bin/sh /client.sh"));
    assert!(said.contains("here"), "{said}");
    a.assert_nothing_left();
    b.sh("ctr tasks kill -s SIGKILL server");
    b.assert_nothing_left();
}

#[test]
fn podman_publishes_ports_on_our_network() {
    if !require_root() || !require_program("podman") || !require_program("runc") {
        return;
    }
    let world = World::new();
    let [a, b] = &world.hosts;
    let podman = "podman --root /mnt/root --runroot /run/podman --storage-driver vfs";
    let with = |host: &Host, line: &str| {
        host.sh(&format!("export CONTAINERS_CONF=/run/containers.conf; {podman} {line}"))
    };
    let archive = image::busybox();
    for host in &world.hosts {
        host.write("/run/containers.conf", PODMAN);
        with(host, &format!("load --input {}", archive.display()));
    }
    let run = format!("run --network sheave --cgroup-parent /{}", world.cgroup);
    let image = "localhost/busybox:1 /bin/sh -c";
    with(a, &format!("{run} --detach --name web --publish 8080:80 {image} '{SERVE}'"));
    let at: SocketAddr = format!("{}:8080", a.ip).parse().expect("an address");
    // From outside, from another host, and from the node itself by both of its addresses.
    let own: SocketAddr = "127.0.0.1:8080".parse().expect("an address");
    for (from, at) in [(&world.lan, at), (&b.netns, at), (&a.netns, at), (&a.netns, own)] {
        wait_for(&format!("the port at {at}"), || http::get_in(from, at, "/").map(drop));
    }
    // From the container itself, from another one beside it, and from one on the other host.
    let line = asking(a.ip, 8080).replace('\'', "\"");
    for said in [
        with(a, &format!("exec web /bin/sh -c '{line}'")),
        with(a, &format!("{run} --rm {image} '{line}'")),
        with(b, &format!("{run} --rm {image} '{line}'")),
    ] {
        assert!(said.contains("here"), "{said}");
    }
    // A port that is taken is told, and nothing of the second container stays.
    let taken = format!("{podman} {run} --rm --publish 8080:80 {image} true");
    let taken = a.try_sh(&format!("export CONTAINERS_CONF=/run/containers.conf; {taken}"));
    let told = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(!taken.status.success() && told.contains("8080"), "{told}");
    with(a, "rm --force --time 0 web");
    for host in &world.hosts {
        host.assert_nothing_left();
    }
}
