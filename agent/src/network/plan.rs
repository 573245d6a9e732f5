//! What to do to connect a pod, PURE. Invariant: [`steps`] applied to what was observed gives what is wanted, and
//! applied to what is wanted gives nothing; first attach, repeated attach and repair are one code path.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use sha2::{Digest, Sha256};

use super::netlink::{Link, Mac};

/// Name of a pod's link inside its namespace, unless a runtime asks for another.
pub(super) const POD_LINK: &str = "eth0";
/// What the names of our links on the node start with; 12 hex digits follow.
pub(crate) const NODE_LINK_PREFIX: &str = "shv";
/// What the aliases of our links start with; the pod's uid follows.
const POD_ALIAS: &str = "sheave pod ";
/// The same for attachments that runtimes asked for; their key follows.
const CNI_ALIAS: &str = "sheave cni ";
/// First of the tables that [`own_table`] gives.
const OWN_TABLES: u32 = 0x5348_0000;
/// Longest alias that the kernel takes, bytes.
const ALIAS_BYTES_MAX: usize = 255;
/// A pod's gateways: a permanent neighbour leads to the node's end of the pair. So that they answer, the node has IPv4's
/// on its loopback, and takes what comes by a pair for IPv6's, which is good on one link only. That is a route: about a new
/// address of every pair the kernel would do much more.
pub(super) const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

const EVERYTHING_V4: IpNetwork = match Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0) {
    Some(all) => IpNetwork::V4(all),
    None => panic!("0 is a prefix length"),
};
const EVERYTHING_V6: IpNetwork = match Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0) {
    Some(all) => IpNetwork::V6(all),
    None => panic!("0 is a prefix length"),
};

/// True for the key of an attachment that a runtime asked for, `network/container/interface`; pods' keys are their
/// uids, which have no `/`.
pub(super) fn is_cni(key: &str) -> bool {
    key.contains('/')
}

/// What the node's end of an attachment's pair is called besides its name. A key that is too long is not in it.
pub(super) fn alias(key: &str) -> String {
    let alias = format!("{}{key}", if is_cni(key) { CNI_ALIAS } else { POD_ALIAS });
    if alias.len() <= ALIAS_BYTES_MAX { alias } else { CNI_ALIAS.trim_end().to_owned() }
}

/// The key in an alias that [`alias`] made.
pub(super) fn key_of(alias: &str) -> Option<String> {
    let key = match alias.strip_prefix(CNI_ALIAS) {
        Some(key) => Some(key).filter(|key| is_cni(key)),
        None => alias.strip_prefix(POD_ALIAS).filter(|key| !is_cni(key)),
    };
    key.map(str::to_owned)
}

/// Name of the node's end of an attachment's pair: `shv` and 48 bits of the key's hash, as names have 15 bytes.
pub(super) fn node_link_name(key: &str) -> String {
    let hash = Sha256::digest(key.as_bytes());
    let mut name = NODE_LINK_PREFIX.to_owned();
    for byte in &hash[..6] {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

/// True for names that [`node_link_name`] gives.
pub(super) fn is_node_link(name: &str) -> bool {
    let hash = name.strip_prefix(NODE_LINK_PREFIX);
    hash.is_some_and(|hash| hash.len() == 12 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// Hardware addresses of a pod's pair, the node's end first. Given at creation, so that nobody renames them; locally
/// administered, unicast.
pub(super) fn macs(key: &str) -> (Mac, Mac) {
    let hash = Sha256::digest(key.as_bytes());
    let mac = |last: u8| [0x02, hash[6], hash[7], hash[8], hash[9], (hash[10] & 0xfe) | last];
    (mac(0), mac(1))
}

/// What a connected pod has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Want {
    /// The pod's uid, or `network/container/interface`.
    pub(super) key: String,
    /// Name of the link inside.
    pub(super) ifname: String,
    /// The hardware address inside, where one was asked for.
    pub(super) mac: Option<Mac>,
    /// Others may have changed what is inside since it was made: it is left as it is while the pair is whole.
    pub(super) theirs: bool,
    /// The namespace had a way out before: what is sent from these addresses gets a table of its own.
    pub(super) table: Option<u32>,
    /// The namespace must be the one with this number.
    pub(super) cookie: Option<u64>,
    /// The pod's addresses.
    pub(super) ips: Vec<IpAddr>,
    /// Addresses that the node has and sends to its pods from, at most one a family.
    pub(super) sources: Vec<IpAddr>,
    pub(super) mtu: u32,
}

/// One of the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Node,
    Pod,
}

/// What one side has. Addresses, routes and neighbours are those of the side's link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Observed {
    pub(super) link: Option<Link>,
    /// Of the pod's namespace; the node's is not looked at.
    pub(super) loopback_up: bool,
    pub(super) addresses: Vec<IpAddr>,
    /// Destination, gateway, preferred source.
    pub(super) routes: Vec<(IpNetwork, Option<IpAddr>, Option<IpAddr>)>,
    pub(super) neighbours: Vec<(IpAddr, Mac)>,
    /// Addresses whose packets are the node's when they come by its end; the pod's side is not looked at.
    pub(super) own: Vec<IpAddr>,
    /// Destinations of routes through the pod's end, whatever table they are in.
    pub(super) destinations: Vec<IpNetwork>,
    /// The pod's namespace has a default route through another link.
    pub(super) other_way_out: bool,
    /// Values of [`sysctls`], where they could be read.
    pub(super) sysctls: BTreeMap<String, String>,
}

/// One step, applied to one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) side: Side,
    pub(super) act: Act,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Removes a link, and with it its peer, routes and neighbours.
    DeleteLink { name: String },
    /// Makes the pair, the peer right in the pod's namespace.
    CreatePair { name: String, mac: Mac, peer_name: String, peer_mac: Mac, mtu: u32 },
    /// Writes below `/proc/sys`.
    Sysctl { key: String, value: &'static str },
    /// Brings a link up, names its pod, sets its MTU.
    SetLink { name: String, alias: Option<String>, mtu: Option<u32> },
    /// Waits until a link that is up passes packets.
    AwaitRunning { name: String },
    /// Waits until the namespace takes packets for an address as its own.
    AwaitLocal { ip: IpAddr },
    /// Gives a link an address.
    Address { link: String, ip: IpAddr },
    /// Takes packets for an address that come by a link.
    Own { link: String, ip: IpAddr },
    /// Makes a permanent neighbour.
    Neighbour { link: String, ip: IpAddr, mac: Mac },
    /// Makes a route.
    Route { link: String, to: IpNetwork, via: Option<IpAddr>, src: Option<IpAddr> },
    /// Makes a route in a table of its own.
    RouteIn { table: u32, link: String, to: IpNetwork, via: IpAddr },
    /// Sends what is from an address by that table.
    Rule { ip: IpAddr, table: u32 },
    /// Takes such a rule away.
    DeleteRule { ip: IpAddr, table: u32 },
}

impl Act {
    /// True for what changes nothing: [`steps`] has these last.
    pub(super) fn waits(&self) -> bool {
        matches!(self, Act::AwaitRunning { .. } | Act::AwaitLocal { .. })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Node => "node",
            Side::Pod => "pod",
        };
        match &self.act {
            Act::DeleteLink { name } => write!(f, "remove link {name}"),
            Act::CreatePair { name, peer_name, .. } => write!(f, "make links {name} and {peer_name}"),
            Act::Sysctl { key, value } => write!(f, "set {} = {value}", key.replace('/', ".")),
            Act::SetLink { name, .. } => write!(f, "bring up link {name}"),
            Act::AwaitRunning { name } => write!(f, "wait for link {name}"),
            Act::AwaitLocal { ip } => write!(f, "wait for address {ip}"),
            Act::Address { link, ip } => write!(f, "add address {ip} to {link}"),
            Act::Own { link, ip } => write!(f, "answer as {ip} on {link}"),
            Act::Neighbour { link, ip, .. } => write!(f, "add neighbour {ip} to {link}"),
            Act::RouteIn { table, link, to, via } => {
                write!(f, "add route {to} via {via} to {link} in table {table}")
            }
            Act::Rule { ip, table } => write!(f, "send what is from {ip} by table {table}"),
            Act::DeleteRule { ip, table } => write!(f, "no longer send what is from {ip} by table {table}"),
            Act::Route { link, to, via: None, .. } => write!(f, "add route {to} to {link}"),
            Act::Route { link, to, via: Some(via), .. } => write!(f, "add route {to} via {via} to {link}"),
        }?;
        write!(f, " ({side} side)")
    }
}

/// A link in the way that is not ours to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Conflict {
    /// The pod's namespace has a link of that name of somebody else's.
    PodLink,
    /// The node has a link of that name that belongs to another pod or to nobody.
    NodeLink(String),
}

/// The way from what is there to what is wanted.
pub(super) fn steps(want: &Want, node: &Observed, pod: &Observed) -> Result<Vec<Step>, Conflict> {
    let name = node_link_name(&want.key);
    let (mac, peer_mac) = macs(&want.key);
    let mut peer_mac = want.mac.unwrap_or(peer_mac);
    if want.theirs
        && let Some(now) = pod.link.as_ref().and_then(|link| link.mac)
    {
        peer_mac = now;
    }
    let mut steps = Vec::new();
    let mut step = |side, act| steps.push(Step { side, act });
    let fresh = Observed { loopback_up: pod.loopback_up, ..Observed::default() };
    let whole = is_pair(node.link.as_ref(), pod.link.as_ref(), mac, peer_mac);
    let (mut node, mut pod) = (node, pod);
    if !whole {
        match &pod.link {
            Some(link) if link.mac == Some(peer_mac) => {
                step(Side::Pod, Act::DeleteLink { name: want.ifname.clone() });
            }
            Some(_) => return Err(Conflict::PodLink),
            None => {}
        }
        match &node.link {
            // Removing the pod's end may have removed it; removing what is gone is no error.
            Some(link) if link.mac == Some(mac) => step(Side::Node, Act::DeleteLink { name: name.clone() }),
            Some(link) => return Err(Conflict::NodeLink(link.name.clone())),
            None => {}
        }
        let (name, peer_name) = (name.clone(), want.ifname.clone());
        step(Side::Node, Act::CreatePair { name, mac, peer_name, peer_mac, mtu: want.mtu });
        (node, pod) = (&fresh, &fresh);
    }
    let leave = whole && want.theirs;
    if !leave {
        pod_steps(want, pod, mac, &mut step);
    } else if let (Some(node), Some(pod)) = (&node.link, &pod.link)
        && node.mtu == pod.mtu
        && pod.mtu != want.mtu
    {
        // Nobody else has changed it: it follows the way out.
        let (name, mtu) = (want.ifname.clone(), Some(want.mtu));
        step(Side::Pod, Act::SetLink { name, alias: None, mtu });
    }
    node_steps(want, node, &name, peer_mac, &mut step);
    // Only with both ends up there is a carrier, and what is sent before the kernel has noticed it is dropped.
    let idle = |side: &Observed| side.link.as_ref().is_none_or(|link| !link.running);
    if !leave && idle(node) {
        step(Side::Node, Act::AwaitRunning { name });
    }
    if !leave && idle(pod) {
        step(Side::Pod, Act::AwaitRunning { name: want.ifname.clone() });
    }
    // The kernel makes an IPv6 address local in a task of its own, also without duplicate address detection.
    for ip in want.ips.iter().filter(|ip| !leave && ip.is_ipv6() && !pod.addresses.contains(ip)) {
        step(Side::Pod, Act::AwaitLocal { ip: *ip });
    }
    Ok(steps)
}

/// True where both ends are there, are ours and belong to each other.
fn is_pair(node: Option<&Link>, pod: Option<&Link>, mac: Mac, peer_mac: Mac) -> bool {
    let (Some(node), Some(pod)) = (node, pod) else { return false };
    node.mac == Some(mac)
        && pod.mac == Some(peer_mac)
        && node.peer == Some(pod.index)
        && pod.peer == Some(node.index)
}

fn pod_steps(want: &Want, pod: &Observed, gateway_mac: Mac, step: &mut impl FnMut(Side, Act)) {
    let link = || want.ifname.clone();
    for (key, value) in sysctls(Side::Pod, &want.ifname, &want.ips) {
        if pod.sysctls.get(&key).is_none_or(|now| now != value) {
            step(Side::Pod, Act::Sysctl { key, value });
        }
    }
    if !pod.loopback_up {
        step(Side::Pod, Act::SetLink { name: "lo".to_owned(), alias: None, mtu: None });
    }
    if let Some(act) = set_link(&want.ifname, None, want.mtu, pod.link.as_ref()) {
        step(Side::Pod, act);
    }
    for ip in &want.ips {
        if !pod.addresses.contains(ip) {
            step(Side::Pod, Act::Address { link: link(), ip: *ip });
        }
    }
    for ip in of_each_family(&want.ips) {
        let gateway = gateway(ip);
        if !pod.neighbours.contains(&(gateway, gateway_mac)) {
            step(Side::Pod, Act::Neighbour { link: link(), ip: gateway, mac: gateway_mac });
        }
        let to = everything(ip);
        match want.table {
            Some(table) => step(Side::Pod, Act::RouteIn { table, link: link(), to, via: gateway }),
            None => {
                // Others who send by this gateway, as plugins that come after ours may, need a way to it.
                let near = IpNetwork::from(gateway);
                if ip.is_ipv4() && !pod.routes.contains(&(near, None, None)) {
                    step(Side::Pod, Act::Route { link: link(), to: near, via: None, src: None });
                }
                if !pod.routes.contains(&(to, Some(gateway), None)) {
                    step(Side::Pod, Act::Route { link: link(), to, via: Some(gateway), src: None });
                }
            }
        }
    }
    if let Some(table) = want.table {
        want.ips.iter().for_each(|ip| step(Side::Pod, Act::Rule { ip: *ip, table }));
    }
}

/// The table of an interface beside others: its own for each name, and nobody's by default.
pub(super) fn own_table(ifname: &str) -> u32 {
    let hash = Sha256::digest(ifname.as_bytes());
    OWN_TABLES | u32::from(hash[0]) << 8 | u32::from(hash[1])
}

/// The first address of each family.
pub(super) fn of_each_family(ips: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let first = |v4: bool| ips.iter().copied().find(|ip| ip.is_ipv4() == v4);
    [first(true), first(false)].into_iter().flatten()
}

/// The gateway of a pod with such an address.
pub(super) fn gateway(family_of: IpAddr) -> IpAddr {
    if family_of.is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 }
}

fn node_steps(want: &Want, node: &Observed, name: &str, pod_mac: Mac, step: &mut impl FnMut(Side, Act)) {
    for (key, value) in sysctls(Side::Node, name, &want.ips) {
        if node.sysctls.get(&key).is_none_or(|now| now != value) {
            step(Side::Node, Act::Sysctl { key, value });
        }
    }
    if let Some(act) = set_link(name, Some(alias(&want.key)), want.mtu, node.link.as_ref()) {
        step(Side::Node, act);
    }
    let v6 = want.ips.iter().any(IpAddr::is_ipv6);
    if v6 && !node.own.contains(&GATEWAY_V6) {
        step(Side::Node, Act::Own { link: name.to_owned(), ip: GATEWAY_V6 });
    }
    // Who asks a link-local gateway does so from such an address.
    let asking = v6.then(|| link_local(pod_mac));
    for ip in want.ips.iter().copied().chain(asking) {
        if !node.neighbours.contains(&(ip, pod_mac)) {
            step(Side::Node, Act::Neighbour { link: name.to_owned(), ip, mac: pod_mac });
        }
        let of_family = |src: &IpAddr| src.is_ipv4() == ip.is_ipv4();
        let src = want.sources.iter().copied().find(of_family).filter(|_| Some(ip) != asking);
        let to = IpNetwork::from(ip);
        if !node.routes.contains(&(to, None, src)) {
            step(Side::Node, Act::Route { link: name.to_owned(), to, via: None, src });
        }
    }
}

/// The address that the kernel gives a link with this hardware address by itself (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: Mac) -> IpAddr {
    let pair = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f)).into()
}

/// Up, alias and MTU, where they differ. A pair that was just made has its MTU already.
fn set_link(name: &str, alias: Option<String>, mtu: u32, now: Option<&Link>) -> Option<Act> {
    let mtu = now.filter(|link| link.mtu != mtu).map(|_| mtu);
    let alias = alias.filter(|alias| now.is_none_or(|link| link.alias.as_ref() != Some(alias)));
    let down = now.is_none_or(|link| !link.up);
    let differs = down || alias.is_some() || mtu.is_some();
    differs.then(|| Act::SetLink { name: name.to_owned(), alias, mtu })
}

/// The default route's destination.
pub(super) fn everything(family_of: IpAddr) -> IpNetwork {
    if family_of.is_ipv4() { EVERYTHING_V4 } else { EVERYTHING_V6 }
}

/// Settings of a side's link, in the order they are written: before the link is up.
pub(super) fn sysctls(side: Side, link: &str, ips: &[IpAddr]) -> Vec<(String, &'static str)> {
    let v4 = ips.iter().any(IpAddr::is_ipv4);
    let v6 = ips.iter().any(IpAddr::is_ipv6);
    let mut all = Vec::new();
    let mut set = |family: &str, key: &str, value| {
        all.push((format!("net/{family}/conf/{link}/{key}"), value));
    };
    match side {
        Side::Node => {
            if v4 {
                set("ipv4", "forwarding", "1");
                // What a pod sends must come from an address that is routed to it.
                set("ipv4", "rp_filter", "1");
            }
            if v6 {
                set("ipv6", "disable_ipv6", "0");
                // No link-local address: nothing would use it, and it would be announced and checked.
                set("ipv6", "addr_gen_mode", "1");
                set("ipv6", "accept_ra", "0");
            }
        }
        Side::Pod => {
            if v6 {
                set("ipv6", "disable_ipv6", "0");
                set("ipv6", "accept_ra", "0");
                set("ipv6", "accept_dad", "0");
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn want(ips: &[&str]) -> Want {
        Want {
            key: "0f3c".to_owned(),
            ifname: POD_LINK.to_owned(),
            mac: None,
            theirs: false,
            table: None,
            cookie: None,
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            sources: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            mtu: 1450,
        }
    }

    /// A kernel that does what it is told.
    fn apply(steps: &[Step], node: &mut Observed, pod: &mut Observed) {
        for step in steps {
            let side = match step.side {
                Side::Node => &mut *node,
                Side::Pod => &mut *pod,
            };
            match &step.act {
                Act::DeleteLink { .. } => {
                    *node = Observed::default();
                    *pod = Observed { loopback_up: pod.loopback_up, ..Observed::default() };
                }
                Act::CreatePair { name, mac, peer_name, peer_mac, mtu } => {
                    let link = |index, name: &str, mac, peer| Link {
                        index,
                        name: name.to_owned(),
                        alias: None,
                        mtu: *mtu,
                        up: false,
                        running: false,
                        loopback: false,
                        mac: Some(mac),
                        peer: Some(peer),
                        queued: false,
                        across: false,
                    };
                    assert!(node.link.is_none() && pod.link.is_none(), "a name is taken");
                    node.link = Some(link(7, name, *mac, 2));
                    pod.link = Some(link(2, peer_name, *peer_mac, 7));
                }
                Act::Sysctl { key, value } => {
                    side.sysctls.insert(key.clone(), (*value).to_owned());
                }
                Act::SetLink { name, .. } if name == "lo" => side.loopback_up = true,
                Act::SetLink { alias, mtu, .. } => {
                    let link = side.link.as_mut().expect("a link to bring up");
                    link.up = true;
                    link.mtu = mtu.unwrap_or(link.mtu);
                    link.alias = alias.clone().or(link.alias.take());
                }
                Act::AwaitRunning { .. } => {
                    let both = [&mut *node, &mut *pod].map(|side| side.link.as_mut().expect("a pair"));
                    assert!(both.iter().all(|link| link.up), "waits for ever");
                    both.into_iter().for_each(|link| link.running = true);
                }
                Act::AwaitLocal { ip } => assert!(side.addresses.contains(ip), "waits for ever"),
                Act::Address { ip, .. } => side.addresses.push(*ip),
                Act::Own { ip, .. } => side.own.push(*ip),
                Act::Neighbour { ip, mac, .. } => side.neighbours.push((*ip, *mac)),
                Act::RouteIn { to, .. } => side.destinations.push(*to),
                Act::Rule { ip, .. } => assert!(side.addresses.contains(ip)),
                Act::DeleteRule { .. } => {}
                Act::Route { to, via, src, .. } => {
                    assert!(side.link.as_ref().is_some_and(|link| link.up), "routes need a link that is up");
                    side.routes.retain(|route| route.0 != *to);
                    side.routes.push((*to, *via, *src));
                }
            }
        }
    }

    #[test]
    fn a_fresh_pod_gets_everything_once() {
        let want = want(&["10.244.0.5", "fd00:244::5"]);
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        let first = steps(&want, &node, &pod).unwrap();
        assert!(matches!(&first[0].act, Act::CreatePair { mtu: 1450, .. }));
        assert!(first.is_sorted_by_key(|step| step.act.waits()), "nothing comes after what is waited for");
        apply(&first, &mut node, &mut pod);
        assert_eq!(steps(&want, &node, &pod).unwrap(), []);
        assert_eq!(pod.addresses, want.ips);
        assert_eq!(node.routes.len(), 3);
        assert!(node.routes.contains(&(
            "10.244.0.5/32".parse().unwrap(),
            None,
            Some("192.0.2.1".parse().unwrap())
        )));
        assert!(pod.loopback_up);
    }

    #[test]
    fn one_family_leaves_the_other_alone() {
        for (ip, other) in [("10.244.0.5", "ipv6"), ("fd00:244::5", "ipv4")] {
            for step in steps(&want(&[ip]), &Observed::default(), &Observed::default()).unwrap() {
                assert!(!format!("{step}").contains(other), "{step}");
            }
        }
    }

    #[test]
    fn links_of_others_are_not_touched() {
        let want = want(&["10.244.0.5"]);
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        apply(&steps(&want, &node, &pod).unwrap(), &mut node, &mut pod);
        let theirs = |side: &Observed| {
            let mut side = side.clone();
            side.link.as_mut().unwrap().mac = Some([6; 6]);
            side
        };
        assert_eq!(steps(&want, &Observed::default(), &theirs(&pod)), Err(Conflict::PodLink));
        let name = node_link_name("0f3c");
        assert_eq!(steps(&want, &theirs(&node), &Observed::default()), Err(Conflict::NodeLink(name)));
    }

    #[test]
    fn half_a_pair_is_made_anew() {
        let want = want(&["10.244.0.5"]);
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        apply(&steps(&want, &node, &pod).unwrap(), &mut node, &mut pod);
        // The pod's namespace was replaced by a fresh one.
        let (mut node, mut pod) = (node, Observed::default());
        let again = steps(&want, &node, &pod).unwrap();
        assert!(
            matches!(&again[0].act, Act::DeleteLink { .. })
                && matches!(&again[1].act, Act::CreatePair { .. })
        );
        apply(&again, &mut node, &mut pod);
        assert_eq!(steps(&want, &node, &pod).unwrap(), []);
    }

    #[test]
    fn what_others_changed_inside_is_left() {
        let mut want = want(&["10.244.0.5"]);
        want.mac = Some([2, 0, 0, 0, 0, 9]);
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        apply(&steps(&want, &node, &pod).unwrap(), &mut node, &mut pod);
        assert_eq!(pod.link.as_ref().unwrap().mac, want.mac);
        want.theirs = true;
        pod.routes.clear();
        pod.addresses.clear();
        pod.link.as_mut().unwrap().mac = Some([2, 0, 0, 0, 0, 8]);
        let repair = steps(&want, &node, &pod).unwrap();
        assert!(
            matches!(
                &repair[..],
                [Step { side: Side::Node, act: Act::Neighbour { mac: [2, 0, 0, 0, 0, 8], .. } }]
            ),
            "the node knows the new hardware address: {repair:?}"
        );
        // A pair that is gone is made anew, with everything.
        let again = steps(&want, &Observed::default(), &Observed::default()).unwrap();
        assert!(matches!(&again[0].act, Act::CreatePair { peer_mac: [2, 0, 0, 0, 0, 9], .. }));
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        apply(&again, &mut node, &mut pod);
        assert_eq!(pod.routes.len(), 2);
    }

    #[test]
    fn a_second_way_out_has_a_table_of_its_own() {
        let mut want = want(&["10.244.0.5", "fd00:244::5"]);
        want.table = Some(own_table("net1"));
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        let all = steps(&want, &node, &pod).unwrap();
        apply(&all, &mut node, &mut pod);
        assert_eq!((pod.routes.len(), pod.destinations.len()), (0, 2));
        assert_eq!(all.iter().filter(|step| matches!(step.act, Act::Rule { .. })).count(), 2);
        assert_ne!(own_table("net1"), own_table("net2"));
    }

    #[test]
    fn the_mtu_is_followed_unless_others_set_it() {
        let mut want = want(&["10.244.0.5"]);
        let (mut node, mut pod) = (Observed::default(), Observed::default());
        apply(&steps(&want, &node, &pod).unwrap(), &mut node, &mut pod);
        (want.theirs, want.mtu) = (true, 1400);
        let inside = |pod: &Observed| {
            let steps = steps(&want, &node, pod).unwrap();
            steps.iter().filter(|step| step.side == Side::Pod).count()
        };
        assert_eq!(inside(&pod), 1);
        pod.link.as_mut().unwrap().mtu = 1300;
        assert_eq!(inside(&pod), 0);
    }

    #[test]
    fn aliases_tell_whose_a_link_is() {
        for key in ["0f3c", "net/0f3c/eth0"] {
            assert_eq!(key_of(&alias(key)).as_deref(), Some(key));
        }
        assert_eq!(key_of("sheave pod a/b"), None);
        assert_eq!(key_of("sheave cni ab"), None);
        assert_eq!(key_of("uplink"), None);
        let long = format!("{}/c/eth0", "n".repeat(300));
        assert!(alias(&long).len() <= ALIAS_BYTES_MAX && key_of(&alias(&long)).is_none());
    }

    #[test]
    fn names_fit_and_differ() {
        assert_eq!(node_link_name("a").len(), 15);
        assert!(is_node_link(&node_link_name("a")) && !is_node_link("shvfoo") && !is_node_link("eth0"));
        assert_ne!(node_link_name("a"), node_link_name("b"));
        let (node, pod) = macs("a");
        assert_ne!(node, pod);
        assert!(node[0] & 1 == 0 && node[0] & 2 == 2);
    }

    proptest! {
        /// Killed after any step, and with anything removed afterwards: the next run leads to the same end.
        #[test]
        fn any_interruption_is_repaired(
            v4 in any::<bool>(), stop in 0_usize..40, loss in 0_u8..12, mtu in 1280_u32..9000,
        ) {
            let mut want = want(if v4 { &["10.0.0.5", "fd00::5"] } else { &["fd00::5"] });
            let (mut node, mut pod) = (Observed::default(), Observed::default());
            let all = steps(&want, &node, &pod).unwrap();
            apply(&all[..stop.min(all.len())], &mut node, &mut pod);
            match loss {
                0 => { node.routes.pop(); node.own.pop(); }
                1 => { node.neighbours.pop(); }
                2 => { pod.routes.pop(); }
                3 => { pod.addresses.pop(); }
                4 => node.link.iter_mut().for_each(|link| (link.up, link.running) = (false, false)),
                5 => want.mtu = mtu,
                6 => want.sources.clear(),
                7 => { pod.sysctls.clear(); }
                8 => pod = Observed::default(),
                9 => { pod.neighbours.clear(); }
                10 => node = Observed::default(),
                _ => {}
            }
            if loss == 4 {
                node.routes.clear();
                pod.link.iter_mut().for_each(|link| link.running = false);
            }
            let repair = steps(&want, &node, &pod).unwrap();
            apply(&repair, &mut node, &mut pod);
            prop_assert_eq!(steps(&want, &node, &pod).unwrap(), []);
            prop_assert_eq!(node.link.unwrap().mtu, want.mtu);
        }
    }
}
