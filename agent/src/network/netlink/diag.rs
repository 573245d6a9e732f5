//! Sockets, as sock_diag(7) shows and ends them. Invariant: a socket is ended by all of its identity, its cookie
//! included, so never another one that took its place.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::limits;

/// Message types (uapi/linux/sock_diag.h).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// The state of a connected socket, of UDP too (net/tcp_states.h, TCP_ESTABLISHED).
const CONNECTED: u32 = 1;
/// `struct inet_diag_sockid`, `struct inet_diag_req_v2` and `struct inet_diag_msg` (uapi/linux/inet_diag.h).
const ID_BYTES: usize = 48;
const REQUEST_BYTES: usize = 8 + ID_BYTES;
const ANSWER_BYTES: usize = 4 + ID_BYTES + 20;
/// Bytes received at a time: more than the kernel puts into one datagram of a dump.
const RECEIVE_BYTES: usize = 64 << 10;

/// A family of addresses, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InetFamily {
    V4 = libc::AF_INET as isize,
    V6 = libc::AF_INET6 as isize,
}

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectedUdp {
    family: u8,
    id: [u8; ID_BYTES],
    /// Where it is connected to; an IPv4-mapped address is given as IPv4.
    pub(crate) remote: SocketAddr,
    /// What SO_COOKIE gives.
    pub(crate) cookie: u64,
    /// Inode of the socket, as the links in `/proc/<pid>/fd` name it.
    pub(crate) inode: u32,
}

/// A sock_diag socket in the network namespace of the thread that opened it.
pub(crate) struct Diag {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Diag {
    /// Opens it in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        let timeout = TimeVal::milliseconds(limits::NETLINK_TIMEOUT_MS);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Every connected UDP socket of the namespace.
    ///
    /// What a BPF socket storage holds for them the kernel does not tell here: it leaves INET_DIAG_SK_BPF_STORAGES out
    /// for sockets that have no connection of their own kind, as UDP's (seen on 6.18).
    pub(crate) fn connected_udp(&mut self, family: InetFamily) -> io::Result<Vec<ConnectedUdp>> {
        let body = request(family as u8, &[0; ID_BYTES]);
        let mut found = Vec::new();
        self.exchange(SOCK_DIAG_BY_FAMILY, body, NLM_F_DUMP, |answer| found.extend(connected(answer)))?;
        Ok(found)
    }

    /// Ends a socket: its next call fails with ECONNABORTED. False when it has gone already.
    pub(crate) fn destroy(&mut self, socket: &ConnectedUdp) -> io::Result<bool> {
        let body = request(socket.family, &socket.id);
        match self.exchange(SOCK_DESTROY, body, NLM_F_ACK, |_| {}) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Sends one request and hands on every answer until the kernel says that this was all.
    fn exchange(
        &mut self,
        kind: u16,
        body: Vec<u8>,
        flags: u16,
        mut answer: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = NLM_F_REQUEST | flags;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(Raw { kind, body }));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            for packet in self.receive()? {
                match packet.payload {
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(()),
                        Some(code) => return Err(io::Error::from_raw_os_error(-code.get())),
                    },
                    NetlinkPayload::InnerMessage(raw) => answer(&raw.body),
                    _ => {}
                }
            }
        }
    }

    /// The messages of one datagram that answer the last request.
    fn receive(&mut self) -> io::Result<Vec<NetlinkMessage<Raw>>> {
        self.buffer.clear();
        let length = loop {
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                done => break done?,
            }
        };
        if length > self.buffer.len() {
            return Err(io::Error::other(format!("an answer of {length} bytes does not fit")));
        }
        let mut packets = Vec::new();
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            let packet = NetlinkMessage::<Raw>::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            let taken = (packet.header.length as usize).next_multiple_of(4).max(4);
            rest = rest.get(taken..).unwrap_or_default();
            if packet.header.sequence_number == self.sequence {
                packets.push(packet);
            }
        }
        Ok(packets)
    }
}

impl std::fmt::Debug for Diag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Diag").field("fd", &self.socket.as_raw_fd()).finish_non_exhaustive()
    }
}

/// `struct inet_diag_req_v2` for connected UDP sockets.
fn request(family: u8, id: &[u8; ID_BYTES]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    bytes.extend([family, libc::IPPROTO_UDP as u8, 0, 0]);
    bytes.extend((1_u32 << CONNECTED).to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// One `struct inet_diag_msg`; `None` for what is none.
fn connected(bytes: &[u8]) -> Option<ConnectedUdp> {
    let family = *bytes.first()?;
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    // Its last field.
    let inode = word(ANSWER_BYTES - 4)?;
    let id: [u8; ID_BYTES] = bytes.get(4..4 + ID_BYTES)?.try_into().ok()?;
    // Local port, remote port, local address, remote address, device, cookie.
    let port = u16::from_be_bytes([id[2], id[3]]);
    let address: [u8; 16] = id[20..36].try_into().ok()?;
    let address: IpAddr = if i32::from(family) == libc::AF_INET {
        Ipv4Addr::new(address[0], address[1], address[2], address[3]).into()
    } else {
        Ipv6Addr::from(address).to_canonical()
    };
    let cookie = u64::from(word(4 + 44)?) << 32 | u64::from(word(4 + 40)?);
    Some(ConnectedUdp { family, id, remote: SocketAddr::new(address, port), cookie, inode })
}

/// A message whose body is left as it is.
#[derive(Debug)]
struct Raw {
    kind: u16,
    body: Vec<u8>,
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }
    fn buffer_len(&self) -> usize {
        self.body.len()
    }
    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for Raw {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { kind: header.message_type, body: payload.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(family: i32, remote: [u8; 16]) -> Vec<u8> {
        let mut bytes = vec![family as u8, CONNECTED as u8, 0, 0];
        bytes.extend(5000_u16.to_be_bytes());
        bytes.extend(8080_u16.to_be_bytes());
        bytes.extend([0; 16]);
        bytes.extend(remote);
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend(1_u32.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes.extend(99_u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn answers_are_read() {
        let mut v4 = [0; 16];
        v4[..4].copy_from_slice(&[10, 244, 0, 1]);
        let mut bytes = answer(libc::AF_INET, v4);
        assert_eq!(bytes.len(), ANSWER_BYTES);
        // Attributes follow.
        bytes.extend([8, 0, 5, 0, 1, 0, 0, 0]);
        let socket = connected(&bytes).expect("a socket");
        let remote = "10.244.0.1:8080".parse().unwrap();
        assert_eq!((socket.remote, socket.cookie, socket.inode), (remote, (1 << 32) + 7, 99));
        assert_eq!(request(socket.family, &socket.id).len(), REQUEST_BYTES);

        let mapped = Ipv4Addr::new(10, 244, 0, 1).to_ipv6_mapped().octets();
        let socket = connected(&answer(libc::AF_INET6, mapped)).expect("a socket");
        assert_eq!(socket.remote, remote);
    }

    #[test]
    fn answers_that_are_cut_short_are_none() {
        let whole = answer(libc::AF_INET, [1; 16]);
        assert!((0..whole.len()).all(|end| connected(&whole[..end]).is_none()));
    }
}
