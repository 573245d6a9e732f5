//! What would become of a packet. Invariant: only live maps are read, nothing is written, and the steps are those of the
//! programs, in their order.

use super::link::LINKS;
use super::map::Map;
use super::{Maps, encode, list, versioned};
use crate::dataplane::{DataplaneError, ServiceRow};
use crate::service::{FrontendEntry, FrontendKey, FrontendKind, Proto};
use ipnetwork::IpNetwork;
use sheave_ebpf_abi::{
    Address, Affinity, AffinityKey, Config, MAGLEV_SLOTS, MemberKey, affinity_scope, config_flag,
    map as names, member_flag, node_addr_flag,
};
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Where a packet starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A socket in the node's own network namespace.
    Node,
    /// A socket in a pod of this node.
    Pod,
    /// Outside: it arrives at an uplink.
    Outside,
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// Who sends; `None` is the node itself.
    pub from: Option<IpAddr>,
    /// Where it starts; `None` follows from `from`.
    pub origin: Option<Origin>,
    /// Where it is sent to.
    pub to: SocketAddr,
    /// Protocol.
    pub proto: Proto,
    /// Ranges of this node's pods, to tell them from the outside.
    pub pod_cidrs: Vec<IpNetwork>,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No service has the destination: it goes on as it is.
    NotBalanced,
    /// It goes to one of the candidates.
    Balanced,
    /// The caller or sender is told that nobody is there.
    Refused,
    /// It is dropped without an answer.
    Dropped,
}

impl Outcome {
    /// The word for it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotBalanced => "not balanced",
            Self::Balanced => "balanced",
            Self::Refused => "refused",
            Self::Dropped => "dropped",
        }
    }
}

/// A backend that the packet may get.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Where it is.
    pub address: SocketAddr,
    /// How likely, from 0 to 1.
    pub share: f64,
    /// It is on this node.
    pub local: bool,
    /// It is ready; otherwise it serves while it terminates.
    pub ready: bool,
    /// A packet that goes there gets the node's address as its source.
    pub masqueraded: bool,
    /// The packet goes there whole, and the backend answers the sender itself, past this node.
    pub direct: bool,
}

/// One decision on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What was decided: `origin`, `hook`, `frontend`, `policy`, `source ranges`, `endpoints`, `affinity`, `pick` or
    /// `source`.
    pub of: &'static str,
    /// How, and why.
    pub said: String,
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Trace {
    /// What becomes of the packet.
    pub outcome: Outcome,
    /// The decisions that led there.
    pub steps: Vec<Step>,
    /// Backends that it may get, likeliest first.
    pub candidates: Vec<Candidate>,
    /// The frontend that it matched.
    pub frontend: Option<ServiceRow>,
}

/// Follows a packet through the maps pinned under `pin_dir`.
pub fn trace(pin_dir: &Path, question: &Question) -> Result<Trace, DataplaneError> {
    let dir = versioned(pin_dir);
    let mut tracer = Tracer {
        maps: Maps::open(&dir)?,
        affinity: Map::open(&dir, names::AFFINITY)?,
        dir,
        question,
        steps: Vec::new(),
    };
    let (outcome, row, candidates) = tracer.run()?;
    Ok(Trace { outcome, steps: tracer.steps, candidates, frontend: row })
}

type Found = (Outcome, Option<ServiceRow>, Vec<Candidate>);

struct Tracer<'a> {
    maps: Maps,
    affinity: Map<AffinityKey, Affinity>,
    dir: PathBuf,
    question: &'a Question,
    steps: Vec<Step>,
}

impl Tracer<'_> {
    fn say(&mut self, of: &'static str, said: impl Into<String>) {
        self.steps.push(Step { of, said: said.into() });
    }

    fn run(&mut self) -> Result<Found, DataplaneError> {
        let origin = self.origin()?;
        if !self.hook(origin) {
            return Ok((Outcome::NotBalanced, None, Vec::new()));
        }
        let Some((key, entry)) = self.frontend(origin)? else {
            return Ok((Outcome::NotBalanced, None, Vec::new()));
        };
        let row = self.maps.row(&key, &entry)?;
        let local = self.policy(origin, &entry);
        if !self.source_ranges(origin, &row) {
            return Ok((Outcome::Dropped, Some(row), Vec::new()));
        }
        let Some(mut candidates) = self.endpoints(origin, &entry, &row, local)? else {
            let outcome = self.nobody(origin, &entry);
            return Ok((outcome, Some(row), Vec::new()));
        };
        if entry.policy.affinity_timeout_s != 0
            && let Some(bound) = self.affinity(origin, &entry, local)?
        {
            candidates.retain(|at| at.address == bound);
            candidates.iter_mut().for_each(|at| at.share = 1.0);
        }
        self.source(origin, &entry, &mut candidates)?;
        candidates.sort_by(|a, b| b.share.total_cmp(&a.share).then(a.address.cmp(&b.address)));
        Ok((Outcome::Balanced, Some(row), candidates))
    }

    fn flags(&self, addr: IpAddr) -> Result<Option<u32>, DataplaneError> {
        self.maps.node_addrs.get(&encode::address(addr))
    }

    fn config(&self) -> Result<Option<Config>, DataplaneError> {
        self.maps.config.get(&0)
    }

    fn origin(&mut self) -> Result<Origin, DataplaneError> {
        let (origin, why) = match (self.question.origin, self.question.from) {
            (Some(origin), _) => (origin, "as told".to_owned()),
            (None, None) => (Origin::Node, "no sender is named".to_owned()),
            (None, Some(from)) if from.is_loopback() => (Origin::Node, format!("{from} is loopback")),
            (None, Some(from)) if self.flags(from)?.is_some() => {
                (Origin::Node, format!("{from} is an address of this node"))
            }
            (None, Some(from)) => match self.question.pod_cidrs.iter().find(|range| range.contains(from)) {
                Some(range) => (Origin::Pod, format!("{from} is in this node's pod range {range}")),
                None => (Origin::Outside, format!("{from} is neither this node's nor one of its pods'")),
            },
        };
        let place = match origin {
            Origin::Node => "a socket of the node",
            Origin::Pod => "a socket in a pod of this node",
            Origin::Outside => "outside, it arrives at an uplink",
        };
        self.say("origin", format!("{place} ({why})"));
        Ok(origin)
    }

    /// Says which hook decides; false when there is none.
    fn hook(&mut self, origin: Origin) -> bool {
        if self.question.proto == Proto::Sctp {
            self.say("hook", "none: the eBPF data plane does not balance SCTP");
            return false;
        }
        let family = if self.question.to.is_ipv4() { 4 } else { 6 };
        let held: Vec<String> = fs::read_dir(self.dir.join(LINKS))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let (found, said) = match origin {
            Origin::Node | Origin::Pod => {
                let connect = format!("shv_connect{family}");
                let text = match self.question.proto {
                    Proto::Udp => {
                        format!("{connect}, or shv_sendmsg{family} where the socket is not connected")
                    }
                    _ => connect.clone(),
                };
                (
                    held.contains(&connect),
                    format!("{text}: the call is translated, no packet is touched later"),
                )
            }
            Origin::Outside => {
                let at: Vec<&str> =
                    held.iter().filter(|name| is_uplink_hook(name)).map(String::as_str).collect();
                let text = format!("the uplink's programs ({})", at.join(", "));
                (!at.is_empty(), text)
            }
        };
        if found {
            self.say("hook", said);
        } else {
            self.say("hook", "none is attached there: nothing is balanced (is an agent running?)");
        }
        found
    }

    fn frontend(&mut self, origin: Origin) -> Result<Option<(FrontendKey, FrontendEntry)>, DataplaneError> {
        let Question { to, proto, .. } = *self.question;
        let key = FrontendKey { addr: to.ip(), port: to.port(), proto };
        if let Some(entry) = self.maps.frontend(&key)? {
            let kind = entry.policy.kind;
            if kind == FrontendKind::ExternalIp && origin != Origin::Outside && self.flags(to.ip())?.is_none()
            {
                self.say("frontend", format!(
                    "{to} is an external IP, but no address of this node: sockets are not translated (CVE-2020-8554)"
                ));
                return Ok(None);
            }
            if kind == FrontendKind::ClusterIp && origin == Origin::Outside {
                self.say("frontend", format!("{to} is a ClusterIP, which is not reached from outside"));
                return Ok(None);
            }
            self.say("frontend", format!("{} {to}, service id {}", kind.name(), entry.service));
            return Ok(Some((key, entry)));
        }
        self.wildcard(origin, key)
    }

    /// A NodePort or hostPort, which is reached on the node's own addresses.
    fn wildcard(
        &mut self,
        origin: Origin,
        asked: FrontendKey,
    ) -> Result<Option<(FrontendKey, FrontendEntry)>, DataplaneError> {
        let to = SocketAddr::new(asked.addr, asked.port);
        let any: IpAddr =
            if asked.addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let key = FrontendKey { addr: any, ..asked };
        let Some(entry) = self.maps.frontend(&key)? else {
            self.say(
                "frontend",
                format!("none for {to} {}, and no NodePort {}", asked.proto.name(), to.port()),
            );
            return Ok(None);
        };
        let kind = entry.policy.kind.name();
        if asked.addr.is_loopback() {
            if origin != Origin::Node {
                self.say("frontend", format!("{kind} {}, but loopback has it for the node alone", to.port()));
                return Ok(None);
            }
        } else if self.flags(asked.addr)?.is_none_or(|flags| flags & node_addr_flag::NODE_PORTS == 0) {
            self.say(
                "frontend",
                format!(
                    "{kind} {} exists, but {} is no address of this node that NodePorts are reached on",
                    to.port(),
                    asked.addr
                ),
            );
            return Ok(None);
        }
        self.say("frontend", format!("{kind} {}, service id {}", to.port(), entry.service));
        Ok(Some((key, entry)))
    }

    /// Whether only endpoints of this node may be used.
    fn policy(&mut self, origin: Origin, entry: &FrontendEntry) -> bool {
        let inside = origin != Origin::Outside;
        let cluster_ip = entry.policy.kind == FrontendKind::ClusterIp;
        let (local, said) = match (inside, entry.policy.internal_local, entry.policy.external_local) {
            (true, true, _) if cluster_ip => (true, "Local: internalTrafficPolicy of a ClusterIP"),
            (true, _, true) => {
                (false, "Cluster: externalTrafficPolicy Local does not concern what starts inside")
            }
            (false, _, true) => (true, "Local: externalTrafficPolicy"),
            _ => (false, "Cluster"),
        };
        self.say("policy", said);
        local
    }

    fn source_ranges(&mut self, origin: Origin, row: &ServiceRow) -> bool {
        if !row.has_source_ranges {
            return true;
        }
        let ranges = row.source_ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match (origin, self.question.from) {
            (Origin::Node | Origin::Pod, _) => {
                self.say("source ranges", format!("not asked: {ranges} concern what arrives from outside"));
                true
            }
            (Origin::Outside, None) => {
                self.say("source ranges", format!("the sender must be in {ranges}; name it with --from"));
                true
            }
            (Origin::Outside, Some(from)) => {
                match row.source_ranges.iter().find(|range| range.contains(from)) {
                    Some(range) => {
                        self.say("source ranges", format!("{from} is in {range}"));
                        true
                    }
                    None => {
                        self.say("source ranges", format!("{from} is in none of {ranges}: dropped"));
                        false
                    }
                }
            }
        }
    }

    /// The backends that may be picked with their shares; `None` when there are none.
    fn endpoints(
        &mut self,
        origin: Origin,
        entry: &FrontendEntry,
        row: &ServiceRow,
        local: bool,
    ) -> Result<Option<Vec<Candidate>>, DataplaneError> {
        let [local_ready, remote_ready, local_terminating, remote_terminating] = entry.counts.map(u32::from);
        let ready = local_ready + remote_ready;
        let hinted = u32::from(entry.local_only);
        let (first, len, what) = match (local, ready) {
            (true, _) if local_ready != 0 => (0, local_ready, "ready endpoints of this node"),
            (true, _) => (ready, local_terminating, "endpoints of this node that terminate (none is ready)"),
            (false, ready) if ready > hinted => (hinted, ready - hinted, "ready endpoints"),
            (false, _) => {
                (ready, local_terminating + remote_terminating, "endpoints that terminate (none is ready)")
            }
        };
        if len == 0 {
            return Ok(None);
        }
        let hints = if hinted != 0 && !local {
            format!("; {hinted} more are left to other nodes by topology hints")
        } else {
            String::new()
        };
        let base = entry.base + first;
        self.say("endpoints", format!("{len} {what}, slots {base} to {}{hints}", base + len - 1));
        let shares = self.shares(origin, entry, len, local)?;
        let mut found: BTreeMap<SocketAddr, Candidate> = BTreeMap::new();
        for (at, share) in (0..len).zip(shares) {
            let Some(slot) = self.maps.slots.get(&(base + at))? else { continue };
            let backend = self.maps.backends.get(&slot.backend)?;
            let Some(backend) = backend.as_ref().and_then(encode::from_backend) else { continue };
            let address = SocketAddr::new(backend.addr, backend.port);
            let (is_local, is_ready, _) = list::place(entry, (first + at) as usize);
            let held = found.entry(address).or_insert(Candidate {
                address,
                share: 0.0,
                local: is_local,
                ready: is_ready,
                masqueraded: false,
                direct: false,
            });
            held.share += share;
        }
        if row.inconsistent {
            self.say("endpoints", "the table is being changed: ask again");
        }
        Ok(Some(found.into_values().collect()))
    }

    /// How often each of `len` slots is picked.
    fn shares(
        &mut self,
        origin: Origin,
        entry: &FrontendEntry,
        len: u32,
        local: bool,
    ) -> Result<Vec<f64>, DataplaneError> {
        let even = || vec![1.0 / f64::from(len); len as usize];
        if entry.maglev == 0 || local || origin != Origin::Outside {
            let how = match (origin, self.question.proto) {
                (Origin::Outside, _) => "by a hash of both addresses and ports",
                (_, Proto::Udp) => "by the socket: one socket keeps its backend",
                _ => "at random",
            };
            self.say("pick", format!("evenly, {how}"));
            return Ok(even());
        }
        let Some(table) = self.maps.maglev.get(&entry.maglev)? else { return Ok(even()) };
        self.say(
            "pick",
            format!("Maglev table {}: the same on every node for one client address and port", entry.maglev),
        );
        let mut shares = vec![0.0; len as usize];
        for pick in table.picks {
            if let Some(share) = shares.get_mut(usize::from(pick)) {
                *share += 1.0 / MAGLEV_SLOTS as f64;
            }
        }
        Ok(shares)
    }

    /// What becomes of a packet when nothing may be picked.
    fn nobody(&mut self, origin: Origin, entry: &FrontendEntry) -> Outcome {
        let elsewhere = entry.run().len != 0;
        let (outcome, said) = match (origin, elsewhere) {
            (Origin::Node | Origin::Pod, _) => {
                (Outcome::Refused, "none may be used: the call fails with ECONNREFUSED")
            }
            (Origin::Outside, true) => {
                (Outcome::Dropped, "none on this node, and the policy is Local: dropped")
            }
            (Origin::Outside, false) => {
                (Outcome::Refused, "none at all: answered with a reset or an ICMP error (port unreachable)")
            }
        };
        self.say("endpoints", said);
        outcome
    }

    /// The backend that the client is bound to, if it is.
    fn affinity(
        &mut self,
        origin: Origin,
        entry: &FrontendEntry,
        local: bool,
    ) -> Result<Option<SocketAddr>, DataplaneError> {
        let timeout = entry.policy.affinity_timeout_s;
        let (client, scope, who) = match (origin, self.question.from) {
            (Origin::Node, _) => {
                let cookie = self.config()?.map_or(0, |config| config.node_netns_cookie);
                let client = Address::v6([0, 0, cookie as u32, (cookie >> 32) as u32]);
                let scope = if local { affinity_scope::NETNS_LOCAL } else { affinity_scope::NETNS };
                (client, scope, "the node's network namespace".to_owned())
            }
            (Origin::Outside, Some(from)) => {
                let scope = if local { affinity_scope::ADDRESS_LOCAL } else { affinity_scope::ADDRESS };
                (encode::address(from), scope, from.to_string())
            }
            (Origin::Pod, _) => {
                self.say("affinity", format!(
                    "ClientIP, {timeout} s: a pod is bound by its network namespace, which this command can't tell from \
                     an address; once bound it keeps its backend"
                ));
                return Ok(None);
            }
            (Origin::Outside, None) => {
                self.say("affinity", format!("ClientIP, {timeout} s: name the client with --from"));
                return Ok(None);
            }
        };
        let held = self.affinity.get(&AffinityKey { client, service: entry.service, scope })?;
        let Some(held) = held else {
            self.say("affinity", format!("ClientIP, {timeout} s: {who} is not bound yet; the pick binds it"));
            return Ok(None);
        };
        let idle = super::sys::monotonic_s().saturating_sub(held.used_s);
        let member = self.maps.members.get(&MemberKey { service: entry.service, backend: held.backend })?;
        let backend = self.maps.backends.get(&held.backend)?;
        let backend = backend.as_ref().and_then(encode::from_backend);
        let address = backend.map(|at| SocketAddr::new(at.addr, at.port));
        let name = address.map_or_else(|| format!("backend {}", held.backend), |at| at.to_string());
        let why_not = match member {
            _ if idle > timeout => Some("the binding has expired"),
            None => Some("which is not an endpoint any more"),
            Some(flags) if !eligible(entry, local, flags) => Some("which the policy does not pick now"),
            Some(_) if address.is_none() => Some("which is gone"),
            Some(_) => None,
        };
        let said = format!("ClientIP, {timeout} s: {who} was bound to {name} {idle} s ago");
        match why_not {
            Some(why) => {
                self.say("affinity", format!("{said}; {why}: a new pick"));
                Ok(None)
            }
            None => {
                self.say("affinity", said);
                Ok(address)
            }
        }
    }

    /// Says whose address the backend sees.
    fn source(
        &mut self,
        origin: Origin,
        entry: &FrontendEntry,
        candidates: &mut [Candidate],
    ) -> Result<(), DataplaneError> {
        if origin != Origin::Outside {
            self.say("source", "kept: the socket talks to the backend itself");
            return Ok(());
        }
        let everything = self.config()?.is_some_and(|config| config.flags & config_flag::MASQUERADE_ALL != 0);
        for at in candidates.iter_mut() {
            let itself = self.question.from == Some(at.address.ip());
            at.direct = entry.policy.dsr && !at.local && !everything && !itself;
            at.masqueraded = everything || itself || !at.local && !at.direct;
        }
        let masqueraded = candidates.iter().filter(|at| at.masqueraded).count();
        let said = match (everything, masqueraded, candidates.len()) {
            (true, ..) => "the node's (--masquerade-all)",
            _ if candidates.iter().any(|at| at.direct) => {
                "kept for backends on other nodes too: they get the packet whole and answer the sender themselves, past \
                 this node"
            }
            (_, 0, _) => "kept: the backend is on this node",
            (_, some, all) if some == all => {
                "the node's: the backend is on another node, or is the sender itself"
            }
            _ => "the node's for backends on other nodes, kept for those of this node",
        };
        self.say("source", said);
        Ok(())
    }
}

fn is_uplink_hook(name: &str) -> bool {
    ["tcx_", "clsact_", "xdp_"].iter().any(|kind| name.starts_with(kind))
}

/// Whether a member may be picked: a ready one or, where there are none, one that terminates.
fn eligible(entry: &FrontendEntry, local: bool, flags: u32) -> bool {
    let [local_ready, remote_ready, ..] = entry.counts.map(u32::from);
    let ready = if local {
        local_ready
    } else {
        (local_ready + remote_ready).saturating_sub(u32::from(entry.local_only))
    };
    if (flags & member_flag::READY != 0) != (ready != 0) {
        return false;
    }
    if local { flags & member_flag::LOCAL != 0 } else { ready == 0 || flags & member_flag::CLUSTER != 0 }
}
