//! A rolling update on IPVS: all backends of a service are replaced one after the other, as a Deployment with graceful
//! termination does it, while clients ask by TCP and UDP, shortly, kept alive and long-lived. What the mode promises is
//! held: nothing that is asked fails, what is established stays with its backend until it ends by itself, and a backend
//! that was said to go is not asked anew from that moment. The rate is what an emulated processor can bear, and every
//! step waits for what it needs; `cargo xtask soak rolling` has the full rate.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use sheave_agent::dataplane::Driver;
use sheave_agent::service::{Event, Proto};
use sheave_harness::{isolated, wait_for};

use crate::ipvs_bed::{Bed, ECHO, NODE, endpoints, plain, table, tell};
use crate::service_world::{address, at};

const VIP: &str = "10.96.0.1";
const NODE_PORT: u16 = 30_080;
/// Backends at any time; each is replaced once.
const BACKENDS: usize = 4;
/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(20);
/// Between a client's requests.
const PAUSE: Duration = Duration::from_millis(10);

fn backend(number: usize) -> String {
    format!("10.244.1.{}", 100 + number)
}

/// A server that says who it is, and whether its clients should go elsewhere.
#[derive(Default)]
struct Backend {
    drains: AtomicBool,
    /// Connections that clients have open.
    open: AtomicUsize,
    asked: AtomicU64,
}

impl Backend {
    fn start(bed: &Bed, number: usize) -> Arc<Self> {
        let addr = backend(number);
        bed.pod1.ip(&["addr", "add", &format!("{addr}/24"), "dev", "eth0"]);
        let (here, to) = (Arc::new(Self::default()), at(&addr, ECHO));
        let (listener, socket) = bed.pod1.run(|| {
            let tcp = TcpListener::bind(to).unwrap_or_else(|e| panic!("listen on {to}: {e}"));
            (tcp, UdpSocket::bind(to).unwrap_or_else(|e| panic!("bind {to}: {e}")))
        });
        let (by_tcp, by_udp) = (here.clone(), here.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let here = by_tcp.clone();
                here.open.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    here.serve(stream, to.ip());
                    here.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 8];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                // A client that has gone already counts what it missed itself.
                drop(socket.send_to(by_udp.answer(to.ip()).as_bytes(), from));
            }
        });
        here
    }

    fn serve(&self, mut stream: TcpStream, addr: IpAddr) {
        let mut byte = [0];
        while stream.read(&mut byte).is_ok_and(|read| read == 1) {
            if stream.write_all(self.answer(addr).as_bytes()).is_err() {
                return;
            }
        }
    }

    fn answer(&self, addr: IpAddr) -> String {
        self.asked.fetch_add(1, Ordering::SeqCst);
        format!("{addr} {}\n", if self.drains.load(Ordering::SeqCst) { "bye" } else { "ok" })
    }
}

/// A connection to a backend, of either protocol.
enum Talk {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

impl Talk {
    /// By TCP.
    fn connect(to: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect_timeout(&to, LIMIT).map_err(|e| format!("connect to {to}: {e}"))?;
        stream.set_read_timeout(Some(LIMIT)).map_err(|e| e.to_string())?;
        // Ended at once, so that the kernel soon forgets it.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&stream, sockopt::Linger, &linger).map_err(|e| e.to_string())?;
        Ok(Self::Tcp(BufReader::new(stream)))
    }

    /// By UDP, from a port that was not used before: IPVS takes datagrams of one port for one flow, which stays.
    fn from_port(port: u16, to: SocketAddr) -> Result<Self, String> {
        let all = || {
            let socket = UdpSocket::bind(("0.0.0.0", port))?;
            socket.set_read_timeout(Some(LIMIT))?;
            socket.connect(to)?;
            Ok(Self::Udp(socket))
        };
        all().map_err(|e: std::io::Error| format!("port {port} to {to}: {e}"))
    }

    /// Asks, and returns who answered and whether it stays.
    fn ask(&mut self) -> Result<(IpAddr, bool), String> {
        let text = match self {
            Self::Tcp(stream) => stream.get_mut().write_all(b"q").and_then(|()| {
                let mut line = String::new();
                stream.read_line(&mut line).map(|_| line)
            }),
            Self::Udp(socket) => socket.send(b"q").and_then(|_| {
                let mut buffer = [0; 64];
                let len = socket.recv(&mut buffer)?;
                Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
            }),
        };
        let text = text.map_err(|e| e.to_string())?;
        match text.trim().split_once(' ') {
            Some((server, word)) => Ok((address(server), word == "ok")),
            None => Err(format!("answered {text:?}")),
        }
    }
}

/// What the clients share.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    /// Backends that were said to go: nobody may get there who asks anew.
    leaving: Mutex<BTreeSet<IpAddr>>,
    /// Requests that were answered, a number a client.
    answered: Mutex<Vec<Arc<AtomicU64>>>,
    wrong: Mutex<Vec<String>>,
    next_port: AtomicU16,
}

impl Load {
    /// A client on a thread of the calling one's namespace; it keeps its connection while it may, or never.
    fn client(
        self: &Arc<Self>,
        name: &'static str,
        to: SocketAddr,
        proto: Proto,
        keeps: bool,
    ) -> JoinHandle<()> {
        let (load, answered) = (self.clone(), Arc::new(AtomicU64::new(0)));
        self.answered.lock().expect("no panic").push(answered.clone());
        std::thread::spawn(move || {
            let mut kept = None;
            while !load.stop.load(Ordering::SeqCst) {
                match load.once(to, proto, kept.take()) {
                    Ok((talk, stays)) => {
                        answered.fetch_add(1, Ordering::SeqCst);
                        kept = (keeps && stays).then_some(talk);
                    }
                    Err(error) => load.wrong.lock().expect("no panic").push(format!("{name}: {error}")),
                }
                std::thread::sleep(PAUSE);
            }
        })
    }

    fn once(&self, to: SocketAddr, proto: Proto, kept: Option<Talk>) -> Result<(Talk, bool), String> {
        // Taken before anything is sent.
        let leaving =
            if kept.is_none() { self.leaving.lock().expect("no panic").clone() } else { BTreeSet::new() };
        let mut talk = match (kept, proto) {
            (Some(talk), _) => talk,
            (None, Proto::Udp) => {
                Talk::from_port(10_000 + self.next_port.fetch_add(1, Ordering::SeqCst), to)?
            }
            (None, _) => Talk::connect(to)?,
        };
        let (server, stays) = talk.ask()?;
        if leaving.contains(&server) {
            return Err(format!("was sent to {server}, which had been said to go"));
        }
        Ok((talk, stays))
    }

    /// Waits until every client has had some more answers, so that nothing from before is under way.
    fn wait_answers(&self, why: &str) {
        let all = || -> Vec<u64> {
            let answered = self.answered.lock().expect("no panic");
            answered.iter().map(|count| count.load(Ordering::SeqCst)).collect()
        };
        let before = all();
        wait_for(why, || {
            let wrong = self.wrong.lock().expect("no panic");
            assert!(wrong.is_empty(), "{why}: {wrong:?}");
            let now = all();
            let gone_on = now.iter().zip(&before).all(|(now, before)| *now >= before + 3);
            if gone_on { Ok(()) } else { Err(format!("answers {now:?} after {before:?}")) }
        });
    }
}

/// The service's endpoints, by both protocols: numbers, and whether they are ready.
fn slices(all: &[(usize, bool)]) -> Vec<Event> {
    let addresses: Vec<String> = all.iter().map(|(number, _)| backend(*number)).collect();
    let list: Vec<_> =
        addresses.iter().zip(all).map(|(addr, (_, ready))| (addr.as_str(), true, *ready)).collect();
    [("web", Proto::Tcp), ("dns", Proto::Udp)].map(|(name, proto)| endpoints(name, proto, ECHO, &list)).into()
}

/// A long-lived connection to this backend, among other traffic.
fn reach(number: usize) -> Talk {
    let wanted = address(&backend(number));
    wait_for("a connection to the backend", || {
        let mut talk = Talk::connect(at(VIP, 80))?;
        let (server, _) = talk.ask()?;
        if server == wanted { Ok(talk) } else { Err(format!("got {server}")) }
    })
}

/// Replaces one backend by another, gracefully.
fn replace(bed: &Bed, driver: &mut Driver, load: &Load, backends: &[Arc<Backend>], old: usize) {
    let addr = address(&backend(old));
    // One from outside, and one from the node.
    let mut talks = [bed.client.run(|| reach(old)), reach(old)];
    let mut go_on = |why: &str| {
        for talk in &mut talks {
            assert_eq!(talk.ask().expect(why).0, addr, "{why}");
        }
    };
    let others: Vec<usize> = (old + 1..=old + BACKENDS).collect();
    let ready: Vec<_> = others.iter().map(|number| (*number, true)).collect();
    tell(driver, slices(&[&[(old, false)], ready.as_slice()].concat()));
    load.leaving.lock().expect("no panic").insert(addr);
    go_on("on a backend that is about to go");
    backends[old].drains.store(true, Ordering::SeqCst);
    load.wait_answers("clients to go elsewhere");
    wait_for("connections that are kept to go elsewhere", || {
        match backends[old].open.load(Ordering::SeqCst) {
            2 => Ok(()),
            open => Err(format!("{open} are open; wrong: {:?}", load.wrong.lock().expect("no panic"))),
        }
    });
    tell(driver, slices(&ready));
    go_on("on a backend that is gone from the API");
    drop(talks);
    bed.pod1.ip(&["addr", "del", &format!("{addr}/24"), "dev", "eth0"]);
    load.wait_answers("clients to do without it");
}

#[test]
fn ipvs_rolling_update_under_load_fails_no_request() {
    isolated(module_path!(), "ipvs_rolling_update_under_load_fails_no_request", |_| {
        let bed = Bed::new();
        let mut backends: Vec<_> = (0..BACKENDS).map(|number| Backend::start(&bed, number)).collect();
        let mut events = vec![
            Event::Service(plain("web", &[VIP], Proto::Tcp, NODE_PORT)),
            Event::Service(plain("dns", &[VIP], Proto::Udp, NODE_PORT)),
        ];
        events.extend(slices(&(0..BACKENDS).map(|number| (number, true)).collect::<Vec<_>>()));
        let mut driver = bed.driver(events);
        let load = Arc::new(Load::default());
        let (service, node_port) = (at(VIP, 80), at(NODE[0], NODE_PORT));
        let mut clients = bed.client.run(|| {
            vec![
                load.client("short", service, Proto::Tcp, false),
                load.client("short, NodePort", node_port, Proto::Tcp, false),
                load.client("kept alive", service, Proto::Tcp, true),
                load.client("datagrams", service, Proto::Udp, false),
                load.client("datagrams, NodePort, connected", node_port, Proto::Udp, true),
            ]
        });
        clients.push(load.client("short, from the node", service, Proto::Tcp, false));
        clients.push(load.client("kept alive, from the node", service, Proto::Tcp, true));
        load.wait_answers("the load to begin");
        for old in 0..BACKENDS {
            backends.push(Backend::start(&bed, old + BACKENDS));
            replace(&bed, &mut driver, &load, &backends, old);
        }
        load.stop.store(true, Ordering::SeqCst);
        clients.into_iter().for_each(|client| client.join().expect("a client"));
        let wrong = load.wrong.lock().expect("no panic");
        assert!(wrong.is_empty(), "{wrong:?}");
        for (number, backend) in backends.iter().enumerate() {
            assert!(backend.asked.load(Ordering::SeqCst) > 0, "backend {number} was never asked");
        }
        let expected: BTreeSet<_> =
            (BACKENDS..2 * BACKENDS).map(|n| format!("{}:{ECHO}", backend(n))).collect();
        wait_for("destinations without connections to go", || {
            driver.tick().expect("repair");
            let held: BTreeSet<_> =
                table().into_values().flatten().map(|(destination, _)| destination).collect();
            if held == expected { Ok(()) } else { Err(format!("{held:?}")) }
        });
        drop(driver);
        bed.uninstall();
    });
}
