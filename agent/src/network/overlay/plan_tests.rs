//! Plans against a kernel that does what it is told. Invariant: whatever was there before, one plan after another ends
//! with nothing left to do, and the end does not depend on the way there.

use proptest::prelude::*;

use super::*;

const UPLINK: u32 = 2;

fn tunnel_link(index: u32, name: &str, mtu: u32) -> TunnelLink {
    let link = crate::network::netlink::Link {
        index,
        name: name.to_owned(),
        alias: None,
        mtu,
        up: true,
        running: true,
        loopback: name == "lo",
        mac: Some([2; 6]),
        peer: None,
        queued: false,
        across: false,
    };
    TunnelLink { link, vxlan: None }
}

fn address(link: u32, ip: IpAddr) -> Address {
    Address { link, ip, global: true, second_choice: false, tentative: false }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A node with one uplink on which its peers are neighbours.
fn kernel(wish: &Wish, via: Option<&str>) -> Kernel {
    let mut kernel = Kernel {
        links: vec![tunnel_link(1, "lo", 65536), tunnel_link(UPLINK, "eth0", 1500)],
        addresses: wish.own.node_ips.iter().map(|ip| address(UPLINK, *ip)).collect(),
        ..Kernel::default()
    };
    for ip in wish.peers.iter().flat_map(|peer| &peer.node_ips) {
        kernel.reach.insert(*ip, Reach { link: UPLINK, via: via.map(self::ip) });
    }
    kernel.sysctls.insert("net/ipv4/conf/eth0/rp_filter".into(), "1".into());
    kernel
}

fn peer(n: u8, ips: &[&str]) -> Peer {
    Peer {
        name: format!("node-{n}"),
        node_ips: ips.iter().map(|ip| self::ip(ip)).collect(),
        pod_cidrs: vec![
            format!("10.244.{n}.0/24").parse().unwrap(),
            format!("fd00:244:0:{n:x}::/64").parse().unwrap(),
        ],
    }
}

fn wish(mode: Mode, peers: Vec<Peer>) -> Wish {
    let own = peer(1, &["192.0.2.1", "2001:db8::1"]);
    Wish {
        mode,
        vni: 84,
        port: 4789,
        tx_checksum: true,
        own: Own { name: own.name, node_ips: own.node_ips, pod_cidrs: own.pod_cidrs },
        uplinks: vec!["eth0".into()],
        peers,
        synced: true,
        ipv6: true,
    }
}

fn dual(n: u8) -> Peer {
    peer(n, &[&format!("192.0.2.{n}"), &format!("2001:db8::{n:x}")])
}

fn index_of(kernel: &Kernel, name: &str) -> u32 {
    kernel.links.iter().find(|l| l.link.name == name).expect("a link that is there").link.index
}

fn drop_link(kernel: &mut Kernel, name: &str) {
    let index = index_of(kernel, name);
    kernel.links.retain(|l| l.link.index != index);
    kernel.addresses.retain(|a| a.link != index);
    kernel.routes.retain(|r| r.link != Some(index));
    kernel.neighbours.retain(|n| n.link != index);
    kernel.forwards.retain(|f| f.link != index);
    kernel.sysctls.retain(|key, _| !key.contains(&format!("/{name}/")));
}

/// Does what the step says, as the kernel would.
fn apply(kernel: &mut Kernel, step: &Step) {
    match step {
        Step::DeleteLink { name } => drop_link(kernel, name),
        Step::CreateVxlan { name, mac, mtu, vxlan } => {
            assert!(!kernel.links.iter().any(|l| l.link.name == *name), "a name is taken");
            let index = kernel.links.iter().map(|l| l.link.index).max().unwrap_or(0) + 1;
            let mut new = tunnel_link(index, name, *mtu);
            new.link.up = false;
            new.link.mac = Some(*mac);
            new.vxlan = Some(*vxlan);
            kernel.links.push(new);
        }
        Step::Sysctl { key, value } => {
            kernel.sysctls.insert(key.clone(), (*value).to_owned());
        }
        Step::ChecksumHere { name } => {
            kernel.offloading.remove(name);
        }
        Step::SetLink { name, mtu } => {
            let link = kernel.links.iter_mut().find(|l| l.link.name == *name).expect("a link");
            (link.link.up, link.link.mtu) = (true, *mtu);
        }
        Step::Address { link, ip } => {
            let index = index_of(kernel, link);
            kernel.addresses.push(address(index, *ip));
        }
        Step::DeleteAddress { link, ip } => {
            let index = index_of(kernel, link);
            kernel.addresses.retain(|a| (a.link, a.ip) != (index, *ip));
        }
        Step::Neighbour { link, ip, mac } => {
            let index = index_of(kernel, link);
            kernel.neighbours.retain(|n| (n.link, n.ip) != (index, *ip));
            kernel.neighbours.push(Neighbour { link: index, ip: *ip, mac: *mac });
        }
        Step::DeleteNeighbour { link, ip, .. } => {
            let index = index_of(kernel, link);
            kernel.neighbours.retain(|n| (n.link, n.ip) != (index, *ip));
        }
        Step::Forward { link, mac, to } => {
            let index = index_of(kernel, link);
            kernel.forwards.retain(|f| (f.link, f.mac) != (index, *mac));
            kernel.forwards.push(Forward { link: index, mac: *mac, to: *to });
        }
        Step::DeleteForward { link, mac, .. } => {
            let index = index_of(kernel, link);
            kernel.forwards.retain(|f| (f.link, f.mac) != (index, *mac));
        }
        Step::Route(want) => {
            let link = want.link.as_deref().map(|name| {
                let link = kernel.links.iter().find(|l| l.link.name == name).expect("a link");
                assert!(link.link.up, "routes need a link that is up");
                link.link.index
            });
            kernel.routes.retain(|r| (r.to, r.metric) != (want.to, want.metric));
            kernel.routes.push(OwnedRoute {
                to: want.to,
                kind: want.kind,
                link: link.or(Some(1)),
                via: want.via,
                src: want.src,
                metric: want.metric,
                protocol: PROTOCOL,
                mtu: 0,
            });
        }
        Step::DeleteRoute(route) => kernel.routes.retain(|r| r != route),
    }
}

/// Plans and applies until nothing is left; returns the last plan.
fn settle(wish: &Wish, kernel: &mut Kernel) -> Plan {
    for _ in 0..3 {
        let plan = plan(wish, kernel);
        if plan.steps.is_empty() {
            return plan;
        }
        plan.steps.iter().for_each(|step| apply(kernel, step));
    }
    panic!("does not settle: {:?}", plan(wish, kernel).steps)
}

/// What matters of a kernel, whatever the order and indexes.
fn shape(kernel: &Kernel) -> (Vec<String>, Vec<String>) {
    let name = |index: u32| kernel.links.iter().find(|l| l.link.index == index).map(|l| l.link.name.clone());
    let ours = |index: u32| name(index).is_some_and(|name| name.starts_with("sheave-"));
    let mut routes: Vec<String> = kernel
        .routes
        .iter()
        .map(|r| format!("{} {:?} {:?} {:?} {:?}", r.to, r.kind, r.link.and_then(name), r.via, r.src))
        .collect();
    let mut rows: Vec<String> = Vec::new();
    for l in kernel.links.iter().filter(|l| ours(l.link.index)) {
        rows.push(format!("{} {} {} {:?} {:?}", l.link.name, l.link.mtu, l.link.up, l.link.mac, l.vxlan));
    }
    rows.extend(kernel.neighbours.iter().map(|n| format!("{:?} {} {:?}", name(n.link), n.ip, n.mac)));
    rows.extend(kernel.forwards.iter().map(|f| format!("{:?} {} {:?}", name(f.link), f.to, f.mac)));
    rows.extend(
        kernel.addresses.iter().filter(|a| ours(a.link)).map(|a| format!("{:?} {}", name(a.link), a.ip)),
    );
    routes.sort();
    rows.sort();
    (routes, rows)
}

#[test]
fn a_peer_by_vxlan_gets_route_neighbour_and_forwarding_entry() {
    let wish = wish(Mode::Vxlan, vec![dual(2)]);
    let mut kernel = kernel(&wish, Some("192.0.2.254"));
    let plan = settle(&wish, &mut kernel);
    let device = kernel.links.iter().find(|l| l.link.name == "sheave-vx4").unwrap().clone();
    assert_eq!((device.link.mtu, plan.pod_mtu), (1450, 1450));
    assert_eq!(device.link.mac, Some(vtep_mac("node-1", true)));
    let vxlan = Vxlan { vni: 84, port: 4789, local: Some(ip("192.0.2.1")), learning: false };
    assert_eq!(device.vxlan, Some(vxlan));
    let mac = vtep_mac("node-2", true);
    assert_eq!(kernel.forwards, [Forward { link: device.link.index, mac, to: ip("192.0.2.2") }]);
    assert_eq!(kernel.neighbours.len(), 2);
    let v4 = kernel.routes.iter().find(|r| r.to == "10.244.2.0/24".parse().unwrap()).unwrap();
    assert_eq!((v4.via, v4.src), (Some(ip("10.244.2.0")), Some(ip("10.244.1.0"))));
    assert!(kernel.neighbours.iter().any(|n| Some(n.ip) == v4.via && n.mac == mac));
    let v6 = kernel.routes.iter().find(|r| r.to == "fd00:244:0:2::/64".parse().unwrap()).unwrap();
    assert!(kernel.neighbours.iter().any(|n| Some(n.ip) == v6.via && n.mac == mac));
    assert!(!kernel.links.iter().any(|l| l.link.name == "sheave-vx6"));
    assert_eq!(kernel.sysctls["net/ipv4/conf/eth0/rp_filter"], "2", "what comes back may come another way");
}

#[test]
fn the_underlay_is_what_both_have() {
    let mut wish = wish(Mode::Vxlan, vec![peer(2, &["2001:db8::2"]), dual(3)]);
    let mut kernel = self::kernel(&wish, None);
    let plan = settle(&wish, &mut kernel);
    let mtus: Vec<(&str, u32)> = plan.ways.iter().map(|way| (way.link.as_str(), way.mtu)).collect();
    assert_eq!(
        mtus,
        [("sheave-vx6", 1430), ("sheave-vx6", 1430), ("sheave-vx4", 1450), ("sheave-vx4", 1450)]
    );
    assert_eq!(plan.pod_mtu, 1430);
    wish.own.node_ips.retain(IpAddr::is_ipv4);
    let plan = settle(&wish, &mut kernel);
    assert!(plan.refused.iter().all(|r| r.peer == "node-2") && plan.refused.len() == 2, "{plan:?}");
    assert!(!kernel.links.iter().any(|l| l.link.name == "sheave-vx6"), "nobody needs it any more");
}

#[test]
fn neighbours_are_reached_without_a_tunnel() {
    for (mode, via, tunnel) in [
        (Mode::Auto, None, false),
        (Mode::Auto, Some("192.0.2.254"), true),
        (Mode::Direct, None, false),
        (Mode::Vxlan, None, true),
    ] {
        let wish = wish(mode, vec![dual(2)]);
        let mut kernel = kernel(&wish, via);
        let plan = settle(&wish, &mut kernel);
        assert_eq!(plan.ways.len(), 2);
        assert!(plan.ways.iter().all(|way| way.tunnel == tunnel), "{mode:?} {via:?}");
        assert_eq!(plan.pod_mtu, if tunnel { 1450 } else { 1500 });
    }
    let wish = wish(Mode::Direct, vec![dual(2)]);
    let mut kernel = kernel(&wish, Some("192.0.2.254"));
    let plan = settle(&wish, &mut kernel);
    assert!(plan.ways.is_empty() && plan.refused[0].why.contains("192.0.2.254"), "{plan:?}");
    assert!(settle(&self::wish(Mode::None, vec![dual(2)]), &mut kernel).ways.is_empty());
    assert!(kernel.routes.is_empty(), "{:?}", kernel.routes);
}

#[test]
fn a_way_changes_with_the_network_and_leaves_nothing() {
    let wish = wish(Mode::Auto, vec![dual(2), dual(3)]);
    let mut kernel = kernel(&wish, None);
    settle(&wish, &mut kernel);
    let direct = shape(&kernel);
    for reach in kernel.reach.values_mut() {
        reach.via = Some(ip("192.0.2.254"));
    }
    settle(&wish, &mut kernel);
    assert_ne!(shape(&kernel), direct);
    for reach in kernel.reach.values_mut() {
        reach.via = None;
    }
    settle(&wish, &mut kernel);
    assert_eq!(shape(&kernel), direct);
}

#[test]
fn nothing_is_removed_before_the_peers_are_known() {
    let full = wish(Mode::Vxlan, vec![dual(2), dual(3)]);
    let mut kernel = kernel(&full, None);
    settle(&full, &mut kernel);
    let before = shape(&kernel);
    let mut unknown = Wish { peers: Vec::new(), synced: false, ..full.clone() };
    settle(&unknown, &mut kernel);
    assert_eq!(shape(&kernel), before);
    unknown.synced = true;
    settle(&unknown, &mut kernel);
    let (routes, rows) = shape(&kernel);
    assert!(rows.is_empty() && routes.iter().all(|r| r.contains("Unreachable")), "{routes:?} {rows:?}");
}

#[test]
fn what_others_made_is_left_and_named() {
    let wish = wish(Mode::Vxlan, vec![dual(2)]);
    let mut kernel = kernel(&wish, None);
    kernel.routes.push(OwnedRoute {
        to: "10.244.2.0/24".parse().unwrap(),
        kind: RouteKind::Unicast,
        link: Some(UPLINK),
        via: None,
        src: None,
        metric: 0,
        protocol: 4,
        mtu: 0,
    });
    let plan = settle(&wish, &mut kernel);
    assert!(plan.refused[0].why.contains("10.244.2.0/24 by eth0"), "{plan:?}");
    assert!(kernel.routes.iter().any(|r| r.protocol == 4));
    kernel.links.retain(|l| l.link.name != "sheave-vx4");
    kernel.links.push(tunnel_link(9, "sheave-vx4", 1500));
    let plan = settle(&wish, &mut kernel);
    assert!(plan.refused.iter().any(|r| r.why.contains("sheave-vx4 is there and not ours")), "{plan:?}");
}

#[test]
fn the_tunnel_follows_its_uplink() {
    let wish = Wish { tx_checksum: false, ..wish(Mode::Vxlan, vec![dual(2)]) };
    let mut kernel = kernel(&wish, None);
    let first = plan(&wish, &kernel);
    assert!(first.steps.iter().any(|s| matches!(s, Step::ChecksumHere { .. })));
    settle(&wish, &mut kernel);
    kernel.links[1].link.mtu = 9000;
    assert_eq!(settle(&wish, &mut kernel).pod_mtu, 8950);
    // While the uplink has no address nobody knows its MTU.
    let addresses = kernel.addresses.clone();
    kernel.addresses.retain(|a| a.link != UPLINK);
    assert_eq!(plan(&wish, &kernel).steps, []);
    kernel.addresses = addresses;
    kernel.links[1].link.mtu = 1300;
    let small = settle(&wish, &mut kernel);
    assert!(small.refused.iter().any(|r| r.why.contains("1250") && r.why.contains("IPv6")), "{small:?}");
    let renumbered = Wish { port: 8472, ..wish };
    settle(&renumbered, &mut kernel);
    let device = kernel.links.iter().find(|l| l.link.name == "sheave-vx4").unwrap();
    assert_eq!(device.vxlan.map(|v| v.port), Some(8472));
}

proptest! {
    /// Interrupted after any step, with anything removed or put wrong by hand: the next passes lead to the same end.
    #[test]
    fn any_damage_is_repaired(
        count in 1_u8..6, v6_only in 0_u8..6, stop in 0_usize..60, losses in prop::collection::vec(0_u8..10, 0..6),
        pick in any::<prop::sample::Index>(), direct in any::<bool>(),
    ) {
        let peers = (2..2 + count).map(|n| if n == v6_only { peer(n, &["2001:db8::7"]) } else { dual(n) });
        let wish = wish(if direct { Mode::Auto } else { Mode::Vxlan }, peers.collect());
        let mut perfect = kernel(&wish, None);
        let ends = settle(&wish, &mut perfect);

        let mut kernel = kernel(&wish, None);
        let steps = plan(&wish, &kernel).steps;
        steps.iter().take(stop).for_each(|step| apply(&mut kernel, step));
        for loss in losses {
            let at = |len: usize| (len > 0).then(|| pick.index(len));
            match loss {
                0 => { at(kernel.routes.len()).map(|i| kernel.routes.remove(i)); }
                1 => { at(kernel.neighbours.len()).map(|i| kernel.neighbours.remove(i)); }
                2 => { at(kernel.forwards.len()).map(|i| kernel.forwards.remove(i)); }
                3 => {
                    let name = kernel.links.iter().find(|l| l.vxlan.is_some()).map(|l| l.link.name.clone());
                    name.into_iter().for_each(|name| drop_link(&mut kernel, &name));
                }
                4 => kernel.links.iter_mut().filter(|l| l.vxlan.is_some()).for_each(|l| l.link.up = false),
                5 => kernel.links.iter_mut().filter(|l| l.vxlan.is_some()).for_each(|l| l.link.mtu = 1280),
                6 => kernel.neighbours.iter_mut().for_each(|n| n.mac = [6; 6]),
                7 => kernel.forwards.iter_mut().for_each(|f| f.to = ip("203.0.113.9")),
                8 => kernel.routes.iter_mut().for_each(|r| r.src = None),
                _ => kernel.addresses.retain(|a| a.link <= UPLINK),
            }
        }
        let repaired = settle(&wish, &mut kernel);
        prop_assert_eq!(shape(&kernel), shape(&perfect));
        prop_assert_eq!(repaired.ways, ends.ways);
    }
}
