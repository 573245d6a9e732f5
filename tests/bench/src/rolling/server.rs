//! Backends that end gracefully. Invariant: a server that drains answers everything that still comes, and tells clients
//! of open connections to go elsewhere; only after that it is stopped.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sheave_harness::NetNs;

/// Port of every backend.
pub(super) const PORT: u16 = 8080;
/// How often a thread that waits looks whether its server is to stop.
const LOOK_MS: u8 = 50;
const LOOK: Duration = Duration::from_millis(LOOK_MS as u64);

const RUNNING: u8 = 0;
const DRAINING: u8 = 1;
const STOPPED: u8 = 2;

/// The address of a backend; 1 to 65,535.
pub(super) fn address(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 20, high, low)
}

/// All backends, in their namespace.
pub(super) struct Servers<'a> {
    netns: &'a NetNs,
    servers: HashMap<u16, Arc<Server>>,
}

#[derive(Default)]
struct Server {
    state: AtomicU8,
    /// Connections that clients have open.
    open: AtomicUsize,
}

impl Server {
    fn is_stopped(&self) -> bool {
        self.state.load(Ordering::Relaxed) == STOPPED
    }
}

impl<'a> Servers<'a> {
    pub(super) fn new(netns: &'a NetNs) -> Result<Self> {
        Ok(Self { netns, servers: HashMap::new() })
    }

    /// Listens by TCP and UDP.
    pub(super) fn start(&mut self, number: u16) -> Result<()> {
        let at = SocketAddr::from((address(number), PORT));
        let (listener, socket) = self
            .netns
            .run(|| Ok::<_, std::io::Error>((TcpListener::bind(at)?, UdpSocket::bind(at)?)))
            .with_context(|| format!("listening on {at}"))?;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(LOOK))?;
        let server = Arc::new(Server::default());
        self.servers.insert(number, server.clone());
        let by_udp = server.clone();
        std::thread::spawn(move || accept(&listener, &server));
        std::thread::spawn(move || datagrams(&socket, &by_udp));
        Ok(())
    }

    /// Tells the clients of open connections to go.
    pub(super) fn drain(&self, number: u16) {
        self.set(number, DRAINING);
    }

    /// Waits until no client is connected, or for so long.
    pub(super) fn wait_idle(&self, number: u16, limit: Duration) {
        let (start, server) = (Instant::now(), self.servers.get(&number));
        while server.is_some_and(|server| server.open.load(Ordering::Relaxed) > 0) && start.elapsed() < limit
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Closes everything.
    pub(super) fn stop(&mut self, number: u16) {
        self.set(number, STOPPED);
        self.servers.remove(&number);
    }

    fn set(&self, number: u16, to: u8) {
        if let Some(server) = self.servers.get(&number) {
            server.state.store(to, Ordering::Relaxed);
        }
    }
}

impl Drop for Servers<'_> {
    fn drop(&mut self) {
        self.servers.values().for_each(|server| server.state.store(STOPPED, Ordering::Relaxed));
    }
}

fn word(server: &Server) -> &'static [u8] {
    if server.state.load(Ordering::Relaxed) == RUNNING { b"ok\n" } else { b"bye\n" }
}

fn accept(listener: &TcpListener, server: &Arc<Server>) {
    while !server.is_stopped() {
        match listener.accept() {
            Ok((stream, _)) => {
                let server = server.clone();
                server.open.fetch_add(1, Ordering::Relaxed);
                std::thread::spawn(move || {
                    serve(stream, &server);
                    server.open.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Err(_) => {
                let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                // What comes of it shows in the next accept.
                poll(&mut waiting, PollTimeout::from(LOOK_MS)).unwrap_or_default();
            }
        }
    }
}

fn serve(stream: TcpStream, server: &Server) {
    // Accepted sockets are blocking whatever the listener is; errors end the connection, which the client counts.
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while matches!(lines.read_line(&mut line), Ok(len) if len > 0) {
        if writer.write_all(word(server)).is_err() {
            return;
        }
        line.clear();
    }
}

fn datagrams(socket: &UdpSocket, server: &Server) {
    let mut buffer = [0; 64];
    while !server.is_stopped() {
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(word(server), from));
        }
    }
}
