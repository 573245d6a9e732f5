//! What the overlay asks of the kernel: VXLAN devices, forwarding entries, routes with their owner's number. Invariant:
//! as everywhere in this room, nothing is decided here.

use std::io;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::convert::RouteParts;
use super::{Connection, Link, Mac, Neighbour, Route, convert};

/// A VXLAN device's own settings; what it is made with and can't change later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) struct Vxlan {
    pub(in crate::network) vni: u32,
    pub(in crate::network) port: u16,
    /// Source of the outer packets.
    pub(in crate::network) local: Option<IpAddr>,
    /// Whether it learns from what it receives.
    pub(in crate::network) learning: bool,
}

/// A link and, if it is one, its tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct TunnelLink {
    pub(in crate::network) link: Link,
    pub(in crate::network) vxlan: Option<Vxlan>,
}

/// What a route does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) enum RouteKind {
    Unicast,
    /// Answers that the destination can't be reached.
    Unreachable,
    Other,
}

/// A route of the main table with all that tells whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct OwnedRoute {
    pub(in crate::network) to: IpNetwork,
    pub(in crate::network) kind: RouteKind,
    pub(in crate::network) link: Option<u32>,
    pub(in crate::network) via: Option<IpAddr>,
    pub(in crate::network) src: Option<IpAddr>,
    pub(in crate::network) metric: u32,
    /// `rtm_protocol`.
    pub(in crate::network) protocol: u8,
    /// Largest packet, 0 for the link's.
    pub(in crate::network) mtu: u32,
}

/// Where the kernel would send a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) struct Reach {
    pub(in crate::network) link: u32,
    pub(in crate::network) via: Option<IpAddr>,
}

/// An entry of a VXLAN device's forwarding table: frames to `mac` go to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::network) struct Forward {
    pub(in crate::network) link: u32,
    pub(in crate::network) mac: Mac,
    pub(in crate::network) to: IpAddr,
}

/// A VXLAN device to be made.
#[derive(Debug, Clone, Copy)]
pub(in crate::network) struct NewVxlan<'a> {
    pub(in crate::network) name: &'a str,
    pub(in crate::network) mac: Mac,
    pub(in crate::network) mtu: u32,
    pub(in crate::network) vxlan: Vxlan,
}

impl Connection {
    /// Every link with its tunnel.
    pub(in crate::network) fn tunnel_links(&mut self) -> io::Result<Vec<TunnelLink>> {
        let answers = self.dump(&convert::get_links())?;
        let one = |message: &Message| {
            let link = convert::link(message)?;
            Some(TunnelLink { link, vxlan: vxlan(message) })
        };
        Ok(answers.iter().filter_map(one).collect())
    }

    /// Every route of the main table.
    pub(in crate::network) fn owned_routes(&mut self) -> io::Result<Vec<OwnedRoute>> {
        let mut found = Vec::new();
        for request in convert::get_routes() {
            found.extend(self.dump(&request)?.iter().filter_map(owned_route));
        }
        Ok(found)
    }

    /// Where packets to `ip` go; `None` where nothing leads there.
    pub(in crate::network) fn reach(&mut self, ip: IpAddr) -> io::Result<Option<Reach>> {
        match self.exchange(convert::get_route_to(ip), 0) {
            Ok(answers) => Ok(answers.iter().find_map(reach)),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// The forwarding entries of one VXLAN device.
    pub(in crate::network) fn forwards(&mut self, link: u32) -> io::Result<Vec<Forward>> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = link;
        let answers = self.dump(&Message::GetNeighbour(message))?;
        Ok(answers.iter().filter_map(forward).filter(|entry| entry.link == link).collect())
    }

    /// Makes a VXLAN device, down.
    pub(in crate::network) fn create_vxlan(&mut self, new: &NewVxlan<'_>) -> io::Result<()> {
        self.change(new_vxlan(new), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Makes a forwarding entry, or replaces the one of the same hardware address.
    pub(in crate::network) fn set_forward(&mut self, entry: &Forward) -> io::Result<()> {
        self.change(Message::NewNeighbour(forward_message(entry)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Removes a forwarding entry; false where there was none.
    pub(in crate::network) fn delete_forward(&mut self, entry: &Forward) -> io::Result<bool> {
        gone_is_fine(self.change(Message::DelNeighbour(forward_message(entry)), 0))
    }

    /// Removes a permanent neighbour; false where there was none.
    pub(in crate::network) fn delete_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<bool> {
        let Message::NewNeighbour(message) = convert::new_neighbour(neighbour) else { return Ok(false) };
        gone_is_fine(self.change(Message::DelNeighbour(message), 0))
    }

    /// Makes a route, or replaces the one with the same destination and metric.
    pub(in crate::network) fn set_owned_route(&mut self, route: &OwnedRoute) -> io::Result<()> {
        self.change(Message::NewRoute(route_message(route)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Removes a route; false where there was none.
    pub(in crate::network) fn delete_owned_route(&mut self, route: &OwnedRoute) -> io::Result<bool> {
        gone_is_fine(self.change(Message::DelRoute(route_message(route)), 0))
    }

    /// Gives a link an address of full length that is of this link only: it is the source of what leaves by a route
    /// that names it, and no network is reached by it.
    pub(in crate::network) fn set_tunnel_address(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        self.change(Message::NewAddress(address_message(link, ip)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address from a link; false where it was not there.
    pub(in crate::network) fn delete_tunnel_address(&mut self, link: u32, ip: IpAddr) -> io::Result<bool> {
        gone_is_fine(self.change(Message::DelAddress(address_message(link, ip)), 0))
    }
}

fn gone_is_fine(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL)
            ) =>
        {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn new_vxlan(new: &NewVxlan<'_>) -> Message {
    let mut data = vec![
        InfoVxlan::Id(new.vxlan.vni),
        InfoVxlan::Learning(new.vxlan.learning),
        InfoVxlan::Port(new.vxlan.port),
    ];
    data.extend(new.vxlan.local.map(|ip| match ip {
        IpAddr::V4(ip) => InfoVxlan::Local(ip),
        IpAddr::V6(ip) => InfoVxlan::Local6(ip),
    }));
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(new.name.to_owned()),
        LinkAttribute::Address(new.mac.to_vec()),
        LinkAttribute::Mtu(new.mtu),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]),
    ];
    Message::NewLink(message)
}

fn vxlan(message: &Message) -> Option<Vxlan> {
    let Message::NewLink(message) = message else { return None };
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    })?;
    // The kernel leaves out what is off.
    let mut vxlan = Vxlan { vni: 0, port: 0, local: None, learning: false };
    for attribute in data {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Learning(on) => vxlan.learning = *on,
            InfoVxlan::Local(ip) => vxlan.local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) => vxlan.local = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    Some(vxlan)
}

fn forward_message(entry: &Forward) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = entry.link;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(entry.mac.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::from(entry.to)),
    ];
    message
}

fn forward(message: &Message) -> Option<Forward> {
    let Message::NewNeighbour(message) = message else { return None };
    let (mut mac, mut to) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            NeighbourAttribute::Destination(address) => to = destination(address),
            _ => {}
        }
    }
    Some(Forward { link: message.header.ifindex, mac: mac?, to: to? })
}

/// Of a forwarding entry the family does not say which of the two an address is; its length does.
fn destination(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        NeighbourAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            _ => None,
        },
        _ => None,
    }
}

fn route_message(route: &OwnedRoute) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.to.ip());
    message.header.destination_prefix_length = route.to.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = route.protocol.into();
    message.header.kind = match route.kind {
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Unicast | RouteKind::Other => RouteType::Unicast,
    };
    message.header.scope = match (route.kind, route.via) {
        (RouteKind::Unicast, None) => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    message.attributes.push(RouteAttribute::Destination(route.to.network().into()));
    if let Some(via) = route.via {
        // The other end of a tunnel is on no network of the device's.
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    message.attributes.extend(route.src.map(|src| RouteAttribute::PrefSource(src.into())));
    message.attributes.extend(route.link.map(RouteAttribute::Oif));
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu > 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    message
}

fn owned_route(message: &Message) -> Option<OwnedRoute> {
    let Message::NewRoute(message) = message else { return None };
    let RouteParts { table, route: Route { link, to, via, src, metric }, mtu } =
        convert::route_parts(message)?;
    if table != convert::MAIN_TABLE {
        return None;
    }
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        _ => RouteKind::Other,
    };
    Some(OwnedRoute { to, kind, link, via, src, metric, protocol: message.header.protocol.into(), mtu })
}

fn reach(message: &Message) -> Option<Reach> {
    let Message::NewRoute(message) = message else { return None };
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut link, mut via) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(address) => via = convert::ip(address),
            // An IPv4 destination behind an IPv6 router.
            RouteAttribute::Via(_) => via = via.or(Some(IpAddr::from([0_u8; 16]))),
            _ => {}
        }
    }
    Some(Reach { link: link?, via })
}

fn address_message(link: u32, ip: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = if ip.is_ipv4() { 32 } else { 128 };
    message.header.index = link;
    message.header.scope = AddressScope::Universe;
    if ip.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    message
}

/// Changes a link's MTU and brings it up where it is not.
pub(in crate::network) fn up_with_mtu(connection: &mut Connection, index: u32, mtu: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.push(LinkAttribute::Mtu(mtu));
    connection.change(Message::SetLink(message), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_survive_the_way_there_and_back() {
        let unicast = OwnedRoute {
            to: "10.244.2.0/24".parse().unwrap(),
            kind: RouteKind::Unicast,
            link: Some(7),
            via: Some("10.244.2.0".parse().unwrap()),
            src: Some("10.244.1.0".parse().unwrap()),
            metric: 0,
            protocol: 84,
            mtu: 1450,
        };
        let v6 = OwnedRoute {
            to: "fd00:244:0:2::/64".parse().unwrap(),
            via: Some("fd00:244:0:2::".parse().unwrap()),
            src: None,
            metric: 1024,
            mtu: 0,
            ..unicast.clone()
        };
        let unreachable = OwnedRoute {
            kind: RouteKind::Unreachable,
            link: None,
            via: None,
            src: None,
            mtu: 0,
            metric: 4096,
            ..unicast.clone()
        };
        for route in [unicast, v6, unreachable] {
            assert_eq!(owned_route(&Message::NewRoute(route_message(&route))), Some(route));
        }
    }

    #[test]
    fn forwards_survive_the_way_there_and_back() {
        for to in ["192.0.2.2", "2001:db8::2"] {
            let entry = Forward { link: 3, mac: [2, 1, 2, 3, 4, 5], to: to.parse().unwrap() };
            assert_eq!(forward(&Message::NewNeighbour(forward_message(&entry))), Some(entry));
        }
    }

    #[test]
    fn tunnels_survive_the_way_there_and_back() {
        for local in ["192.0.2.2", "2001:db8::2"] {
            let vxlan = Vxlan { vni: 84, port: 4789, local: Some(local.parse().unwrap()), learning: false };
            let new = NewVxlan { name: "x", mac: [2, 0, 0, 0, 0, 1], mtu: 1450, vxlan };
            let message = new_vxlan(&new);
            assert_eq!(super::vxlan(&message), Some(vxlan));
            let link = convert::link(&message).unwrap();
            assert_eq!((link.mac, link.mtu), (Some(new.mac), 1450));
        }
    }
}
