//! Which tracked flows of UDP and SCTP a round makes wrong: translation is decided with a flow's first packet, and a
//! client that goes on sending never gets another one. Invariant: pure; TCP is left to resets, and flows that do not
//! concern our frontends are never picked.

use crate::dataplane::mirror::{Mirror, Mirrored, Touched};
use crate::network::netlink::conntrack::Flow;
use crate::service::{BackendAddr, Family, FrontendKey, Proto, ServiceId};
use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a round has done, as far as flows are concerned.
pub(super) struct Round<'a> {
    pub(super) touched: &'a Touched,
    pub(super) mirror: &'a Mirror,
    pub(super) lost: &'a BTreeSet<(ServiceId, BackendAddr)>,
    /// Addresses on which NodePorts are reached.
    pub(super) nodes: &'a BTreeSet<IpAddr>,
    /// In the first round after a start, which can't tell what was lost meanwhile: every backend there is.
    pub(super) known: Option<HashSet<BackendAddr>>,
}

impl Round<'_> {
    /// The flows to look at: of which family and protocol. Empty when nothing can have become wrong.
    pub(super) fn concerned(&self) -> BTreeSet<(Family, Proto)> {
        let backends = |mirrored: Option<&Mirrored>| mirrored.map_or(0, |m| m.backends.len());
        let woken = |key: &FrontendKey, old: Option<&Mirrored>| {
            backends(old) == 0 && backends(self.mirror.get(key)) != 0
        };
        let put = self.touched.put.iter().filter(|(key, old)| woken(key, old.as_ref()));
        let keys = put.map(|(key, _)| key).chain(self.touched.deleted.keys());
        let keys = keys.map(|key| (key.addr, key.proto));
        let lost = self.lost.iter().map(|(_, backend)| (backend.addr, backend.proto));
        keys.chain(lost)
            .filter(|(_, proto)| *proto != Proto::Tcp)
            .map(|(addr, proto)| (Family::of(addr), proto))
            .collect()
    }

    /// Whether a flow must be begun anew: it leads to an endpoint that its service has lost, goes by a frontend that is
    /// gone, or past one that had no endpoints when it began.
    pub(super) fn makes_wrong(&self, flow: &Flow, proto: Proto) -> bool {
        let exact = FrontendKey { addr: flow.to.ip(), port: flow.to.port(), proto };
        let any = match Family::of(exact.addr) {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let node = self.nodes.contains(&exact.addr).then_some(FrontendKey { addr: any, ..exact });
        let keys = || [Some(exact), node].into_iter().flatten();
        let by = BackendAddr { addr: flow.by.ip(), port: flow.by.port(), proto };
        if let Some(now) = keys().find_map(|key| self.mirror.get(&key)) {
            return if !flow.translated {
                !now.backends.is_empty()
            } else if let Some(known) = &self.known {
                !known.contains(&by)
            } else {
                self.lost.contains(&(now.entry.service, by))
            };
        }
        let gone = keys().find_map(|key| self.touched.deleted.get(&key));
        flow.translated && gone.is_some_and(|gone| gone.backends.contains(&by))
    }
}
