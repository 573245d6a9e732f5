//! From a destination to a backend. Invariant: a backend is returned only when frontend, slot and backend named each
//! other, so a table that changes under the reader never sends anything to another service's backend.

use crate::affinity;
use crate::env::{Affinities, Table};
use crate::select::{self, Range, Scope};
use sheave_ebpf_abi::{
    Address, Backend, Config, Counter, Frontend, Frontend4Key, Frontend6Key, config_flag, frontend_flag,
    node_addr_flag,
};

/// A transport address, port in network order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address; IPv4 as IPv4-mapped.
    pub addr: Address,
    /// Port, network order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
}

/// What became of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// No service has it.
    NotService,
    /// A service has it, and nothing serves it.
    NoEndpoints,
    /// The table changed under both attempts.
    Stale,
    /// The backend, and the id of the service.
    To(Backend, u32),
}

/// Tries before a table that changes under the reader makes the call fail.
const ATTEMPTS: u32 = 2;

/// The frontend that has exactly this address.
#[inline(always)]
pub fn frontend<T: Table>(table: &T, to: &Destination) -> Option<Frontend> {
    if !table.serves_net(to.addr.net()) {
        return None;
    }
    match to.addr.as_v4() {
        Some(addr) => table.frontend4(&Frontend4Key { addr, port: to.port, proto: to.proto, pad: 0 }),
        None => {
            table.frontend6(&Frontend6Key { addr: to.addr.words, port: to.port, proto: to.proto, pad: 0 })
        }
    }
}

/// The NodePort frontend of this family, port and protocol, without asking whose address it was sent to.
#[inline(always)]
pub fn node_port_frontend<T: Table>(table: &T, to: &Destination) -> Option<Frontend> {
    match to.addr.as_v4() {
        Some(_) => table.frontend4(&Frontend4Key { addr: 0, port: to.port, proto: to.proto, pad: 0 }),
        None => table.frontend6(&Frontend6Key { addr: [0; 4], port: to.port, proto: to.proto, pad: 0 }),
    }
}

/// The backend behind slot `pick(range, entropy)`; `None` when what was read does not fit together.
#[inline(always)]
pub fn backend_of<T: Table>(table: &T, service: u32, range: Range, entropy: u32) -> Option<Backend> {
    backend_at(table, service, select::pick(range, entropy))
}

/// The backend in the slot `index`; `None` when what was read does not fit together.
#[inline(always)]
pub fn backend_at<T: Table>(table: &T, service: u32, index: u32) -> Option<Backend> {
    let slot = table.slot(index)?;
    if slot.service != service {
        return None;
    }
    let backend = table.backend(slot.backend)?;
    if backend.id != slot.backend { None } else { Some(backend) }
}

/// Who asks. Every answer costs something and is asked for only where it matters.
pub trait Caller {
    /// Whether it lives in the node's own network namespace.
    fn on_node(&self, config: &Config) -> bool;
    /// 32 evenly distributed bits, the same for all datagrams of a socket.
    fn entropy(&self, proto: u8) -> u32;
    /// Cookie of its network namespace.
    fn netns_cookie(&self) -> u64;
    /// Seconds of the kernel's monotonic clock.
    fn now_s(&self) -> u32;
}

/// Resolves what a socket on this node asked for.
#[inline(always)]
pub fn resolve<T: Table + Affinities, C: Caller>(table: &T, to: &Destination, caller: &C) -> Resolution {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let Some(found) = lookup(table, to, caller) else { return Resolution::NotService };
        let scope = scope_at_socket(&found);
        let Some(range) = select::range(&found, scope) else { return Resolution::NoEndpoints };
        let pick = || backend_of(table, found.service, range, caller.entropy(to.proto));
        let backend = if found.affinity_timeout_s == 0 {
            pick()
        } else {
            let key = affinity::netns_key(caller.netns_cookie(), found.service, scope);
            affinity::choose(table, &key, &found, scope, caller.now_s(), pick)
        };
        if let Some(backend) = backend {
            return Resolution::To(backend, found.service);
        }
        table.count(Counter::SlotRetry);
        attempt += 1;
    }
    Resolution::Stale
}

/// `internalTrafficPolicy` is about the ClusterIP; whoever asks for another kind from inside gets policy Cluster.
#[inline(always)]
fn scope_at_socket(frontend: &Frontend) -> Scope {
    const KINDS: u32 = frontend_flag::NODE_PORT
        | frontend_flag::LOAD_BALANCER
        | frontend_flag::EXTERNAL_IP
        | frontend_flag::HOST_PORT;
    if frontend.flags & (KINDS | frontend_flag::INTERNAL_LOCAL) == frontend_flag::INTERNAL_LOCAL {
        Scope::Local
    } else {
        Scope::Cluster
    }
}

/// Frontends that belong to this node's addresses only: any service may claim the world's addresses as external IPs
/// (CVE-2020-8554), and a wildcard key says nothing of the address.
const NODE_BOUND: u32 = frontend_flag::NODE_PORT | frontend_flag::EXTERNAL_IP | frontend_flag::HOST_PORT;

#[inline(always)]
fn lookup<T: Table, C: Caller>(table: &T, to: &Destination, caller: &C) -> Option<Frontend> {
    let found = match frontend(table, to) {
        Some(found) if found.flags & NODE_BOUND == 0 => return Some(found),
        Some(found) => found,
        None => wildcard(table, to)?,
    };
    if is_reached(table, &found, to, caller) { Some(found) } else { None }
}

/// The NodePort or hostPort of every address of the node.
#[inline(always)]
fn wildcard<T: Table>(table: &T, to: &Destination) -> Option<Frontend> {
    if may_be_wildcard(table, to.port) { node_port_frontend(table, to) } else { None }
}

/// Whether a frontend of every address of the node may have this port, in network order.
#[inline(always)]
pub fn may_be_wildcard<T: Table>(table: &T, port: u16) -> bool {
    let port = u16::from_be(port);
    table.config().is_some_and(|config| {
        let in_range = config.node_port_min <= port && port <= config.node_port_max;
        in_range || config.flags & config_flag::HOST_PORTS != 0
    })
}

/// Whether the caller reaches a frontend of the node by this address.
#[inline(always)]
fn is_reached<T: Table, C: Caller>(table: &T, found: &Frontend, to: &Destination, caller: &C) -> bool {
    let node_port = found.flags & frontend_flag::NODE_PORT != 0;
    // The kernel takes the unspecified address for loopback.
    if !(to.addr.is_loopback() || to.addr.is_unspecified()) {
        let wanted = if node_port { node_addr_flag::NODE_PORTS } else { node_addr_flag::OURS };
        return table.node_flags(&to.addr) & wanted != 0;
    }
    let Some(config) = table.config() else { return false };
    let has_it = if node_port {
        config.flags & config_flag::LOOPBACK_NODE_PORTS != 0
    } else {
        found.flags & frontend_flag::HOST_PORT != 0
    };
    has_it && caller.on_node(&config)
}

/// Whether a socket in the node's own network namespace may not listen at `at`, because a service has it: a NodePort,
/// or the address of a load balancer or external IP that is one of the node's.
#[inline(always)]
pub fn is_taken<T: Table>(table: &T, at: &Destination) -> bool {
    const OWNED: u32 = frontend_flag::LOAD_BALANCER | frontend_flag::EXTERNAL_IP;
    let unspecified = at.addr.is_unspecified();
    if !unspecified && frontend(table, at).is_some_and(|found| found.flags & OWNED != 0) {
        return true;
    }
    let Some(config) = table.config() else { return false };
    let port = u16::from_be(at.port);
    if port < config.node_port_min || config.node_port_max < port {
        return false;
    }
    let is_node_port = |to: &Destination| {
        node_port_frontend(table, to).is_some_and(|found| found.flags & frontend_flag::NODE_PORT != 0)
    };
    // A socket at `::` hears IPv4 too.
    let any4 = Destination { addr: Address::v4(0), ..*at };
    let hears_v4 = unspecified && at.addr.as_v4().is_none();
    let taken = is_node_port(at) || hears_v4 && is_node_port(&any4);
    if !taken {
        return false;
    }
    unspecified
        || if at.addr.is_loopback() {
            config.flags & config_flag::LOOPBACK_NODE_PORTS != 0
        } else {
            table.node_flags(&at.addr) & node_addr_flag::NODE_PORTS != 0
        }
}

/// Whether the service `id` still has what a socket once asked for.
#[inline(always)]
pub fn is_current<T: Table>(table: &T, asked: &Destination, id: u32) -> bool {
    let found = match frontend(table, asked) {
        Some(found) => Some(found),
        None => wildcard(table, asked),
    };
    found.is_some_and(|found| found.service == id)
}
