//! What to do so that pods of other nodes are reached, PURE. Invariant: [`plan`] applied to what was observed gives what
//! is wanted, and applied to what is wanted gives nothing; first start, event, timer and repair are one code path.
//! Nothing is removed before the peers are known.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use sha2::{Digest, Sha256};

use super::super::ipam::bounds;
use super::super::netlink::tunnel::{Forward, OwnedRoute, Reach, RouteKind, TunnelLink, Vxlan};
use super::super::netlink::{Address, Mac, Neighbour};
use super::peers::{Own, Peer, Refusal, accept};
use super::settings::Mode;

/// Owner of our routes in the kernel's tables (`rtm_protocol`), a number nobody else has claimed.
pub(super) const PROTOCOL: u8 = 84;
/// What IPv6 gives a route without a metric.
const METRIC_V6: u32 = 1024;
/// Metric of the route that ends what is for no pod of this node: behind every other.
const METRIC_LAST: u32 = 4_278_198_272;
/// Bytes around a packet: outer IPv4 or IPv6, UDP, VXLAN and the inner Ethernet header.
const OVERHEAD_V4: u32 = 20 + 8 + 8 + 14;
const OVERHEAD_V6: u32 = 40 + 8 + 8 + 14;
/// Where no link says otherwise.
const DEFAULT_MTU: u32 = 1500;
/// Smallest MTU with which a link has IPv6.
const MTU_V6_MIN: u32 = 1280;

/// Name of the VXLAN device over an underlay of IPv4 or IPv6.
pub(super) fn device_name(v4: bool) -> &'static str {
    if v4 { "sheave-vx4" } else { "sheave-vx6" }
}

/// Whether a link of this name is one of our tunnels.
pub(in crate::network) fn is_tunnel(name: &str) -> bool {
    [true, false].iter().any(|v4| name == device_name(*v4))
}

/// Indexes of our devices.
pub(super) fn our_devices(kernel: &Kernel) -> Vec<u32> {
    kernel.links.iter().filter(|link| is_tunnel(&link.link.name)).map(|link| link.link.index).collect()
}

/// Hardware address of a node's end of the tunnels over one underlay family. It depends on nothing else, so that peers
/// need not be told.
pub(super) fn vtep_mac(node: &str, v4: bool) -> Mac {
    let hash = Sha256::digest(format!("sheave vtep {} {node}", if v4 { 4 } else { 6 }));
    [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
}

/// The gateway behind which IPv6 ranges of the owner of `mac` are: link-local, so that the kernel asks no other route
/// about it.
fn gateway_v6(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac;
    let mut ip = [0; 16];
    ip[..2].copy_from_slice(&[0xfe, 0x80]);
    ip[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    ip.into()
}

fn overhead(v4: bool) -> u32 {
    if v4 { OVERHEAD_V4 } else { OVERHEAD_V6 }
}

/// What is wanted, before the kernel is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) mode: Mode,
    pub(super) vni: u32,
    pub(super) port: u16,
    pub(super) tx_checksum: bool,
    pub(super) own: Own,
    pub(super) uplinks: Vec<String>,
    /// Older ones first.
    pub(super) peers: Vec<Peer>,
    /// Whether `peers` are all there are. Until then nothing is removed.
    pub(super) synced: bool,
    /// Whether the kernel has IPv6.
    pub(super) ipv6: bool,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) links: Vec<TunnelLink>,
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<OwnedRoute>,
    /// Permanent ones.
    pub(super) neighbours: Vec<Neighbour>,
    /// Of our devices.
    pub(super) forwards: Vec<Forward>,
    /// Where packets to the peers' addresses go.
    pub(super) reach: BTreeMap<IpAddr, Reach>,
    /// Values of [`sysctls`], where they could be read.
    pub(super) sysctls: BTreeMap<String, String>,
    /// Devices of ours that leave checksums to the uplink.
    pub(super) offloading: BTreeSet<String>,
}

/// A route whose link is known by name: the link may be yet to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WantedRoute {
    pub(super) to: IpNetwork,
    pub(super) kind: RouteKind,
    pub(super) link: Option<String>,
    pub(super) via: Option<IpAddr>,
    pub(super) src: Option<IpAddr>,
    pub(super) metric: u32,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    DeleteLink {
        name: String,
    },
    CreateVxlan {
        name: String,
        mac: Mac,
        mtu: u32,
        vxlan: Vxlan,
    },
    Sysctl {
        key: String,
        value: &'static str,
    },
    ChecksumHere {
        name: String,
    },
    /// Brings a link up with this MTU.
    SetLink {
        name: String,
        mtu: u32,
    },
    Address {
        link: String,
        ip: IpAddr,
    },
    DeleteAddress {
        link: String,
        ip: IpAddr,
    },
    Neighbour {
        link: String,
        ip: IpAddr,
        mac: Mac,
    },
    DeleteNeighbour {
        link: String,
        ip: IpAddr,
        mac: Mac,
    },
    Forward {
        link: String,
        mac: Mac,
        to: IpAddr,
    },
    DeleteForward {
        link: String,
        mac: Mac,
        to: IpAddr,
    },
    Route(WantedRoute),
    DeleteRoute(OwnedRoute),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::DeleteLink { name } => write!(f, "remove link {name}"),
            Step::CreateVxlan { name, vxlan, .. } => {
                write!(f, "make VXLAN device {name} (vni {}, port {})", vxlan.vni, vxlan.port)
            }
            Step::Sysctl { key, value } => write!(f, "set {} = {value}", key.replace('/', ".")),
            Step::ChecksumHere { name } => write!(f, "turn checksum offload of {name} off"),
            Step::SetLink { name, mtu } => write!(f, "bring {name} up with mtu {mtu}"),
            Step::Address { link, ip } => write!(f, "add address {ip} to {link}"),
            Step::DeleteAddress { link, ip } => write!(f, "remove address {ip} from {link}"),
            Step::Neighbour { link, ip, .. } => write!(f, "add neighbour {ip} on {link}"),
            Step::DeleteNeighbour { link, ip, .. } => write!(f, "remove neighbour {ip} on {link}"),
            Step::Forward { link, to, .. } => write!(f, "add forwarding to {to} on {link}"),
            Step::DeleteForward { link, to, .. } => write!(f, "remove forwarding to {to} on {link}"),
            Step::Route(route) => {
                let link = route.link.as_deref().unwrap_or("nowhere");
                write!(f, "add route to {} by {link}", route.to)
            }
            Step::DeleteRoute(route) => write!(f, "remove route to {}", route.to),
        }
    }
}

/// How one range of a peer is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Way {
    pub(super) peer: String,
    pub(super) range: IpNetwork,
    /// The peer's address that packets go to.
    pub(super) to: IpAddr,
    /// The device they leave by.
    pub(super) link: String,
    pub(super) tunnel: bool,
    /// Largest packet, bytes.
    pub(super) mtu: u32,
}

/// What [`plan`] found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) ways: Vec<Way>,
    /// Peers, or ranges of theirs, that are not reached, and why.
    pub(super) refused: Vec<Refusal>,
    /// Largest packet that a pod may send and every peer gets whole.
    pub(super) pod_mtu: u32,
}

/// Settings that are wanted: of our devices that exist or are to be, and of the links to the peers.
pub(super) fn sysctls(devices: &[&str], uplinks: &[&str], ipv6: bool) -> Vec<(String, &'static str)> {
    let mut all = Vec::new();
    for link in devices {
        all.push((format!("net/ipv4/conf/{link}/forwarding"), "1"));
        // What a node sends from its own address comes back another way than by the tunnel.
        all.push((format!("net/ipv4/conf/{link}/rp_filter"), "2"));
        if ipv6 {
            all.push((format!("net/ipv6/conf/{link}/disable_ipv6"), "0"));
            all.push((format!("net/ipv6/conf/{link}/addr_gen_mode"), "1"));
            all.push((format!("net/ipv6/conf/{link}/accept_ra"), "0"));
            all.push((format!("net/ipv6/conf/{link}/accept_dad"), "0"));
        }
    }
    for link in uplinks {
        all.push((format!("net/ipv4/conf/{link}/rp_filter"), "2"));
    }
    all
}

/// The setting that wins over a link's own where it is stricter.
pub(super) const RP_FILTER_ALL: &str = "net/ipv4/conf/all/rp_filter";

/// All that is wanted of the kernel.
#[derive(Debug, Default)]
struct Target {
    devices: BTreeMap<bool, Device>,
    neighbours: BTreeSet<(bool, IpAddr, Mac)>,
    forwards: BTreeSet<(bool, Mac, IpAddr)>,
    routes: Vec<WantedRoute>,
}

#[derive(Debug)]
struct Device {
    mac: Mac,
    mtu: u32,
    vxlan: Vxlan,
    addresses: BTreeSet<IpAddr>,
}

/// Leads from what the kernel has to what is wished.
pub(super) fn plan(wish: &Wish, kernel: &Kernel) -> Plan {
    let mut plan = Plan::default();
    let mut target = Target::default();
    if wish.mode != Mode::None {
        let (peers, refused) = accept(&wish.peers, &wish.own);
        plan.refused = refused;
        Router { wish, kernel, target: &mut target, plan: &mut plan }.all(&peers);
        for range in &wish.own.pod_cidrs {
            target.routes.push(WantedRoute {
                to: *range,
                kind: RouteKind::Unreachable,
                link: None,
                via: None,
                src: None,
                metric: METRIC_LAST,
            });
        }
    }
    plan.pod_mtu = pod_mtu(wish, kernel, &plan.ways);
    Differ { wish, kernel, target: &target, plan: &mut plan, fresh: BTreeSet::new() }.all();
    plan
}

/// The MTU of the link that has the node's address of a family.
fn underlay_mtu(wish: &Wish, kernel: &Kernel, v4: bool) -> Option<u32> {
    let ip = wish.own.node_ips.iter().find(|ip| ip.is_ipv4() == v4)?;
    let link = kernel.addresses.iter().find(|address| address.ip == *ip)?.link;
    kernel.links.iter().find(|l| l.link.index == link && !l.link.loopback).map(|l| l.link.mtu)
}

/// The smallest MTU of the uplinks.
fn uplink_mtu(wish: &Wish, kernel: &Kernel) -> Option<u32> {
    let named = kernel.links.iter().filter(|l| wish.uplinks.contains(&l.link.name)).map(|l| l.link.mtu);
    let by_ip = [true, false].into_iter().filter_map(|v4| underlay_mtu(wish, kernel, v4));
    named.chain(by_ip).min()
}

fn pod_mtu(wish: &Wish, kernel: &Kernel, ways: &[Way]) -> u32 {
    let uplink = uplink_mtu(wish, kernel).unwrap_or(DEFAULT_MTU);
    // With VXLAN alone pods are made for it before there is a peer.
    let expected = (wish.mode == Mode::Vxlan).then(|| {
        let v4 = wish.own.node_ips.iter().any(IpAddr::is_ipv4);
        uplink.saturating_sub(overhead(v4))
    });
    ways.iter().map(|way| way.mtu).chain(expected).chain([uplink]).min().unwrap_or(uplink)
}

/// Finds the way to every range.
struct Router<'a> {
    wish: &'a Wish,
    kernel: &'a Kernel,
    target: &'a mut Target,
    plan: &'a mut Plan,
}

impl Router<'_> {
    fn all(&mut self, peers: &[Peer]) {
        for peer in peers {
            for range in &peer.pod_cidrs {
                if range.is_ipv6() && !self.wish.ipv6 {
                    continue;
                }
                if let Err(why) = self.one(peer, *range) {
                    self.plan.refused.push(Refusal { peer: peer.name.clone(), why });
                }
            }
        }
    }

    fn one(&mut self, peer: &Peer, range: IpNetwork) -> Result<(), String> {
        if let Some(theirs) = self.foreign(range) {
            return Err(theirs);
        }
        if self.wish.mode != Mode::Vxlan {
            match self.direct(peer, range) {
                Ok(()) => return Ok(()),
                Err(why) if self.wish.mode == Mode::Direct => return Err(why),
                Err(_) => {}
            }
        }
        self.tunnel(peer, range)
    }

    /// A route of somebody else where ours would be.
    fn foreign(&self, range: IpNetwork) -> Option<String> {
        let metric = metric(range);
        let theirs = self
            .kernel
            .routes
            .iter()
            .find(|route| route.to == range && route.metric == metric && route.protocol != PROTOCOL)?;
        let link = theirs.link.and_then(|index| self.kernel.links.iter().find(|l| l.link.index == index));
        let by = link.map_or("nowhere", |l| l.link.name.as_str());
        Some(format!(
            "a route to its pod range {range} by {by} is there and not ours; remove it (ip route del {range})"
        ))
    }

    fn direct(&mut self, peer: &Peer, range: IpNetwork) -> Result<(), String> {
        let Some(ip) = peer.node_ips.iter().copied().find(|ip| ip.is_ipv4() == range.is_ipv4()) else {
            return Err(format!("it has no address of the family of its pod range {range}"));
        };
        let link = match self.kernel.reach.get(&ip) {
            None => return Err(format!("nothing leads to its address {ip}")),
            Some(Reach { via: Some(via), .. }) => {
                return Err(format!(
                    "its address {ip} is behind the router {via}, not on a link of this node"
                ));
            }
            Some(Reach { link, via: None }) => *link,
        };
        let Some(found) = self.kernel.links.iter().find(|l| l.link.index == link) else {
            return Err(format!("the link to its address {ip} is gone"));
        };
        let (name, mtu) = (found.link.name.clone(), found.link.mtu);
        self.target.routes.push(WantedRoute {
            to: range,
            kind: RouteKind::Unicast,
            link: Some(name.clone()),
            via: Some(ip),
            src: None,
            metric: metric(range),
        });
        self.plan.ways.push(Way { peer: peer.name.clone(), range, to: ip, link: name, tunnel: false, mtu });
        Ok(())
    }

    fn tunnel(&mut self, peer: &Peer, range: IpNetwork) -> Result<(), String> {
        let own = &self.wish.own;
        let pair = [true, false].into_iter().find_map(|v4| {
            let of = |ips: &[IpAddr]| ips.iter().copied().find(|ip| ip.is_ipv4() == v4);
            Some((v4, of(&own.node_ips)?, of(&peer.node_ips)?))
        });
        let Some((v4, local, to)) = pair else {
            return Err("it has no address of a family that this node has one of".to_owned());
        };
        let name = device_name(v4).to_owned();
        if self.kernel.links.iter().any(|l| l.link.name == name && l.vxlan.is_none()) {
            return Err(format!("the link {name} is there and not ours; remove it (ip link del {name})"));
        }
        let mac = vtep_mac(&peer.name, v4);
        if self.target.forwards.iter().any(|(f, m, ip)| *f == v4 && *m == mac && *ip != to) {
            return Err("its name has the same hash as another node's; give it another name".to_owned());
        }
        let mtu = self.device(v4, local);
        if range.is_ipv6() && mtu < MTU_V6_MIN {
            return Err(format!(
                "an MTU of {mtu} on {name} is too small for IPv6; the uplink's must be larger"
            ));
        }
        let via = if range.is_ipv4() { range.network() } else { gateway_v6(mac) };
        self.target.forwards.insert((v4, mac, to));
        self.target.neighbours.insert((v4, via, mac));
        self.target.routes.push(WantedRoute {
            to: range,
            kind: RouteKind::Unicast,
            link: Some(name.clone()),
            via: Some(via),
            src: source(own, range.is_ipv4()),
            metric: metric(range),
        });
        self.plan.ways.push(Way { peer: peer.name.clone(), range, to, link: name, tunnel: true, mtu });
        Ok(())
    }

    /// Wants the device of a family; returns its MTU.
    fn device(&mut self, v4: bool, local: IpAddr) -> u32 {
        let (wish, kernel) = (self.wish, self.kernel);
        let device = self.target.devices.entry(v4).or_insert_with(|| {
            let now = kernel.links.iter().find(|l| l.link.name == device_name(v4)).map(|l| l.link.mtu);
            // While the uplink is away its MTU is not known: the tunnel keeps its own.
            let mtu = underlay_mtu(wish, kernel, v4).map(|mtu| mtu.saturating_sub(overhead(v4)));
            Device {
                mac: vtep_mac(&wish.own.name, v4),
                mtu: mtu.or(now).unwrap_or(DEFAULT_MTU - overhead(v4)),
                vxlan: Vxlan { vni: wish.vni, port: wish.port, local: Some(local), learning: false },
                addresses: [true, false].into_iter().filter_map(|v4| source(&wish.own, v4)).collect(),
            }
        });
        device.mtu
    }
}

fn metric(range: IpNetwork) -> u32 {
    if range.is_ipv4() { 0 } else { METRIC_V6 }
}

/// The address from which this node speaks to pods behind a tunnel, so that they answer by the tunnel too: the first of
/// its own pod range, which no pod gets unless there are hardly any.
fn source(own: &Own, v4: bool) -> Option<IpAddr> {
    let range =
        own.pod_cidrs.iter().find(|range| range.is_ipv4() == v4 && bounds(range).0 != range.network())?;
    Some(range.network())
}

/// The link that a way's outer packets take.
fn under<'a>(kernel: &'a Kernel, way: &Way) -> Option<&'a str> {
    let index = kernel.reach.get(&way.to)?.link;
    kernel.links.iter().find(|l| l.link.index == index).map(|l| l.link.name.as_str())
}

/// Turns the difference into steps.
struct Differ<'a> {
    wish: &'a Wish,
    kernel: &'a Kernel,
    target: &'a Target,
    plan: &'a mut Plan,
    /// Devices that are made in this plan: whatever their namesakes had is gone.
    fresh: BTreeSet<String>,
}

impl<'a> Differ<'a> {
    fn all(&mut self) {
        self.devices();
        self.settings();
        for (v4, device) in &self.target.devices {
            let name = device_name(*v4);
            let now = self.now(name);
            if now.is_none_or(|l| !l.link.up || l.link.mtu != device.mtu) {
                self.step(Step::SetLink { name: name.to_owned(), mtu: device.mtu });
            }
            for ip in &device.addresses {
                if !now.is_some_and(|l| self.has_address(l.link.index, *ip)) {
                    self.step(Step::Address { link: name.to_owned(), ip: *ip });
                }
            }
        }
        self.tables();
        self.routes();
        if self.wish.synced {
            self.leftovers();
        }
    }

    fn step(&mut self, step: Step) {
        self.plan.steps.push(step);
    }

    /// The link of that name as it will be found: not there if it is made in this plan.
    fn now(&self, name: &str) -> Option<&'a TunnelLink> {
        let kernel: &'a Kernel = self.kernel;
        if self.fresh.contains(name) {
            return None;
        }
        kernel.links.iter().find(|l| l.link.name == name)
    }

    fn has_address(&self, link: u32, ip: IpAddr) -> bool {
        self.kernel.addresses.iter().any(|address| address.link == link && address.ip == ip)
    }

    fn devices(&mut self) {
        for (v4, device) in &self.target.devices {
            let name = device_name(*v4);
            let now = self.now(name);
            if now.is_some_and(|l| l.vxlan == Some(device.vxlan) && l.link.mac == Some(device.mac)) {
                continue;
            }
            if now.is_some() {
                self.step(Step::DeleteLink { name: name.to_owned() });
            }
            self.fresh.insert(name.to_owned());
            let (mac, mtu, vxlan) = (device.mac, device.mtu, device.vxlan);
            self.step(Step::CreateVxlan { name: name.to_owned(), mac, mtu, vxlan });
        }
    }

    fn settings(&mut self) {
        let devices: Vec<&str> = self.target.devices.keys().map(|v4| device_name(*v4)).collect();
        let sysctl_now = &self.kernel.sysctls;
        let strict = |key: &str| sysctl_now.get(key).is_some_and(|value| value == "1");
        let uplinks: BTreeSet<&str> =
            self.plan.ways.iter().filter_map(|way| under(self.kernel, way)).collect();
        let uplinks: Vec<&str> = uplinks.into_iter().collect();
        for (key, value) in sysctls(&devices, &[], self.wish.ipv6) {
            let fresh = self.fresh.iter().any(|name| key.contains(&format!("/{name}/")));
            if fresh || self.kernel.sysctls.get(&key).is_none_or(|now| now != value) {
                self.step(Step::Sysctl { key, value });
            }
        }
        for (key, value) in sysctls(&[], &uplinks, self.wish.ipv6) {
            // Loose is wanted only where the kernel would be strict.
            let known = sysctl_now.get(&key);
            if known.is_some_and(|now| now != value) && (strict(&key) || strict(RP_FILTER_ALL)) {
                self.step(Step::Sysctl { key, value });
            }
        }
        for name in devices {
            let on = self.fresh.contains(name) || self.kernel.offloading.contains(name);
            if !self.wish.tx_checksum && on {
                self.step(Step::ChecksumHere { name: name.to_owned() });
            }
        }
    }

    fn tables(&mut self) {
        for (v4, ip, mac) in &self.target.neighbours {
            let name = device_name(*v4);
            let link = self.now(name).map(|l| l.link.index);
            let there = |n: &Neighbour| Some(n.link) == link && n.ip == *ip && n.mac == *mac;
            if !self.kernel.neighbours.iter().any(there) {
                self.step(Step::Neighbour { link: name.to_owned(), ip: *ip, mac: *mac });
            }
        }
        for (v4, mac, to) in &self.target.forwards {
            let name = device_name(*v4);
            let link = self.now(name).map(|l| l.link.index);
            let there = |f: &Forward| Some(f.link) == link && f.mac == *mac && f.to == *to;
            if !self.kernel.forwards.iter().any(there) {
                self.step(Step::Forward { link: name.to_owned(), mac: *mac, to: *to });
            }
        }
    }

    fn routes(&mut self) {
        for want in &self.target.routes {
            let is_there = self.kernel.routes.iter().any(|route| self.is(route, want));
            if !is_there {
                self.step(Step::Route(want.clone()));
            }
        }
    }

    fn is(&self, route: &OwnedRoute, want: &WantedRoute) -> bool {
        let link = want.link.as_deref().map(|name| self.now(name).map(|l| l.link.index));
        let same_link = match link {
            // The kernel names the loopback for these.
            None => true,
            Some(index) => index.is_some() && route.link == index,
        };
        route.protocol == PROTOCOL
            && route.to == want.to
            && route.kind == want.kind
            && route.metric == want.metric
            && route.via == want.via
            && route.src == want.src
            && route.mtu == 0
            && same_link
    }

    /// What is ours and wanted no more.
    fn leftovers(&mut self) {
        for route in self.kernel.routes.iter().filter(|route| route.protocol == PROTOCOL) {
            // A route that differs is replaced in place; if it is there beside the right one, it goes.
            let replaced = |want: &&WantedRoute| want.to == route.to && want.metric == route.metric;
            let wanted = self.target.routes.iter().find(replaced);
            let stays = wanted.is_some_and(|want| {
                self.is(route, want) || !self.kernel.routes.iter().any(|other| self.is(other, want))
            });
            let link = self.kernel.links.iter().find(|l| Some(l.link.index) == route.link);
            if !stays && !link.is_some_and(|l| self.fresh.contains(&l.link.name)) {
                self.step(Step::DeleteRoute(route.clone()));
            }
        }
        for v4 in [true, false] {
            let name = device_name(v4);
            let Some(link) = self.now(name).filter(|l| l.vxlan.is_some()).map(|l| l.link.index) else {
                continue;
            };
            match self.target.devices.get(&v4) {
                None => self.step(Step::DeleteLink { name: name.to_owned() }),
                Some(device) => self.device_leftovers(v4, link, device),
            }
        }
    }

    fn device_leftovers(&mut self, v4: bool, index: u32, device: &Device) {
        let link = || device_name(v4).to_owned();
        for n in self.kernel.neighbours.iter().filter(|n| n.link == index) {
            // One with another hardware address was replaced above.
            if !self.target.neighbours.iter().any(|(f, ip, _)| *f == v4 && *ip == n.ip) {
                self.step(Step::DeleteNeighbour { link: link(), ip: n.ip, mac: n.mac });
            }
        }
        for f in self.kernel.forwards.iter().filter(|f| f.link == index) {
            if !self.target.forwards.iter().any(|(family, mac, _)| *family == v4 && *mac == f.mac) {
                self.step(Step::DeleteForward { link: link(), mac: f.mac, to: f.to });
            }
        }
        for a in self.kernel.addresses.iter().filter(|a| a.link == index && a.global) {
            if !device.addresses.contains(&a.ip) {
                self.step(Step::DeleteAddress { link: link(), ip: a.ip });
            }
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
