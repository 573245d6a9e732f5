//! Conformance cases C63 to C80: capabilities, chains, delegated plugins, and what runtimes and machines do to a plugin
//! beside calling it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use sheave_harness::netns::checked;
use sheave_harness::node::{NODE_IP4, NODE_IP6, OUTSIDE_IP4};
use sheave_harness::{wait_for, wait_until};

use crate::cni_bed::{
    Bed, Ctr, DEBIAN, Plugin, addresses, ips_of, link, links_of, node_interfaces, run, with, with_prev,
};
use crate::cni_fake::FakeIpam;
use crate::network_pods::talk;

const PATIENCE: Duration = Duration::from_secs(5);

fn node_ip(v4: bool) -> IpAddr {
    if v4 { NODE_IP4 } else { NODE_IP6 }.parse().expect("an address")
}

/// The outside connects to `port` of the node at `ip`; what it says is to arrive in the container.
fn reaches(bed: &Bed, ctr: &Ctr, at: SocketAddr, port: u16) {
    let any: IpAddr = if at.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let listener = ctr.netns().run(|| TcpListener::bind((any, port))).expect("listen in the container");
    let mut out = bed
        .node
        .outside
        .run(|| TcpStream::connect_timeout(&at, PATIENCE))
        .unwrap_or_else(|e| panic!("connect to {at}: {e}"));
    out.write_all(b"hello").expect("send");
    let (mut inside, _) = listener.accept().expect("accept");
    let mut said = [0; 5];
    inside.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    inside.read_exact(&mut said).expect("receive");
    assert_eq!(&said, b"hello");
}

/// TCP from the outside to a host port.
pub(crate) fn reaches_host_port(bed: &Bed, ctr: &Ctr, host: u16, port: u16) {
    reaches(bed, ctr, SocketAddr::new(node_ip(true), host), port);
}

/// Nobody answers for the outside there.
fn refused(bed: &Bed, at: SocketAddr) {
    let result = bed.node.outside.run(|| TcpStream::connect_timeout(&at, PATIENCE));
    assert!(result.is_err(), "{at} answers");
}

/// A datagram of the outside reaches the container, and its answer comes back from where it was sent.
fn reaches_udp(bed: &Bed, ctr: &Ctr, at: SocketAddr, port: u16) {
    let any: IpAddr = if at.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let inside = ctr.netns().run(|| UdpSocket::bind((any, port))).expect("bind in the container");
    let out = bed.node.outside.run(|| UdpSocket::bind((any, 0))).expect("bind outside");
    for socket in [&inside, &out] {
        socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    }
    out.send_to(b"hi", at).expect("send");
    let mut said = [0; 8];
    let (length, from) = inside.recv_from(&mut said).unwrap_or_else(|e| panic!("receive for {at}: {e}"));
    inside.send_to(&said[..length], from).expect("answer");
    let (_, answered) = out.recv_from(&mut said).expect("the answer");
    assert_eq!(answered, at);
}

pub(crate) fn port_mappings(bed: &Bed) {
    let entry = |host: u16, port: u16, protocol: &str, ip: &str| {
        let mut entry = json!({"hostPort": host, "containerPort": port, "protocol": protocol});
        if !ip.is_empty() {
            entry["hostIP"] = json!(ip);
        }
        entry
    };
    let mappings = json!([
        entry(10631, 81, "tcp", ""),
        entry(10632, 82, "udp", ""),
        entry(10633, 83, "sctp", ""),
        entry(10634, 84, "tcp", NODE_IP4),
        entry(10635, 85, "tcp", "0.0.0.0"),
        entry(10636, 86, "tcp", "127.0.0.1"),
        entry(10637, 87, "tcp", NODE_IP6),
        entry(10638, 88, "tcp", "::"),
        entry(0, 89, "tcp", ""),
        entry(10639, 90, "TCP", ""),
    ]);
    let (ctr, list) = (Ctr::new(), bed.list("n-ports", json!({"portMappings": mappings})));
    let result = bed.add_list(&ctr, &list).expect("an ADD");
    for (host, port) in [(10631, 81), (10634, 84), (10635, 85), (10639, 90)] {
        reaches_host_port(bed, &ctr, host, port);
    }
    reaches_udp(bed, &ctr, SocketAddr::new(node_ip(true), 10632), 82);
    refused(bed, SocketAddr::new(node_ip(true), 10636));
    let rules = checked(bed.node.netns.command("nft").args(["list", "ruleset"]));
    assert!(rules.contains("10633") && rules.contains("sctp"), "{rules}");
    if ips_of(&result).iter().any(IpAddr::is_ipv6) {
        for (host, port) in [(10631, 81), (10637, 87), (10638, 88)] {
            reaches(bed, &ctr, SocketAddr::new(node_ip(false), host), port);
        }
        reaches_udp(bed, &ctr, SocketAddr::new(node_ip(false), 10632), 82);
    }
    refused(bed, SocketAddr::new(node_ip(true), 10637));
    bed.del_list(&ctr, &list, Some(&result));
    refused(bed, SocketAddr::new(node_ip(true), 10631));
    for bad in [json!([entry(10631, 81, "ipx", "")]), json!([entry(10631, 81, "tcp", "not an address")])] {
        let list = bed.list("n-ports", json!({"portMappings": bad}));
        let outcome = bed.add_list(&ctr, &list).expect_err("a wrong mapping");
        assert!([2, 7].contains(&outcome.refusal().code), "{outcome:?}");
    }
}

pub(crate) fn stale_udp_flows_are_flushed(bed: &Bed) {
    let mapping =
        |host: u16| json!({"portMappings": [{"hostPort": host, "containerPort": 5353, "protocol": "udp"}]});
    // Whoever translates at all is at work before the flow begins.
    let (first, second) = (Ctr::new(), Ctr::new());
    let (early, late) = (bed.list("n-flows", mapping(10641)), bed.list("n-flows", mapping(10642)));
    let early_result = bed.add_list(&first, &early).expect("an ADD");
    let at = SocketAddr::new(node_ip(true), 10642);
    let out = bed.node.outside.run(|| UdpSocket::bind("0.0.0.0:0")).expect("bind outside");
    let send = || out.send_to(b"still there", at).expect("send");
    for _ in 0..3 {
        send();
    }
    let result = bed.add_list(&second, &late).expect("an ADD");
    let inside = second.netns().run(|| UdpSocket::bind("0.0.0.0:5353")).expect("bind in the container");
    inside.set_read_timeout(Some(Duration::from_millis(100))).expect("set a timeout");
    // The client never stops, so that no timeout ends the flow that goes nowhere.
    wait_until("a datagram of the flow that was there", PATIENCE, || {
        send();
        inside.recv(&mut [0; 16]).map_err(|error| error.to_string())
    });
    bed.del_list(&second, &late, Some(&result));
    bed.del_list(&first, &early, Some(&early_result));
}

pub(crate) fn bandwidth(bed: &Bed) {
    let most = u32::MAX;
    let runtime = json!({"bandwidth": {"ingressRate": 8_000_000, "ingressBurst": most,
                                       "egressRate": 16_000_000, "egressBurst": most}});
    let (ctr, list) = (Ctr::new(), bed.list("n-rate", runtime.clone()));
    let result = bed.add_list(&ctr, &list).expect("an ADD");
    let host = &node_interfaces(&result)[0];
    let shown = || checked(bed.node.netns.command("tc").args(["qdisc", "show", "dev", host]));
    assert!(shown().contains("8Mbit"), "{}", shown());
    bed.check_list(&ctr, &list, &result).expect("a shaped attachment");
    bed.del_list(&ctr, &list, Some(&result));
    // What the administrator wrote wins.
    let ctr = Ctr::new();
    let mut list = bed.list("n-rate", runtime);
    let fixed = json!({"ingressRate": 4_000_000, "ingressBurst": 400_000, "egressRate": 4_000_000,
                       "egressBurst": 400_000});
    let last = list.pop().expect("a plugin");
    list.push(with(last, if bed.plugin == Plugin::Ours { json!({"bandwidth": fixed}) } else { fixed }));
    let result = bed.add_list(&ctr, &list).expect("an ADD");
    let host = &node_interfaces(&result)[0];
    let shown = checked(bed.node.netns.command("tc").args(["qdisc", "show", "dev", host]));
    assert!(shown.contains("4Mbit"), "{shown}");
    bed.del_list(&ctr, &list, Some(&result));
    for half in [json!({"ingressRate": 8_000_000}), json!({"egressRate": 8_000_000, "egressBurst": 0})] {
        let ctr = Ctr::new();
        let list = bed.list("n-rate", json!({"bandwidth": half}));
        let outcome = bed.add_list(&ctr, &list).expect_err("a rate without a burst");
        assert!(outcome.refusal().text.to_lowercase().contains("burst"), "{outcome:?}");
    }
}

pub(crate) fn requested_addresses(bed: &Bed) {
    for (n, way) in ["runtimeConfig", "args", "CNI_ARGS"].iter().enumerate() {
        let ip = bed.static_ip("n-static", 60 + u8::try_from(n).expect("few"));
        let (ctr, plain) = (Ctr::new(), bed.config("n-static"));
        let asked = bed.with_prefix(ip);
        let config = match *way {
            "runtimeConfig" => with(plain, json!({"runtimeConfig": {"ips": [asked]}})),
            "args" => with(plain, json!({"args": {"cni": {"ips": [asked]}}})),
            _ => plain,
        };
        let mut command = bed.prepared("ADD", &ctr, &config);
        if *way == "CNI_ARGS" {
            command.env("CNI_ARGS", format!("IgnoreUnknown=1;IP={ip};K8S_POD_NAME=web"));
        }
        let outcome = run(command, config.to_string().as_bytes());
        // An error is honest; another address is not.
        let result = outcome.result();
        assert!(ips_of(&result).contains(&ip), "{way}: {ip} was asked for: {result}");
        assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
        let other = Ctr::new();
        let list = bed.list("n-static", json!({"ips": [bed.with_prefix(ip)]}));
        let taken = bed.add_list(&other, &list).expect_err("an address that is in use");
        taken.refusal();
        bed.del(&ctr, &config);
    }
    let outside = bed.list("n-static", json!({"ips": ["203.0.113.9/24"]}));
    bed.add_list(&Ctr::new(), &outside).expect_err("an address of no range").refusal();
    let nonsense = bed.list("n-static", json!({"ips": ["nonsense"]}));
    bed.add_list(&Ctr::new(), &nonsense).expect_err("no address").refusal();
}

pub(crate) fn requested_mac(bed: &Bed) {
    for (n, way) in ["runtimeConfig", "args", "CNI_ARGS"].iter().enumerate() {
        let mac = format!("02:00:5e:10:00:0{n}");
        let (ctr, plain) = (Ctr::new(), bed.config("n-mac"));
        let config = match *way {
            "runtimeConfig" => with(plain, json!({"runtimeConfig": {"mac": mac}})),
            "args" => with(plain, json!({"args": {"cni": {"mac": mac}}})),
            _ => plain,
        };
        let mut command = bed.prepared("ADD", &ctr, &config);
        if *way == "CNI_ARGS" {
            command.env("CNI_ARGS", format!("IgnoreUnknown=1;MAC={mac}"));
        }
        let result = run(command, config.to_string().as_bytes()).result();
        let told =
            result["interfaces"].as_array().expect("a list").iter().any(|row| row["mac"] == mac.as_str());
        assert!(told, "{way}: {result}");
        assert_eq!(link(ctr.netns(), "eth0").expect("the interface")["address"], mac.as_str(), "{way}");
        talk(&bed.node.netns, ctr.netns(), ips_of(&result)[0]);
        bed.del(&ctr, &config);
    }
    let wrong = with(bed.config("n-mac"), json!({"runtimeConfig": {"mac": "01:00:5e:00:00:01"}}));
    bed.call("ADD", &Ctr::new(), &wrong).refusal();
}

pub(crate) fn dns_overrides_ipam(bed: &Bed) {
    let ipam = FakeIpam::new();
    let of_ipam = json!({"nameservers": ["192.0.2.1"], "search": ["ipam.example"]});
    let configured = json!({"nameservers": ["192.0.2.2"], "options": ["ndots:3"]});
    for (n, given) in [None, Some(&configured)].into_iter().enumerate() {
        ipam.gives("1.0.0", &format!("10.201.68.1{n}"), json!({"dns": of_ipam}));
        let (ctr, mut config) = (Ctr::new(), ipam.config(bed, "n-dns"));
        if let Some(given) = given {
            config["dns"] = given.clone();
        }
        let result = ipam.call(bed, "ADD", &ctr, &config).result();
        assert_eq!(&result["dns"], given.unwrap_or(&of_ipam), "{result}");
        ipam.call(bed, "DEL", &ctr, &config).silent();
    }
}

pub(crate) fn aliases(bed: &Bed) {
    let (ctr, other, config) = (Ctr::new(), Ctr::new(), bed.config("n-alias"));
    let plain = bed.add(&ctr, &config);
    let named = with(config.clone(), json!({"runtimeConfig": {"aliases": ["web", "www"]}}));
    let result = bed.add(&other, &named);
    let keys = |value: &Value| value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>());
    assert_eq!(keys(&plain), keys(&result));
    assert!(!result.to_string().contains("www"), "{result}");
    bed.del(&ctr, &config);
    bed.del(&other, &named);
}

pub(crate) fn masquerade(bed: &Bed) {
    let outside: IpAddr = OUTSIDE_IP4.parse().expect("an address");
    for masquerade in [true, false] {
        let (ctr, config) = (Ctr::new(), with(bed.config("n-masq"), json!({"ipMasq": masquerade})));
        let result = bed.add(&ctr, &config);
        let ip = *ips_of(&result).iter().find(|ip| ip.is_ipv4()).expect("an address");
        let route = format!("{ip}/32");
        bed.node.outside.ip(&["route", "add", &route, "via", NODE_IP4]);
        let seen = talk(ctr.netns(), &bed.node.outside, outside);
        assert_eq!(seen, if masquerade { node_ip(true) } else { ip }, "ipMasq {masquerade}");
        bed.del(&ctr, &config);
        bed.node.outside.ip(&["route", "del", &route]);
    }
}

pub(crate) fn chain(bed: &Bed) {
    let dir = bed.node.dir().join("tuning").display().to_string();
    let mapped = json!([{"hostPort": 10071, "containerPort": 80, "protocol": "tcp"}]);
    let rate = json!({"ingressRate": 80_000_000, "ingressBurst": 8_000_000,
                      "egressRate": 80_000_000, "egressBurst": 8_000_000});
    let later = |kind: &str, more: Value| {
        with(json!({"cniVersion": "1.0.0", "name": "n-chained", "type": kind}), more)
    };
    let chain = [
        bed.config("n-chained"),
        later("portmap", json!({"runtimeConfig": {"portMappings": mapped}, "snat": true})),
        later("bandwidth", json!({"runtimeConfig": {"bandwidth": rate}})),
        later(
            "tuning",
            json!({"sysctl": {"net.ipv4.conf.eth0.accept_redirects": "0"}, "mtu": 1350, "dataDir": dir}),
        ),
        later("firewall", json!({"backend": "iptables"})),
        later("sbr", json!({})),
    ];
    // sbr moves the routes that ptp's CHECK looks for, and has no CHECK itself.
    for length in [5, 6] {
        let (ctr, chain) = (Ctr::new(), &chain[..length]);
        let result = bed.add_list(&ctr, chain).expect("an ADD of the whole chain");
        assert_eq!(ips_of(&result), addresses(ctr.netns(), "eth0"));
        assert_eq!(link(ctr.netns(), "eth0").expect("the interface")["mtu"], 1350);
        talk(&bed.node.netns, ctr.netns(), ips_of(&result)[0]);
        reaches_host_port(bed, &ctr, 10071, 80);
        if length == 5 {
            bed.check_list(&ctr, &chain[2..], &result).expect("a CHECK of what comes after");
            bed.check_list(&ctr, &chain[..1], &result).expect("a CHECK of what they came after");
        }
        bed.del_list(&ctr, chain, Some(&result));
        bed.assert_gone(&result);
        assert!(!links_of(ctr.netns()).contains("eth0"));
    }
}

pub(crate) fn beside_loopback(bed: &Bed) {
    let config = bed.config("n-lo");
    let loopback = json!({"cniVersion": "1.0.0", "name": "lo", "type": "loopback"});
    for _ in 0..4 {
        let ctr = Ctr::new();
        ctr.netns().ip(&["link", "set", "lo", "down"]);
        let mut lo = Ctr::new();
        (lo.ifname, lo.netns_path) = ("lo".to_owned(), Some(ctr.path()));
        let result = std::thread::scope(|scope| {
            let other = scope.spawn(|| bed.add(&lo, &loopback));
            let result = bed.add(&ctr, &config);
            other.join().expect("loopback");
            result
        });
        let state = link(ctr.netns(), "lo").expect("lo");
        assert!(state["flags"].as_array().is_some_and(|flags| flags.contains(&json!("UP"))), "{state}");
        assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
        bed.del(&ctr, &config);
    }
}

pub(crate) fn delegates_are_searched_for(bed: &Bed) {
    let ipam = FakeIpam::new();
    // It is not in the first directory.
    let (ctr, config) = (Ctr::new(), ipam.config(bed, "n-search"));
    let result = ipam.call(bed, "ADD", &ctr, &config).result();
    assert_eq!(ips_of(&result), [IpAddr::from([10, 201, 0, 2])]);
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
    ipam.call(bed, "DEL", &ctr, &config).silent();
    let told = bed.call("ADD", &Ctr::new(), &config).refusal().text;
    assert!(told.contains("fake-ipam"), "names what it did not find: {told}");
}

pub(crate) fn delegates_get_everything(bed: &Bed) {
    let ipam = FakeIpam::new();
    ipam.gives("1.0.0", "10.201.74.2", json!({}));
    let (ctr, config) = (Ctr::new(), ipam.config(bed, "n-whole"));
    let config = with(config, json!({"example.org/unknown": {"a": [1]}, "runtimeConfig": {"ips": []}}));
    let mut command = bed.prepared("ADD", &ctr, &config);
    command.env("CNI_PATH", ipam.path()).env("CNI_ARGS", "K8S_POD_NAME=web");
    let outcome = run(command, config.to_string().as_bytes());
    outcome.result();
    assert_eq!(ipam.stdin("ADD"), config);
    let environment = ipam.environment("ADD");
    for wanted in [
        format!("CNI_CONTAINERID={}", ctr.id),
        format!("CNI_NETNS={}", ctr.path().display()),
        format!("CNI_PATH={}", ipam.path()),
        "CNI_ARGS=K8S_POD_NAME=web".to_owned(),
        "CNI_COMMAND=ADD".to_owned(),
        "CNI_IFNAME=eth0".to_owned(),
    ] {
        assert!(environment.contains(&wanted), "{wanted} is not in {environment:?}");
    }
    ipam.call(bed, "DEL", &ctr, &config).silent();
}

pub(crate) fn delegates_stderr(bed: &Bed) {
    let ipam = FakeIpam::new();
    ipam.gives("1.0.0", "10.201.75.2", json!({}));
    let (ctr, config) = (Ctr::new(), ipam.config(bed, "n-stderr"));
    for verb in ["ADD", "DEL"] {
        let outcome = ipam.call(bed, verb, &ctr, &config);
        assert_eq!(outcome.status, Some(0), "{outcome:?}");
        assert!(outcome.stderr.contains(&format!("fake-ipam was asked for {verb}")), "{outcome:?}");
    }
}

pub(crate) fn delegates_for_every_verb(bed: &Bed) {
    let ipam = FakeIpam::new();
    ipam.gives(bed.newest(), "10.201.76.2", json!({}));
    let (ctr, config) = (Ctr::new(), with(ipam.config(bed, "n-verbs"), json!({"cniVersion": bed.newest()})));
    let result = ipam.call(bed, "ADD", &ctr, &config).result();
    ipam.call(bed, "CHECK", &ctr, &with_prev(&config, Some(&result))).silent();
    if bed.plugin == Plugin::Ours {
        ipam.verb(bed, "STATUS", &config).silent();
        let keep = json!([{"containerID": ctr.id, "ifname": ctr.ifname}]);
        ipam.verb(bed, "GC", &with(config.clone(), json!({"cni.dev/valid-attachments": keep}))).silent();
    }
    ipam.call(bed, "DEL", &ctr, &config).silent();
    let wanted = match bed.plugin {
        Plugin::Ours => &["ADD", "CHECK", "STATUS", "GC", "DEL"][..],
        Plugin::Oracle => &["ADD", "CHECK", "DEL"],
    };
    assert_eq!(ipam.calls(), wanted);
}

pub(crate) fn two_networks(bed: &Bed) {
    let mut ctr = Ctr::new();
    let first = bed.add(&ctr, &bed.config("n-one"));
    ctr.ifname = "net1".to_owned();
    let mut second = bed.config("n-two");
    if bed.plugin == Plugin::Oracle {
        second["ipam"].as_object_mut().expect("an object").remove("routes");
    }
    let other = bed.add(&ctr, &second);
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&first));
    assert_eq!(addresses(ctr.netns(), "net1"), ips_of(&other));
    assert!(ips_of(&first).iter().all(|ip| !ips_of(&other).contains(ip)));
    bed.del(&ctr, &second);
    bed.assert_gone(&other);
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&first));
    talk(&bed.node.netns, ctr.netns(), ips_of(&first)[0]);
    ctr.ifname = "eth0".to_owned();
    bed.del(&ctr, &bed.config("n-one"));
    bed.assert_gone(&first);
}

pub(crate) fn replaced_under_load(bed: &Bed) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let dir = tempfile::Builder::new().prefix("shv-bin-").tempdir().expect("a directory");
    let config = bed.config("n-replaced");
    let (from, program) = (bed.program(&config), dir.path().join("plugin"));
    let install = |n: u32| {
        let draft = dir.path().join(format!("draft{n}"));
        // By a process of its own: a fork of another test must not hold the draft open for writing.
        checked(std::process::Command::new("cp").arg(&from).arg(&draft));
        std::fs::rename(draft, &program).expect("rename");
    };
    install(0);
    let done = AtomicBool::new(false);
    let rounds: u32 = std::thread::scope(|scope| {
        let workers = [(); 2].map(|()| {
            scope.spawn(|| {
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) {
                    let ctr = Ctr::new();
                    for verb in ["ADD", "DEL"] {
                        let mut command = bed.command(&program);
                        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &ctr.id);
                        command
                            .env("CNI_NETNS", ctr.path())
                            .env("CNI_IFNAME", "eth0")
                            .env("CNI_PATH", DEBIAN);
                        let outcome = run(command, config.to_string().as_bytes());
                        assert_eq!(outcome.status, Some(0), "{verb}: {outcome:?}");
                    }
                    rounds += 1;
                }
                rounds
            })
        });
        (1..20).for_each(install);
        done.store(true, Ordering::Relaxed);
        workers.map(|worker| worker.join().expect("a worker")).iter().sum()
    });
    assert!(rounds > 0);
}

pub(crate) fn signalled_while_deleting(bed: &Bed) {
    use nix::sys::signal::{Signal, kill};
    for round in 0..8_u64 {
        let (ctr, config) = (Ctr::new(), bed.config("n-signal"));
        let result = bed.add(&ctr, &config);
        let mut command = bed.prepared("DEL", &ctr, &config);
        let input = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut &input, config.to_string().as_bytes()).expect("write");
        std::io::Seek::rewind(&mut &input).expect("rewind");
        let mut child = command.stdin(input).spawn().expect("start a plugin");
        // Not a wait for anything: the moment is to be another in every round.
        std::thread::sleep(Duration::from_micros(round * 400));
        let signal = if round % 2 == 0 { Signal::SIGTERM } else { Signal::SIGINT };
        kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid")), signal).expect("signal");
        child.wait().expect("wait for a plugin");
        bed.del(&ctr, &config);
        bed.assert_gone(&result);
        assert!(!links_of(ctr.netns()).contains("eth0"));
    }
}

pub(crate) fn dead_namespaces_are_reclaimed(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let config = bed.config("n-reboot");
    let mapped = json!({"portMappings": [{"hostPort": 10080, "containerPort": 80, "protocol": "tcp"}]});
    let (mut dead, alive) = (Ctr::new(), Ctr::new());
    let list = bed.list("n-reboot", mapped);
    let first = bed.add_list(&dead, &list).expect("an ADD");
    let second = bed.add(&alive, &config);
    bed.kill_agent();
    dead.lose_netns();
    bed.start();
    ips_of(&first).into_iter().filter(IpAddr::is_ipv4).for_each(|ip| bed.assert_free("n-reboot", ip));
    bed.assert_gone(&first);
    wait_for("the rules to be gone", || {
        let rules = checked(bed.node.netns.command("nft").args(["list", "ruleset"]));
        if rules.contains("10080") { Err(rules) } else { Ok(()) }
    });
    assert_eq!(addresses(alive.netns(), "eth0"), ips_of(&second));
    talk(&bed.node.netns, alive.netns(), ips_of(&second)[0]);
}
