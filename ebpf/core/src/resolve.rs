//! From a destination to a backend. Invariant: a backend is returned only when frontend, slot and backend named each
//! other, so a table that changes under the reader never sends anything to another service's backend.

use crate::env::Table;
use crate::select::{self, Range, Scope};
use sheave_ebpf_abi::{Address, Backend, Counter, Frontend, Frontend4Key, Frontend6Key, frontend_flag};

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

/// Whether the port, in network order, is in the node's range of NodePorts.
#[inline(always)]
pub fn in_node_port_range<T: Table>(table: &T, port: u16) -> bool {
    let port = u16::from_be(port);
    match table.config() {
        Some(config) => config.node_port_min <= port && port <= config.node_port_max,
        None => false,
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

/// Resolves what a socket on this node asked for. `loopback_node_ports`: NodePorts on 127.0.0.0/8 and `::1` are
/// meant for the caller, which is so in the node's own network namespace only; asked only when it matters.
/// `entropy`: 32 evenly distributed bits.
#[inline(always)]
pub fn resolve<T: Table>(
    table: &T,
    to: &Destination,
    loopback_node_ports: impl Fn() -> bool,
    entropy: u32,
) -> Resolution {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let Some(found) = lookup(table, to, &loopback_node_ports) else { return Resolution::NotService };
        let local_only = found.flags & (frontend_flag::INTERNAL_LOCAL | frontend_flag::NODE_PORT)
            == frontend_flag::INTERNAL_LOCAL;
        let scope = if local_only { Scope::Local } else { Scope::Cluster };
        let Some(range) = select::range(&found, scope) else { return Resolution::NoEndpoints };
        if let Some(backend) = backend_of(table, found.service, range, entropy) {
            return Resolution::To(backend, found.service);
        }
        table.count(Counter::SlotRetry);
        attempt += 1;
    }
    Resolution::Stale
}

#[inline(always)]
fn lookup<T: Table>(
    table: &T,
    to: &Destination,
    loopback_node_ports: &impl Fn() -> bool,
) -> Option<Frontend> {
    if let Some(found) = frontend(table, to) {
        return Some(found);
    }
    if !in_node_port_range(table, to.port) {
        return None;
    }
    let found = node_port_frontend(table, to)?;
    let ours = if to.addr.is_loopback() { loopback_node_ports() } else { table.is_node_address(&to.addr) };
    if ours { Some(found) } else { None }
}
