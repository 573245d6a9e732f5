//! Which tracked flows of UDP and SCTP a round makes wrong: translation is decided with a flow's first packet, and a
//! client that goes on sending never gets another one. Invariant: pure; TCP is left to resets, and flows that do not
//! concern our frontends are never picked.

use super::schema::number;
use crate::dataplane::mirror::{Mirror, Mirrored, Touched};
use crate::network::netlink::conntrack::Flow;
use crate::service::{Family, FrontendKey, Proto};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The flows to look at: of which family and protocol. Empty when nothing can have become wrong.
pub(super) fn concerned(touched: &Touched, mirror: &Mirror) -> BTreeSet<(Family, Proto)> {
    let put = touched.put.iter().filter(|(key, old)| {
        let backends = |mirrored: Option<&Mirrored>| mirrored.map_or(0, |m| m.backends.len());
        let now = mirror.get(key);
        let lost =
            old.iter().flat_map(|old| &old.backends).any(|backend| !holds(now, backend.addr, backend.port));
        lost || (backends(old.as_ref()) == 0 && backends(now) != 0)
    });
    let keys = put.map(|(key, _)| key).chain(touched.deleted.keys());
    keys.filter(|key| key.proto != Proto::Tcp).map(|key| (Family::of(key.addr), key.proto)).collect()
}

/// Whether a flow must be begun anew: it leads to an endpoint that has left its frontend, or past a frontend that had no
/// endpoints when it began.
pub(super) fn is_wrong(
    flow: &Flow,
    proto: Proto,
    touched: &Touched,
    mirror: &Mirror,
    nodes: &BTreeSet<IpAddr>,
) -> bool {
    let exact = FrontendKey { addr: flow.to.ip(), port: flow.to.port(), proto };
    let any = match Family::of(exact.addr) {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let node = nodes.contains(&exact.addr).then_some(FrontendKey { addr: any, ..exact });
    let keys = || [Some(exact), node].into_iter().flatten();
    if let Some(now) = keys().find_map(|key| mirror.get(&key)) {
        return if flow.translated {
            !holds(Some(now), flow.by.ip(), flow.by.port())
        } else {
            !now.backends.is_empty()
        };
    }
    let gone = keys().find_map(|key| touched.deleted.get(&key));
    flow.translated && holds(gone, flow.by.ip(), flow.by.port())
}

/// `IPPROTO_…`.
pub(super) fn protocol(proto: Proto) -> u8 {
    number(proto)
}

fn holds(mirrored: Option<&Mirrored>, addr: IpAddr, port: u16) -> bool {
    mirrored.is_some_and(|m| m.backends.iter().any(|backend| backend.addr == addr && backend.port == port))
}
