//! The two ends of a road. Invariant: streams have one thread at each end, so that what the kernel says of it is what
//! they cost; a stream counts once its receiver has read it to the end. A stream is a connection of its own; requests
//! have one that is kept from turn to turn: what a road decides once a connection is decided before any counts.

use crate::LoadError;
use crate::error::Doing as _;
use crate::wire;
use nix::{libc, setsockopt_impl, sockopt_impl};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Where the receiver listens.
pub(crate) const PORT: u16 = 5201;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);
const CHUNK_BYTES: usize = 128 << 10;
/// First byte of a connection that is a stream, or for requests.
const STREAM: u8 = b's';
const REQUESTS: u8 = b'r';

/// A turn of traffic.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Turn {
    /// A stream for so long.
    Stream { to: SocketAddr, ms: u64 },
    /// Requests of one byte, one after the other.
    Requests { to: SocketAddr, count: u32, warm_up: u32 },
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Of a stream.
    pub(crate) bytes: u64,
    /// How long the stream took, or each request.
    pub(crate) ns: Vec<u64>,
    /// Why there is nothing.
    pub(crate) failure: Option<String>,
}

/// Receives until it is killed. Says `null` when it is ready.
pub(crate) fn receive() -> Result<(), LoadError> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).doing("listen")?;
    wire::write(&mut std::io::stdout(), &()).doing("say that it listens")?;
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        // A sender that goes away in the middle says so itself.
        take(stream, &mut buffer).unwrap_or_default();
    }
}

sockopt_impl!(
    /// Bytes that wait before a receiver is woken (`SO_RCVLOWAT`, socket(7)).
    WakeAt,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    i32
);

/// Serves a stream to its end, and has requests served in the background, since their connection stays.
fn take(mut stream: TcpStream, buffer: &mut [u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    if kind[0] == REQUESTS {
        std::thread::spawn(move || echo(stream).unwrap_or_default());
        return Ok(());
    }
    // Woken for each piece, a receiver that is quick to sleep again makes a quick road slow: what was measured would be
    // how this machine wakes a thread of another processor.
    nix::sys::socket::setsockopt(&stream, WakeAt, &(buffer.len() as i32))?;
    while stream.read(buffer)? > 0 {}
    Ok(())
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    // Other roads have their turns meanwhile.
    stream.set_read_timeout(None)?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// Does the turns that it is told.
pub(crate) fn send(input: &mut impl BufRead) -> Result<(), LoadError> {
    let mut kept = None;
    while let Some(turn) = wire::read(input, "sending")? {
        let done = perform(&turn, &mut kept)
            .unwrap_or_else(|error| Done { failure: Some(error.to_string()), ..Done::default() });
        wire::write(&mut std::io::stdout(), &done).doing("answer")?;
    }
    Ok(())
}

fn perform(turn: &Turn, kept: &mut Option<TcpStream>) -> std::io::Result<Done> {
    match *turn {
        Turn::Stream { to, ms } => stream(to, Duration::from_millis(ms)),
        Turn::Requests { to, count, warm_up } => {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => open(to, REQUESTS)?,
            };
            // One that failed is not kept: where it broke off is not known.
            let done = requests(&mut connection, count, warm_up)?;
            *kept = Some(connection);
            Ok(done)
        }
    }
}

fn open(to: SocketAddr, kind: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

fn stream(to: SocketAddr, time: Duration) -> std::io::Result<Done> {
    let mut stream = open(to, STREAM)?;
    let chunk = vec![0x5a; CHUNK_BYTES];
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        stream.write_all(&chunk)?;
        bytes += chunk.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    // The receiver closes once it has read all, and sends nothing.
    if stream.read(&mut [0])? != 0 {
        return Err(std::io::Error::other("the receiver of a stream sent something"));
    }
    Ok(Done { bytes, ns: vec![nanos(start)], failure: None })
}

fn requests(stream: &mut TcpStream, count: u32, warm_up: u32) -> std::io::Result<Done> {
    let mut ns = Vec::with_capacity(count as usize);
    let mut byte = [7];
    for at in 0..warm_up + count {
        let start = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        if at >= warm_up {
            ns.push(nanos(start));
        }
    }
    Ok(Done { bytes: 0, ns, failure: None })
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// CPU time that a process with one thread has had, nanoseconds.
pub(crate) fn cpu_ns(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    text.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_counts_what_its_receiver_has_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let receiver = std::thread::spawn(move || {
            // Two streams, and one connection for all requests.
            for _ in 0..3 {
                take(listener.accept().unwrap().0, &mut [0; 4096]).unwrap();
            }
        });
        let mut kept = None;
        for _ in 0..2 {
            let streamed = perform(&Turn::Stream { to, ms: 5 }, &mut kept).unwrap();
            assert!(streamed.bytes > 0 && streamed.ns[0] >= 5_000_000);
            let asked = perform(&Turn::Requests { to, count: 3, warm_up: 2 }, &mut kept).unwrap();
            assert_eq!(asked.ns.len(), 3);
        }
        drop(kept);
        receiver.join().unwrap();
        let gone = perform(&Turn::Requests { to, count: 1, warm_up: 0 }, &mut None);
        assert!(gone.is_err(), "nobody listens any more: {gone:?}");
        assert!(cpu_ns(std::process::id()) > 0);
        assert_eq!(cpu_ns(0), 0);
    }
}
