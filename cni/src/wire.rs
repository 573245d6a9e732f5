//! The way from the plugin to the agent. Invariant: one request and one reply a connection, each a length (four
//! bytes, little-endian) and a JSON document; the namespace travels as a descriptor with the request's first bytes,
//! so that the agent needs nobody's mounts; both ends know that the other is root.

#![expect(unsafe_code, reason = "received descriptors are numbers until somebody owns them")]

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
    getsockopt, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};

use crate::error::{Error, code};

/// Version of the protocol. An agent speaks all that its plugins may speak.
pub const VERSION: u64 = 1;
/// Where the agent listens unless told otherwise.
pub const SOCKET: &str = "/run/sheave/cni.sock";
/// Where DEL waits for the agent unless told otherwise.
pub const SPOOL: &str = "/var/lib/sheave/network/spool";
/// Bytes of a request or a reply.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// What the plugin asks of the agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// A verb, or `PROBE`: whether ADD would meet an attachment that is there already.
    pub command: String,
    /// As in [`crate::Call`].
    pub container_id: String,
    /// As in [`crate::Call`]; in the result it names the namespace, which is the descriptor that came along.
    pub netns: String,
    /// As in [`crate::Call`].
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// The whole network configuration.
    pub config: Value,
    /// The result of the delegate that manages addresses, where there is one.
    pub ipam: Option<Value>,
}

impl Request {
    /// As sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut value = json!({
            "v": VERSION,
            "command": self.command,
            "container_id": self.container_id,
            "netns": self.netns,
            "ifname": self.ifname,
            "args": self.args,
            "config": self.config,
        });
        if let Some(ipam) = &self.ipam {
            value["ipam"] = ipam.clone();
        }
        value.to_string().into_bytes()
    }

    /// Reads what [`Request::encode`] made.
    pub fn decode(bytes: &[u8]) -> Result<Request, Error> {
        let mut value = document(bytes, "the plugin")?;
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Request {
            command: text("command"),
            container_id: text("container_id"),
            netns: text("netns"),
            ifname: text("ifname"),
            args: text("args"),
            ipam: value.get("ipam").filter(|ipam| !ipam.is_null()).cloned(),
            config: value.get_mut("config").map(Value::take).unwrap_or_default(),
        })
    }
}

/// A document of a version that is spoken.
fn document(bytes: &[u8], who: &str) -> Result<Value, Error> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| Error::new(code::DECODE, format!("what {who} sent is not JSON: {e}")))?;
    match value.get("v").and_then(Value::as_u64) {
        Some(VERSION) => Ok(value),
        other => {
            let theirs = other.map_or("none".to_owned(), |v| v.to_string());
            let message = format!("{who} speaks version {theirs} of the protocol, not {VERSION}");
            Err(Error::new(code::INCOMPATIBLE_VERSION, message)
                .with("install plugin and agent of one release"))
        }
    }
}

/// What the agent answers: what to print, if anything.
pub type Reply = Result<Option<Value>, Error>;

/// A reply as sent.
pub fn encode_reply(reply: &Reply) -> Vec<u8> {
    let value = match reply {
        Ok(stdout) => json!({"v": VERSION, "code": 0, "msg": "", "details": "", "stdout": stdout}),
        Err(error) => {
            json!({"v": VERSION, "code": error.code, "msg": error.message, "details": error.details})
        }
    };
    value.to_string().into_bytes()
}

/// Reads a reply; a reply that is none is an error of its own.
pub fn decode_reply(bytes: &[u8]) -> Reply {
    let mut value = document(bytes, "the agent")?;
    match Error::from_value(&value) {
        Some(Error { code: 0, .. }) => Ok(value.get_mut("stdout").map(Value::take).filter(|v| !v.is_null())),
        Some(error) => Err(error),
        None => Err(Error::new(code::DECODE, "the agent's reply has no code")),
    }
}

/// Connects to the agent, waiting no longer than until `deadline`, also where its queue is full.
pub fn dial(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let left = left(deadline)?;
    let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(micros))?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(UnixStream::from(fd)),
        Err(nix::Error::EAGAIN) => Err(ErrorKind::TimedOut.into()),
        Err(errno) => Err(errno.into()),
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// The user at the other end when the connection was made.
pub fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    Ok(getsockopt(stream, sockopt::PeerCredentials)?.uid())
}

/// Sends a message, with a descriptor where one is given.
pub fn send(
    stream: &UnixStream,
    message: &[u8],
    fd: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(message);
    stream.set_write_timeout(Some(left(deadline)?))?;
    let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let slices = [IoSlice::new(&bytes)];
    let sent = loop {
        match sendmsg::<()>(stream.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::Error::EINTR) => {}
            done => break done?,
        }
    };
    (&*stream).write_all(bytes.get(sent..).unwrap_or_default()).map_err(timed_out)
}

/// Receives a message and the first descriptor that came with it; further ones are closed.
pub fn receive(stream: &UnixStream, deadline: Instant) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut head = [0; 4];
    let (mut have, mut fd) = (0, None);
    while have < head.len() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let (count, came) = receive_some(stream, &mut head[have..])?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        have += count;
        fd = fd.or(came);
    }
    let length = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a message of {length} bytes")));
    }
    let mut message = vec![0; length];
    let mut have = 0;
    while have < length {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match (&*stream).read(&mut message[have..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(timed_out(error)),
        }
    }
    Ok((message, fd))
}

/// Descriptors that are taken from one message; more are refused by the kernel.
const FDS_MAX: usize = 8;

fn receive_some(stream: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut slices = [IoSliceMut::new(into)];
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => return Err(ErrorKind::TimedOut.into()),
            done => break done?,
        }
    };
    let mut first = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
                let owned = unsafe { OwnedFd::from_raw_fd(fd) };
                first = first.or(Some(owned));
            }
        }
    }
    Ok((message.bytes, first))
}

/// A socket whose time is up says that it would block.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { ErrorKind::TimedOut.into() } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn request() -> Request {
        Request {
            command: "ADD".to_owned(),
            container_id: "a".to_owned(),
            netns: "/run/netns/a".to_owned(),
            ifname: "eth0".to_owned(),
            args: "IP=10.0.0.1".to_owned(),
            config: json!({"name": "net", "big": "x".repeat(300_000)}),
            ipam: Some(json!({"ips": []})),
        }
    }

    #[test]
    fn requests_travel_with_their_descriptor() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let sent = request();
        std::thread::scope(|scope| {
            let bytes = sent.encode();
            scope.spawn(move || send(&near, &bytes, Some(file.as_fd()), soon()).unwrap());
            let (bytes, fd) = receive(&far, soon()).unwrap();
            assert!(fd.is_some());
            assert_eq!(Request::decode(&bytes).unwrap(), sent);
        });
    }

    #[test]
    fn replies_are_read_back() {
        for reply in [Ok(None), Ok(Some(json!({"ips": []}))), Err(Error::new(11, "later").with("why"))] {
            assert_eq!(decode_reply(&encode_reply(&reply)), reply);
        }
        let other = decode_reply(br#"{"v":2,"code":0}"#).unwrap_err();
        assert!(other.message.contains("version 2"), "{other}");
        assert_eq!(decode_reply(b"{").unwrap_err().code, code::DECODE);
        assert_eq!(decode_reply(br#"{"v":1}"#).unwrap_err().code, code::DECODE);
        assert!(Request::decode(b"{}").unwrap_err().message.contains("version none"));
    }

    #[test]
    fn half_messages_and_long_ones_are_errors() {
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(&[9, 0, 0, 0, b'x']).unwrap();
        drop(near);
        assert_eq!(receive(&far, soon()).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert_eq!(receive(&far, soon()).unwrap_err().kind(), ErrorKind::InvalidData);
        let (_near, far) = UnixStream::pair().unwrap();
        let now = Instant::now() + Duration::from_millis(20);
        assert_eq!(receive(&far, now).unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
