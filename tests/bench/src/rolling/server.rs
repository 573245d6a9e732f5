//! Backends that end gracefully. Invariant: a server that drains answers everything that still comes, and tells clients
//! of open connections to go elsewhere; only after that it is stopped.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use sheave_harness::NetNs;

/// Port of every backend.
pub(super) const PORT: u16 = 8080;
/// How often a thread that waits looks whether its server is to stop.
const LOOK: Duration = Duration::from_millis(50);

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
    states: HashMap<u16, Arc<AtomicU8>>,
}

impl<'a> Servers<'a> {
    pub(super) fn new(netns: &'a NetNs) -> Result<Self> {
        Ok(Self { netns, states: HashMap::new() })
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
        let state = Arc::new(AtomicU8::new(RUNNING));
        self.states.insert(number, state.clone());
        let udp_state = state.clone();
        std::thread::spawn(move || accept(&listener, &state));
        std::thread::spawn(move || datagrams(&socket, &udp_state));
        Ok(())
    }

    /// Tells the clients of open connections to go.
    pub(super) fn drain(&self, number: u16) {
        self.set(number, DRAINING);
    }

    /// Closes everything.
    pub(super) fn stop(&mut self, number: u16) {
        self.set(number, STOPPED);
        self.states.remove(&number);
    }

    fn set(&self, number: u16, to: u8) {
        if let Some(state) = self.states.get(&number) {
            state.store(to, Ordering::Relaxed);
        }
    }
}

fn word(state: &AtomicU8) -> &'static [u8] {
    if state.load(Ordering::Relaxed) == RUNNING { b"ok\n" } else { b"bye\n" }
}

fn accept(listener: &TcpListener, state: &Arc<AtomicU8>) {
    while state.load(Ordering::Relaxed) != STOPPED {
        match listener.accept() {
            Ok((stream, _)) => {
                let state = state.clone();
                std::thread::spawn(move || serve(stream, &state));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn serve(stream: TcpStream, state: &AtomicU8) {
    // Accepted sockets are blocking whatever the listener is; errors end the connection, which the client counts.
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while matches!(lines.read_line(&mut line), Ok(len) if len > 0) {
        if writer.write_all(word(state)).is_err() {
            return;
        }
        line.clear();
    }
}

fn datagrams(socket: &UdpSocket, state: &AtomicU8) {
    let mut buffer = [0; 64];
    while state.load(Ordering::Relaxed) != STOPPED {
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(word(state), from));
        }
    }
}
