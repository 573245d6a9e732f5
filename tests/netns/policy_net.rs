//! Real traffic between pods: servers that answer on every pod, and many connection attempts at a time.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, accept4, bind, connect,
    getsockopt, listen, setsockopt, socket, sockopt,
};
use sheave_harness::NetNs;

/// A protocol that is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Proto {
    Tcp,
    Udp,
    Sctp,
}

impl Proto {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Proto::Tcp => "TCP",
            Proto::Udp => "UDP",
            Proto::Sctp => "SCTP",
        }
    }

    fn socket(self, v4: bool) -> nix::Result<OwnedFd> {
        let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let (kind, protocol) = match self {
            Proto::Tcp => (SockType::Stream, SockProtocol::Tcp),
            Proto::Udp => (SockType::Datagram, SockProtocol::Udp),
            Proto::Sctp => (SockType::Stream, SockProtocol::Sctp),
        };
        socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, protocol)
    }
}

/// Whether this kernel has SCTP.
pub(crate) fn has_sctp() -> bool {
    Proto::Sctp.socket(true).is_ok()
}

/// Servers on every given namespace, by a thread of their own, until it is dropped.
pub(crate) struct Servers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Servers {
    pub(crate) fn start<'a>(
        namespaces: impl Iterator<Item = &'a NetNs>,
        ports: &[u16],
        protos: &[Proto],
    ) -> Self {
        let mut sockets = Vec::new();
        for ns in namespaces {
            let _inside = ns.enter();
            for proto in protos {
                for port in ports {
                    let fd = proto.socket(false).expect("a server's socket");
                    setsockopt(&fd, sockopt::Ipv6V6Only, &false).expect("both families");
                    let at = SocketAddr::new("::".parse::<IpAddr>().expect("any address"), *port);
                    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).expect("bind a server");
                    if *proto != Proto::Udp {
                        listen(&fd, Backlog::new(1000).expect("a backlog")).expect("listen");
                    }
                    sockets.push((*proto, fd));
                }
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || serve(&sockets, &flag));
        Servers { stop, thread: Some(thread) }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the servers' thread");
        }
    }
}

fn serve(sockets: &[(Proto, OwnedFd)], stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut fds: Vec<PollFd<'_>> =
            sockets.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut fds, PollTimeout::from(50_u8)).unwrap_or(0) == 0 {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for ((proto, fd), _) in sockets.iter().zip(ready).filter(|(_, ready)| *ready) {
            if *proto == Proto::Udp {
                let server = std::net::UdpSocket::from(fd.try_clone().expect("the socket again"));
                let mut bytes = [0; 64];
                while let Ok((len, from)) = server.recv_from(&mut bytes) {
                    server.send_to(&bytes[..len], from).ok();
                }
            } else {
                // Who connected has seen all that there is to see.
                while let Ok(one) = accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                    nix::unistd::close(one).ok();
                }
            }
        }
    }
}

/// An attempt: from a namespace (by its number) to an address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    pub(crate) from: usize,
    pub(crate) to: SocketAddr,
    pub(crate) proto: Proto,
}

/// Makes all attempts at once and says which succeeded. Those that are `awaited` are given `patience`; then the others
/// a moment more, in which they would have succeeded as well.
pub(crate) fn try_all(
    namespaces: &[&NetNs],
    attempts: &[Attempt],
    awaited: &[bool],
    patience: Duration,
    moment: Duration,
) -> Vec<bool> {
    let mut sockets: Vec<Option<OwnedFd>> = attempts.iter().map(|_| None).collect();
    for (number, ns) in namespaces.iter().enumerate() {
        let _inside = ns.enter();
        for (at, attempt) in attempts.iter().enumerate().filter(|(_, attempt)| attempt.from == number) {
            let fd = attempt.proto.socket(attempt.to.is_ipv4()).expect("a client's socket");
            // What is done in the background fails later, or not at all.
            connect(fd.as_raw_fd(), &SockaddrStorage::from(attempt.to)).ok();
            if attempt.proto == Proto::Udp {
                let client = std::net::UdpSocket::from(fd.try_clone().expect("the socket again"));
                client.send(b"?").ok();
            }
            sockets[at] = Some(fd);
        }
    }
    let mut done = vec![false; attempts.len()];
    let deadline = Instant::now() + patience;
    while done.iter().zip(awaited).any(|(done, awaited)| *awaited && !done) && Instant::now() < deadline {
        look(&mut sockets, attempts, &mut done, Duration::from_millis(20));
    }
    let end = Instant::now() + moment;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        look(&mut sockets, attempts, &mut done, left);
        if left.is_zero() {
            return done;
        }
    }
}

fn look(sockets: &mut [Option<OwnedFd>], attempts: &[Attempt], done: &mut [bool], wait: Duration) {
    let open: Vec<usize> = (0..sockets.len()).filter(|at| sockets[*at].is_some()).collect();
    let ready: Vec<usize> = {
        let fds = open.iter().filter_map(|at| {
            let events =
                if attempts[*at].proto == Proto::Udp { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            sockets[*at].as_ref().map(|fd| PollFd::new(fd.as_fd(), events))
        });
        let mut fds: Vec<PollFd<'_>> = fds.collect();
        let wait = PollTimeout::try_from(wait).expect("a short wait");
        poll(&mut fds, wait).ok();
        open.iter().zip(&fds).filter(|(_, fd)| fd.any().unwrap_or(false)).map(|(at, _)| *at).collect()
    };
    for at in ready {
        let Some(fd) = sockets[at].take() else { continue };
        let failed = getsockopt(&fd, sockopt::SocketError).expect("the socket's error") != 0;
        let heard = attempts[at].proto != Proto::Udp || {
            let client = std::net::UdpSocket::from(fd.try_clone().expect("the socket again"));
            client.recv(&mut [0; 8]).is_ok()
        };
        done[at] = !failed && heard;
        if attempts[at].proto == Proto::Tcp {
            // Ends at once, by a reset.
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&fd, sockopt::Linger, &linger).ok();
        }
    }
}
