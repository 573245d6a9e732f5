//! What the service tests share: a data plane over private pins, servers that name themselves, models in short.
//! Everything is gone when its guard is dropped.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sheave_agent::dataplane::{DataplaneConfig, Driver, uninstall};
use sheave_agent::service::{
    Endpoint, Event, Hint, ObjectKey, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};

/// How long a peer may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pins of a test.
pub(crate) struct World {
    dir: PathBuf,
    /// Settings of its data plane.
    pub(crate) config: DataplaneConfig,
}

impl World {
    /// Pins below a fresh directory; the data plane serves `cgroup`.
    pub(crate) fn new(cgroup: &Path, uplinks: &[&str]) -> Self {
        Self::at(&std::env::temp_dir().join(sheave_harness::unique("sheave-pins")), cgroup, uplinks)
    }

    /// Pins below `dir`.
    pub(crate) fn at(dir: &Path, cgroup: &Path, uplinks: &[&str]) -> Self {
        let config = DataplaneConfig {
            pin_dir: dir.join("bpf"),
            cgroup_path: Some(cgroup.to_owned()),
            uplinks: uplinks.iter().map(|&name| name.to_owned()).collect(),
            node_name: "node-1".to_owned(),
            ..DataplaneConfig::default()
        };
        Self { dir: dir.to_owned(), config }
    }

    /// A data plane with everything in `events` applied.
    pub(crate) fn driver(&self, events: Vec<Event>) -> Driver {
        let mut driver = Driver::open(&self.config).unwrap_or_else(|e| panic!("open: {}", chain(&e)));
        driver.handle(synced(events));
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        driver
    }

    /// How often the kernel counted a reason.
    pub(crate) fn counted(&self, reason: &str) -> u64 {
        let reasons = self.config.stats.snapshot().reasons;
        let found = reasons.iter().find(|(counter, _)| counter.name() == reason);
        found.unwrap_or_else(|| panic!("no reason {reason}")).1
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let removed = uninstall(&self.config.pin_dir);
        let left = std::fs::remove_dir_all(&self.dir);
        if !std::thread::panicking() {
            removed.unwrap_or_else(|errors| panic!("uninstall: {errors:?}"));
            left.unwrap_or_else(|e| panic!("{}: {e}", self.dir.display()));
        }
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    text
}

/// The events followed by the statement that this is all there is.
pub(crate) fn synced(mut events: Vec<Event>) -> Vec<Event> {
    let (mut services, mut slices) = (BTreeSet::new(), BTreeSet::new());
    for event in &events {
        match event {
            Event::Service(service) => drop(services.insert(service.key.clone())),
            Event::Slice(slice) => drop(slices.insert(slice.key.clone())),
            _ => {}
        }
    }
    events.extend([Event::ServicesSynced(services), Event::SlicesSynced(slices)]);
    events
}

fn key(name: &str) -> ObjectKey {
    format!("default/{name}").into()
}

/// A service with one port, on these cluster IPs; `node_port` 0 for none.
pub(crate) fn service(name: &str, ips: &[&str], proto: Proto, node_port: u16) -> Event {
    Event::Service(Service {
        key: key(name),
        cluster_ips: ips.iter().map(|ip| address(ip)).collect(),
        ports: [ServicePort { name: "".into(), port: 80, node_port, proto }].into(),
        ..Service::default()
    })
}

/// Its ready endpoints.
pub(crate) fn slice(name: &str, proto: Proto, endpoints: &[SocketAddr]) -> Event {
    let port = endpoints.first().map_or(1, SocketAddr::port);
    assert!(endpoints.iter().all(|e| e.port() == port), "a slice has one port");
    let endpoint = |at: &SocketAddr| Endpoint {
        addr: at.ip(),
        on_this_node: true,
        readiness: Readiness::Ready,
        hint: Hint::None,
    };
    let family = if endpoints.first().is_some_and(SocketAddr::is_ipv6) { "v6" } else { "v4" };
    Event::Slice(Slice {
        key: key(&format!("{name}-{family}")),
        service: key(name),
        ports: [SlicePort { name: "".into(), port, proto }].into(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        weight: 1,
        problems: Box::default(),
    })
}

/// Parses an address.
pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// A socket address.
pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address(ip), port)
}

/// Runs `ip` in the current network namespace.
pub(crate) fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap_or_else(|e| panic!("ip {args:?}: {e}"));
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Gives the loopback device these addresses.
pub(crate) fn on_loopback(addresses: &[&str]) {
    for text in addresses {
        match address(text) {
            IpAddr::V4(_) => ip(&["addr", "add", &format!("{text}/32"), "dev", "lo"]),
            IpAddr::V6(_) => ip(&["addr", "add", &format!("{text}/128"), "dev", "lo", "nodad"]),
        }
    }
}

/// Serves TCP: every connection is told the peer that the server sees and the server's own address.
pub(crate) fn tcp_server(listen: SocketAddr) {
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("listen on {listen}: {e}"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let peer = stream.peer_addr().map(|p| p.ip().to_canonical().to_string()).unwrap_or_default();
            // A client that has gone already is the test's affair.
            drop(stream.write_all(format!("{} {peer}", listen.ip()).as_bytes()));
        }
    });
}

/// Serves UDP: answers every datagram with its own address.
pub(crate) fn udp_server(listen: SocketAddr) {
    let socket = UdpSocket::bind(listen).unwrap_or_else(|e| panic!("bind {listen}: {e}"));
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(listen.ip().to_string().as_bytes(), from));
        }
    });
}

/// Connects and returns who answered, and what peer the server saw.
pub(crate) fn ask(to: SocketAddr) -> std::io::Result<(String, String)> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    assert_eq!(stream.peer_addr()?, to, "the program must see the address that it asked for");
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (server, peer) = text.split_once(' ').unwrap_or_default();
    Ok((server.to_owned(), peer.to_owned()))
}

/// An unconnected UDP socket of `to`'s family.
pub(crate) fn udp_client(to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).expect("bind a client");
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket
}

/// Sends a datagram and returns who answered, checking that the answer seems to come from `to`.
pub(crate) fn ask_udp(socket: &UdpSocket, to: SocketAddr) -> String {
    socket.send_to(b"who", to).unwrap_or_else(|e| panic!("send to {to}: {e}"));
    let mut buffer = [0; 64];
    let (len, from) = socket.recv_from(&mut buffer).unwrap_or_else(|e| panic!("answer from {to}: {e}"));
    assert_eq!(from, to, "the answer must seem to come from the service");
    String::from_utf8_lossy(&buffer[..len]).into_owned()
}
