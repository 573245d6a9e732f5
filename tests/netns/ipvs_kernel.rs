//! What the IPVS data plane leaves in the kernel: settings of services, services of others, repairs.

use std::process::Command;

use sheave_agent::dataplane::Mode;
use sheave_agent::service::{Event, IpvsScheduler, Proto, Scheduler, Service, ServiceExtras, ServicePort};
use sheave_harness::{isolated, wait_for};

use crate::ipvs_bed::{
    Bed, ECHO, NAMES, NODE, POD1, POD2, Talk, endpoints, plain, table, tell, weighted, with,
};
use crate::service_scenarios;
use crate::service_world::{address, ask, ask_udp, at, ip, udp_client};

#[test]
fn ipvs_scenarios() {
    isolated(module_path!(), "ipvs_scenarios", |cgroup| service_scenarios::run(cgroup, Mode::Ipvs));
}

fn scheduled(name: &str, ip: &str, scheduler: Scheduler) -> Event {
    let extras = ServiceExtras { scheduler, ..ServiceExtras::default() };
    Event::Service(with(plain(name, &[ip], Proto::Tcp, 0), extras))
}

#[test]
fn ipvs_settings_of_services_are_the_kernels() {
    isolated(module_path!(), "ipvs_settings_of_services_are_the_kernels", |_| {
        let bed = Bed::new();
        let one = |name: &str| endpoints(name, Proto::Tcp, NAMES, &[(POD1[0], true, true)]);
        let mut events = vec![scheduled("default", "10.96.2.1", Scheduler::Default), one("default")];
        events.extend([scheduled("maglev", "10.96.2.2", Scheduler::Maglev), one("maglev")]);
        for (number, (scheduler, name)) in (3..).zip(IpvsScheduler::ALL) {
            let vip = format!("10.96.2.{number}");
            events.extend([scheduled(name, &vip, Scheduler::Ipvs(scheduler)), one(name)]);
        }
        let sticky = Service { affinity_timeout_s: 300, ..plain("sticky", &["10.96.3.1"], Proto::Tcp, 0) };
        events.extend([Event::Service(sticky), one("sticky")]);
        events.push(Event::Service(plain("heavy", &["10.96.3.2"], Proto::Tcp, 0)));
        events.push(weighted("heavy", "a", Proto::Tcp, NAMES, 6, &[(POD1[0], true, true)]));
        events.push(weighted("heavy", "b", Proto::Tcp, NAMES, 2, &[(POD2[0], true, true)]));
        let mut driver = bed.driver(events);
        let shown = |start: &str| {
            let found = table();
            let found = found.into_iter().find(|(key, _)| key.starts_with(&format!("TCP {start}:80 ")));
            found.unwrap_or_else(|| panic!("no {start} in {:?}", table()))
        };
        assert!(shown("10.96.2.1").0.contains(" rr"), "{:?}", shown("10.96.2.1"));
        assert!(shown("10.96.2.2").0.contains(" mh"), "{:?}", shown("10.96.2.2"));
        for (number, (_, name)) in (3..).zip(IpvsScheduler::ALL) {
            let (key, destinations) = shown(&format!("10.96.2.{number}"));
            assert!(key.split(' ').any(|word| word == name), "{key} is not scheduled by {name}");
            assert_eq!(destinations, [(format!("{}:{NAMES}", POD1[0]), 1)]);
            assert_eq!(ask(at(&format!("10.96.2.{number}"), 80)).expect(name).0, POD1[0]);
        }
        let (key, _) = shown("10.96.3.1");
        let ticks = key.split(' ').skip_while(|word| *word != "persistent").nth(1);
        let ticks: u32 = ticks.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{key}"));
        // The kernel counts in its own ticks.
        assert!([100, 250, 300, 1000].contains(&(ticks / 300)) && ticks.is_multiple_of(300), "{key}");
        let (key, destinations) = shown("10.96.3.2");
        assert!(key.contains(" wrr"), "{key}: rr would not look at weights");
        let expected = [(format!("{}:{NAMES}", POD1[0]), 3), (format!("{}:{NAMES}", POD2[0]), 1)];
        assert_eq!(destinations, expected);
        // A live service changes its scheduler.
        tell(&mut driver, vec![scheduled("default", "10.96.2.1", Scheduler::Ipvs(IpvsScheduler::Lc))]);
        assert!(shown("10.96.2.1").0.contains(" lc"), "{:?}", shown("10.96.2.1"));
        for (setting, value) in [("conntrack", "1"), ("expire_nodest_conn", "1"), ("conn_reuse_mode", "1")] {
            let held = std::fs::read_to_string(format!("/proc/sys/net/ipv4/vs/{setting}")).expect(setting);
            assert_eq!(held.trim(), value, "{setting}");
        }
        drop(driver);
        bed.uninstall();
        assert!(table().is_empty(), "{:?}", table());
    });
}

#[test]
fn ipvs_datagrams_leave_an_endpoint_that_is_gone() {
    isolated(module_path!(), "ipvs_datagrams_leave_an_endpoint_that_is_gone", |_| {
        let bed = Bed::new();
        let local = Service { external_local: true, ..plain("dns", &["10.96.0.1"], Proto::Udp, 30_080) };
        let slice = |all: &[(&str, bool, bool)]| endpoints("dns", Proto::Udp, NAMES, all);
        let mut driver = bed.driver(vec![Event::Service(local), slice(&[(POD1[0], true, true)])]);
        let places = [at("10.96.0.1", 80), at(NODE[0], 30_080)];
        let sockets: Vec<_> = places.iter().map(|to| bed.client.run(|| udp_client(*to))).collect();
        for (socket, to) in sockets.iter().zip(places) {
            assert_eq!(ask_udp(socket, to), POD1[0]);
        }
        // About to go it still has its clients; gone it has none, though they keep to their ports.
        tell(&mut driver, vec![slice(&[(POD1[0], true, false), (POD2[0], true, true)])]);
        for (socket, to) in sockets.iter().zip(places) {
            assert_eq!(ask_udp(socket, to), POD1[0]);
        }
        tell(&mut driver, vec![slice(&[(POD2[0], true, true)])]);
        for (socket, to) in sockets.iter().zip(places) {
            let short = std::time::Duration::from_millis(300);
            socket.set_read_timeout(Some(short)).expect("set a timeout");
            // The first datagram may be spent on finding out.
            wait_for("the other endpoint's answer", || {
                socket.send_to(b"who", to).map_err(|e| e.to_string())?;
                let mut buffer = [0; 64];
                let (length, _) = socket.recv_from(&mut buffer).map_err(|e| e.to_string())?;
                let server = String::from_utf8_lossy(&buffer[..length]).into_owned();
                if server == POD2[0] { Ok(()) } else { Err(server) }
            });
        }
        bed.uninstall();
    });
}

/// What setsockopt takes to add a service (uapi `struct ip_vs_service_user`).
#[repr(C)]
struct UserService {
    protocol: u16,
    addr: u32,
    port: u16,
    mark: u32,
    scheduler: [u8; 16],
    flags: u32,
    timeout_s: u32,
    netmask: u32,
}

/// Adds or deletes a service in the way of programs other than ours.
#[expect(unsafe_code, reason = "setsockopt with an option of IPVS's")]
fn by_somebody_else(option: i32, addr: &str, port: u16) {
    use std::os::fd::AsRawFd as _;
    let std::net::IpAddr::V4(addr) = address(addr) else { panic!("IPv4 only") };
    let mut scheduler = [0; 16];
    scheduler[..2].copy_from_slice(b"rr");
    let service = UserService {
        protocol: libc::IPPROTO_TCP as u16,
        addr: u32::from_ne_bytes(addr.octets()),
        port: port.to_be(),
        mark: 0,
        scheduler,
        flags: 0,
        timeout_s: 0,
        netmask: u32::MAX,
    };
    let raw = nix::sys::socket::SockProtocol::Raw;
    let kind = nix::sys::socket::SockType::Raw;
    let flags = nix::sys::socket::SockFlag::empty();
    let socket = nix::sys::socket::socket(nix::sys::socket::AddressFamily::Inet, kind, flags, raw)
        .expect("a raw socket");
    // SAFETY: the kernel reads as many bytes as the structure has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            option,
            (&raw const service).cast(),
            size_of::<UserService>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// `IP_VS_SO_SET_ADD` and `IP_VS_SO_SET_DEL`.
const ADD: i32 = 64 + 1024 + 64 + 2;
const DELETE: i32 = ADD + 2;

#[test]
fn ipvs_leaves_the_services_of_others_alone() {
    isolated(module_path!(), "ipvs_leaves_the_services_of_others_alone", |_| {
        let bed = Bed::new();
        // Somebody's own, and one that stands where ours should.
        by_somebody_else(ADD, "192.0.2.77", 443);
        by_somebody_else(ADD, "10.96.0.9", 80);
        let theirs = |found: &std::collections::BTreeMap<String, Vec<(String, u32)>>| {
            found.iter().any(|(key, all)| key.starts_with("TCP 192.0.2.77:443 ") && all.is_empty())
        };
        let slice = |name: &str| endpoints(name, Proto::Tcp, NAMES, &[(POD1[0], true, true)]);
        let mut driver = bed.driver(vec![
            Event::Service(plain("web", &["10.96.0.1"], Proto::Tcp, 0)),
            slice("web"),
            Event::Service(plain("late", &["10.96.0.9"], Proto::Tcp, 0)),
            slice("late"),
        ]);
        assert_eq!(ask(at("10.96.0.1", 80)).expect("the rest works").0, POD1[0]);
        assert!(theirs(&table()), "{:?}", table());
        driver.tick().expect("repair");
        let in_the_way = |key: &str| key.starts_with("TCP 10.96.0.9:80 ");
        let found = table();
        assert!(found.iter().any(|(key, all)| in_the_way(key) && all.is_empty()), "{found:?}");
        // Out of the way, ours takes its place.
        by_somebody_else(DELETE, "10.96.0.9", 80);
        driver.tick().expect("repair");
        assert_eq!(ask(at("10.96.0.9", 80)).expect("now it works").0, POD1[0]);
        drop(driver);
        bed.uninstall();
        let found = table();
        assert!(theirs(&found) && found.len() == 1, "{found:?}");
    });
}

#[test]
fn ipvs_repairs_what_others_break() {
    isolated(module_path!(), "ipvs_repairs_what_others_break", |_| {
        let bed = Bed::new();
        let two = ServicePort { name: "".into(), port: 81, node_port: 0, proto: Proto::Tcp };
        let mut service = plain("web", &["10.96.0.1"], Proto::Tcp, 30_080);
        service.ports = [service.ports[0].clone(), two].into();
        let slice = endpoints("web", Proto::Tcp, ECHO, &[(POD1[0], true, true)]);
        let mut driver = bed.driver(vec![Event::Service(service), slice]);
        let works = |why: &str| {
            for to in [at("10.96.0.1", 80), at("10.96.0.1", 81), at(NODE[0], 30_080)] {
                assert_eq!(Talk::once(to).to_string(), POD1[0], "{why}");
                assert_eq!(bed.client.run(|| Talk::once(to)).to_string(), POD1[0], "{why}");
            }
        };
        works("at the beginning");
        let mut talk = bed.client.run(|| Talk::begin(at("10.96.0.1", 80)));
        let nft = |args: &[&str]| {
            let done = Command::new("nft").args(args).status().expect("run nft");
            assert!(done.success(), "nft {args:?}");
        };
        type Break<'a> = (&'a str, &'a dyn Fn());
        let breaks: [Break<'_>; 4] = [
            ("without the rules", &|| nft(&["flush", "ruleset"])),
            ("without an element", &|| {
                nft(&["delete", "element", "inet", "sheave_ipvs", "node4", "{", NODE[0], "}"]);
                nft(&["delete", "chain", "inet", "sheave_ipvs", "postrouting"]);
            }),
            ("without the device", &|| ip(&["link", "del", "sheave-ipvs0"])),
            ("without a service", &|| by_somebody_else(DELETE, "10.96.0.1", 81)),
        ];
        for (why, harm) in breaks {
            harm();
            driver.tick().unwrap_or_else(|e| panic!("{why}: {e}"));
            works(why);
            assert_eq!(talk.with().to_string(), POD1[0], "{why}");
        }
        // The node gets another address.
        ip(&["addr", "add", "198.51.100.7/24", "dev", "up0"]);
        driver.tick().expect("repair");
        assert_eq!(bed.client.run(|| Talk::once(at("198.51.100.7", 30_080))).to_string(), POD1[0]);
        drop(driver);
        bed.uninstall();
    });
}
