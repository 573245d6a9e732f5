//! The kernel's own telling of what changes. Invariant: nothing is missed without being said: where the kernel had
//! more to tell than the socket holds, that is an event too.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnetwork::IpNetwork;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{RECEIVE_BYTES, attributes};
use crate::limits;

/// Groups that are listened to (`RTNLGRP_*`): links, neighbours, queues, addresses and routes of both families.
const GROUPS: [u32; 7] = [1, 3, 4, 5, 7, 9, 11];
/// Bytes that the kernel may keep for us.
const BUFFER_BYTES: usize = 4 << 20;
/// Bytes of a netlink header.
const HEADER_BYTES: usize = 16;

/// Something changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A link came, went, or is another way now.
    Link {
        /// Its index.
        index: u32,
        /// Its name.
        name: String,
    },
    /// An address came or went.
    Address {
        /// Of this link.
        link: u32,
        /// Whether it is good on this link only (`RT_SCOPE_LINK`).
        local: bool,
    },
    /// A link got another queue, or none.
    Queue {
        /// The link.
        link: u32,
    },
    /// A route of the main table came or went.
    Route {
        /// Its destination.
        to: IpNetwork,
        /// Whose it is.
        protocol: u8,
    },
    /// A neighbour or forwarding entry came, went or changed.
    Neighbour {
        /// On this link.
        link: u32,
    },
    /// More happened than could be told: anything may have changed.
    Lost,
}

/// A socket that hears of changes in the network namespace of the thread that opened it.
pub(crate) struct Events {
    socket: Socket,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("fd", &self.socket.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Events {
    /// Begins to listen.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        // The default would hold a few hundred changes; where the host's limit is lower, that is what we get.
        socket.set_rx_buf_sz(BUFFER_BYTES)?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        let patience = TimeVal::milliseconds(limits::NETLINK_EVENTS_WAIT_MS);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &patience)?;
        Ok(Events { socket, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Waits for what happens next, up to [`limits::NETLINK_EVENTS_WAIT_MS`]; empty where nothing did.
    pub(crate) fn take(&mut self) -> io::Result<Vec<Event>> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer, 0) {
            Ok(_) => Ok(parse(&self.buffer)),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(vec![Event::Lost]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(Vec::new())
            }
            Err(e) => Err(e),
        }
    }
}

fn parse(bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    let mut rest = bytes;
    while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let Some(body) = rest.get(HEADER_BYTES..length) else { break };
        events.extend(event(kind, body));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    events
}

fn event(kind: u16, body: &[u8]) -> Option<Event> {
    const IFNAME: u16 = 3;
    match kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            let name = attributes(body.get(16..)?).find(|(kind, _)| *kind == IFNAME)?.1;
            let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
            Some(Event::Link { index: number(body, 4)?, name })
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            let local = *body.get(3)? == libc::RT_SCOPE_LINK;
            Some(Event::Address { link: number(body, 4)?, local })
        }
        libc::RTM_NEWQDISC | libc::RTM_DELQDISC => Some(Event::Queue { link: number(body, 4)? }),
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => Some(Event::Neighbour { link: number(body, 4)? }),
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => route(body),
        _ => None,
    }
}

fn number(body: &[u8], at: usize) -> Option<u32> {
    body.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn route(body: &[u8]) -> Option<Event> {
    const DST: u16 = 1;
    let [family, length, _, _, table, protocol, ..] = *body else { return None };
    if table != libc::RT_TABLE_MAIN {
        return None;
    }
    let v4 = i32::from(family) == libc::AF_INET;
    let mut to: IpAddr = if v4 { [0_u8; 4].into() } else { [0_u8; 16].into() };
    for (kind, value) in attributes(body.get(12..)?) {
        if kind == DST {
            to = match value.len() {
                4 => <[u8; 4]>::try_from(value).ok()?.into(),
                16 => <[u8; 16]>::try_from(value).ok()?.into(),
                _ => return None,
            };
        }
    }
    Some(Event::Route { to: IpNetwork::new(to, length).ok()?, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(HEADER_BYTES + body.len()).unwrap().to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn changes_are_read_and_others_skipped() {
        let mut body = vec![2, 24, 0, 0, 254, 84, 0, 1, 0, 0, 0, 0];
        body.extend([8, 0, 1, 0, 10, 244, 2, 0]);
        let mut bytes = message(libc::RTM_DELROUTE, &body);
        body[4] = 255;
        bytes.extend(message(libc::RTM_DELROUTE, &body));
        bytes.extend(message(3, &[]));
        let mut link = vec![0; 16];
        link[4] = 9;
        link.extend([7, 0, 3, 0, b'e', b'0', 0]);
        bytes.extend(message(libc::RTM_NEWLINK, &link));
        bytes.extend(message(libc::RTM_NEWNEIGH, &[7, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]));
        bytes.extend(message(libc::RTM_NEWADDR, &[10, 64, 0, 253, 6, 0, 0, 0]));
        bytes.extend(message(libc::RTM_DELADDR, &[2, 24, 0, 0, 7, 0, 0, 0]));
        bytes.extend(message(libc::RTM_NEWQDISC, &[0, 0, 0, 0, 8, 0, 0, 0]));
        let to = "10.244.2.0/24".parse().unwrap();
        assert_eq!(
            parse(&bytes),
            [
                Event::Route { to, protocol: 84 },
                Event::Link { index: 9, name: "e0".into() },
                Event::Neighbour { link: 5 },
                Event::Address { link: 6, local: true },
                Event::Address { link: 7, local: false },
                Event::Queue { link: 8 },
            ]
        );
        for cut in 0..bytes.len() {
            parse(&bytes[..cut]);
        }
    }
}
