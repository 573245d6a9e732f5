//! What a socket remembers of its translations. Invariant: an entry names the backend that it is for, so an answer
//! from anybody else is shown as what it is.

use crate::env::{Peers, Socket};
use crate::resolve::Destination;
use sheave_ebpf_abi::{Address, Backend, PROTO_TCP, ReverseEntry, ReverseKey, ReverseValue, peer_places};

/// Puts `entry` into the table of connected sockets; false when others have both places. The second place is looked at only
/// where the first one is taken: it is far away.
#[inline(always)]
fn note<P: Peers>(peers: &P, cookie: u64, entry: &ReverseEntry) -> bool {
    let [first, second] = peer_places(cookie);
    let has = |place| peers.take(place, cookie) || peers.owner(place) == cookie;
    let place = if has(first) {
        first
    } else if has(second) {
        second
    } else {
        return false;
    };
    peers.set_entry(place, entry);
    true
}

/// What the table of connected sockets has for the socket.
#[inline(always)]
fn noted<P: Peers>(peers: &P, cookie: u64) -> Option<ReverseEntry> {
    let [first, second] = peer_places(cookie);
    // The first one is the later one: a socket that was connected again found it free.
    if peers.owner(first) == cookie {
        peers.entry(first)
    } else if peers.owner(second) == cookie {
        peers.entry(second)
    } else {
        None
    }
}

/// The socket is no more.
#[inline(always)]
pub fn forget<P: Peers>(peers: &P, cookie: u64) {
    for place in peer_places(cookie) {
        if peers.owner(place) == cookie {
            peers.leave(place);
        }
    }
}

#[inline(always)]
fn lru_key(cookie: u64, addr: &Address, port: u16, proto: u8) -> ReverseKey {
    ReverseKey { cookie: [cookie as u32, (cookie >> 32) as u32], backend: *addr, port, proto, pad: 0 }
}

#[inline(always)]
fn entry(asked: &Destination, backend: &Backend, service_id: u32) -> ReverseEntry {
    ReverseEntry {
        backend: backend.addr,
        service: asked.addr,
        backend_port: backend.port,
        service_port: asked.port,
        service_id,
    }
}

/// Remembers a connection: the socket has one peer. Of TCP it is in the table of connected sockets, which costs a small part of
/// what a storage of its own does; without room there, and for the sake of those who look for connected UDP sockets, in the
/// socket's storage. False when the kernel has no memory left for it in any place.
#[inline(always)]
pub fn remember_peer<S: Socket, P: Peers>(
    socket: &S,
    peers: &P,
    asked: &Destination,
    backend: &Backend,
    service_id: u32,
) -> bool {
    let entry = entry(asked, backend, service_id);
    if asked.proto == PROTO_TCP && note(peers, socket.cookie(), &entry) || socket.store(&entry) {
        return true;
    }
    remember_in_lru(socket, asked, backend, service_id) != Remembered::No
}

/// What became of remembering a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remembered {
    /// The socket has sent through this service to this backend before.
    Before,
    /// It is the first time, as far as is remembered.
    Newly,
    /// The kernel has no memory left for it.
    No,
}

/// Remembers one datagram: the storage keeps one backend, further ones of the same socket go to the LRU.
#[inline(always)]
pub fn remember_datagram<S: Socket>(
    socket: &S,
    asked: &Destination,
    backend: &Backend,
    service_id: u32,
) -> Remembered {
    let new = entry(asked, backend, service_id);
    match socket.stored() {
        Some(held) if held == new => Remembered::Before,
        Some(held) if held.backend != new.backend || held.backend_port != new.backend_port => {
            remember_in_lru(socket, asked, backend, service_id)
        }
        _ => {
            if socket.store(&new) {
                return Remembered::Newly;
            }
            remember_in_lru(socket, asked, backend, service_id)
        }
    }
}

#[inline(always)]
fn remember_in_lru<S: Socket>(
    socket: &S,
    asked: &Destination,
    backend: &Backend,
    service_id: u32,
) -> Remembered {
    let key = lru_key(socket.cookie(), &backend.addr, backend.port, asked.proto);
    let value = ReverseValue { service: asked.addr, service_id, port: asked.port, pad: 0 };
    if socket.reverse(&key) == Some(value) {
        return Remembered::Before;
    }
    if socket.set_reverse(&key, &value) { Remembered::Newly } else { Remembered::No }
}

/// What the program asked for when it now hears of `peer`, and the id of that service; `None` when `peer` is not a
/// backend of this socket.
#[inline(always)]
pub fn recall<S: Socket, P: Peers>(socket: &S, peers: &P, peer: &Destination) -> Option<(Destination, u32)> {
    let asked = |addr, port| Destination { addr, port, proto: peer.proto };
    let is_of = |held: &ReverseEntry| held.backend == peer.addr && held.backend_port == peer.port;
    if peer.proto == PROTO_TCP
        && let Some(held) = noted(peers, socket.cookie())
        && is_of(&held)
    {
        return Some((asked(held.service, held.service_port), held.service_id));
    }
    if let Some(held) = socket.stored()
        && is_of(&held)
    {
        return Some((asked(held.service, held.service_port), held.service_id));
    }
    let value = socket.reverse(&lru_key(socket.cookie(), &peer.addr, peer.port, peer.proto))?;
    Some((asked(value.service, value.port), value.service_id))
}
