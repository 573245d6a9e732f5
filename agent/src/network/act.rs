//! Carries steps out. Invariant: decides nothing, and enters a pod's namespace only on a thread that ends with the
//! visit, so that no thread of the agent ever runs in a namespace that is not its own.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use super::error::NetworkError;
use super::netlink::{Connection, LinkChange, MAIN_TABLE, Neighbour, Own, Route, VethPair};
use super::node::{read_sysctl, write_sysctl};
use super::plan::{Act, Observed, Side, Step, Want, node_link_name, sysctls};
use crate::limits;

/// Pause between two looks at what the kernel is about to do.
const LOOK_PAUSE_US: u64 = 100;

/// Routes, neighbours and own addresses of a whole namespace. Taken once for many pods: rows that have changed since
/// lead to steps that change nothing.
pub(super) struct NodeRows {
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
    own: Vec<Own>,
}

impl NodeRows {
    fn read(connection: &mut Connection) -> io::Result<Self> {
        let (routes, own) = connection.routes_and_own()?;
        Ok(NodeRows { routes, neighbours: connection.neighbours()?, own })
    }

    /// Those of the calling thread's namespace.
    pub(super) fn take() -> io::Result<Self> {
        Self::read(&mut Connection::open()?)
    }
}

/// A namespace that is looked at and changed: the calling thread's.
struct Hands {
    connection: Connection,
    side: Side,
    /// Indexes by name.
    links: HashMap<String, u32>,
}

impl Hands {
    fn open(side: Side) -> io::Result<Self> {
        Ok(Hands { connection: Connection::open()?, side, links: HashMap::new() })
    }

    fn observe(&mut self, name: &str, ips: &[IpAddr], all: Option<&NodeRows>) -> io::Result<Observed> {
        let mut seen = Observed::default();
        let link = match self.side {
            Side::Node => self.connection.link(name)?,
            Side::Pod => {
                let links = self.connection.links()?;
                seen.loopback_up = links.iter().any(|link| link.loopback && link.up);
                let own = links.iter().find(|link| link.name == name).cloned();
                let others = links.iter().any(|link| !link.loopback && link.up && link.name != name);
                // A namespace that has nothing yet, as nearly all have, needs no look at its tables.
                if others || own.is_some() {
                    self.observe_ways(own.as_ref().map(|link| link.index), &mut seen)?;
                }
                own
            }
        };
        let Some(link) = link else { return Ok(seen) };
        let index = link.index;
        if self.side == Side::Pod {
            let addresses = self.connection.addresses()?.into_iter().filter(|a| a.link == index);
            seen.addresses = addresses.map(|a| a.ip).collect();
            let neighbours = self.connection.neighbours()?.into_iter().filter(|n| n.link == index);
            seen.neighbours = neighbours.map(|n| (n.ip, n.mac)).collect();
        } else {
            let own;
            let rows = match all {
                Some(rows) => rows,
                None => {
                    own = NodeRows::read(&mut self.connection)?;
                    &own
                }
            };
            let routes = rows.routes.iter().filter(|r| r.link == Some(index));
            seen.routes = routes.map(|r| (r.to, r.via, r.src)).collect();
            let neighbours = rows.neighbours.iter().filter(|n| n.link == index);
            seen.neighbours = neighbours.map(|n| (n.ip, n.mac)).collect();
            seen.own = rows.own.iter().filter(|(link, _)| *link == index).map(|(_, ip)| *ip).collect();
        }
        let settings = sysctls(self.side, name, ips).into_iter();
        seen.sysctls = settings.filter_map(|(key, _)| Some((key.clone(), read_sysctl(&key).ok()?))).collect();
        seen.link = Some(link);
        Ok(seen)
    }

    /// Routes inside a pod's namespace, those through its link `own` and those past it.
    fn observe_ways(&mut self, own: Option<u32>, seen: &mut Observed) -> io::Result<()> {
        for (table, route) in self.connection.routes_of_all_tables()? {
            let main = table == MAIN_TABLE;
            if own.is_some() && route.link == own {
                seen.destinations.push(route.to);
                if main {
                    seen.routes.push((route.to, route.via, route.src));
                }
            } else if main && route.to.prefix() == 0 {
                seen.other_way_out = true;
            }
        }
        Ok(())
    }

    fn index(&mut self, name: &str) -> io::Result<u32> {
        if let Some(index) = self.links.get(name) {
            return Ok(*index);
        }
        let link = self.connection.link(name)?;
        let index = link.ok_or_else(|| io::Error::other(format!("link {name} is gone")))?.index;
        self.links.insert(name.to_owned(), index);
        Ok(index)
    }

    fn act(&mut self, act: &Act, peer: Option<&File>) -> io::Result<()> {
        match act {
            Act::DeleteLink { name } => {
                self.links.clear();
                self.connection.delete_link(name).map(drop)
            }
            Act::CreatePair { name, mac, peer_name, peer_mac, mtu } => {
                let peer = peer.ok_or_else(|| io::Error::other("no namespace for the other end"))?;
                self.connection.create_veth(&VethPair {
                    name,
                    mac: *mac,
                    peer_name,
                    peer_mac: *peer_mac,
                    peer_netns: peer.as_fd(),
                    mtu: *mtu,
                })
            }
            Act::Sysctl { key, value } => write_sysctl(key, value).map_err(|error| match error {
                NetworkError::Io { source, .. } => source,
                other => io::Error::other(other),
            }),
            Act::SetLink { name, alias, mtu } => {
                let index = self.index(name)?;
                let change = LinkChange { up: true, mtu: *mtu, alias: alias.as_deref() };
                self.connection.set_link(index, &change)
            }
            Act::AwaitRunning { name } => self.await_running(name),
            Act::AwaitLocal { ip } => await_true(|| self.connection.is_local(*ip)),
            Act::Address { link, ip } => {
                let index = self.index(link)?;
                self.connection.set_address(index, *ip)
            }
            Act::Own { link, ip } => {
                let index = self.index(link)?;
                self.connection.set_own(index, *ip)
            }
            Act::Neighbour { link, ip, mac } => {
                let neighbour = Neighbour { link: self.index(link)?, ip: *ip, mac: *mac };
                self.connection.set_neighbour(&neighbour)
            }
            Act::RouteIn { table, link, to, via } => {
                let index = self.index(link)?;
                let route = Route { link: Some(index), to: *to, via: Some(*via), src: None, metric: 0 };
                self.connection.set_route_in(*table, index, &route)
            }
            Act::Rule { ip, table } => self.connection.set_rule(*ip, *table),
            Act::DeleteRule { ip, table } => self.connection.delete_rule(*ip, *table),
            Act::Route { link, to, via, src } => {
                let index = self.index(link)?;
                let route = Route { link: Some(index), to: *to, via: *via, src: *src, metric: 0 };
                self.connection.set_route(index, &route)
            }
        }
    }

    fn await_running(&mut self, name: &str) -> io::Result<()> {
        // Asking makes recent kernels look at once; older ones do within milliseconds.
        await_true(|| match self.connection.link(name)? {
            Some(link) => Ok(link.running),
            None => Err(io::Error::other(format!("link {name} is gone"))),
        })
    }
}

/// Looks until it is so.
fn await_true(mut look: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_millis(limits::LINK_READY_TIMEOUT_MS);
    while !look()? {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_micros(LOOK_PAUSE_US));
    }
    Ok(())
}

/// The calling thread's namespace. Never `/proc/self/…`: that is the main thread's.
const OWN: &str = "/proc/thread-self/ns/net";

/// Runs `work`, which enters a pod's namespace, on a thread that ends with it.
pub(super) fn on_own_thread<T: Send>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    thread::scope(|scope| {
        let spawned = thread::Builder::new().name("pod-netns".to_owned()).spawn_scoped(scope, work);
        let thread = spawned.map_err(|source| NetworkError::Io {
            op: "start a thread for",
            path: "/proc/self/task".into(),
            source,
        })?;
        thread.join().unwrap_or(Err(NetworkError::Worker))
    })
}

/// Both sides of one pod, for a thread of [`on_own_thread`]. Between calls the thread is in the node's namespace.
pub(super) struct Sides {
    node: Hands,
    pod: Hands,
    netns: File,
    home: File,
}

impl Sides {
    /// Looks into the namespace `netns`.
    pub(super) fn open(netns: File) -> io::Result<Self> {
        let home = File::open(OWN)?;
        let node = Hands::open(Side::Node)?;
        let pod = visit(&netns, &home, || Hands::open(Side::Pod))?;
        Ok(Sides { node, pod, netns, home })
    }

    /// The pod's namespace.
    pub(super) fn netns(&self) -> &File {
        &self.netns
    }

    /// What the pod's side has, and the number that no other network namespace ever had, where the kernel tells it.
    pub(super) fn look_inside(
        &mut self,
        ifname: &str,
        ips: &[IpAddr],
    ) -> io::Result<(Observed, Option<u64>)> {
        let pod = &mut self.pod;
        let seen = visit(&self.netns, &self.home, || pod.observe(ifname, ips, None))?;
        Ok((seen, self.pod.connection.cookie().ok()))
    }

    /// What the node's side has. `rows`, where given, spares looking through the node's tables.
    pub(super) fn look_at_node(&mut self, want: &Want, rows: Option<&NodeRows>) -> io::Result<Observed> {
        self.node.observe(&node_link_name(&want.key), &want.ips, rows)
    }

    /// Carries out steps in their order; an error comes with the step that failed.
    pub(super) fn apply(&mut self, steps: &[Step]) -> Result<(), (Step, io::Error)> {
        for run in steps.chunk_by(|one, next| one.side == next.side) {
            let mut at = &run[0];
            let done = match at.side {
                Side::Node => run.iter().try_for_each(|step| {
                    at = step;
                    self.node.act(&step.act, Some(&self.netns))
                }),
                Side::Pod => {
                    let pod = &mut self.pod;
                    visit(&self.netns, &self.home, || {
                        run.iter().try_for_each(|step| {
                            at = step;
                            pod.act(&step.act, None)
                        })
                    })
                }
            };
            done.map_err(|error| (at.clone(), error))?;
        }
        Ok(())
    }
}

/// Runs `work` with the calling thread in the namespace `netns`. A thread that can't come back ends.
fn visit<T>(netns: &File, home: &File, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let done = work();
    if let Err(errno) = setns(home, CloneFlags::CLONE_NEWNET) {
        panic!("a thread can't leave a pod's network namespace: {errno}");
    }
    done
}
