//! Events of the programs, for `sheave monitor`. Invariant: the programs write events only while somebody keeps asking:
//! the permission runs out by itself, so that a listener that was killed costs nothing.

use super::map::{Counters, Map};
use super::{encode, sys, versioned};
use crate::dataplane::DataplaneError;
use crate::limits;
use aya::maps::{Map as AyaMap, MapData, RingBuf};
use sheave_ebpf_abi::{COUNTERS, Counter, Event, Plain as _, event_hook, event_kind, map as names};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

/// One event, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// Something was refused or dropped; otherwise a connection was given a backend.
    pub drop: bool,
    /// `connect`, `sendmsg`, `bind`, `ingress`, `egress` or `xdp`.
    pub hook: &'static str,
    /// Why: the name of a counter.
    pub reason: &'static str,
    /// `TCP`, `UDP`, `SCTP`, or a number.
    pub proto: String,
    /// Who asked, where it is known.
    pub client: Option<SocketAddr>,
    /// What was asked for.
    pub asked: SocketAddr,
    /// Where it went.
    pub backend: Option<SocketAddr>,
    /// Service id; 0 when there is none.
    pub service: u32,
    /// Index of the network device of a packet; 0 otherwise.
    pub device: u32,
}

fn hook(number: u8) -> &'static str {
    match number {
        event_hook::CONNECT => "connect",
        event_hook::SENDMSG => "sendmsg",
        event_hook::BIND => "bind",
        event_hook::TC_INGRESS => "ingress",
        event_hook::TC_EGRESS => "egress",
        event_hook::XDP => "xdp",
        _ => "unknown",
    }
}

fn reason(number: u16) -> &'static str {
    COUNTERS
        .iter()
        .find(|counter| **counter as u32 == u32::from(number))
        .map_or("unknown", |found| found.name())
}

fn proto(number: u8) -> String {
    match number {
        sheave_ebpf_abi::PROTO_TCP => "TCP".to_owned(),
        sheave_ebpf_abi::PROTO_UDP => "UDP".to_owned(),
        sheave_ebpf_abi::PROTO_SCTP => "SCTP".to_owned(),
        other => other.to_string(),
    }
}

/// The words for a record.
fn words(event: &Event) -> Seen {
    let at = |address, port: u16| SocketAddr::new(encode::from_address(address), u16::from_be(port));
    let known = |at: SocketAddr| {
        let nobody = match at.ip() {
            IpAddr::V4(ip) => ip.is_unspecified(),
            IpAddr::V6(ip) => ip.is_unspecified(),
        };
        (!nobody).then_some(at)
    };
    Seen {
        time_ns: event.time_ns,
        drop: event.kind == event_kind::DROP,
        hook: hook(event.hook),
        reason: reason(event.reason),
        proto: proto(event.proto),
        client: known(at(&event.client, event.client_port)),
        asked: at(&event.asked, event.asked_port),
        backend: known(at(&event.backend, event.backend_port)),
        service: event.service,
        device: event.device,
    }
}

/// A listener; there must be one at a time, since what one reads no other sees.
pub struct Listener {
    ring: RingBuf<MapData>,
    listen: Map<u32, u32>,
    counters: Counters,
    lost_before: u64,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

impl Listener {
    /// Opens the ring buffer pinned under `pin_dir` and throws away what an earlier listener left in it.
    pub fn open(pin_dir: &Path) -> Result<Self, DataplaneError> {
        let dir = versioned(pin_dir);
        let path = dir.join(names::EVENTS);
        let failed = |e: aya::maps::MapError| DataplaneError::Pin {
            op: "open",
            path: path.clone(),
            source: io::Error::other(e),
        };
        let data = MapData::from_pin(&path).map_err(failed)?;
        let ring = AyaMap::from_map_data(data).and_then(RingBuf::try_from).map_err(failed)?;
        let counters = Counters::open(&dir)?;
        let mut listener = Self { ring, listen: Map::open(&dir, names::LISTEN)?, counters, lost_before: 0 };
        while listener.ring.next().is_some() {}
        listener.lost_before = listener.lost_ever()?;
        listener.keep_on()?;
        Ok(listener)
    }

    /// Lets the programs write events for another while. To be called once a second.
    pub fn keep_on(&self) -> Result<(), DataplaneError> {
        self.listen.put(&0, &sys::monotonic_s().saturating_add(limits::EVENTS_PERMISSION_S))
    }

    /// Takes the permission back.
    pub fn stop(&self) -> Result<(), DataplaneError> {
        self.listen.put(&0, &0)
    }

    /// The next event, if there is one.
    pub fn take(&mut self) -> Option<Seen> {
        while let Some(record) = self.ring.next() {
            // A record of another size is of no program that this build knows.
            if let Some(event) = Event::from_bytes(&record) {
                return Some(words(&event));
            }
        }
        None
    }

    /// Waits until there may be an event, `timeout` at most.
    pub fn wait(&self, timeout: Duration) -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn lost_ever(&self) -> Result<u64, DataplaneError> {
        let read = self.counters.read()?;
        Ok(read.iter().find(|(counter, _)| *counter == Counter::EventLost).map_or(0, |(_, count)| *count))
    }

    /// Events that found no room since this listener was opened.
    pub fn lost(&self) -> Result<u64, DataplaneError> {
        Ok(self.lost_ever()?.saturating_sub(self.lost_before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_put_into_words() {
        let event = Event {
            time_ns: 5,
            asked: encode::address([10, 96, 0, 1].into()),
            asked_port: 80_u16.to_be(),
            reason: Counter::ConnectNoEndpoints as u16,
            proto: 6,
            kind: event_kind::DROP,
            hook: event_hook::CONNECT,
            ..Event::zeroed()
        };
        let seen = words(&event);
        assert!(seen.drop);
        assert_eq!((seen.hook, seen.reason, seen.proto.as_str()), ("connect", "connect_no_endpoints", "TCP"));
        assert_eq!(seen.asked, SocketAddr::from(([10, 96, 0, 1], 80)));
        assert_eq!((seen.client, seen.backend), (None, None));
        assert_eq!(reason(999), "unknown");
    }
}
