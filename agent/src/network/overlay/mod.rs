//! The way to the pods of other nodes. Invariant: what the kernel holds for a peer is a function of the peers, the
//! settings and the node's own links; whoever removes some of it finds it back within a second.
//!
//! Each peer's range is reached by a plain route where the peer is a neighbour, else by a VXLAN device, one a family of
//! the outer packets: a route, a permanent neighbour and a forwarding entry. Nothing is learned and nothing is asked of
//! peers, so what is there goes on working without the agent. Start, change of peers, the kernel's own telling of
//! changes, and a slow timer all lead to the same pass: look, plan, act.

mod act;
mod file;
mod peers;
mod plan;
mod run;
mod settings;
mod status;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;

pub(crate) use file::follow;
pub use peers::{Peer, PeersError, PeersFile};
pub(super) use plan::is_tunnel;
pub use settings::{Mode, OverlaySettings, VNI_MAX};
pub use status::{PeerStatus, Status, read_status};

use super::error::NetworkError;
use super::nat::{Masquerade, Nat};
use super::netlink::Connection;
use super::node::has_ipv6;
use act::Hands;
use peers::Own;
use plan::{Plan, Step, Wish};

/// Passes until nothing is left to do; a second one finds what the first made possible.
const ROUNDS_MAX: usize = 3;

/// Destinations that are many hosts at once: translating their senders helps nobody.
const MULTICAST: [&str; 3] = ["224.0.0.0/4", "255.255.255.255/32", "ff00::/8"];

/// What the overlay tells whoever connects pods. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct OverlayView(Arc<AtomicU32>);

impl OverlayView {
    /// Largest packet that a pod's link is to take, bytes; `None` while nothing limits it beside the uplinks.
    pub fn pod_mtu(&self) -> Option<u32> {
        Some(self.0.load(Ordering::Relaxed)).filter(|mtu| *mtu > 0)
    }

    /// Whether it is another one now.
    fn set_mtu(&self, mtu: u32) -> bool {
        self.0.swap(mtu, Ordering::Relaxed) != mtu
    }
}

/// What an overlay is made with.
#[derive(Debug, Clone, Default)]
pub struct OverlayConfig {
    /// What the operator says.
    pub settings: OverlaySettings,
    /// Name of this node.
    pub node_name: String,
    /// Its addresses.
    pub node_ips: Vec<IpAddr>,
    /// Ranges of its pods.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Links to the outside.
    pub uplinks: Vec<String>,
    /// Where the state is told to `sheave status`, and peers are remembered until the next boot.
    pub run_dir: PathBuf,
    /// Where the MTU for pods is told.
    pub view: OverlayView,
}

/// The overlay of this node. Cheap to clone. Its work runs on blocking threads of the runtime, in the network namespace
/// of the process.
#[derive(Debug, Clone)]
pub struct Overlay {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: OverlayConfig,
    nat: Nat,
    ipv6: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    peers: Vec<Peer>,
    /// Whether `peers` are all there are.
    synced: bool,
    /// Indexes of our devices, as they were last seen.
    devices: Vec<u32>,
    status: Status,
}

/// What one pass did.
#[derive(Debug, Default, PartialEq, Eq)]
struct Done {
    /// Steps, in words.
    steps: Vec<String>,
    /// What did not work, in words; tried again soon.
    failed: Vec<String>,
    /// Whether the MTU for pods is another one than before.
    mtu_changed: bool,
}

impl Overlay {
    /// Looks at the kernel for the first time: what an earlier agent left is adopted, and the MTU for pods is known
    /// when this returns.
    pub(crate) async fn open(config: OverlayConfig, nat: Nat) -> Result<Self, NetworkError> {
        let inner = Inner { ipv6: has_ipv6(), config, nat, state: Mutex::new(State::default()) };
        let inner = Arc::new(inner);
        let first = Arc::clone(&inner);
        super::blocking(move || {
            first.state().peers = status::remembered(&first.config);
            let done = first.pass();
            for what in &done.steps {
                tracing::info!(what, "overlay");
            }
            Ok(())
        })
        .await?;
        Ok(Overlay { inner })
    }

    /// The MTU for pods, bytes.
    pub fn pod_mtu(&self) -> Option<u32> {
        self.inner.config.view.pod_mtu()
    }

    /// What is reached how.
    pub fn status(&self) -> Status {
        self.inner.state().status.clone()
    }
}

impl Inner {
    /// A poisoned lock is taken over: every change of the state is a single assignment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self) -> Wish {
        let state = self.state();
        let config = &self.config;
        Wish {
            mode: config.settings.mode,
            vni: config.settings.vni,
            port: config.settings.port,
            tx_checksum: config.settings.tx_checksum,
            own: Own {
                name: config.node_name.clone(),
                node_ips: config.node_ips.clone(),
                pod_cidrs: config.pod_cidrs.clone(),
            },
            uplinks: config.uplinks.clone(),
            peers: state.peers.clone(),
            synced: state.synced,
            ipv6: self.ipv6,
        }
    }

    /// Looks, plans and acts until there is nothing left to do. Blocks for milliseconds.
    fn pass(&self) -> Done {
        let wish = self.wish();
        let mut done = Done::default();
        let plan = match Hands::open().map_err(|error| format!("opening a netlink socket: {error}")) {
            Ok(mut hands) => self.converge(&wish, &mut hands, &mut done),
            Err(why) => {
                done.failed.push(why);
                None
            }
        };
        if let Err(error) = self.masquerade(&wish, &mut done) {
            done.failed.push(super::in_full(&error));
        }
        if let Some(plan) = plan {
            done.mtu_changed = self.config.view.set_mtu(plan.pod_mtu);
            self.drop_in(&plan, &mut done);
            self.tell(&wish, &plan, &done);
        }
        done
    }

    fn converge(&self, wish: &Wish, hands: &mut Hands, done: &mut Done) -> Option<Plan> {
        let mut last = None;
        for _ in 0..ROUNDS_MAX {
            hands.look_again();
            let kernel = match hands.observe(wish) {
                Ok(kernel) => kernel,
                Err(error) => {
                    done.failed.push(format!("looking at links and routes: {error}"));
                    return last;
                }
            };
            self.state().devices = plan::our_devices(&kernel);
            let plan = plan::plan(wish, &kernel);
            let steps = plan.steps.clone();
            last = Some(plan);
            if steps.is_empty() {
                break;
            }
            done.failed.clear();
            for step in &steps {
                match hands.apply(step) {
                    Ok(()) => done.steps.push(step.to_string()),
                    Err(error) => done.failed.push(format!("{step}: {error}{}", hint(step, &error))),
                }
            }
        }
        last
    }

    /// What leaves the pod ranges gets the node's address.
    fn masquerade(&self, wish: &Wish, done: &mut Done) -> Result<(), NetworkError> {
        let settings = &self.config.settings;
        if !wish.synced && settings.masquerade && self.nat.read(|desired| desired.masquerade.is_none())? {
            // What an earlier agent wrote knows more peers than we do.
            return Ok(());
        }
        let mut wanted = Masquerade::default();
        if settings.masquerade {
            wanted.from.clone_from(&wish.own.pod_cidrs);
            wanted.except.clone_from(&wish.own.pod_cidrs);
            wanted.except.extend(wish.peers.iter().flat_map(|peer| peer.pod_cidrs.iter().copied()));
            wanted.except.extend(settings.masquerade_exceptions.iter().copied());
            wanted.except.extend(MULTICAST.iter().filter_map(|range| range.parse::<IpNetwork>().ok()));
        }
        self.nat.change(|desired| {
            desired.masquerade = Some(wanted);
            Ok(())
        })?;
        if self.nat.repair()? {
            done.steps.push("write the nftables table anew".to_owned());
        }
        Ok(())
    }

    /// Looks whether somebody changed the nftables table; costs one request where nobody did.
    fn mend_nat(&self) {
        match self.nat.repair() {
            Ok(false) => {}
            Ok(true) => tracing::info!("the nftables table was changed by somebody else and is written anew"),
            Err(error) => tracing::warn!(error = super::in_full(&error), "looking at the nftables table"),
        }
    }

    fn drop_in(&self, plan: &Plan, done: &mut Done) {
        let Some(dir) = &self.config.settings.sysctl_dir else { return };
        let devices: Vec<&str> =
            [true, false].map(plan::device_name).into_iter().filter(|name| plan.uses(name)).collect();
        let keys = plan::sysctls(&devices, &[], self.ipv6);
        if let Err(error) = act::write_drop_in(dir, &keys) {
            done.failed.push(format!("writing the sysctl file in {}: {error}", dir.display()));
        }
    }
}

/// What an operator can do about a refused step.
fn hint(step: &Step, error: &std::io::Error) -> &'static str {
    match (step, error.raw_os_error()) {
        (Step::CreateVxlan { .. }, Some(libc::EEXIST)) => {
            "; another VXLAN device has the same identifier and port: give --vxlan-vni or --vxlan-port"
        }
        (Step::CreateVxlan { .. }, Some(libc::EADDRINUSE)) => {
            "; something else listens on that UDP port: give --vxlan-port"
        }
        (Step::CreateVxlan { .. }, Some(libc::EOPNOTSUPP)) => {
            "; the kernel has no VXLAN (modprobe vxlan): use --overlay direct"
        }
        _ => "",
    }
}

/// Takes devices, routes and settings of the overlay off the calling thread's network namespace. Goes on past errors.
pub fn remove_all() -> Vec<String> {
    let mut failures = Vec::new();
    if let Err(error) = Nat::uninstall() {
        failures.push(super::in_full(&error));
    }
    let mut connection = match Connection::open() {
        Ok(connection) => connection,
        Err(error) => return vec![format!("opening a netlink socket: {error}")],
    };
    match connection.owned_routes() {
        Ok(routes) => {
            for route in routes.iter().filter(|route| route.protocol == plan::PROTOCOL) {
                if let Err(error) = connection.delete_owned_route(route) {
                    failures.push(format!("removing the route to {}: {error}", route.to));
                }
            }
        }
        Err(error) => failures.push(format!("listing routes: {error}")),
    }
    for name in [true, false].map(plan::device_name) {
        if let Err(error) = connection.delete_link(name) {
            failures.push(format!("removing link {name}: {error}"));
        }
    }
    failures.extend(super::node::answer_no_more());
    failures
}
