//! The pod network of one node. Invariant: an address belongs to at most one pod; a lease is on disk before the
//! address is in the kernel and goes only after it has left the kernel.
//!
//! Pods are routed: a veth pair each, /32 and /128 addresses, a link-local gateway behind permanent neighbours; no
//! bridge, no ARP, no duplicate address detection. Traffic to services is balanced at the socket by the data plane,
//! not here.

mod act;
mod asked;
mod attachment;
mod bandwidth;
pub mod cni;
mod doom;
mod error;
mod inventory;
mod ipam;
mod leases;
pub(crate) mod nat;
pub(crate) mod netlink;
mod node;
pub mod overlay;
mod plan;
mod ports;
mod quarantine;
mod reconcile;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;

pub use bandwidth::Bandwidth;
pub use error::NetworkError;
pub use inventory::{Inventory, PoolUse, inventory};
pub use node::{NodeAddresses, node_addresses};
pub use ports::{PortMapping, PortsOf, Protocol};

use act::{NodeRows, Sides, on_own_thread};
use doom::Doom;
use leases::{Lease, Leases, Netns, check_uid};
use nat::Nat;
use netlink::Connection;
pub(crate) use netlink::{
    AddressDevice, Attributes, ConnectedUdp, Diag, Generic, InetFamily, KernelEvent, KernelEvents,
    RoutedLink, attributes, end_tracking, has_clsact_filter, has_link, pod_devices,
};
use node::Tables;
pub(crate) use plan::NODE_LINK_PREFIX;
use plan::{Conflict, Observed, POD_LINK, Step, Want, is_cni, is_node_link, node_link_name};
use ports::Ports;
use reconcile::{Decision, OurLink};

/// Settings of the pod network.
#[derive(Debug, Clone, Default)]
pub struct NetworkConfig {
    /// Leases are kept in `<state_dir>/network`.
    pub state_dir: PathBuf,
    /// Addresses of the node, at most one a family; the source of what the node sends to its pods. Empty means those
    /// that [`node_addresses`] finds, if any.
    pub node_ips: Vec<IpAddr>,
    /// Ranges that pods get their addresses from; a pod gets one of every family that has a range.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Links to the outside, whose smallest MTU the pods get. Empty means those of the default routes.
    pub uplinks: Vec<String>,
    /// What else limits the packets of pods.
    pub overlay: overlay::OverlayView,
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The pod's addresses, IPv4 first.
    pub ips: Vec<IpAddr>,
    /// Name of the node's end of the pair, `shv…`.
    pub host_link: String,
}

/// What a reconciliation found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Leftovers that were removed: links and leases, in words.
    pub removed: Vec<String>,
    /// What was missing of live pods or of the node and was put back, in words.
    pub repaired: Vec<String>,
    /// Live pods whose network is missing and can't be put back from here (uid, why): attach them again.
    pub broken: Vec<(String, String)>,
    /// What could not be removed or looked at, in words; the next reconciliation tries again.
    pub failed: Vec<String>,
}

impl Report {
    /// True where everything was as it should be.
    pub fn is_clean(&self) -> bool {
        *self == Report::default()
    }
}

/// The pod network of this node. Cheap to clone. Its work runs on blocking threads of the runtime, in the network
/// namespace of the process.
#[derive(Debug, Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: NetworkConfig,
    state: Mutex<State>,
    /// Held while one pod is being connected.
    turn: Mutex<()>,
    /// Signalled when a pod is no longer worked on.
    idle: Condvar,
    /// Which range had no address left for whom, each time.
    exhausted: Told,
    doom: Doom,
    /// Host ports and masquerading.
    nat: Nat,
    /// Host ports of the attachments.
    ports: Ports,
}

#[derive(Debug)]
struct State {
    leases: Leases,
    /// Pods that are being worked on.
    busy: BTreeSet<String>,
    /// Pods that this process connected and has not disconnected.
    connected: BTreeSet<String>,
    facts: Facts,
    /// Why pods that are there can't reach others, where that is so.
    impaired: Option<String>,
}

/// Tells whoever listens, also when nobody does.
type Told = tokio::sync::watch::Sender<String>;

/// What every pod's plan needs of the node.
#[derive(Debug, Clone, Default)]
struct Facts {
    mtu: u32,
    sources: Vec<IpAddr>,
}

impl Network {
    /// Reads the leases and switches forwarding on in the network namespace of the calling process.
    pub async fn open(config: NetworkConfig) -> Result<Self, NetworkError> {
        let inner = blocking(move || Inner::open(config)).await?;
        Ok(Network { inner: Arc::new(inner) })
    }

    /// Connects the pod in the network namespace at `netns` (such as `/proc/<pid>/ns/net`). Idempotent: a pod that
    /// is connected keeps what it has, what is missing of it is put back, and a pod in a new namespace keeps its
    /// addresses.
    pub async fn attach(&self, uid: &str, netns: &Path) -> Result<Attachment, NetworkError> {
        let (inner, uid, netns) = (Arc::clone(&self.inner), uid.to_owned(), netns.to_owned());
        blocking(move || inner.attach(&uid, &netns)).await
    }

    /// Takes the pod's link and addresses away. Idempotent; the namespace may be gone already.
    pub async fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        let (inner, uid) = (Arc::clone(&self.inner), uid.to_owned());
        blocking(move || inner.detach(&uid)).await
    }

    /// Gives a connected pod these host ports and no others; its own port of each is that of its first addresses.
    pub async fn set_ports(&self, uid: &str, mappings: &[PortMapping]) -> Result<(), NetworkError> {
        let (inner, uid, mappings) = (Arc::clone(&self.inner), uid.to_owned(), mappings.to_vec());
        blocking(move || inner.set_ports(&uid, &mappings)).await
    }

    /// Limits how fast a connected pod receives and sends, from now on.
    pub async fn set_bandwidth(&self, uid: &str, limits: &Bandwidth) -> Result<(), NetworkError> {
        let (inner, uid, limits) = (Arc::clone(&self.inner), uid.to_owned(), *limits);
        blocking(move || inner.set_bandwidth(&uid, &limits)).await
    }

    /// Removes links and leases of pods that are not in `live` and that this process has not connected itself, and
    /// puts back what is missing of those that are. Call it after a start, once it is known who lives, and then
    /// from time to time. Goes on past errors; they are in the report.
    pub async fn reconcile(&self, live: &[String]) -> Result<Report, NetworkError> {
        let (inner, live) = (Arc::clone(&self.inner), live.iter().cloned().collect());
        blocking(move || inner.reconcile(&live)).await
    }

    /// Changes each time that no address was left for what a runtime wanted to connect, to why.
    pub fn exhaustion(&self) -> tokio::sync::watch::Receiver<String> {
        self.inner.exhausted.subscribe()
    }

    /// Tells runtimes that pods which are there can't reach others, and why; `None` when they can again.
    pub fn set_impaired(&self, why: Option<String>) {
        self.inner.state().impaired = why;
    }

    /// Looks at the node again: what the overlay found out since goes into what is made from now on.
    pub(crate) async fn look_again(&self) -> Result<(), NetworkError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.prepare().map(drop)).await
    }

    /// The table that pods' translation is in.
    pub(crate) fn nat(&self) -> Nat {
        self.inner.nat.clone()
    }

    /// Gives the links of all pods the MTU that is right now, and puts back what else is missing of them.
    pub async fn follow_mtu(&self) -> Result<Report, NetworkError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let all = inner.state().leases.all().into_iter().map(|lease| lease.uid).collect();
            inner.reconcile(&all)
        })
        .await
    }

    /// The pod's addresses, if it has a lease; IPv4 first.
    pub fn addresses(&self, uid: &str) -> Option<Vec<IpAddr>> {
        self.inner.state().leases.get(uid).map(|lease| lease.ips.clone())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| NetworkError::Worker)?
}

impl Inner {
    fn open(mut config: NetworkConfig) -> Result<Self, NetworkError> {
        if !node::has_ipv6() && config.pod_cidrs.iter().any(IpNetwork::is_ipv6) {
            tracing::warn!("the kernel has no IPv6: pods get IPv4 addresses only");
            config.pod_cidrs.retain(IpNetwork::is_ipv4);
        }
        if config.pod_cidrs.is_empty() {
            return Err(NetworkError::NoRange);
        }
        let (leases, dropped) = Leases::open(&config.state_dir.join("network"))?;
        for what in dropped {
            tracing::info!(what, "dropped a lease");
        }
        let state = State {
            leases,
            busy: BTreeSet::new(),
            connected: BTreeSet::new(),
            facts: Facts::default(),
            impaired: None,
        };
        let nat = Nat::default();
        let ports = Ports::new(nat.clone());
        let (turn, idle) = (Mutex::new(()), Condvar::new());
        let (doom, exhausted) = (Doom::new(), Told::default());
        let inner = Inner { config, state: Mutex::new(state), turn, idle, exhausted, doom, nat, ports };
        for what in inner.prepare()? {
            tracing::info!(what, "set for routing pods");
        }
        Ok(inner)
    }

    /// A poisoned lock is taken over: every change of the state is a single call that leaves it whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Our links, without those that are about to go.
    fn our_links(&self) -> Result<Vec<OurLink>, NetworkError> {
        // Before looking: what goes meanwhile is still among them.
        let doomed = self.doom.pending();
        our_links(|index| doomed.contains(&index))
    }

    /// Looks at the node again and sets what routing needs; returns what was not so.
    fn prepare(&self) -> Result<Vec<String>, NetworkError> {
        let tables = Tables::read()?;
        let uplinks = tables.uplinks(&self.config.uplinks)?;
        let ips = match self.config.node_ips.as_slice() {
            [] => tables.ips(&uplinks),
            given => given.to_vec(),
        };
        for ip in &ips {
            if let Some(range) = self.config.pod_cidrs.iter().find(|range| range.contains(*ip)) {
                return Err(NetworkError::NodeInRange { ip: *ip, range: *range });
            }
        }
        let mtu = node::mtu(&uplinks);
        let mtu = self.config.overlay.pod_mtu().map_or(mtu, |limit| mtu.min(limit));
        self.state().facts = Facts { mtu, sources: tables.sources(&ips) };
        let v4 = self.config.pod_cidrs.iter().any(IpNetwork::is_ipv4);
        let v6 = self.config.pod_cidrs.iter().any(IpNetwork::is_ipv6);
        let mut changed = node::prepare(v4, v6, &uplinks)?;
        if v4 {
            changed.extend(node::answer_as_gateway(&tables)?);
        }
        Ok(changed)
    }

    /// Waits until nobody else works on the pod.
    fn begin(&self, uid: &str) -> Working<'_> {
        let mut state = self.state();
        while state.busy.contains(uid) {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.busy.insert(uid.to_owned());
        Working { inner: self, uid: uid.to_owned() }
    }

    fn attach(&self, uid: &str, path: &Path) -> Result<Attachment, NetworkError> {
        check_uid(uid)?;
        let _working = self.begin(uid);
        let gone = |source| NetworkError::Netns { uid: uid.to_owned(), path: path.to_owned(), source };
        let (netns, file) = Netns::open(path).map_err(gone)?;
        if self.state().facts.sources.len() < self.config.node_ips.len() {
            // An address of the node was not usable yet when it was last looked at.
            self.prepare()?;
        }
        let (lease, facts) = {
            let mut state = self.state();
            (state.leases.acquire(uid, &self.config.pod_cidrs, &netns)?, state.facts.clone())
        };
        self.connect(&want(&lease, facts), file, path, None)?;
        self.state().connected.insert(uid.to_owned());
        Ok(Attachment { ips: lease.ips, host_link: node_link_name(uid) })
    }

    fn set_ports(&self, uid: &str, mappings: &[PortMapping]) -> Result<(), NetworkError> {
        check_key(uid)?;
        let _working = self.begin(uid);
        let ips = self.state().leases.get(uid).map(|lease| lease.ips.clone()).unwrap_or_default();
        self.ports.set(&PortsOf { id: uid, host_link: &node_link_name(uid), ips: &ips, mappings })
    }

    fn set_bandwidth(&self, uid: &str, limits: &Bandwidth) -> Result<(), NetworkError> {
        check_uid(uid)?;
        let _working = self.begin(uid);
        let netns = self.state().leases.get(uid).and_then(|lease| lease.netns.clone());
        let Some(netns) = netns else {
            return Err(NetworkError::Gone { id: uid.to_owned(), what: "its network namespace".to_owned() });
        };
        let gone = |source| NetworkError::Netns { uid: uid.to_owned(), path: netns.path.clone(), source };
        let (_, netns) = Netns::open(&netns.path).map_err(gone)?;
        let host_link = node_link_name(uid);
        let ends = bandwidth::Ends { id: uid, host_link: &host_link, netns: &netns, ifname: POD_LINK };
        bandwidth::set(&ends, limits).map(drop)
    }

    fn detach(&self, uid: &str) -> Result<(), NetworkError> {
        check_key(uid)?;
        let _working = self.begin(uid);
        // While the link is there, so that nobody who comes by a port meets another pod with the same address.
        self.ports.clear(uid)?;
        self.clear_rules(uid);
        // Whatever happens now: what is left is a leftover.
        self.state().connected.remove(uid);
        if is_cni(uid) {
            // Nobody gets its addresses before it is long gone; and one that is left, should the agent end now, is
            // known by them.
            self.doom.enqueue(&node_link_name(uid))?;
        } else {
            self.doom.remove(&node_link_name(uid))?;
        }
        let masqueraded = {
            let mut state = self.state();
            let ranges = state.leases.masquerade();
            state.leases.release(uid)?;
            ranges != state.leases.masquerade()
        };
        if masqueraded { self.masquerade_asked() } else { Ok(()) }
    }

    fn reconcile(&self, live: &BTreeSet<String>) -> Result<Report, NetworkError> {
        let mut report = Report::default();
        report.repaired.extend(self.prepare()?.into_iter().map(|what| format!("node: set {what}")));
        if self.nat.repair()? {
            report.repaired.push("node: the nftables table sheave-net".to_owned());
        }
        let links = self.our_links()?;
        let (leases, kept) = {
            let state = self.state();
            let leases = state.leases.all().into_iter().map(|lease| lease.uid).collect();
            (leases, state.connected.union(&state.busy).cloned().collect())
        };
        let rows = NodeRows::take().map_err(|source| NetworkError::Netlink {
            op: "list routes and neighbours".to_owned(),
            source,
        })?;
        for decision in reconcile::decide(&links, &leases, live, &kept) {
            if let Err(error) = self.carry_out(&decision, &rows, &mut report) {
                report.failed.push(in_full(&error));
            }
        }
        Ok(report)
    }

    fn carry_out(
        &self,
        decision: &Decision,
        rows: &NodeRows,
        report: &mut Report,
    ) -> Result<(), NetworkError> {
        match decision {
            Decision::RemoveLink { name, owner } => {
                let _working = owner.as_ref().map(|uid| self.begin(uid));
                if owner.as_ref().is_some_and(|uid| self.state().connected.contains(uid)) {
                    return Ok(());
                }
                if self.doom.remove(name)? {
                    let owner = owner.as_deref().unwrap_or("nobody knows which");
                    report.removed.push(format!("link {name} of pod {owner}"));
                }
            }
            Decision::Release { uid } => {
                let _working = self.begin(uid);
                if !self.state().connected.contains(uid) {
                    self.ports.clear(uid)?;
                }
                let mut state = self.state();
                if !state.connected.contains(uid) && state.leases.release(uid)? {
                    report.removed.push(format!("lease of pod {uid}"));
                }
            }
            Decision::Adopt { uid, link } => {
                let _working = self.begin(uid);
                let ips = self.routed_to(link, uid)?;
                let asked = self.recover(uid)?;
                let mut state = self.state();
                let taken = ips.iter().find_map(|ip| state.leases.holder(*ip));
                if let Some(other) = taken.filter(|other| other != uid) {
                    report.broken.push((uid.clone(), format!("its address is leased to pod {other}")));
                } else if ips.is_empty() {
                    report.broken.push((uid.clone(), "it has neither a lease nor an address".to_owned()));
                } else {
                    state.leases.adopt(uid, ips, asked)?;
                    report.repaired.push(format!("pod {uid}: lease from the kernel's routes"));
                }
            }
            Decision::Missing { uid } => {
                report.broken.push((uid.clone(), "it is not connected".to_owned()));
            }
            Decision::Check { uid } => self.check(uid, rows, report)?,
        }
        Ok(())
    }

    /// Puts back what is missing of a live pod.
    fn check(&self, uid: &str, rows: &NodeRows, report: &mut Report) -> Result<(), NetworkError> {
        let _working = self.begin(uid);
        let (lease, facts) = {
            let state = self.state();
            (state.leases.get(uid).cloned(), state.facts.clone())
        };
        let Some(lease) = lease else { return Ok(()) };
        // Adopted without its namespace: the next attach tells it.
        let Some(known) = lease.netns.clone() else { return Ok(()) };
        let file = match Netns::open(&known.path) {
            Ok((now, file)) if now == known => file,
            Ok(_) => {
                let why = format!("{} is another network namespace now", known.path.display());
                report.broken.push((uid.to_owned(), why));
                return Ok(());
            }
            Err(error) => {
                report.broken.push((uid.to_owned(), format!("{}: {error}", known.path.display())));
                return Ok(());
            }
        };
        let gone = |source| NetworkError::Netns { uid: uid.to_owned(), path: known.path.clone(), source };
        let inside = file.try_clone().map_err(gone)?;
        let mut done = self.connect(&want(&lease, facts), file, &known.path, Some(rows))?;
        done.extend(bandwidth::keep(&lease, &inside)?);
        report.repaired.extend(done.into_iter().map(|step| format!("pod {uid}: {step}")));
        Ok(())
    }

    /// Leads from what is there to what is wanted; returns the steps that were needed, in words.
    fn connect(
        &self,
        want: &Want,
        netns: std::fs::File,
        path: &Path,
        rows: Option<&NodeRows>,
    ) -> Result<Vec<String>, NetworkError> {
        on_own_thread(|| {
            let mut sides = open_sides(&want.key, netns, path)?;
            let (pod, cookie) = sides.look_inside(&want.ifname, &want.ips).map_err(look_failed(&want.key))?;
            if want.cookie.is_some() && cookie.is_some() && want.cookie != cookie {
                return Err(NetworkError::OtherNetns { uid: want.key.clone(), path: path.to_owned() });
            }
            self.lead(&mut sides, want, &pod, rows)
        })
    }

    /// The rest of [`Inner::connect`], from what the pod's side has.
    fn lead(
        &self,
        sides: &mut Sides,
        want: &Want,
        pod: &Observed,
        rows: Option<&NodeRows>,
    ) -> Result<Vec<String>, NetworkError> {
        let uid = || want.key.clone();
        // One at a time: the kernel has one lock for all of this, and threads that fight for it keep the kernel's own
        // tasks, which are waited for last, from getting it.
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let node = sides.look_at_node(want, rows).map_err(look_failed(&want.key))?;
        let steps = plan::steps(want, &node, pod).map_err(|conflict| match conflict {
            Conflict::PodLink => NetworkError::PodLinkTaken { uid: uid(), ifname: want.ifname.clone() },
            Conflict::NodeLink(link) => NetworkError::NodeLinkTaken { uid: uid(), link },
        })?;
        let done = steps.iter().position(|step| step.act.waits()).unwrap_or(steps.len());
        let (made, awaited) = steps.split_at(done);
        let failed =
            |(step, source): (Step, _)| NetworkError::Step { uid: uid(), step: step.to_string(), source };
        sides.apply(made).map_err(failed)?;
        drop(turn);
        sides.apply(awaited).map_err(failed)?;
        Ok(steps.iter().map(ToString::to_string).collect())
    }

    /// Addresses that the kernel routes to the pod's `link`; for pods of ours, of the pod ranges.
    fn routed_to(&self, link: &str, uid: &str) -> Result<Vec<IpAddr>, NetworkError> {
        let tables = Tables::read()?;
        let index = tables.links.iter().find(|l| l.name == link).map(|l| l.index);
        let to = tables.routes.iter().filter(|route| route.link.is_some() && route.link == index);
        let mut ips: Vec<IpAddr> = to.filter_map(netlink::Route::to_one).collect();
        ips.retain(|ip| is_cni(uid) || self.config.pod_cidrs.iter().any(|range| range.contains(*ip)));
        ips.sort();
        Ok(ips)
    }
}

/// Enters the namespace of an attachment.
fn open_sides(uid: &str, netns: std::fs::File, path: &Path) -> Result<Sides, NetworkError> {
    let fail = |source| NetworkError::Netns { uid: uid.to_owned(), path: path.to_owned(), source };
    Sides::open(netns).map_err(fail)
}

fn look_failed(uid: &str) -> impl FnOnce(std::io::Error) -> NetworkError {
    let uid = uid.to_owned();
    move |source| NetworkError::Step { uid, step: "look at its links".to_owned(), source }
}

/// What an attachment with this lease has.
fn want(lease: &Lease, facts: Facts) -> Want {
    let asked = lease.asked.as_ref();
    Want {
        key: lease.uid.clone(),
        ifname: asked.map_or_else(|| POD_LINK.to_owned(), |asked| asked.ifname.clone()),
        mac: asked.and_then(|asked| asked.mac),
        theirs: asked.is_some(),
        table: asked.and_then(|asked| asked.table),
        cookie: asked.and_then(|asked| asked.cookie),
        ips: lease.ips.clone(),
        sources: facts.sources,
        mtu: asked.map(|asked| asked.mtu).filter(|mtu| *mtu > 0).unwrap_or(facts.mtu),
    }
}

/// Keys of runtimes' attachments were judged when they were made of their parts.
fn check_key(uid: &str) -> Result<(), NetworkError> {
    if is_cni(uid) { Ok(()) } else { check_uid(uid) }
}

/// A pod that is being worked on, by one thread at a time.
struct Working<'a> {
    inner: &'a Inner,
    uid: String,
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.inner.state().busy.remove(&self.uid);
        self.inner.idle.notify_all();
    }
}

/// Our links on the node, but for those whose index is `left_out`.
fn our_links(left_out: impl Fn(u32) -> bool) -> Result<Vec<OurLink>, NetworkError> {
    let links = Connection::open()
        .and_then(|mut connection| connection.links())
        .map_err(|source| NetworkError::Netlink { op: "list links".to_owned(), source })?;
    let ours = links.into_iter().filter(|link| is_node_link(&link.name) && !left_out(link.index));
    Ok(ours.map(|link| OurLink { name: link.name, alias: link.alias }).collect())
}

/// The addresses that are routed to pods' links, whose names begin with one of `prefixes`.
pub(crate) fn routed_links(prefixes: &[String]) -> std::io::Result<Vec<RoutedLink>> {
    netlink::routed_to(prefixes, |alias| plan::key_of(alias).filter(|key| !plan::is_cni(key)))
}

/// An error with its sources.
fn in_full(error: &NetworkError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
