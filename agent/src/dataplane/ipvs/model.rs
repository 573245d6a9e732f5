//! Virtual services and how one set of them becomes another. Invariant: pure; a destination that may carry
//! connections is never deleted here, only set to weight 0, so that what is established goes on.

use crate::service::{Family, Proto};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Half of a service's flags word that no kernel uses but every kernel keeps: it says whose the service is.
const OWNER_MASK: u32 = 0xffff_0000;
/// Ours, on an address that we gave to the node.
const OWNER_ADDRESS: u32 = 0x5ea1_0000;
/// Ours, on an address that the node has anyway, or on none (a firewall mark).
const OWNER_NODE: u32 = 0x5ea2_0000;

/// Firewall marks of ours: one of these, and 24 bits that say which frontend. A mark takes packets of any protocol, so
/// that it must tell by itself whether datagrams are meant.
pub(super) const MARKS: u32 = 0x5e00_0000;
pub(super) const DATAGRAM_MARKS: u32 = 0x5c00_0000;
/// The bits that say which frontend.
pub(super) const MARK_BITS: u32 = 0x00ff_ffff;

/// Flags of services (uapi `linux/ip_vs.h`).
pub(super) mod flag {
    /// The kernel's own note that a service is in its table; neither asked for nor compared.
    pub(in super::super) const HASHED: u32 = 0x2;
    /// A client stays with its destination.
    pub(in super::super) const PERSISTENT: u32 = 0x1;
    /// Of schedulers `mh` and `sh`: ports count too.
    pub(in super::super) const HASH_PORT: u32 = 0x10;
}

/// What packets a virtual service takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ServiceKey {
    /// Those with a firewall mark. The kernel looks for these first.
    Mark { family: Family, mark: u32 },
    /// Those to an address and port.
    Addr { addr: IpAddr, port: u16, proto: Proto },
}

impl ServiceKey {
    pub(super) fn family(&self) -> Family {
        match self {
            Self::Mark { family, .. } => *family,
            Self::Addr { addr, .. } => Family::of(*addr),
        }
    }

    pub(super) fn is_mark(&self) -> bool {
        matches!(self, Self::Mark { .. })
    }
}

impl std::fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mark { mark, .. } => write!(f, "mark {mark:#x}"),
            Self::Addr { addr, port, proto } => write!(f, "{} {addr} port {port}", proto.name()),
        }
    }
}

/// Where a virtual service sends connections: address and port.
pub(super) type Destination = (IpAddr, u16);

/// What a virtual service is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// The kernel's name of its scheduler.
    pub(super) scheduler: Box<str>,
    /// [`flag`]s and owner.
    pub(super) flags: u32,
    /// How long a client stays with its destination; 0 where the service is not persistent.
    pub(super) timeout_s: u32,
}

impl Settings {
    /// The owner's part of the flags.
    pub(super) fn owner(on_given_address: bool) -> u32 {
        if on_given_address { OWNER_ADDRESS } else { OWNER_NODE }
    }

    pub(super) fn is_ours(&self) -> bool {
        [OWNER_ADDRESS, OWNER_NODE].contains(&(self.flags & OWNER_MASK))
    }

    /// Ours, on an address that we gave to the node.
    pub(super) fn is_on_given_address(&self) -> bool {
        self.flags & OWNER_MASK == OWNER_ADDRESS
    }
}

/// A virtual service with its destinations and their weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) settings: Settings,
    pub(super) destinations: BTreeMap<Destination, u32>,
}

/// One change of the kernel's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    AddService(Settings),
    EditService(Settings),
    DeleteService,
    AddDestination(Destination, u32),
    EditDestination(Destination, u32),
    DeleteDestination(Destination),
}

impl Op {
    /// Those that take something away; they come last.
    pub(super) fn is_removal(&self) -> bool {
        match self {
            Self::DeleteService | Self::DeleteDestination(_) | Self::EditDestination(_, 0) => true,
            Self::AddService(_)
            | Self::EditService(_)
            | Self::AddDestination(..)
            | Self::EditDestination(..) => false,
        }
    }
}

/// Whether connections of this service outlive its destinations' leaving. Datagrams are sent elsewhere at once.
fn drains(key: &ServiceKey) -> bool {
    match key {
        ServiceKey::Mark { mark, .. } => mark & !MARK_BITS != DATAGRAM_MARKS,
        ServiceKey::Addr { proto, .. } => *proto != Proto::Udp,
    }
}

/// What leads from what the kernel holds to what is wanted, in order. Destinations that are not wanted any more are
/// left with weight 0 where they may still carry connections.
pub(super) fn diff(key: &ServiceKey, held: Option<&Service>, wanted: Option<&Service>) -> Vec<Op> {
    let mut ops = Vec::new();
    let none = BTreeMap::new();
    let before = held.map_or(&none, |held| &held.destinations);
    let after = wanted.map_or(&none, |wanted| &wanted.destinations);
    match (held, wanted) {
        (None, None) => {}
        (Some(_), None) if before.is_empty() || !drains(key) => return vec![Op::DeleteService],
        (Some(_), None) => {}
        (None, Some(wanted)) => ops.push(Op::AddService(wanted.settings.clone())),
        (Some(held), Some(wanted)) if held.settings != wanted.settings => {
            ops.push(Op::EditService(wanted.settings.clone()));
        }
        (Some(_), Some(_)) => {}
    }
    for (destination, weight) in after {
        match before.get(destination) {
            None => ops.push(Op::AddDestination(*destination, *weight)),
            Some(held) if held != weight => ops.push(Op::EditDestination(*destination, *weight)),
            Some(_) => {}
        }
    }
    for (destination, weight) in before.iter().filter(|(destination, _)| !after.contains_key(destination)) {
        if !drains(key) {
            ops.push(Op::DeleteDestination(*destination));
        } else if *weight != 0 {
            ops.push(Op::EditDestination(*destination, 0));
        }
    }
    ops
}

/// Takes a change that was made into the record of what the kernel holds.
pub(super) fn record(held: &mut BTreeMap<ServiceKey, Service>, key: ServiceKey, op: &Op) {
    match op {
        Op::AddService(settings) => {
            held.insert(key, Service { settings: settings.clone(), destinations: BTreeMap::new() });
        }
        Op::DeleteService => drop(held.remove(&key)),
        Op::EditService(settings) => {
            if let Some(service) = held.get_mut(&key) {
                service.settings = settings.clone();
            }
        }
        Op::AddDestination(destination, weight) | Op::EditDestination(destination, weight) => {
            if let Some(service) = held.get_mut(&key) {
                service.destinations.insert(*destination, *weight);
            }
        }
        Op::DeleteDestination(destination) => {
            if let Some(service) = held.get_mut(&key) {
                service.destinations.remove(destination);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn service(scheduler: &str, destinations: &[(u8, u32)]) -> Service {
        Service {
            settings: Settings { scheduler: scheduler.into(), flags: Settings::owner(true), timeout_s: 0 },
            destinations: destinations.iter().map(|(n, weight)| (at(*n), *weight)).collect(),
        }
    }

    fn at(last: u8) -> Destination {
        ([10, 0, 0, last].into(), 80)
    }

    fn key(proto: Proto) -> ServiceKey {
        ServiceKey::Addr { addr: [10, 96, 0, 1].into(), port: 80, proto }
    }

    #[test]
    fn what_leaves_drains_under_tcp_and_goes_at_once_under_udp() {
        let (before, after) = (service("rr", &[(1, 1), (2, 1), (3, 0)]), service("rr", &[(1, 1)]));
        let tcp = diff(&key(Proto::Tcp), Some(&before), Some(&after));
        assert_eq!(tcp, [Op::EditDestination(at(2), 0)], "the third drains already");
        let udp = diff(&key(Proto::Udp), Some(&before), Some(&after));
        assert_eq!(udp, [Op::DeleteDestination(at(2)), Op::DeleteDestination(at(3))]);
    }

    #[test]
    fn marks_say_whether_datagrams_are_meant() {
        let (before, after) = (service("rr", &[(1, 1)]), service("rr", &[]));
        let by_mark = |mark| {
            let key = ServiceKey::Mark { family: Family::V4, mark };
            diff(&key, Some(&before), Some(&after))
        };
        assert_eq!(by_mark(MARKS | 7), [Op::EditDestination(at(1), 0)]);
        assert_eq!(by_mark(DATAGRAM_MARKS | 7), [Op::DeleteDestination(at(1))]);
    }

    #[test]
    fn a_service_that_is_not_wanted_stays_while_destinations_do() {
        let full = service("rr", &[(1, 1)]);
        assert_eq!(diff(&key(Proto::Tcp), Some(&full), None), [Op::EditDestination(at(1), 0)]);
        assert_eq!(diff(&key(Proto::Udp), Some(&full), None), [Op::DeleteService]);
        assert_eq!(diff(&key(Proto::Tcp), Some(&service("rr", &[])), None), [Op::DeleteService]);
    }

    #[test]
    fn settings_change_in_place() {
        let (before, after) = (service("rr", &[(1, 1)]), service("wlc", &[(1, 1)]));
        let ops = diff(&key(Proto::Tcp), Some(&before), Some(&after));
        assert_eq!(ops, [Op::EditService(after.settings)]);
    }

    fn any_service() -> impl Strategy<Value = Option<Service>> {
        let destinations = prop::collection::btree_map(0_u8..6, 0_u32..4, 0..6);
        let some = (prop::bool::ANY, destinations).prop_map(|(rr, destinations)| {
            let all: Vec<_> = destinations.into_iter().collect();
            service(if rr { "rr" } else { "sh" }, &all)
        });
        prop::option::of(some)
    }

    proptest! {
        /// Whatever was there, what is wanted is there afterwards; anything else takes no new connections.
        #[test]
        fn the_differences_lead_to_what_is_wanted(
            before in any_service(), after in any_service(), udp in prop::bool::ANY,
        ) {
            let key = key(if udp { Proto::Udp } else { Proto::Tcp });
            let mut held: BTreeMap<_, _> = before.clone().map(|service| (key, service)).into_iter().collect();
            for op in diff(&key, before.as_ref(), after.as_ref()) {
                record(&mut held, key, &op);
            }
            let found = held.remove(&key);
            if let Some(wanted) = &after {
                let found = found.as_ref().expect("it is there");
                prop_assert_eq!(&found.settings, &wanted.settings);
                for (destination, weight) in &wanted.destinations {
                    prop_assert_eq!(found.destinations.get(destination), Some(weight));
                }
            }
            let wanted = after.map(|service| service.destinations).unwrap_or_default();
            for (destination, weight) in found.map(|service| service.destinations).unwrap_or_default() {
                prop_assert!(wanted.contains_key(&destination) || (weight == 0 && !udp));
            }
        }
    }
}
