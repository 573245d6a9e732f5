//! Between this room's plain data and netlink messages. Invariant: pure; what the kernel sends and we do not
//! understand is left out, never guessed.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use ipnetwork::IpNetwork;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::{Address, Link, LinkChange, Neighbour, Own, Route, VethPair};

/// The table that routes are in unless told otherwise.
pub(in crate::network) const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// Before the main table's rule, after the local table's.
const RULE_PRIORITY: u32 = 1_000;

/// Attribute of an extended acknowledgement that holds text (`NLMSGERR_ATTR_MSG`).
const ACK_TEXT: u16 = 1;
/// Bytes of a netlink header.
const HEADER_BYTES: usize = 16;

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn full_length(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

pub(super) fn get_link(name: &str) -> Message {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    Message::GetLink(message)
}

pub(super) fn get_links() -> Message {
    Message::GetLink(LinkMessage::default())
}

pub(super) fn get_addresses() -> Message {
    Message::GetAddress(AddressMessage::default())
}

pub(super) fn get_routes() -> [Message; 2] {
    [AddressFamily::Inet, AddressFamily::Inet6].map(|family| {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        Message::GetRoute(message)
    })
}

pub(super) fn get_route_to(ip: IpAddr) -> Message {
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = full_length(ip);
    message.attributes.push(RouteAttribute::Destination(ip.into()));
    Message::GetRoute(message)
}

pub(super) fn is_local_route(message: &Message) -> bool {
    matches!(message, Message::NewRoute(route) if route.header.kind == RouteType::Local)
}

pub(super) fn get_neighbours() -> Message {
    Message::GetNeighbour(NeighbourMessage::default())
}

pub(super) fn new_veth(pair: &VethPair<'_>) -> Message {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pair.peer_name.to_owned()),
        LinkAttribute::Address(pair.peer_mac.to_vec()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::NetNsFd(pair.peer_netns.as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(pair.name.to_owned()),
        LinkAttribute::Address(pair.mac.to_vec()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    Message::NewLink(message)
}

pub(super) fn new_dummy(name: &str) -> Message {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Dummy)]),
    ];
    Message::NewLink(message)
}

pub(super) fn set_link(index: u32, change: &LinkChange<'_>) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = index;
    if change.up {
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
    }
    message.attributes.extend(change.mtu.map(LinkAttribute::Mtu));
    message.attributes.extend(change.alias.map(|alias| LinkAttribute::IfAlias(alias.to_owned())));
    Message::SetLink(message)
}

pub(super) fn delete_link(name: &str) -> Message {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    Message::DelLink(message)
}

pub(super) fn delete_link_at(index: u32) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = index;
    Message::DelLink(message)
}

pub(super) fn set_group(index: u32, group: u32) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Group(group));
    Message::SetLink(message)
}

pub(super) fn delete_group(group: u32) -> Message {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(group));
    Message::DelLink(message)
}

fn rule(ip: IpAddr, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(ip);
    message.header.src_len = full_length(ip);
    message.header.action = RuleAction::ToTable;
    message.attributes =
        vec![RuleAttribute::Source(ip), RuleAttribute::Table(table), RuleAttribute::Priority(RULE_PRIORITY)];
    message
}

pub(super) fn new_rule(ip: IpAddr, table: u32) -> Message {
    Message::NewRule(rule(ip, table))
}

pub(super) fn delete_rule(ip: IpAddr, table: u32) -> Message {
    Message::DelRule(rule(ip, table))
}

fn full_address(link: u32, ip: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = full_length(ip);
    message.header.index = link;
    message.header.scope = AddressScope::Universe;
    if ip.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    message
}

pub(super) fn new_address(link: u32, ip: IpAddr) -> Message {
    Message::NewAddress(full_address(link, ip))
}

/// Of IPv4 addresses the scope keeps them from being sources, of IPv6 addresses that they are deprecated.
pub(super) fn new_quiet_address(link: u32, ip: IpAddr) -> Message {
    let mut message = full_address(link, ip);
    if ip.is_ipv4() {
        message.header.scope = AddressScope::Host;
    } else {
        let mut deprecated = CacheInfo::default();
        deprecated.ifa_valid = u32::MAX;
        message.attributes.push(AddressAttribute::CacheInfo(deprecated));
    }
    Message::NewAddress(message)
}

pub(super) fn delete_address(link: u32, ip: IpAddr) -> Message {
    Message::DelAddress(full_address(link, ip))
}

pub(super) fn new_neighbour(neighbour: &Neighbour) -> Message {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = neighbour.link;
    message.header.state = NeighbourState::Permanent;
    let ip = match neighbour.ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(ip),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    Message::NewNeighbour(message)
}

pub(super) fn new_route(link: u32, route: &Route) -> Message {
    Message::NewRoute(route_message(link, route))
}

pub(super) fn new_route_in(table: u32, link: u32, route: &Route) -> Message {
    let mut message = route_message(link, route);
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.attributes.push(RouteAttribute::Table(table));
    Message::NewRoute(message)
}

/// Packets for `ip` that come by the link are this node's.
pub(super) fn new_local_route(link: u32, ip: IpAddr) -> Message {
    let to = IpNetwork::from(ip);
    let mut message = route_message(link, &Route { link: Some(link), to, via: None, src: None, metric: 0 });
    message.header.table = libc::RT_TABLE_LOCAL;
    message.header.kind = RouteType::Local;
    message.header.scope = RouteScope::Host;
    Message::NewRoute(message)
}

fn route_message(link: u32, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.to.ip());
    message.header.destination_prefix_length = route.to.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = if route.via.is_some() { RouteScope::Universe } else { RouteScope::Link };
    if route.to.prefix() > 0 {
        message.attributes.push(RouteAttribute::Destination(route.to.ip().into()));
    }
    if let Some(via) = route.via {
        // The gateway is on no network of the pod's.
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    message.attributes.extend(route.src.map(|src| RouteAttribute::PrefSource(src.into())));
    message.attributes.push(RouteAttribute::Oif(link));
    message
}

pub(super) fn link(message: &Message) -> Option<Link> {
    let Message::NewLink(message) = message else { return None };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        alias: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        running: false,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        mac: None,
        peer: None,
        queued: false,
        across: false,
    };
    let (mut pair, mut elsewhere) = (false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Link(peer) => link.peer = Some(*peer),
            // The second: of a link that was never up.
            LinkAttribute::Qdisc(kind) => link.queued = !matches!(kind.as_str(), "noqueue" | "noop"),
            // Not the running flag: that one is also set while the state is not known yet.
            LinkAttribute::OperState(state) => link.running = link.up && *state == State::Up,
            LinkAttribute::LinkInfo(info) => pair = info.contains(&LinkInfo::Kind(InfoKind::Veth)),
            // Said only where it is another one than the link's own.
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    link.across = pair && elsewhere;
    Some(link)
}

pub(super) fn address(message: &Message) -> Option<Address> {
    let Message::NewAddress(message) = message else { return None };
    let (mut local, mut remote) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => remote = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // On point-to-point links the address is the other end's; the own one is local.
    let ip = local.or(remote)?;
    // For IPv6 "secondary" means temporary; for IPv4 a second address of the same network.
    let later = AddressFlags::Secondary | AddressFlags::Deprecated | AddressFlags::Tentative;
    Some(Address {
        link: message.header.index,
        ip,
        global: message.header.scope == AddressScope::Universe && !flags.contains(AddressFlags::Dadfailed),
        second_choice: flags.intersects(later),
        tentative: flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic),
    })
}

/// What a message says of a route of any kind.
pub(super) struct RouteParts {
    pub(super) table: u32,
    pub(super) route: Route,
    /// Bytes; 0 where the route names none.
    pub(super) mtu: u32,
}

pub(super) fn route_parts(message: &RouteMessage) -> Option<RouteParts> {
    let header = &message.header;
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0_u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0_u8; 16]),
        _ => return None,
    };
    let (mut to, mut table, mut mtu) = (any, u32::from(header.table), 0);
    let (mut via, mut src, mut link, mut metric) = (None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(wide) => table = *wide,
            RouteAttribute::Destination(address) => to = ip(address)?,
            RouteAttribute::Gateway(address) => via = ip(address),
            RouteAttribute::PrefSource(address) => src = ip(address),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Metrics(metrics) => {
                let of = |metric: &RouteMetric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                };
                mtu = metrics.iter().find_map(of).unwrap_or(0);
            }
            // Of several next hops the first stands for the route.
            RouteAttribute::MultiPath(hops) => link = link.or(hops.first().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    let to = IpNetwork::new(to, header.destination_prefix_length).ok()?;
    Some(RouteParts { table, route: Route { link, to, via, src, metric }, mtu })
}

/// Where packets to an address are this node's, and by which link they must come.
pub(super) fn local_route(message: &Message) -> Option<Own> {
    let Message::NewRoute(message) = message else { return None };
    let route = route_parts(message).filter(|_| message.header.kind == RouteType::Local)?.route;
    Some((route.link?, route.to.ip()))
}

/// A unicast route and its table.
pub(super) fn route(message: &Message) -> Option<(u32, Route)> {
    let Message::NewRoute(message) = message else { return None };
    let parts = route_parts(message)?;
    (message.header.kind == RouteType::Unicast).then_some((parts.table, parts.route))
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

pub(super) fn neighbour(message: &Message) -> Option<Neighbour> {
    let Message::NewNeighbour(message) = message else { return None };
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut destination, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                destination = Some(IpAddr::V4(*ip))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                destination = Some(IpAddr::V6(*ip))
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { link: message.header.ifindex, ip: destination?, mac: mac? })
}

/// The kernel's text in a refused request's acknowledgement: attributes after the request's header.
pub(super) fn explanation(payload: &[u8]) -> Option<String> {
    let mut rest = payload.get(HEADER_BYTES..)?;
    while let [l0, l1, k0, k1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(4..length)?;
        if u16::from_ne_bytes([k0, k1]) & 0x3fff == ACK_TEXT {
            return Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_survive_the_way_there_and_back() {
        for (to, via, src) in [
            ("10.0.0.5/32", None, Some("10.1.0.1")),
            ("0.0.0.0/0", Some("169.254.1.1"), None),
            ("fd00::5/128", None, Some("fd01::1")),
            ("::/0", Some("fe80::1"), None),
        ] {
            let route = Route {
                link: Some(7),
                to: to.parse().unwrap(),
                via: via.map(|ip| ip.parse().unwrap()),
                src: src.map(|ip| ip.parse().unwrap()),
                metric: 0,
            };
            let Message::NewRoute(message) = new_route(7, &route) else { unreachable!() };
            assert_eq!(super::route(&Message::NewRoute(message)), Some((MAIN_TABLE, route.clone())));
            assert_eq!(super::route(&new_route_in(70_000, 7, &route)), Some((70_000, route)));
        }
    }

    #[test]
    fn neighbours_survive_the_way_there_and_back() {
        let one = Neighbour { link: 3, ip: "fe80::1".parse().unwrap(), mac: [2, 0, 0, 0, 0, 1] };
        assert_eq!(neighbour(&new_neighbour(&one)), Some(one));
    }

    #[test]
    fn broken_explanations_are_left_out() {
        assert_eq!(explanation(&[0; 3]), None);
        let mut payload = vec![0; HEADER_BYTES];
        payload.extend_from_slice(&6_u16.to_ne_bytes());
        payload.extend_from_slice(&ACK_TEXT.to_ne_bytes());
        payload.extend_from_slice(b"no");
        assert_eq!(explanation(&payload), Some("no".to_owned()));
        payload[HEADER_BYTES] = 200;
        assert_eq!(explanation(&payload), None);
        payload[HEADER_BYTES] = 0;
        assert_eq!(explanation(&payload), None);
    }
}
