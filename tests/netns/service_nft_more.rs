//! The nftables data plane when things change under it: endpoints leave, the agent starts again, somebody else takes the
//! table away; and many services.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use sheave_agent::dataplane::{Driver, Mode, remove};
use sheave_agent::service::{Event, Proto};
use sheave_harness::netns::checked;
use sheave_harness::{isolated, require_program, wait_until};

use crate::service_nft_bed::{At, Bed, cluster_ip, here, node_port, pod, service, slices};
use crate::service_world::{ask, at, chain, synced};

/// Runs `nft ARGS` in the test's own namespace.
fn nft(args: &[&str]) -> String {
    checked(Command::new("nft").args(args))
}

fn web(endpoints: &[At]) -> Vec<Event> {
    let mut events = vec![service("web", 1, Proto::Tcp, |_| {})];
    events.extend(slices("web", Proto::Tcp, endpoints));
    events
}

fn step(driver: &mut Driver, events: Vec<Event>) {
    driver.handle(events);
    driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
}

/// A connection from the client, kept open; the pod's side echoes.
fn long_lived(bed: &Bed, port: u16, to: SocketAddr) -> TcpStream {
    let listener = bed.pods[0].run(|| TcpListener::bind(at(&pod(0, 0), port))).expect("listen");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
    });
    bed.client.run(|| TcpStream::connect(to)).expect("connect")
}

fn still_lives(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set a timeout");
    let mut byte = [7];
    stream.write_all(&byte).expect("send");
    stream.read_exact(&mut byte).expect("hear");
    assert_eq!(byte, [7]);
}

#[test]
fn service_nft_restart_replaces_the_table_and_keeps_connections() {
    isolated(module_path!(), "service_nft_restart_replaces_the_table_and_keeps_connections", |_| {
        let bed = Bed::new(2);
        let mut events = web(&[here(0), here(1)]);
        events.push(service("echo", 2, Proto::Tcp, |_| {}));
        let mut echo = slices("echo", Proto::Tcp, &[here(0)]);
        for event in &mut echo {
            let Event::Slice(slice) = event else { continue };
            slice.ports[0].port = 9090;
        }
        events.extend(echo);
        events.push(service("old", 3, Proto::Tcp, |_| {}));
        events.extend(slices("old", Proto::Tcp, &[here(1)]));
        let driver = bed.driver(events);
        let mut stream = long_lived(&bed, 9090, node_port(2, 0));
        still_lives(&mut stream);
        assert_eq!(bed.client.run(|| ask(node_port(3, 0))).expect("old").0, pod(1, 0));
        drop(driver);
        // Without an agent everything goes on.
        still_lives(&mut stream);
        assert_eq!(bed.client.run(|| ask(node_port(3, 0))).expect("old").0, pod(1, 0));
        // The next one knows of one service with one endpoint: all else goes, connections stay.
        let driver = bed.driver(web(&[here(1)]));
        still_lives(&mut stream);
        for _ in 0..20 {
            assert_eq!(bed.client.run(|| ask(node_port(1, 0))).expect("web").0, pod(1, 0));
        }
        let refused = bed.client.run(|| ask(node_port(3, 0))).expect_err("gone");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        still_lives(&mut stream);
        drop(driver);
    });
}

#[test]
fn service_nft_table_that_somebody_removed_is_made_again() {
    isolated(module_path!(), "service_nft_table_that_somebody_removed_is_made_again", |_| {
        if !require_program("nft") {
            return;
        }
        let bed = Bed::new(2);
        let mut driver = bed.driver(web(&[here(0)]));
        let works = |name| {
            let answer = bed.client.run(|| ask(node_port(1, 0))).unwrap_or_else(|e| panic!("{name}: {e}"));
            answer.0
        };
        assert_eq!(works("at first"), pod(0, 0));
        for command in [
            &["delete", "table", "inet", "sheave"][..],
            &["flush", "table", "inet", "sheave"],
            &["flush", "ruleset"],
        ] {
            nft(command);
            let refused = bed.client.run(|| ask(node_port(1, 0))).expect_err("nothing balances");
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
            driver.tick().unwrap_or_else(|e| panic!("tick: {}", chain(&e)));
            assert_eq!(works("after a tick"), pod(0, 0));
        }
        // Somebody removes it just before a change: the change fails, the next round brings everything.
        nft(&["delete", "table", "inet", "sheave"]);
        driver.handle(slices("web", Proto::Tcp, &[here(1)]));
        let error = driver.step().expect_err("there is no table");
        assert!(chain(&error).contains("nftables table sheave"), "{}", chain(&error));
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        assert_eq!(works("after a failed round"), pod(1, 0));
        // Rules of others are none of our business.
        nft(&["add", "table", "inet", "other"]);
        driver.tick().expect("tick");
        assert_eq!(remove(Mode::Nftables, &bed.config).len(), 0);
        assert_eq!(nft(&["list", "tables"]).trim(), "table inet other");
        assert_eq!(remove(Mode::Nftables, &bed.config).len(), 0, "there is none any more");
    });
}

#[test]
fn service_nft_replaces_what_somebody_else_calls_sheave() {
    isolated(module_path!(), "service_nft_replaces_what_somebody_else_calls_sheave", |_| {
        if !require_program("nft") {
            return;
        }
        let bed = Bed::new(1);
        nft(&["add", "table", "inet", "sheave"]);
        nft(&["add", "chain", "inet", "sheave", "prerouting", "{ type filter hook prerouting priority 0; }"]);
        nft(&["add", "set", "inet", "sheave", "services4", "{ type ipv4_addr; }"]);
        nft(&["add", "rule", "inet", "sheave", "prerouting", "ip", "saddr", "@services4", "drop"]);
        let driver = bed.driver(web(&[here(0)]));
        assert_eq!(bed.client.run(|| ask(node_port(1, 0))).expect("answered").0, pod(0, 0));
        let listed = nft(&["list", "map", "inet", "sheave", "services4"]);
        assert!(listed.contains("10.96.0.1 . tcp . 80"), "{listed}");
        drop(driver);
    });
}

#[test]
fn service_nft_udp_follows_its_endpoints() {
    isolated(module_path!(), "service_nft_udp_follows_its_endpoints", |_| {
        let bed = Bed::new(2);
        let mut driver = bed.driver(Vec::new());
        // One socket for everything: one flow in the kernel's eyes, and never a pause.
        for (family, to) in [(0, node_port(1, 0)), (1, cluster_ip(1, 1))] {
            let any = if family == 0 { "0.0.0.0:0" } else { "[::]:0" };
            let socket = bed.client.run(|| UdpSocket::bind(any)).expect("bind");
            socket.set_read_timeout(Some(Duration::from_millis(100))).expect("set a timeout");
            let hear = || {
                let mut buffer = [0; 64];
                socket.send_to(b"who", to).ok()?;
                let (len, from) = socket.recv_from(&mut buffer).ok()?;
                assert_eq!(from, to);
                Some(String::from_utf8_lossy(&buffer[..len]).into_owned())
            };
            // Before there is a service, its flow is tracked without translation.
            assert_eq!(hear(), None);
            step(&mut driver, vec![service("dns", 1, Proto::Udp, |_| {})]);
            assert_eq!(hear(), None);
            for n in [0, 1, 0] {
                step(&mut driver, slices("dns", Proto::Udp, &[here(n)]));
                wait_until("the endpoint of now answers", Duration::from_secs(10), || {
                    let who = hear();
                    if who.as_deref() == Some(&pod(n, family)) {
                        Ok(())
                    } else {
                        Err(format!("{who:?} answered"))
                    }
                });
                // None of the old one's comes any more.
                assert!((0..5).filter_map(|_| hear()).all(|who| who == pod(n, family)));
            }
            step(&mut driver, slices("dns", Proto::Udp, &[]));
            assert_eq!(hear(), None, "nobody is left");
            step(&mut driver, vec![Event::ServiceGone("default/dns".into())]);
        }
    });
}

#[test]
fn service_nft_takes_thousands_of_services() {
    isolated(module_path!(), "service_nft_takes_thousands_of_services", |_| {
        const COUNT: u16 = 5000;
        let bed = Bed::new(2);
        let mut events = web(&[here(0), here(1)]);
        for n in 0..COUNT {
            let name = format!("many-{n}");
            let [high, low] = n.to_be_bytes();
            let v4 = format!("10.97.{high}.{low}").parse().expect("an address");
            let v6 = format!("fd00:97::{n:x}").parse().expect("an address");
            events.push(service(&name, 0, Proto::Tcp, |service| {
                service.cluster_ips = [v4, v6].into();
                service.ports[0].node_port = 0;
            }));
            events.extend(slices(&name, Proto::Tcp, &[here(usize::from(n % 2))]));
        }
        let mut driver = bed.driver(events);
        let last = at(&format!("10.97.{}.{}", (COUNT - 1) >> 8, (COUNT - 1) & 255), 80);
        let answered = |to| bed.client.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}")).0;
        assert_eq!(answered(last), pod(usize::from((COUNT - 1) % 2), 0));
        assert_eq!(
            answered(at(&format!("fd00:97::{:x}", COUNT - 2), 80)),
            pod(usize::from((COUNT - 2) % 2), 1)
        );
        assert_eq!(answered(at("10.97.0.0", 80)), pod(0, 0));
        // One changes, the others stay.
        step(&mut driver, slices(&format!("many-{}", COUNT - 1), Proto::Tcp, &[here(0)]));
        assert_eq!(answered(last), pod(0, 0));
        assert_eq!(answered(at("10.97.0.1", 80)), pod(1, 0));
        // All but one go.
        step(&mut driver, synced(web(&[here(1)])));
        let both: BTreeSet<_> = (0..10).map(|_| answered(node_port(1, 0))).collect();
        assert_eq!(both, [pod(1, 0)].into());
        assert!(bed.client.run(|| TcpStream::connect_timeout(&last, Duration::from_millis(200))).is_err());
    });
}
