//! Frames as fast as one core sends and forwards them: a packet socket beyond the uplink, the node's data plane, and the
//! counter of the device where forwarded frames come out again. All three share one core, so that the rate is what that
//! core does for a frame from end to end.

#![expect(unsafe_code, reason = "sendmmsg on a packet socket, which nothing wraps with prepared buffers")]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::packet::{FIRST_NODE_PORT, UPLINK, World};
use crate::packet_frame::{CLIENT, Frame, NODE};

/// A pod of another node, and the address by which that node is reached.
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 5);
const REMOTE_NODE: &str = "198.51.100.3";
const FLOWS: u16 = 1000;
const BATCH: usize = 64;
const WARM_UP: Duration = Duration::from_millis(500);
const MEASURED: Duration = Duration::from_secs(3);

/// What forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forwarding {
    /// The kernel's routing, nothing loaded, frames for the backend itself.
    Routing,
    /// A NodePort, by tcx.
    Tcx,
    /// A NodePort, by XDP.
    Xdp,
}

impl Forwarding {
    pub(crate) const ALL: [Self; 3] = [Self::Routing, Self::Tcx, Self::Xdp];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Tcx => "tcx",
            Self::Xdp => "xdp",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Rate {
    pub(crate) per_second: f64,
    pub(crate) sent: u64,
    pub(crate) forwarded: u64,
}

/// Measures one of them in a world of its own.
pub(crate) fn rate(how: Forwarding) -> Result<Rate> {
    let mut world = World::new("forwarding")?;
    let uplink_mac = mac(&world.node.ip(&["link", "show", UPLINK])).context("the uplink's address")?;
    let lan_link = world.lan.ip(&["link", "show", "eth0"]);
    let lan_mac = mac(&lan_link).context("the address beyond it")?;
    let neighbour = hex(lan_mac);
    // The other node and the client are behind the same device, and always known.
    for ip in [REMOTE_NODE, &CLIENT.to_string()] {
        world.node.ip(&["neigh", "replace", ip, "lladdr", &neighbour, "dev", UPLINK, "nud", "permanent"]);
    }
    world.node.ip(&["route", "add", &format!("{REMOTE}/32"), "via", REMOTE_NODE]);
    // Frames come out of the device that they came in by.
    world
        .node
        .run(|| std::fs::write(format!("/proc/sys/net/ipv4/conf/{UPLINK}/send_redirects"), "0"))
        .and_then(|()| world.node.run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/send_redirects", "0")))
        .context("no redirects")?;
    // A veth takes what XDP sends only while its other end polls, which it does for GRO.
    world.lan.run(|| set_gro("eth0")).context("switching GRO on")?;
    world.config.xdp = how == Forwarding::Xdp;
    let _driver = match how {
        Forwarding::Routing => None,
        _ => Some(world.fill(10, (REMOTE, false))?),
    };
    if how == Forwarding::Xdp {
        let link = world.node.ip(&["link", "show", UPLINK]);
        ensure!(link.contains("xdp"), "no XDP program is attached to the uplink");
    }
    let to = if how == Forwarding::Routing { (REMOTE, 8080) } else { (NODE, FIRST_NODE_PORT) };
    let frames: Vec<Vec<u8>> = (0..FLOWS)
        .map(|flow| Frame::udp((CLIENT, 10_000 + flow), to).between(uplink_mac, lan_mac).bytes())
        .collect();
    world.lan.run(|| flood(&frames))
}

/// Sends from the calling thread's namespace and counts what comes back.
fn flood(frames: &[Vec<u8>]) -> Result<Rate> {
    let mut cpus = CpuSet::new();
    cpus.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("keeping to one core")?;
    let socket = packet_socket("eth0").context("a packet socket")?;
    let mut messages = Messages::of(frames);
    send_for(&socket, &mut messages, WARM_UP)?;
    let (start, before) = (Instant::now(), received()?);
    let sent = send_for(&socket, &mut messages, MEASURED)?;
    let (took, forwarded) = (start.elapsed(), received()? - before);
    ensure!(forwarded > 0, "none of {sent} frames came back");
    Ok(Rate { per_second: forwarded as f64 / took.as_secs_f64(), sent, forwarded })
}

/// Frames that arrived at `eth0` of the calling thread's namespace.
fn received() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no eth0")?;
    line.split_whitespace().nth(1).context("no counter")?.parse().context("a counter")
}

fn send_for(socket: &OwnedFd, messages: &mut Messages, time: Duration) -> Result<u64> {
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < time {
        sent += messages.send(socket)?;
    }
    Ok(sent)
}

/// Prepared frames; the vectors point into each other and are never changed.
struct Messages {
    headers: Vec<libc::mmsghdr>,
    _vectors: Vec<libc::iovec>,
    _frames: Vec<Vec<u8>>,
    next: usize,
}

impl Messages {
    fn of(frames: &[Vec<u8>]) -> Self {
        let mut frames = frames.to_vec();
        let mut vectors: Vec<libc::iovec> = frames
            .iter_mut()
            .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
            .collect();
        let headers = vectors
            .iter_mut()
            .map(|vector| {
                // SAFETY: all zeroes is an empty header.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                (header.msg_hdr.msg_iov, header.msg_hdr.msg_iovlen) = (vector, 1);
                header
            })
            .collect();
        Self { headers, _vectors: vectors, _frames: frames, next: 0 }
    }

    fn send(&mut self, socket: &OwnedFd) -> Result<u64> {
        let end = (self.next + BATCH).min(self.headers.len());
        let batch = &mut self.headers[self.next..end];
        // SAFETY: the headers point to vectors and frames that this struct keeps as they are.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), batch.as_mut_ptr(), batch.len() as u32, 0) };
        self.next = if end == self.headers.len() { 0 } else { end };
        if sent >= 0 {
            return Ok(sent as u64);
        }
        match io::Error::last_os_error() {
            // The device is busy; the frames of this batch are lost, as on a wire.
            error if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(0),
            error => Err(error).context("sending frames"),
        }
    }
}

/// A packet socket on a device, past its queueing discipline.
fn packet_socket(device: &str) -> io::Result<OwnedFd> {
    let index = nix::net::if_::if_nametoindex(device)?;
    // SAFETY: makes a descriptor and touches nothing else; protocol 0 receives nothing.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let one: libc::c_int = 1;
    // SAFETY: all zeroes is an address without a device.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index as i32;
    // SAFETY: both calls read the value behind the pointer, of the size that they are told.
    let results = unsafe {
        [
            libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const one).cast(),
                size_of::<libc::c_int>() as u32,
            ),
            libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32),
        ]
    };
    if results.iter().any(|result| *result < 0) { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Switches generic receive offload on.
fn set_gro(device: &str) -> io::Result<()> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const ETHTOOL_SGRO: u32 = 0x2c;
    /// `struct ethtool_value` (uapi/linux/ethtool.h).
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let mut value = Value { command: ETHTOOL_SGRO, data: 1 };
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeroes is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and what it points to live until the call returns.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The Ethernet address in what `ip link show` says.
fn mac(link: &str) -> Option<[u8; 6]> {
    let text = link.split("link/ether ").nth(1)?.split_whitespace().next()?;
    let bytes: Vec<u8> = text.split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes.try_into().ok()
}

fn hex(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let text = "7: up0@if2: <UP> mtu 1500\n    link/ether 02:00:0a:ff:10:01 brd ff:ff:ff:ff:ff:ff";
        assert_eq!(mac(text).map(hex).as_deref(), Some("02:00:0a:ff:10:01"));
        assert_eq!(mac("lo"), None);
    }
}
