//! The server: a thread a connection, an end that loses no request. On SIGTERM it goes on accepting for `DRAIN_MS`,
//! then stops, lets what is under way finish and exits 0.

use std::io::{self, BufReader};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{Shutdown, shutdown};

use crate::http;

/// How long requests under way may take after the server stopped accepting.
const FINISH_MAX: Duration = Duration::from_secs(10);
/// How long a connection may be silent. Also bounds how long an idle one delays the end.
const IDLE_MAX: Duration = Duration::from_secs(60);

struct Server {
    pod: String,
    ready: AtomicBool,
    stopping: AtomicBool,
    /// Requests being answered.
    busy: AtomicUsize,
}

pub(crate) fn main() -> Result<ExitCode, String> {
    let port: u16 = match std::env::var("PORT") {
        Ok(text) => text.parse().map_err(|_| format!("PORT={text} is no port"))?,
        Err(_) => 8080,
    };
    let drain: u64 = match std::env::var("DRAIN_MS") {
        Ok(text) => text.parse().map_err(|_| format!("DRAIN_MS={text} is no number of milliseconds"))?,
        Err(_) => 0,
    };
    let pod = std::env::var("POD_NAME").ok().or_else(host_name).unwrap_or_else(|| "unknown".to_owned());
    // Before any thread starts, so that all inherit it and only the wait below sees the signals.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().map_err(|error| format!("block signals: {error}"))?;
    let listener = listen(port).map_err(|error| format!("listen on port {port}: {error}"))?;
    let udp = UdpSocket::bind(listener.local_addr().map_err(|error| format!("local address: {error}"))?)
        .map_err(|error| format!("UDP port {port}: {error}"))?;
    println!("{pod} listens on port {port}");
    let state = AtomicBool::new(true);
    let server =
        Arc::new(Server { pod, ready: state, stopping: AtomicBool::new(false), busy: AtomicUsize::new(0) });
    let descriptor = listener.as_raw_fd();
    let (for_tcp, for_udp) = (server.clone(), server.clone());
    let accepting = std::thread::spawn(move || accept(&listener, &for_tcp));
    std::thread::spawn(move || echo_datagrams(&udp, &for_udp));
    signals.wait().map_err(|error| format!("wait for signals: {error}"))?;
    println!("{} was asked to stop", server.pod);
    server.ready.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(drain));
    server.stopping.store(true, Ordering::SeqCst);
    // Wakes the thread in accept(2), which then drops the listener.
    shutdown(descriptor, Shutdown::Both).map_err(|error| format!("stop listening: {error}"))?;
    accepting.join().map_err(|_| "the accepting thread panicked".to_owned())?;
    let deadline = Instant::now() + FINISH_MAX;
    while server.busy.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(ExitCode::SUCCESS)
}

/// Both families where there are two, IPv4 alone where there is no IPv6.
fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
}

fn host_name() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|name| name.trim().to_owned())
}

fn accept(listener: &TcpListener, server: &Arc<Server>) {
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                let server = server.clone();
                // A connection that cannot have a thread is dropped; the peer sees that.
                let started = std::thread::Builder::new().spawn(move || serve(&stream, peer, &server));
                if let Err(error) = started {
                    eprintln!("no thread for {peer}: {error}");
                }
            }
            Err(_) if server.stopping.load(Ordering::SeqCst) => return,
            Err(error) => {
                eprintln!("accept: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn serve(stream: &TcpStream, peer: SocketAddr, server: &Server) {
    let timeouts = stream.set_read_timeout(Some(IDLE_MAX)).and_then(|()| stream.set_nodelay(true));
    if let Err(error) = timeouts.and_then(|()| exchange(stream, peer, server)) {
        eprintln!("{peer}: {error}");
    }
}

fn exchange(stream: &TcpStream, peer: SocketAddr, server: &Server) -> io::Result<()> {
    let local = stream.local_addr()?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(request) = http::read(&mut reader)? {
        server.busy.fetch_add(1, Ordering::SeqCst);
        let close = request.close || server.stopping.load(Ordering::SeqCst);
        let (status, body, exit) = respond(&request.first, local, peer, server);
        let written = http::answer(&mut writer, status, &body, close || exit.is_some());
        server.busy.fetch_sub(1, Ordering::SeqCst);
        written?;
        if let Some(code) = exit {
            println!("{} exits with {code}, as it was told", server.pod);
            std::process::exit(code);
        }
        if close {
            break;
        }
    }
    Ok(())
}

/// Status, body, and the code to exit with after the answer.
fn respond(
    first: &str,
    local: SocketAddr,
    peer: SocketAddr,
    server: &Server,
) -> (&'static str, String, Option<i32>) {
    let target = first.split(' ').nth(1).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/" => {
            let (ip, pod) = (local.ip().to_canonical(), &server.pod);
            let remote = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            ("200 OK", format!("{{\"pod\":\"{pod}\",\"ip\":\"{ip}\",\"remote\":\"{remote}\"}}\n"), None)
        }
        "/healthz" => ("200 OK", "ok\n".to_owned(), None),
        "/readyz" if server.ready.load(Ordering::SeqCst) => ("200 OK", "ready\n".to_owned(), None),
        "/readyz" => ("503 Service Unavailable", "not ready\n".to_owned(), None),
        "/fail" => {
            let ready = !server.ready.fetch_xor(true, Ordering::SeqCst);
            ("200 OK", format!("ready: {ready}\n"), None)
        }
        "/exit" => match query.strip_prefix("code=").map_or(Ok(0), str::parse) {
            Ok(code) => ("200 OK", format!("exits with {code}\n"), Some(code)),
            Err(_) => ("400 Bad Request", "code must be a number\n".to_owned(), None),
        },
        _ => ("404 Not Found", "no such path\n".to_owned(), None),
    }
}

fn echo_datagrams(socket: &UdpSocket, server: &Server) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let result = socket.recv_from(&mut buffer).and_then(|(length, peer)| {
            let payload = String::from_utf8_lossy(&buffer[..length]);
            socket.send_to(format!("{} {payload}", server.pod).as_bytes(), peer)
        });
        // An unreachable peer is told to the next receive; neither may end the server.
        if let Err(error) = result {
            eprintln!("udp: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        let (ready, stopping) = (AtomicBool::new(true), AtomicBool::new(false));
        Server { pod: "web-1".into(), ready, stopping, busy: AtomicUsize::new(0) }
    }

    fn ask(server: &Server, first: &str) -> (&'static str, String, Option<i32>) {
        let address = |text: &str| text.parse().expect("an address");
        respond(first, address("[::ffff:10.0.0.1]:80"), address("[::ffff:10.0.0.2]:1234"), server)
    }

    #[test]
    fn answers_name_the_pod() {
        let (status, body, exit) = ask(&server(), "GET / HTTP/1.1");
        assert_eq!((status, exit), ("200 OK", None));
        assert_eq!(body, "{\"pod\":\"web-1\",\"ip\":\"10.0.0.1\",\"remote\":\"10.0.0.2:1234\"}\n");
    }

    #[test]
    fn readiness_can_be_toggled() {
        let server = server();
        assert_eq!(ask(&server, "GET /readyz HTTP/1.1").0, "200 OK");
        ask(&server, "GET /fail HTTP/1.1");
        assert_eq!(ask(&server, "GET /readyz HTTP/1.1").0, "503 Service Unavailable");
        assert_eq!(ask(&server, "GET /healthz HTTP/1.1").0, "200 OK");
        assert_eq!(ask(&server, "GET /fail HTTP/1.1").1, "ready: true\n");
    }

    #[test]
    fn it_exits_when_told_how() {
        assert_eq!(ask(&server(), "GET /exit?code=3 HTTP/1.1").2, Some(3));
        assert_eq!(ask(&server(), "GET /exit HTTP/1.1").2, Some(0));
        assert_eq!(ask(&server(), "GET /exit?code=x HTTP/1.1").0, "400 Bad Request");
        assert_eq!(ask(&server(), "nonsense").0, "404 Not Found");
    }
}
