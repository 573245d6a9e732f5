//! Netfilter's netlink: attributes by hand, batches, dumps. Invariant: a batch is one transaction of the kernel's: it
//! takes effect whole or not at all, and the caller knows which before the call returns.

use std::borrow::Cow;
use std::io;
use std::os::fd::AsFd;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::convert::explanation;
use crate::limits;

/// Bytes of a message's header (`struct nlmsghdr`).
const HEADER_BYTES: usize = 16;
/// Bytes of the subsystem's header after it (`struct nfgenmsg`).
const FAMILY_BYTES: usize = 4;
/// Bytes received at a time: more than the kernel puts into one datagram.
const RECEIVE_BYTES: usize = 64 << 10;
/// The kernel doubles what is asked for, and wants some for itself.
const SEND_SLACK_BYTES: usize = 4096;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`.
const BATCH: [u16; 2] = [0x10, 0x11];
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// What the kernel said no to.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub(crate) struct Refused {
    /// What was asked for.
    pub(crate) what: String,
    /// The kernel's error.
    pub(crate) source: io::Error,
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::new(refused.source.kind(), refused)
    }
}

/// Messages under construction, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

/// Where something that has a length began.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub(crate) struct Open(usize);

impl Writer {
    fn header(&mut self, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) -> Open {
        let at = Open(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        at
    }

    fn finish(&mut self, at: Open) {
        let length = (self.bytes.len() - at.0) as u32;
        self.bytes[at.0..at.0 + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Opens a nested attribute.
    pub(crate) fn nest(&mut self, kind: u16) -> Open {
        let at = Open(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        at
    }

    /// Closes it.
    pub(crate) fn end(&mut self, at: Open) {
        let length = (self.bytes.len() - at.0) as u16;
        self.bytes[at.0..at.0 + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// An attribute of these bytes.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A number in network byte order, as netfilter has them.
    pub(crate) fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// The same with 64 bits.
    pub(crate) fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Text with its final zero.
    pub(crate) fn put_str(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.put(kind, &bytes);
    }

    /// Attributes that were written elsewhere.
    pub(crate) fn append(&mut self, written: &Writer) {
        self.bytes.extend_from_slice(&written.bytes);
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// A transaction under construction.
#[derive(Debug)]
pub(crate) struct Batch {
    writer: Writer,
    subsystem: u8,
    /// What each message does, for errors; the first has sequence number 1.
    labels: Vec<Cow<'static, str>>,
    last: Open,
}

impl Batch {
    /// An empty one for a subsystem (`NFNL_SUBSYS_…`).
    pub(crate) fn new(subsystem: u8) -> Self {
        let mut writer = Writer::default();
        let at = writer.header(BATCH[0], NLM_F_REQUEST, 0, 0, u16::from(subsystem));
        writer.finish(at);
        Self { writer, subsystem, labels: Vec::new(), last: at }
    }

    /// Begins a message; what it does is told with errors.
    pub(crate) fn begin(&mut self, kind: u8, flags: u16, family: u8, label: impl Into<Cow<'static, str>>) {
        self.labels.push(label.into());
        let kind = u16::from(self.subsystem) << 8 | u16::from(kind);
        let sequence = self.labels.len() as u32;
        self.last = self.writer.header(kind, NLM_F_REQUEST | flags, sequence, family, 0);
    }

    /// Ends the message.
    pub(crate) fn finish(&mut self) {
        self.writer.finish(self.last);
    }

    /// Where attributes of the current message go.
    pub(crate) fn writer(&mut self) -> &mut Writer {
        &mut self.writer
    }

    /// Whether it has no message.
    pub(crate) fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    fn close(&mut self) {
        // The last message is acknowledged once the transaction is committed.
        let flags = self.last.0 + 6;
        let asked = NLM_F_REQUEST
            | NLM_F_ACK
            | u16::from_ne_bytes([self.writer.bytes[flags], self.writer.bytes[flags + 1]]);
        self.writer.bytes[flags..flags + 2].copy_from_slice(&asked.to_ne_bytes());
        let at = self.writer.header(
            BATCH[1],
            NLM_F_REQUEST,
            self.labels.len() as u32 + 1,
            0,
            u16::from(self.subsystem),
        );
        self.writer.finish(at);
    }
}

/// One message that the kernel sent.
struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// A netfilter socket in the namespace of the thread that opened it.
pub(crate) struct Netfilter {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Netfilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netfilter").finish_non_exhaustive()
    }
}

impl Netfilter {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        let timeout = TimeVal::milliseconds(limits::NETLINK_TIMEOUT_MS);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Runs a transaction. On an error nothing of it has happened.
    pub(crate) fn commit(&mut self, mut batch: Batch) -> Result<(), Refused> {
        if batch.is_empty() {
            return Ok(());
        }
        batch.close();
        let whole = |source| Refused { what: format!("a batch of {} messages", batch.labels.len()), source };
        let room = batch.writer.len() + SEND_SLACK_BYTES;
        setsockopt(&self.socket.as_fd(), sockopt::SndBufForce, &room).map_err(|e| whole(e.into()))?;
        self.socket.send(&batch.writer.bytes, 0).map_err(whole)?;
        // The kernel works while it is sent to: all answers are there by now.
        let wanted = batch.labels.len() as u32;
        let (mut acknowledged, mut refused) = (false, None);
        while !acknowledged || refused.is_some() {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(refused.unwrap_or_else(|| whole(e))),
            }
            for answer in answers(&self.buffer).filter(|answer| answer.kind == NLMSG_ERROR) {
                match failure(answer.payload) {
                    None => acknowledged |= answer.sequence == wanted,
                    Some(source) if refused.is_none() => {
                        let label = batch.labels.get((answer.sequence as usize).wrapping_sub(1));
                        let what = label.map_or_else(|| "the whole batch".to_owned(), ToString::to_string);
                        refused = Some(Refused { what, source });
                    }
                    Some(_) => {}
                }
            }
        }
        match refused {
            Some(refused) => Err(refused),
            None if acknowledged => Ok(()),
            None => Err(whole(io::Error::other("the kernel did not answer"))),
        }
    }

    /// Sends one request outside of a transaction and waits for its acknowledgement.
    pub(crate) fn request(
        &mut self,
        subsystem: u8,
        kind: u8,
        family: u8,
        write: impl FnOnce(&mut Writer),
    ) -> io::Result<()> {
        let sequence = self.send(subsystem, kind, NLM_F_ACK, family, write)?;
        loop {
            self.receive()?;
            for answer in answers(&self.buffer) {
                if answer.sequence == sequence && answer.kind == NLMSG_ERROR {
                    return failure(answer.payload).map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Asks for one object; `None` where the kernel has none.
    pub(crate) fn get<T>(
        &mut self,
        subsystem: u8,
        kind: u8,
        family: u8,
        write: impl FnOnce(&mut Writer),
        read: impl Fn(&[u8]) -> T,
    ) -> io::Result<Option<T>> {
        let sequence = self.send(subsystem, kind, 0, family, write)?;
        loop {
            self.receive()?;
            for answer in answers(&self.buffer).filter(|answer| answer.sequence == sequence) {
                if answer.kind != NLMSG_ERROR {
                    return Ok(Some(read(attributes_of(answer.payload))));
                }
                match failure(answer.payload) {
                    Some(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                    Some(e) => return Err(e),
                    None => {}
                }
            }
        }
    }

    /// Takes a dump, handing the attributes of every object to `read`, which keeps what it wants; one that changed
    /// under way is taken again, up to a limit, and then is as it is.
    pub(crate) fn dump<T>(
        &mut self,
        subsystem: u8,
        kind: u8,
        family: u8,
        write: impl Fn(&mut Writer),
        mut read: impl FnMut(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut found = Vec::new();
        for _ in 0..limits::NETLINK_DUMP_TRIES_MAX {
            found.clear();
            let sequence = self.send(subsystem, kind, NLM_F_DUMP, family, &write)?;
            let (mut done, mut interrupted) = (false, false);
            while !done {
                self.receive()?;
                for answer in answers(&self.buffer).filter(|answer| answer.sequence == sequence) {
                    interrupted |= answer.flags & NLM_F_DUMP_INTR != 0;
                    match answer.kind {
                        NLMSG_DONE => done = true,
                        NLMSG_ERROR => {
                            let error = failure(answer.payload);
                            return match error {
                                Some(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
                                _ => Ok(Vec::new()),
                            };
                        }
                        _ => found.extend(read(attributes_of(answer.payload))),
                    }
                }
            }
            if !interrupted {
                break;
            }
        }
        Ok(found)
    }

    fn send(
        &mut self,
        subsystem: u8,
        kind: u8,
        flags: u16,
        family: u8,
        write: impl FnOnce(&mut Writer),
    ) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut writer = Writer::default();
        let kind = u16::from(subsystem) << 8 | u16::from(kind);
        let at = writer.header(kind, NLM_F_REQUEST | flags, self.sequence, family, 0);
        write(&mut writer);
        writer.finish(at);
        self.socket.send(&writer.bytes, 0)?;
        Ok(self.sequence)
    }

    fn receive(&mut self) -> io::Result<()> {
        self.buffer.clear();
        loop {
            match self.socket.recv(&mut self.buffer, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map(drop),
            }
        }
    }
}

fn answers(mut rest: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *rest else { return None };
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let payload = rest.get(HEADER_BYTES..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Answer {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload,
        })
    })
}

fn attributes_of(payload: &[u8]) -> &[u8] {
    payload.get(FAMILY_BYTES..).unwrap_or_default()
}

/// The error in an acknowledgement; `None` means success.
fn failure(payload: &[u8]) -> Option<io::Error> {
    let [c0, c1, c2, c3, rest @ ..] = payload else {
        return Some(io::Error::from(io::ErrorKind::InvalidData));
    };
    let code = i32::from_ne_bytes([*c0, *c1, *c2, *c3]);
    if code == 0 {
        return None;
    }
    let error = io::Error::from_raw_os_error(-code);
    if let Some(text) = explanation(rest).filter(|text| !text.is_empty()) {
        tracing::debug!(%error, text, "netfilter request refused");
    }
    Some(error)
}

/// The attributes in these bytes: kind and value.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1, ..] = *rest else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
    })
}

/// The first attribute of that kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// An attribute's text without its final zero.
pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

/// An attribute's number.
pub(crate) fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_the_way_there_and_back() {
        let mut writer = Writer::default();
        let outer = writer.nest(7);
        writer.put_str(1, "abc");
        writer.put_u32(2, 0x0102_0304);
        writer.end(outer);
        writer.put(9, &[1, 2, 3, 4, 5]);
        let inner = attribute(&writer.bytes, 7).unwrap();
        assert_eq!(text(attribute(inner, 1).unwrap()), "abc");
        assert_eq!(number(attribute(inner, 2).unwrap()), Some(0x0102_0304));
        assert_eq!(attribute(&writer.bytes, 9), Some(&[1, 2, 3, 4, 5][..]));
        assert_eq!(attribute(&writer.bytes, 8), None);
    }

    #[test]
    fn broken_answers_end_the_reading() {
        assert_eq!(answers(&[1, 2, 3]).count(), 0);
        assert_eq!(answers(&[255; 40]).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert!(failure(&[0]).is_some());
    }
}
