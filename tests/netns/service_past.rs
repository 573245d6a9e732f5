//! Connections from outside to pods of this node past its stack, on a node whose own rules drop what its connection tracking
//! takes for no part of a connection, as many do.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;

use sheave_agent::dataplane::ebpf::{HostRouting, host_routing};
use sheave_agent::service::Proto;
use sheave_harness::isolated;

use crate::service_packet::{
    BALANCER, CLIENT, DEAF_PORT, LOCAL_PORT, NODE, Net, PATIENCE, POD, connected, endpoint,
};
use crate::service_world::{ask, ask_udp, at, service, udp_client};

/// Rules of the node, with a counter of TCP and UDP that it forwards.
const RULES: &str = "table inet strict {
    counter forwarded { }
    chain forward {
        type filter hook forward priority 0;
        meta l4proto { tcp, udp } counter name forwarded
        ct state invalid drop
    }
}";

fn nft(args: &[&str]) -> String {
    let done = std::process::Command::new("nft").args(args).output().expect("run nft");
    assert!(done.status.success(), "nft {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Packets that the node's own rules saw since the last call.
fn forwarded() -> u64 {
    let said = nft(&["reset", "counter", "inet", "strict", "forwarded"]);
    let count = said.split_whitespace().skip_while(|word| *word != "packets").nth(1);
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no counter in {said}"))
}

fn talk(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    stream.write_all(b"still there?").expect("send");
    let mut heard = [0; 12];
    stream.read_exact(&mut heard).expect("hear");
    assert_eq!(&heard, b"still there?");
}

#[test]
fn service_past_the_stack_on_both_ways() {
    isolated(module_path!(), "service_past_the_stack_on_both_ways", |cgroup| {
        let mut net = Net::new(cgroup);
        let rules = std::env::temp_dir().join(sheave_harness::unique("sheave-rules"));
        std::fs::write(&rules, RULES).expect("write rules");
        nft(&["-f", &rules.to_string_lossy()]);
        std::fs::remove_file(&rules).expect("remove the rules");
        net.world.config.pod_packets = false;
        for (routing, watched) in [(true, false), (true, true), (false, true), (true, false)] {
            (net.world.config.host_routing, net.world.config.watched_pod_links) = (routing, watched);
            let driver = net.driver(8080);
            let shown = host_routing(&net.world.config.pin_dir).expect("read the pins");
            let devices = if routing { 2 } else { 0 };
            assert_eq!(shown, HostRouting { devices, entered: if watched { 0 } else { devices } });
            forwarded();
            for n in 0..2 {
                for to in [at(NODE[n], LOCAL_PORT), at(BALANCER[n], 80)] {
                    for _ in 0..3 {
                        let heard = net.client.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}"));
                        assert_eq!(heard, (POD[n].to_owned(), CLIENT[n].to_owned()), "{to}");
                        assert_eq!(net.client.run(|| ask_udp(&udp_client(to), to)), POD[n], "{to}");
                    }
                }
            }
            assert_eq!(forwarded() == 0, routing, "routing {routing}, watched {watched}");
            drop(driver);
        }
        net.no_trouble();
    });
}

#[test]
fn service_past_the_stack_errors_and_fragments() {
    isolated(module_path!(), "service_past_the_stack_errors_and_fragments", |cgroup| {
        let mut net = Net::new(cgroup);
        (net.world.config.pod_packets, net.world.config.host_routing) = (false, true);
        for watched in [false, true] {
            net.world.config.watched_pod_links = watched;
            let mut driver = net.driver(9090);
            let mut events = vec![service("deaf", &["10.96.0.9", "fd00:96::9"], Proto::Udp, DEAF_PORT)];
            events.extend(POD.map(|ip| endpoint("deaf", Proto::Udp, at(ip, 7), true)));
            driver.handle(events);
            driver.step().expect("apply");
            let sent: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8).collect();
            for node in NODE {
                net.client.run(|| {
                    let socket = connected(at(node, LOCAL_PORT));
                    socket.send(&sent).expect("send");
                    let mut heard = vec![0; 65_536];
                    let len = socket.recv(&mut heard).unwrap_or_else(|e| panic!("{node}: {e}"));
                    assert!(heard[..len] == sent, "{node}");
                    let deaf = connected(at(node, DEAF_PORT));
                    deaf.send(b"who").expect("send");
                    let told = deaf.recv(&mut [0; 8]).expect_err("nobody there");
                    assert_eq!(told.kind(), ErrorKind::ConnectionRefused, "{node}");
                    // Much at once, in packets that the devices put together and take apart.
                    let mut stream = TcpStream::connect(at(node, LOCAL_PORT)).expect("connect");
                    let mut reader = stream.try_clone().expect("clone");
                    let all: Vec<u8> = (0..2_000_000_u32).map(|n| (n % 253) as u8).collect();
                    let hears = std::thread::spawn(move || {
                        let mut heard = vec![0; 2_000_000];
                        reader.read_exact(&mut heard).expect("hear");
                        heard
                    });
                    stream.write_all(&all).expect("send");
                    assert!(hears.join().expect("heard") == all, "{node}");
                });
            }
            drop(driver);
        }
        net.no_trouble();
    });
}

/// The way of what is under way changes with the settings, on a node that tracks no connections.
#[test]
fn service_past_the_stack_connections_outlive_changes_of_the_settings() {
    isolated(
        module_path!(),
        "service_past_the_stack_connections_outlive_changes_of_the_settings",
        |cgroup| {
            let mut net = Net::new(cgroup);
            let mut held: Vec<TcpStream> = Vec::new();
            for (routing, watched, packets) in [
                (false, false, false),
                (true, false, false),
                (true, true, false),
                (true, false, true),
                (false, false, true),
                (true, false, false),
                (false, false, false),
            ] {
                let config = &mut net.world.config;
                (config.host_routing, config.watched_pod_links, config.pod_packets) =
                    (routing, watched, packets);
                let driver = net.driver(9090);
                for node in NODE {
                    let to = at(node, LOCAL_PORT);
                    held.push(net.client.run(|| TcpStream::connect_timeout(&to, PATIENCE).expect("connect")));
                }
                held.iter_mut().for_each(talk);
                drop(driver);
                held.iter_mut().for_each(talk);
            }
            net.no_trouble();
        },
    );
}
