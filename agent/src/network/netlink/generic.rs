//! Generic netlink: kernel subsystems that are found by name. Invariant: a request returns after the kernel has
//! answered for it; what the payloads mean is the caller's affair.

use std::io;
use std::os::fd::AsFd;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::RECEIVE_BYTES;
use crate::limits;

/// Bytes of a netlink header (`struct nlmsghdr`).
const HEADER_BYTES: usize = 16;
/// Bytes of a generic netlink header (`struct genlmsghdr`).
const GENERIC_BYTES: usize = 4;
/// The family that knows the others (`GENL_ID_CTRL`), its question, and the attributes of its answer.
const CONTROL: u16 = 16;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;
/// Kinds of messages (`NLMSG_ERROR`, `NLMSG_DONE`).
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Flags of requests.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// An attribute that holds attributes (`NLA_F_NESTED`); not part of its kind.
const NESTED: u16 = 0x8000;
const KIND_MASK: u16 = 0x3fff;

/// Attributes of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds one of `kind`.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // Values are names, addresses and numbers; no attribute comes near the 64 KiB that the length can say.
        let length = u16::try_from(GENERIC_BYTES + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds one that holds others.
    pub(crate) fn nest(&mut self, kind: u16, inner: &Attributes) -> &mut Self {
        self.put(kind | NESTED, &inner.0)
    }

    /// As they are sent.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The attributes in `bytes`, kind and value, up to the first that does not fit.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let head = rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & KIND_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A socket to one family, in the network namespace of the thread that opened it.
pub(crate) struct Generic {
    socket: Socket,
    family: u16,
    sequence: u32,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Generic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generic").field("family", &self.family).finish_non_exhaustive()
    }
}

impl Generic {
    /// Opens a socket to the family `name`; `None` where the kernel has none of that name, also after it has tried to
    /// load the module that brings it.
    pub(crate) fn open(name: &str) -> io::Result<Option<Self>> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_cap_ack(true)?;
        let timeout = TimeVal::milliseconds(limits::NETLINK_TIMEOUT_MS);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout)?;
        let mut generic =
            Self { socket, family: CONTROL, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) };
        let mut question = Attributes::default();
        question.put(CONTROL_FAMILY_NAME, format!("{name}\0").as_bytes());
        let answers = match generic.exchange(CONTROL_GET_FAMILY, ACK, &question) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            answers => answers?,
        };
        let mut found = answers.iter().flat_map(|answer| attributes(answer));
        let id = found.find_map(|(kind, value)| match kind {
            CONTROL_FAMILY_ID => value.try_into().ok().map(u16::from_ne_bytes),
            _ => None,
        });
        let Some(id) = id else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the answer names no family {name}"),
            ));
        };
        generic.family = id;
        Ok(Some(generic))
    }

    /// Asks for a change, and returns when it is made.
    pub(crate) fn change(&mut self, command: u8, attributes: &Attributes) -> io::Result<()> {
        self.exchange(command, ACK, attributes).map(drop)
    }

    /// Asks for one thing; the attributes of the answers.
    pub(crate) fn ask(&mut self, command: u8, attributes: &Attributes) -> io::Result<Vec<Vec<u8>>> {
        self.exchange(command, ACK, attributes)
    }

    /// Asks for all of a kind; the attributes of each.
    pub(crate) fn dump(&mut self, command: u8, attributes: &Attributes) -> io::Result<Vec<Vec<u8>>> {
        self.exchange(command, DUMP, attributes)
    }

    fn exchange(&mut self, command: u8, flags: u16, attributes: &Attributes) -> io::Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER_BYTES + GENERIC_BYTES + attributes.bytes().len();
        let mut message = Vec::with_capacity(length);
        message.extend((length as u32).to_ne_bytes());
        message.extend(self.family.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        // The version is 1 in every family there is; nobody looks at it.
        message.extend([command, 1, 0, 0]);
        message.extend(attributes.bytes());
        self.socket.send(&message, 0)?;
        let mut answers = Vec::new();
        while !self.receive(&mut answers)? {}
        Ok(answers)
    }

    /// Takes one datagram in; whether that was the end of the answer. Late answers to requests that timed out are
    /// skipped.
    fn receive(&mut self, answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        self.buffer.clear();
        let length = loop {
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let waited = limits::NETLINK_TIMEOUT_MS;
                    let text = format!("the kernel did not answer within {waited} ms");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                done => break done?,
            }
        };
        if length > self.buffer.len() {
            return Err(io::Error::other(format!("an answer of {length} bytes does not fit")));
        }
        let mut rest = &self.buffer[..];
        while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
            let Some(body) = rest.get(HEADER_BYTES..length) else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message longer than its datagram"));
            };
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            if sequence != self.sequence {
                continue;
            }
            match kind {
                ERROR | DONE => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => answers.push(body.get(GENERIC_BYTES..).unwrap_or_default().to_vec()),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_the_way_there_and_back() {
        let (mut inner, mut outer) = (Attributes::default(), Attributes::default());
        inner.put(2, b"rr\0").put(7, &[1, 2, 3, 4]);
        outer.put(1, &[9]).nest(3, &inner);
        assert_eq!(outer.bytes().len() % 4, 0);
        let found: Vec<_> = attributes(outer.bytes()).collect();
        assert_eq!(found[0], (1, &[9][..]));
        assert_eq!(found[1].0, 3, "without the flag that says it is nested");
        let nested: Vec<_> = attributes(found[1].1).collect();
        assert_eq!(nested, [(2, &b"rr\0"[..]), (7, &[1, 2, 3, 4][..])]);
    }

    #[test]
    fn attributes_that_lie_about_their_length_end_the_list() {
        for bytes in [&[8, 0, 1, 0, 5][..], &[2, 0, 1, 0, 5, 0, 0, 0][..], &[4][..]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn a_family_that_is_not_there_is_none_and_the_control_family_is_itself() {
        assert!(Generic::open("sheave-none").expect("ask").is_none());
        assert_eq!(Generic::open("nlctrl").expect("ask").expect("always there").family, CONTROL);
    }
}
