//! The only place that speaks netlink. Invariant: a call returns after the kernel has answered for it, a dump is
//! whole (interrupted ones are taken again), and nothing here decides: callers say what, the kernel says whether.
//!
//! Blocking, one socket a [`Connection`]: requests take microseconds, and a socket belongs for good to the network
//! namespace of the thread that opened it.

mod address_device;
pub(crate) mod bucket;
pub(crate) mod conntrack;
mod convert;
mod diag;
mod events;
mod filter;
mod generic;
pub(crate) mod nfnl;
pub(crate) mod nft;
pub(crate) mod nft_expr;
pub(crate) mod offload;
mod routed;
pub(crate) mod tunnel;

pub(crate) use address_device::AddressDevice;
pub(crate) use conntrack::end_tracking;
pub(super) use convert::MAIN_TABLE;
pub(crate) use diag::{ConnectedUdp, Diag, InetFamily};
pub(crate) use events::{Event as KernelEvent, Events as KernelEvents};
pub(crate) use filter::has_clsact_filter;
pub(crate) use generic::{Attributes, Generic, attributes};
pub(crate) use routed::RoutedLink;
pub(super) use routed::routed_to;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use ipnetwork::IpNetwork;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::limits;

/// Whether there is a link of that name in the calling thread's network namespace.
pub(crate) fn has_link(name: &str) -> io::Result<bool> {
    Ok(Connection::open()?.link(name)?.is_some())
}

/// What a pod's device is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodDevice {
    /// Its index.
    pub(crate) index: u32,
    /// Bytes of the largest IP packet that it takes.
    pub(crate) mtu: u32,
    /// It is one end of a pair whose other end is in another network namespace.
    pub(crate) across: bool,
    /// What it sends waits in a queue, such as one that limits it.
    pub(crate) queued: bool,
}

/// The links of the calling thread's network namespace whose name begins with one of `prefixes`.
pub(crate) fn pod_devices(prefixes: &[String]) -> io::Result<Vec<PodDevice>> {
    let links = Connection::open()?.links()?.into_iter();
    let ours = links.filter(|link| prefixes.iter().any(|prefix| link.name.starts_with(prefix.as_str())));
    Ok(ours.map(|Link { index, mtu, across, queued, .. }| PodDevice { index, mtu, across, queued }).collect())
}

/// Removes a link from the calling thread's network namespace; false where there was none.
pub(crate) fn delete_link(name: &str) -> io::Result<bool> {
    Connection::open()?.delete_link(name)
}

/// `SO_NETNS_COOKIE`.
#[derive(Debug, Clone, Copy)]
struct NetnsCookie;

nix::getsockopt_impl!(NetnsCookie, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, u64, sockopt::GetStruct<u64>);

/// False where the kernel says that there is no such link.
fn there(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Bytes received at a time: more than the kernel puts into one datagram of a dump.
const RECEIVE_BYTES: usize = 64 << 10;

/// A hardware address.
pub(super) type Mac = [u8; 6];

/// A link as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// Up, has a carrier, and the kernel's link watch has seen it: what is sent now is not dropped.
    pub(super) running: bool,
    pub(super) loopback: bool,
    pub(super) mac: Option<Mac>,
    /// Index of the other end of a pair, in whichever namespace that is.
    pub(super) peer: Option<u32>,
    /// What it sends waits in a queue that somebody gave it, or that its kind has.
    pub(super) queued: bool,
    /// One end of a pair of Ethernet devices whose other end is in another network namespace.
    pub(super) across: bool,
}

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) link: u32,
    pub(super) ip: IpAddr,
    /// Neither link-local nor of the host only.
    pub(super) global: bool,
    /// Not to be preferred: deprecated, temporary, or still checked for duplicates.
    pub(super) second_choice: bool,
    /// Still checked for duplicates: not usable yet.
    pub(super) tentative: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) link: Option<u32>,
    pub(super) to: IpNetwork,
    pub(super) via: Option<IpAddr>,
    pub(super) src: Option<IpAddr>,
    pub(super) metric: u32,
}

impl Route {
    /// The address that it is for, where it is for one alone that is good on more than one link.
    pub(super) fn to_one(&self) -> Option<IpAddr> {
        let whole = match self.to.ip() {
            IpAddr::V4(_) => 32,
            IpAddr::V6(ip) if ip.is_unicast_link_local() => return None,
            IpAddr::V6(_) => 128,
        };
        (self.to.prefix() == whole).then(|| self.to.ip())
    }
}

/// A link, and an address whose packets are this namespace's when they come by it.
pub(super) type Own = (u32, IpAddr);

/// A permanent neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) link: u32,
    pub(super) ip: IpAddr,
    pub(super) mac: Mac,
}

/// A pair of links to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct VethPair<'a> {
    pub(super) name: &'a str,
    pub(super) mac: Mac,
    pub(super) peer_name: &'a str,
    pub(super) peer_mac: Mac,
    pub(super) peer_netns: BorrowedFd<'a>,
    pub(super) mtu: u32,
}

/// What is changed about a link; `None` leaves it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LinkChange<'a> {
    pub(super) up: bool,
    pub(super) mtu: Option<u32>,
    pub(super) alias: Option<&'a str>,
}

/// A netlink socket in the namespace of the thread that opened it.
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        let timeout = TimeVal::milliseconds(limits::NETLINK_TIMEOUT_MS);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout)?;
        Ok(Connection { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// The link of that name, if there is one.
    pub(super) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        match self.exchange(convert::get_link(name), 0) {
            Ok(answers) => Ok(answers.iter().find_map(convert::link)),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Every link.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        Ok(self.dump(&convert::get_links())?.iter().filter_map(convert::link).collect())
    }

    /// Every address.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<Address>> {
        Ok(self.dump(&convert::get_addresses())?.iter().filter_map(convert::address).collect())
    }

    /// Unicast routes of the main table, both families.
    pub(super) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let all = self.routes_of_all_tables()?.into_iter();
        Ok(all.filter(|(table, _)| *table == convert::MAIN_TABLE).map(|(_, route)| route).collect())
    }

    /// Unicast routes with their tables, both families.
    pub(super) fn routes_of_all_tables(&mut self) -> io::Result<Vec<(u32, Route)>> {
        let mut found = Vec::new();
        for request in convert::get_routes() {
            found.extend(self.dump(&request)?.iter().filter_map(convert::route));
        }
        Ok(found)
    }

    /// Unicast routes of the main table, and addresses whose packets are this namespace's when they come by a link.
    pub(super) fn routes_and_own(&mut self) -> io::Result<(Vec<Route>, Vec<Own>)> {
        let (mut routes, mut own) = (Vec::new(), Vec::new());
        for request in convert::get_routes() {
            for message in self.dump(&request)? {
                let unicast = convert::route(&message).filter(|(table, _)| *table == convert::MAIN_TABLE);
                routes.extend(unicast.map(|(_, route)| route));
                own.extend(convert::local_route(&message));
            }
        }
        Ok((routes, own))
    }

    /// Takes packets for `ip` that come by the link, whatever else takes them by other links.
    pub(super) fn set_own(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        // Replacing would replace that of another link.
        match self.change(convert::new_local_route(link, ip), NLM_F_CREATE) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        }
    }

    /// True where packets to `ip` are delivered in this namespace.
    pub(super) fn is_local(&mut self, ip: IpAddr) -> io::Result<bool> {
        match self.exchange(convert::get_route_to(ip), 0) {
            Ok(answers) => Ok(answers.iter().any(convert::is_local_route)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Permanent neighbours, both families.
    pub(super) fn neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        Ok(self.dump(&convert::get_neighbours())?.iter().filter_map(convert::neighbour).collect())
    }

    /// Makes a pair, one end here and one in another namespace.
    pub(super) fn create_veth(&mut self, pair: &VethPair<'_>) -> io::Result<()> {
        self.change(convert::new_veth(pair), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Makes a dummy link.
    fn create_dummy(&mut self, name: &str) -> io::Result<()> {
        self.change(convert::new_dummy(name), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Changes a link.
    pub(super) fn set_link(&mut self, index: u32, change: &LinkChange<'_>) -> io::Result<()> {
        self.change(convert::set_link(index, change), 0)
    }

    /// Removes a link; false where there was none.
    pub(super) fn delete_link(&mut self, name: &str) -> io::Result<bool> {
        there(self.change(convert::delete_link(name), 0))
    }

    /// Removes the link of that index; false where there was none.
    pub(super) fn delete_link_at(&mut self, index: u32) -> io::Result<bool> {
        there(self.change(convert::delete_link_at(index), 0))
    }

    /// Puts a link into a group; false where there is no such link.
    pub(super) fn set_group(&mut self, index: u32, group: u32) -> io::Result<bool> {
        there(self.change(convert::set_group(index, group), 0))
    }

    /// Removes every link of a group; one that is empty is fine.
    pub(super) fn delete_group(&mut self, group: u32) -> io::Result<()> {
        there(self.change(convert::delete_group(group), 0)).map(drop)
    }

    /// Lets what is sent from `ip` look into a table of its own first.
    pub(super) fn set_rule(&mut self, ip: IpAddr, table: u32) -> io::Result<()> {
        match self.change(convert::new_rule(ip, table), NLM_F_CREATE | NLM_F_EXCL) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        }
    }

    /// Takes back what [`Connection::set_rule`] did; what is not there is fine.
    pub(super) fn delete_rule(&mut self, ip: IpAddr, table: u32) -> io::Result<()> {
        match self.change(convert::delete_rule(ip, table), 0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Makes a route in a table of its own.
    pub(super) fn set_route_in(&mut self, table: u32, link: u32, route: &Route) -> io::Result<()> {
        self.change(convert::new_route_in(table, link, route), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// A number that no other network namespace of this boot ever had.
    pub(super) fn cookie(&self) -> io::Result<u64> {
        Ok(getsockopt(&self.socket.as_fd(), NetnsCookie)?)
    }

    /// Gives a link an address of full prefix length, without duplicate address detection.
    pub(super) fn set_address(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        self.change(convert::new_address(link, ip), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Gives a link an address that is never chosen as the source of what goes elsewhere.
    pub(super) fn set_quiet_address(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        self.change(convert::new_quiet_address(link, ip), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address of full prefix length from a link.
    pub(super) fn delete_address(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        self.change(convert::delete_address(link, ip), 0)
    }

    /// Makes a permanent neighbour.
    pub(super) fn set_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<()> {
        self.change(convert::new_neighbour(neighbour), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Makes a route in the main table, or replaces the one with the same destination and metric.
    pub(super) fn set_route(&mut self, link: u32, route: &Route) -> io::Result<()> {
        self.change(convert::new_route(link, route), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn change(&mut self, message: Message, flags: u16) -> io::Result<()> {
        self.exchange(message, flags | NLM_F_ACK).map(drop)
    }

    /// Sends one request and returns what came before its acknowledgement; a request without one is answered by one
    /// message or an error.
    fn exchange(&mut self, message: Message, flags: u16) -> io::Result<Vec<Message>> {
        let sequence = self.send(message, flags)?;
        let mut answers = Vec::new();
        loop {
            for packet in self.receive(sequence)? {
                match packet.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(refusal(&error)),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
            if flags & NLM_F_ACK == 0 && !answers.is_empty() {
                return Ok(answers);
            }
        }
    }

    /// Takes a dump; one that changed under way is taken again.
    fn dump(&mut self, message: &Message) -> io::Result<Vec<Message>> {
        for _ in 0..limits::NETLINK_DUMP_TRIES_MAX {
            if let Some(answers) = self.dump_once(message.clone())? {
                return Ok(answers);
            }
        }
        Err(io::Error::other(format!(
            "the list changed while it was read, {} times in a row",
            limits::NETLINK_DUMP_TRIES_MAX
        )))
    }

    /// `None` where the dump was interrupted by a change.
    fn dump_once(&mut self, message: Message) -> io::Result<Option<Vec<Message>>> {
        let sequence = self.send(message, NLM_F_DUMP)?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            for packet in self.receive(sequence)? {
                interrupted |= packet.header.flags & NLM_F_DUMP_INTR != 0;
                match packet.payload {
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(answers)),
                    NetlinkPayload::Error(error) => return Err(refusal(&error)),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: Message, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = NLM_F_REQUEST | flags;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(self.sequence)
    }

    /// The messages of one datagram that answer `sequence`; late answers to requests that timed out are skipped.
    fn receive(&mut self, sequence: u32) -> io::Result<Vec<NetlinkMessage<Message>>> {
        self.buffer.clear();
        let length = loop {
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let waited = limits::NETLINK_TIMEOUT_MS;
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("the kernel did not answer within {waited} ms"),
                    ));
                }
                done => break done?,
            }
        };
        if length > self.buffer.len() {
            return Err(io::Error::other(format!("an answer of {length} bytes does not fit")));
        }
        let mut packets = Vec::new();
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            let packet = NetlinkMessage::<Message>::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            // Messages are padded to four bytes.
            let taken = (packet.header.length as usize).next_multiple_of(4).max(4);
            rest = rest.get(taken..).unwrap_or_default();
            if packet.header.sequence_number == sequence {
                packets.push(packet);
            }
        }
        Ok(packets)
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("fd", &self.socket.as_raw_fd()).finish_non_exhaustive()
    }
}

/// An error with the kernel's own explanation, where it gives one; the number stays readable by
/// [`io::Error::raw_os_error`] where it does not.
fn refusal(error: &netlink_packet_core::ErrorMessage) -> io::Error {
    let errno = io::Error::from_raw_os_error(-error.raw_code());
    match convert::explanation(&error.header) {
        Some(text) if !text.is_empty() => tracing::debug!(%errno, text, "netlink request refused"),
        _ => {}
    }
    errno
}
