//! Services and the overlay together, as who replaces flannel and kube-proxy has them: a port of one node that leads to a
//! pod of another, through the tunnel.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use sheave_harness::overlay::{Bed, Host, Ips, Pod};
use sheave_harness::{Cgroup, NetNs, http, require_root, wait_for};

use serde_json::{Value, json};

const NODE_PORT: u16 = 30080;
const TARGET: u16 = 8080;
const OUTSIDE4: &str = "192.0.2.200";
const OUTSIDE6: &str = "2001:db8::200";
const TRY: Duration = Duration::from_secs(2);
/// More than what fits into one packet, and into the queues of a connection.
const BULK: usize = 300_000;

/// Serves what comes back as it was sent, after a line that says who asked.
fn serve(pod: &Pod, family: usize) {
    let listener = pod.netns.run(|| TcpListener::bind((pod.ips[family], TARGET))).expect("listen");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let Ok(peer) = stream.peer_addr() else { continue };
            std::thread::spawn(move || {
                stream.write_all(format!("{:<45}\n", peer.ip()).as_bytes()).ok();
                let mut reader = stream.try_clone().expect("a second handle");
                std::io::copy(&mut reader, &mut stream).ok();
            });
        }
    });
}

/// Who the server says that asked, after a good deal went there and back.
fn ask(from: &NetNs, to: SocketAddr) -> Result<IpAddr, String> {
    let text = |error: std::io::Error| format!("{to}: {error}");
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, TRY)).map_err(text)?;
    stream.set_read_timeout(Some(TRY)).map_err(text)?;
    let mut line = [0; 46];
    stream.read_exact(&mut line).map_err(text)?;
    let mut writer = stream.try_clone().map_err(text)?;
    let writing = std::thread::spawn(move || writer.write_all(&vec![7; BULK]));
    let mut back = vec![0; BULK];
    stream.read_exact(&mut back).map_err(text)?;
    writing.join().expect("the writer").map_err(text)?;
    assert!(back.iter().all(|byte| *byte == 7), "{to}: what came back is not what was sent");
    String::from_utf8_lossy(&line).trim().parse().map_err(|error| format!("{line:?}: {error}"))
}

fn publish(bed: &Bed, server: &Pod, node: &Host) {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {
        "type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"port": 80, "targetPort": TARGET, "nodePort": NODE_PORT}]}});
    bed.raw("POST", "/api/v1/namespaces/default/services", Some(&service)).expect("make the Service");
    for (ip, kind) in server.ips.iter().zip(["IPv4", "IPv6"]) {
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("web-{}", kind.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": kind, "ports": [{"port": TARGET, "protocol": "TCP"}],
            "endpoints": [{"addresses": [ip], "nodeName": node.name, "conditions": {"ready": true}}]});
        let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
        bed.raw("POST", path, Some(&slice)).expect("make the EndpointSlice");
    }
}

/// Bytes that the node has sent into its tunnels.
fn tunnelled(host: &Host) -> u64 {
    let links: Value = serde_json::from_str(&host.netns.ip(&["-s", "-j", "link"])).expect("links as JSON");
    let is_tunnel = |link: &&Value| link["ifname"].as_str().is_some_and(|name| name.starts_with("sheave-vx"));
    let links = links.as_array().into_iter().flatten().filter(is_tunnel);
    links.filter_map(|link| link["stats64"]["tx"]["bytes"].as_u64()).sum()
}

fn a_node_port_leads_through_the_tunnel(plane: &str) {
    if !require_root() {
        return;
    }
    let cgroup = Cgroup::new("overlay-services");
    let group = cgroup.path().display().to_string();
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    bed.control();
    let mut hosts: Vec<Host> = (0..2).map(|_| bed.join(Ips::Both, &["--overlay", "vxlan"])).collect();
    for host in &mut hosts {
        host.kill9();
        host.set_components("network,services", &["--data-plane", plane, "--cgroup-path", &group]);
        host.start();
        host.wait_serving();
    }
    hosts.iter().for_each(|host| host.wait_ways(2));
    let (near, server) = (hosts[0].pod(), hosts[1].pod());
    [0, 1].into_iter().for_each(|family| serve(&server, family));
    publish(&bed, &server, &hosts[1]);
    let outside = NetNs::new();
    outside.veth("eth0", &bed.switch, "outside");
    bed.switch.ip(&["link", "set", "outside", "master", "br0"]);
    outside.ip(&["addr", "add", &format!("{OUTSIDE4}/24"), "dev", "eth0"]);
    outside.ip(&["addr", "add", &format!("{OUTSIDE6}/64"), "dev", "eth0", "nodad"]);

    for (family, ip) in [hosts[0].ip4.as_str(), &hosts[0].ip6].into_iter().enumerate() {
        let to = SocketAddr::new(ip.parse().expect("an address"), NODE_PORT);
        // A process of the node would have to be in the cgroup whose sockets eBPF translates.
        let node = (plane != "ebpf").then_some(("the node", &hosts[0].netns));
        for (who, from) in
            [("outside", &outside), ("a pod of that node", &near.netns)].into_iter().chain(node)
        {
            let before = tunnelled(&hosts[0]);
            let seen = wait_for(&format!("{plane}: {who} at {to}"), || {
                ask(from, to).map_err(|error| format!("{error}\n{}", hosts[0].log()))
            });
            let sent = tunnelled(&hosts[0]) - before;
            assert!(sent >= BULK as u64, "{plane}: {who} at {to}: {sent} bytes went into the tunnel");
            // The answer has to come back by the node that was asked, which knows whom it was for.
            let outsider = [OUTSIDE4, OUTSIDE6][family].parse::<IpAddr>().expect("an address");
            assert!(who != "outside" || seen != outsider, "{plane}: {who} at {to} was not masqueraded");
        }
    }
    // Where the pod is, an outsider gets to it too.
    for ip in [hosts[1].ip4.as_str(), &hosts[1].ip6] {
        let to = SocketAddr::new(ip.parse().expect("an address"), NODE_PORT);
        wait_for(&format!("{plane}: outside at {to}"), || ask(&outside, to));
    }
    for host in &hosts {
        let healthz = ([127, 0, 0, 1], 10256).into();
        // What a round has written is served a moment before the round is over.
        wait_for("the node to be healthy", || {
            match http::get_in(&host.netns, healthz, "/healthz").expect("healthz") {
                (200, _) => Ok(()),
                (status, _) => Err(format!("{status}\n{}", host.log())),
            }
        });
    }
}

#[test]
fn a_node_port_leads_to_another_nodes_pod_with_ebpf() {
    a_node_port_leads_through_the_tunnel("ebpf");
}

#[test]
fn a_node_port_leads_to_another_nodes_pod_with_nftables() {
    a_node_port_leads_through_the_tunnel("nftables");
}
