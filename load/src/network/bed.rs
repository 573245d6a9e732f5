//! What traffic runs over. Invariant: it is all in namespaces without names, which end with the processes in them; each
//! road has hosts of its own, so that what one of them loads never costs another anything.
//!
//! ```text
//!   pod ── host a ── up0 ═══ up0 ── host b ── pod
//! ```

use super::agent::{Agent, Place};
use super::frontend::{self, Frontend};
use super::options::{NetworkOptions, Road};
use super::traffic::PORT;
use crate::LoadError;
use crate::bed::{Cpus, Ground, batch, ip, set};
use crate::spawn::{NetNs, Worker};
use crate::wire::Job;
use std::net::SocketAddr;
use std::path::Path;

const UPLINK: &str = "up0";
const NODES: [Place; 2] = [
    Place { name: "a", ip: "198.51.100.1", range: "10.244.1.0/24" },
    Place { name: "b", ip: "198.51.100.2", range: "10.244.2.0/24" },
];
/// Bytes that VXLAN takes of a packet over IPv4.
const VXLAN_BYTES: u32 = 50;

/// Two ends, and what lies between them.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) sender: Worker,
    pub(super) receiver: Worker,
    pub(super) to: SocketAddr,
    /// Dropped after the processes above, in this order.
    _frontend: Option<Worker>,
    _agents: Vec<Agent>,
    _namespaces: Vec<NetNs>,
}

/// Builds a road.
///
/// # Errors
/// When the host refuses; [`LoadError::Unavailable`] where it lacks something.
pub(super) fn build(
    ground: &Ground,
    cpus: Cpus,
    options: &NetworkOptions,
    road: Road,
) -> Result<Ends, LoadError> {
    match road {
        Road::Host | Road::Veth => plain(cpus, options.mtu, road),
        Road::Pod => by_agents(ground, cpus, options.mtu, road, "none"),
        Road::Direct => by_agents(ground, cpus, options.mtu, road, "direct"),
        Road::Vxlan | Road::Service => by_agents(ground, cpus, options.mtu, road, "vxlan"),
        Road::Flannel => by_hand(cpus, options.mtu),
    }
}

fn workers(
    road: Road,
    cpus: Cpus,
    (from, to): (&NetNs, &NetNs),
    cgroup: Option<&Path>,
) -> Result<(Worker, Worker), LoadError> {
    let name = road.name();
    let mut receiver =
        Worker::start(format!("receiving ({name})"), to, None, &Job::Receive { cpu: cpus.server })?;
    let () = receiver.listen()?;
    let sender = Worker::start(format!("sending ({name})"), from, cgroup, &Job::Send { cpu: cpus.client })?;
    Ok((sender, receiver))
}

fn at(ip: &str) -> Result<SocketAddr, LoadError> {
    let ip = ip.parse().map_err(|_| LoadError::Unavailable(format!("{ip} is no address")))?;
    Ok(SocketAddr::new(ip, PORT))
}

/// Two hosts on one link.
fn hosts(mtu: u32) -> Result<[NetNs; 2], LoadError> {
    let (a, b) = (NetNs::new()?, NetNs::new()?);
    ip(
        &a,
        &format!(
            "link set lo up\nlink add {UPLINK} mtu {mtu} type veth peer name {UPLINK} mtu {mtu} netns {}",
            b.path()
        ),
    )?;
    ip(&b, "link set lo up")?;
    for (host, [own, other]) in [(&a, [NODES[0].ip, NODES[1].ip]), (&b, [NODES[1].ip, NODES[0].ip])] {
        let lines = format!(
            "addr add {own}/24 dev {UPLINK}\nlink set {UPLINK} up\nroute add default via {other} dev {UPLINK}"
        );
        ip(host, &lines)?;
    }
    Ok([a, b])
}

fn plain(cpus: Cpus, mtu: u32, road: Road) -> Result<Ends, LoadError> {
    let [a, b] = hosts(mtu)?;
    let (sender, receiver) = workers(road, cpus, (&a, &b), None)?;
    let to = at(NODES[1].ip)?;
    Ok(Ends { sender, receiver, to, _frontend: None, _agents: Vec::new(), _namespaces: vec![a, b] })
}

fn by_agents(ground: &Ground, cpus: Cpus, mtu: u32, road: Road, overlay: &str) -> Result<Ends, LoadError> {
    let [a, b] = hosts(mtu)?;
    let (from, to) = (NetNs::new()?, NetNs::new()?);
    let first = Agent::start(ground, road.name(), &a, NODES[0], &NODES, overlay)?;
    first.attach("from", &from)?;
    let (target, agents) = if road == Road::Pod {
        (first.attach("to", &to)?, vec![first])
    } else {
        let second = Agent::start(ground, road.name(), &b, NODES[1], &NODES, overlay)?;
        (second.attach("to", &to)?, vec![first, second])
    };
    let mut service = None;
    let mut cgroup = None;
    if road == Road::Service {
        let inside = ground.cgroup("road")?;
        let job = Job::Frontend(Frontend {
            to: target,
            cgroup: inside.clone(),
            pin_dir: ground.pins().join("road-service"),
            uplink: UPLINK.to_owned(),
        });
        let mut worker = Worker::start("service", &a, None, &job)?;
        if let Some(why) = worker.listen::<Option<String>>()? {
            return Err(LoadError::Unavailable(format!("no service can be put in: {why}")));
        }
        service = Some(worker);
        cgroup = Some(inside);
    }
    let (sender, receiver) = workers(road, cpus, (&from, &to), cgroup.as_deref())?;
    let to_addr = if road == Road::Service { frontend::AT } else { target };
    let namespaces = vec![a, b, from, to];
    Ok(Ends { sender, receiver, to: to_addr, _frontend: service, _agents: agents, _namespaces: namespaces })
}

/// A bridge for the pods of each host, and VXLAN with one route, neighbour and forwarding entry for the other.
fn by_hand(cpus: Cpus, mtu: u32) -> Result<Ends, LoadError> {
    const MACS: [&str; 2] = ["02:f1:a0:00:00:01", "02:f1:a0:00:00:02"];
    let hosts = hosts(mtu)?;
    let pods = [NetNs::new()?, NetNs::new()?];
    let inner = mtu - VXLAN_BYTES;
    for (own, other) in [(0, 1), (1, 0)] {
        let (net, there) = (own + 1, other + 1);
        let (ip_own, ip_other) = (NODES[own].ip, NODES[other].ip);
        set(&hosts[own], "ipv4/ip_forward", "1")?;
        ip(
            &hosts[own],
            &format!(
                "link add flannel.1 mtu {inner} address {} type vxlan id 1 local {ip_own} dev {UPLINK} dstport 8472 nolearning\n\
                 addr add 10.244.{net}.0/32 dev flannel.1\n\
                 link set flannel.1 up\n\
                 link add cni0 mtu {inner} type bridge\n\
                 addr add 10.244.{net}.1/24 dev cni0\n\
                 link set cni0 up\n\
                 link add pod0 mtu {inner} type veth peer name eth0 mtu {inner} netns {}\n\
                 link set pod0 master cni0\n\
                 link set pod0 up\n\
                 route add 10.244.{there}.0/24 via 10.244.{there}.0 dev flannel.1 onlink\n\
                 neigh add 10.244.{there}.0 lladdr {} dev flannel.1 nud permanent",
                MACS[own],
                pods[own].path(),
                MACS[other],
            ),
        )?;
        let entry = format!("fdb add {} dev flannel.1 dst {ip_other} self permanent", MACS[other]);
        batch("bridge", &hosts[own], &entry)?;
        ip(
            &pods[own],
            &format!(
                "link set lo up\naddr add 10.244.{net}.2/24 dev eth0\nlink set eth0 up\n\
                 route add default via 10.244.{net}.1"
            ),
        )?;
    }
    let (sender, receiver) = workers(Road::Flannel, cpus, (&pods[0], &pods[1]), None)?;
    let namespaces = hosts.into_iter().chain(pods).collect();
    let to = at("10.244.2.2")?;
    Ok(Ends { sender, receiver, to, _frontend: None, _agents: Vec::new(), _namespaces: namespaces })
}
