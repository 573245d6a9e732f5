//! Waits for changes of links, their queues, addresses and routes. Invariant: a change that may have been missed counts as one.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use ipnetwork::IpNetwork;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{Connection, Link};

/// RTMGRP_LINK, RTMGRP_TC, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x8 | 0x10 | 0x40 | 0x100 | 0x400;

/// A socket that hears of changes in the network namespace of the thread that opened it.
pub(crate) struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Listens from now on.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS))?;
        Ok(Self { socket, buffer: Vec::with_capacity(super::RECEIVE_BYTES) })
    }

    /// Waits until something changes; false when nothing did for so long.
    pub(crate) fn wait(&mut self, timeout_ms: i64) -> io::Result<bool> {
        setsockopt(&self.socket.as_fd(), sockopt::ReceiveTimeout, &TimeVal::milliseconds(timeout_ms))?;
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer, 0) {
            Ok(_) => Ok(true),
            // More happened than the socket holds.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(true),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// A link that an address is routed to.
#[derive(Debug, Clone)]
pub(crate) struct RoutedLink {
    /// The address.
    pub(crate) ip: IpAddr,
    /// The link's name.
    pub(crate) name: String,
    /// Its index.
    pub(crate) index: u32,
    /// What it sends waits in a queue.
    pub(crate) queued: bool,
    /// Uid of the pod that its alias tells of.
    pub(crate) pod: Option<Box<str>>,
}

/// The addresses that are routed, alone, to links whose name begins with one of `prefixes`. `pod` reads aliases.
pub(crate) fn routed_to(
    prefixes: &[String],
    pod: impl Fn(&str) -> Option<String>,
) -> io::Result<Vec<RoutedLink>> {
    let mut connection = Connection::open()?;
    let ours = |link: &Link| prefixes.iter().any(|prefix| link.name.starts_with(prefix.as_str()));
    let links: BTreeMap<u32, Link> =
        connection.links()?.into_iter().filter(ours).map(|link| (link.index, link)).collect();
    let alone = |to: &IpNetwork| to.prefix() == if to.is_ipv4() { 32 } else { 128 };
    let routes = connection.routes()?.into_iter().filter(|route| route.via.is_none() && alone(&route.to));
    let found = routes.filter_map(|route| {
        let link = links.get(&route.link?)?;
        let pod = link.alias.as_deref().and_then(&pod).map(Into::into);
        let (name, index, queued) = (link.name.clone(), link.index, link.queued);
        Some(RoutedLink { ip: route.to.ip(), name, index, queued, pod })
    });
    Ok(found.collect())
}
