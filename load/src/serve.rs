//! The backends: answer a byte with a byte, on TCP and UDP, on every address of their namespace. Invariant: a datagram is
//! answered from the address that it came to.

use crate::LoadError;
use crate::error::Doing as _;
use crate::spec::TARGET_PORT;
use crate::wire;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};
use std::collections::HashMap;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

const LISTENER: u64 = u64::MAX;
const DATAGRAMS: u64 = u64::MAX - 1;
const STDIN: u64 = u64::MAX - 2;

/// How long it looks for more before it sleeps. Waking a processor up takes as long as a whole connect: whether it was
/// asleep would be what is measured.
const AWAKE: Duration = Duration::from_micros(300);

/// Serves until standard input ends. Says `null` when it is ready. `awake`: there is a processor for it alone, so that it
/// need not sleep while there is traffic.
pub(crate) fn run(awake: bool) -> Result<(), LoadError> {
    let any = (Ipv4Addr::UNSPECIFIED, TARGET_PORT);
    let listener = TcpListener::bind(any).doing("listen")?;
    listener.set_nonblocking(true).doing("listen")?;
    let datagrams = UdpSocket::bind(any).doing("bind a UDP socket")?;
    datagrams.set_nonblocking(true).doing("bind a UDP socket")?;
    setsockopt(&datagrams, sockopt::Ipv4PacketInfo, &true).doing("ask for addresses of datagrams")?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).doing("make an epoll")?;
    let input = std::io::stdin();
    let readable = |id| EpollEvent::new(EpollFlags::EPOLLIN, id);
    epoll.add(&listener, readable(LISTENER)).doing("wait for connections")?;
    epoll.add(&datagrams, readable(DATAGRAMS)).doing("wait for datagrams")?;
    epoll.add(input.as_fd(), readable(STDIN)).doing("wait for the end")?;
    wire::write(&mut std::io::stdout(), &()).doing("say that the server is ready")?;
    let mut server = Server { epoll, connections: HashMap::new() };
    let mut events = [EpollEvent::empty(); 64];
    let mut last = None::<Instant>;
    loop {
        let looks = last.is_some_and(|last| last.elapsed() < AWAKE);
        let timeout = if looks { EpollTimeout::ZERO } else { EpollTimeout::NONE };
        let count = match server.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => continue,
            result => result.doing("wait for traffic")?,
        };
        if count != 0 && awake {
            last = Some(Instant::now());
        }
        for event in &events[..count] {
            match event.data() {
                LISTENER => server.accept(&listener),
                DATAGRAMS => while answer(&datagrams) {},
                STDIN => return Ok(()),
                id => server.talk(id),
            }
        }
    }
}

struct Server {
    epoll: Epoll,
    connections: HashMap<u64, TcpStream>,
}

impl Server {
    fn accept(&mut self, listener: &TcpListener) {
        // A client that is gone by now, or no descriptor left: the client's failure to count.
        while let Ok((mut stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_err()
                || stream.set_nodelay(true).is_err()
                || !echo(&mut stream)
            {
                continue;
            }
            let id = stream.as_raw_fd() as u64;
            if self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, id)).is_ok() {
                self.connections.insert(id, stream);
            }
        }
    }

    fn talk(&mut self, id: u64) {
        if self.connections.get_mut(&id).is_some_and(|stream| !echo(stream)) {
            // Closing takes it out of the epoll.
            self.connections.remove(&id);
        }
    }
}

/// Answers what there is to read; false when the connection is over.
fn echo(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 512];
    match stream.read(&mut buffer) {
        Ok(0) => false,
        Ok(len) => stream.write_all(&buffer[..len]).is_ok(),
        Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    }
}

/// Answers one datagram; false when there was none.
fn answer(socket: &UdpSocket) -> bool {
    let mut buffer = [0; 512];
    let mut control = nix::cmsg_space!([u8; 64]);
    let fd = socket.as_raw_fd();
    let (len, from, to) = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let Ok(got) = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut control), MsgFlags::empty()) else {
            return false;
        };
        let to = got.cmsgs().ok().and_then(|mut all| {
            all.find_map(|message| match message {
                ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
                _ => None,
            })
        });
        (got.bytes, got.address, to)
    };
    if let (Some(from), Some(mut info)) = (from, to) {
        // The route back decides the device.
        info.ipi_ifindex = 0;
        info.ipi_spec_dst = info.ipi_addr;
        let said = [IoSlice::new(&buffer[..len])];
        // A client that is gone is the client's affair.
        sendmsg(fd, &said, &[ControlMessage::Ipv4PacketInfo(&info)], MsgFlags::empty(), Some(&from))
            .unwrap_or_default();
    }
    true
}
