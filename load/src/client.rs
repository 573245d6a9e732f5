//! The side that connects. Invariant: every round takes each target once, in a random order, so that no target gains by
//! what was done before it; a failure is counted and never enters the latencies.

use crate::LoadError;
use crate::error::Doing as _;
use crate::stats::Random;
use crate::wire::{self, Drive, Driven, Kind, Samples};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, bind, connect, recv, send, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use std::io::BufRead;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// A connection or an answer that takes longer has failed. One lost packet is sent again within this time.
const PATIENCE_MS: i64 = 4_000;
/// The same for a datagram, which nobody sends again.
const DATAGRAM_PATIENCE_MS: i64 = 500;
/// Ports of datagrams: 10240 to 29999, as the beds' own range; those past services are even, those through them odd. A client
/// that asks an endpoint itself from a port that just asked it through a service can't tell the answers apart.
const DATAGRAM_PORTS: (u16, u16) = (10_240, 9_880);
/// Failures after which a block ends early: each may take that long.
const FAILED_MAX: u64 = 4;

/// Does what it is asked for until the input ends.
pub(crate) fn run(input: &mut impl BufRead) -> Result<(), LoadError> {
    let mut output = std::io::stdout().lock();
    let mut datagrams = 0;
    while let Some(drive) = wire::read::<Drive>(input, "connecting")? {
        wire::write(&mut output, &drive_once(&drive, &mut datagrams)).doing("answer")?;
    }
    Ok(())
}

fn drive_once(drive: &Drive, datagrams: &mut u16) -> Driven {
    let mut random = Random::new(drive.seed);
    let mut driven = Driven::default();
    driven.targets.resize_with(drive.targets.len(), Samples::default);
    let mut kept: Vec<Option<OwnedFd>> = drive.targets.iter().map(|_| None).collect();
    let mut order: Vec<usize> = (0..drive.targets.len()).collect();
    for round in 0..drive.warm_up + drive.rounds {
        if driven.targets.iter().map(|samples| samples.failed).sum::<u64>() >= FAILED_MAX {
            break;
        }
        random.shuffle(&mut order);
        for &target in &order {
            let addresses = &drive.targets[target];
            let Some(SocketAddr::V4(to)) = addresses.get(random.below(addresses.len())) else { continue };
            let to = SockaddrIn::from(*to);
            let result = match drive.kind {
                Kind::Connect => connect_once(&to).map(|took| (took, None)),
                Kind::Short => short(&to).map(|(took, answer)| (took, Some(answer))),
                Kind::Keepalive => keepalive(&to, &mut kept[target]).map(|took| (took, None)),
                Kind::Udp => {
                    *datagrams = (*datagrams + 1) % DATAGRAM_PORTS.1;
                    let port = DATAGRAM_PORTS.0 + 2 * *datagrams + u16::from(target != 0);
                    datagram(&to, port).map(|took| (took, None))
                }
            };
            let samples = &mut driven.targets[target];
            match result {
                Err(error) => {
                    samples.failed += 1;
                    driven.failure.get_or_insert_with(|| format!("{} {to}: {error}", drive.kind.name()));
                }
                Ok((took, answer)) if round >= drive.warm_up => {
                    samples.ns.push(ns(took));
                    samples.answer_ns.extend(answer.map(ns));
                }
                Ok(_) => {}
            }
        }
    }
    driven
}

fn ns(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

/// A connected socket that is reset when it is closed, so that ports do not run out.
fn connected(to: &SockaddrIn) -> Result<OwnedFd, Errno> {
    let stream = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&stream, sockopt::Linger, &LINGER)?;
    setsockopt(&stream, sockopt::SendTimeout, &TimeVal::milliseconds(PATIENCE_MS))?;
    connect(stream.as_raw_fd(), to)?;
    Ok(stream)
}

const LINGER: nix::libc::linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };

fn request(stream: &OwnedFd) -> Result<(), Errno> {
    let mut answer = [0; 8];
    send(stream.as_raw_fd(), b"?", MsgFlags::MSG_NOSIGNAL)?;
    match recv(stream.as_raw_fd(), &mut answer, MsgFlags::empty())? {
        0 => Err(Errno::ECONNRESET),
        _ => Ok(()),
    }
}

fn connect_once(to: &SockaddrIn) -> Result<Duration, Errno> {
    let start = Instant::now();
    let stream = connected(to)?;
    let took = start.elapsed();
    drop(stream);
    Ok(took)
}

fn short(to: &SockaddrIn) -> Result<(Duration, Duration), Errno> {
    let start = Instant::now();
    let stream = connected(to)?;
    setsockopt(&stream, sockopt::ReceiveTimeout, &TimeVal::milliseconds(PATIENCE_MS))?;
    request(&stream)?;
    let answered = start.elapsed();
    drop(stream);
    Ok((start.elapsed(), answered))
}

fn keepalive(to: &SockaddrIn, kept: &mut Option<OwnedFd>) -> Result<Duration, Errno> {
    let stream = match kept.take() {
        Some(stream) => stream,
        None => {
            let stream = connected(to)?;
            setsockopt(&stream, sockopt::TcpNoDelay, &true)?;
            setsockopt(&stream, sockopt::ReceiveTimeout, &TimeVal::milliseconds(PATIENCE_MS))?;
            stream
        }
    };
    let start = Instant::now();
    // A connection that failed is not kept; the next round makes another.
    request(&stream)?;
    let took = start.elapsed();
    *kept = Some(stream);
    Ok(took)
}

fn datagram(to: &SockaddrIn, port: u16) -> Result<Duration, Errno> {
    let start = Instant::now();
    let udp = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    bind(udp.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))?;
    setsockopt(&udp, sockopt::ReceiveTimeout, &TimeVal::milliseconds(DATAGRAM_PATIENCE_MS))?;
    sendto(udp.as_raw_fd(), b"?", to, MsgFlags::empty())?;
    recv(udp.as_raw_fd(), &mut [0; 8], MsgFlags::empty())?;
    Ok(start.elapsed())
}
