//! A data plane whose driver is killed at random moments while endpoints churn. What balances must go on as if nothing
//! had happened, and the next driver must find its way from whatever the killed one left.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::Rng as _;
use sheave_agent::dataplane::{DataplaneConfig, Driver, list};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use sheave_harness::{isolated, wait_for};

use crate::service_world::{World, ip, synced};

const SERVICES: u8 = 12;
const BACKENDS: u8 = 6;
const KILLS: usize = 12;
/// Set in the process that is killed: where its pins are, and its cgroup.
const VICTIM: &str = "SHEAVE_VICTIM";
const VICTIM_TEST: &str = "service_killed::service_victim";

/// Backends tell by their address whose they are.
fn backend(service: u8, number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 20, service, number)
}

fn frontend(service: u8) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 96, 0, service), 80))
}

fn service(number: u8) -> Event {
    Event::Service(Service {
        key: format!("default/s{number}").into(),
        cluster_ips: [frontend(number).ip()].into(),
        ports: [ServicePort { name: "".into(), port: 80, node_port: 0, proto: Proto::Tcp }].into(),
        ..Service::default()
    })
}

fn slice(number: u8, backends: &BTreeSet<u8>) -> Event {
    let endpoint = |n: &u8| Endpoint {
        addr: backend(number, *n).into(),
        on_this_node: false,
        readiness: Readiness::Ready,
        hint: Hint::None,
    };
    Event::Slice(Slice {
        key: format!("default/s{number}-slice").into(),
        service: format!("default/s{number}").into(),
        ports: [SlicePort { name: "".into(), port: 8080, proto: Proto::Tcp }].into(),
        endpoints: backends.iter().map(endpoint).collect(),
        weight: 1,
        problems: Box::default(),
    })
}

/// Some backends, at least one.
fn some() -> BTreeSet<u8> {
    let mut random = rand::rng();
    let mut found: BTreeSet<u8> = (1..=BACKENDS).filter(|_| random.random_bool(0.5)).collect();
    found.insert(random.random_range(1..=BACKENDS));
    found
}

fn all(backends: &BTreeMap<u8, BTreeSet<u8>>) -> Vec<Event> {
    backends.iter().flat_map(|(number, backends)| [service(*number), slice(*number, backends)]).collect()
}

/// The body of the process that is killed: one change after the other, for ever.
#[test]
fn service_victim() {
    let Some(place) = std::env::var_os(VICTIM) else { return };
    let (pins, cgroup) =
        (PathBuf::from(&place), std::env::var_os("SHEAVE_VICTIM_CGROUP").expect("its cgroup"));
    let config = DataplaneConfig {
        pin_dir: pins,
        cgroup_path: Some(cgroup.into()),
        node_name: "node-1".to_owned(),
        ..DataplaneConfig::default()
    };
    let mut driver = Driver::open(&config).expect("open the data plane");
    driver.handle(synced(all(&(1..=SERVICES).map(|number| (number, some())).collect())));
    driver.step().expect("the first round");
    println!("VICTIM ready");
    loop {
        let number = rand::rng().random_range(1..=SERVICES);
        driver.handle([slice(number, &some())]);
        driver.step().expect("a round");
    }
}

fn start_victim(world: &World) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("the test program's own path"));
    command.args([VICTIM_TEST, "--exact", "--nocapture", "--test-threads=1", "--quiet"]);
    command
        .env(VICTIM, &world.config.pin_dir)
        .env("SHEAVE_VICTIM_CGROUP", world.config.cgroup_path.as_ref().expect("set"));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("start the victim");
    let mut output = BufReader::new(child.stdout.take().expect("its output"));
    let mut line = String::new();
    while !line.contains("VICTIM ready") {
        line.clear();
        assert!(output.read_line(&mut line).expect("hear the victim") > 0, "the victim is gone");
    }
    child
}

/// Answers every line with the address that it was reached at.
fn serve() {
    let listener = TcpListener::bind("0.0.0.0:8080").expect("listen");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let here = stream.local_addr().map(|at| at.ip().to_string()).unwrap_or_default();
                let Ok(mut writer) = stream.try_clone() else { return };
                for _ in BufReader::new(stream).lines().map_while(Result::ok) {
                    // A client that has gone is the test's affair.
                    drop(writeln!(writer, "{here}"));
                }
            });
        }
    });
}

struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).unwrap_or_else(|e| panic!("connect to {to}: {e}"));
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        Self(BufReader::new(stream))
    }

    /// Who answers.
    fn ask(&mut self) -> Ipv4Addr {
        writeln!(self.0.get_mut(), "who").expect("send");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("receive");
        line.trim().parse().unwrap_or_else(|e| panic!("answered {line:?}: {e}"))
    }
}

fn ids(world: &World) -> BTreeMap<SocketAddr, u32> {
    let rows = list(&world.config.pin_dir).expect("list");
    rows.iter().map(|row| (SocketAddr::new(row.address, row.port), row.service_id)).collect()
}

#[test]
fn service_tables_survive_kills_of_their_driver() {
    isolated(module_path!(), "service_tables_survive_kills_of_their_driver", |cgroup| {
        ip(&["route", "add", "local", "10.20.0.0/16", "dev", "lo"]);
        serve();
        let world = World::new(cgroup, &[]);
        let mut victim = start_victim(&world);
        let first_ids = ids(&world);
        assert_eq!(first_ids.len(), usize::from(SERVICES));
        let mut held: Vec<_> = (1..=SERVICES)
            .map(|number| {
                let mut connection = Connection::open(frontend(number));
                let server = connection.ask();
                (connection, server)
            })
            .collect();
        for _ in 0..KILLS {
            std::thread::sleep(Duration::from_millis(rand::rng().random_range(0..40)));
            victim.kill().expect("kill the victim");
            victim.wait().expect("wait for the victim");
            for (connection, server) in &mut held {
                assert_eq!(connection.ask(), *server, "an established connection stays where it is");
            }
            for number in 1..=SERVICES {
                let server = Connection::open(frontend(number)).ask();
                assert_eq!(server.octets()[2], number, "{} reached {server}", frontend(number));
            }
            victim = start_victim(&world);
        }
        victim.kill().expect("kill the victim");
        victim.wait().expect("wait for the victim");
        let wanted: BTreeMap<u8, BTreeSet<u8>> = (1..=SERVICES).map(|number| (number, some())).collect();
        drop(world.driver(all(&wanted)));
        assert_eq!(ids(&world), first_ids, "ids are stable");
        wait_for("the maps to hold what is wanted", || {
            let rows = list(&world.config.pin_dir).map_err(|e| e.to_string())?;
            let found: BTreeMap<SocketAddr, BTreeSet<std::net::IpAddr>> = rows
                .iter()
                .map(|row| {
                    (SocketAddr::new(row.address, row.port), row.ready.iter().map(|at| at.0).collect())
                })
                .collect();
            let expected = wanted
                .iter()
                .map(|(number, set)| {
                    (frontend(*number), set.iter().map(|n| backend(*number, *n).into()).collect())
                })
                .collect();
            if found == expected { Ok(()) } else { Err(format!("{found:?}")) }
        });
    });
}
