//! The table's fixed part: sets, base chains and how a packet finds its way to a pick. Invariant: pure; how many rules a
//! packet meets does not depend on the number of services.

use super::super::{DataplaneConfig, NodePortAddresses};
use crate::network::netlink::nft::{
    Base, Data, Element, INET, IPV4, IPV6, OUTPUT, POSTROUTING, PREROUTING, Set, Transaction, Type, Value,
    Verdict, set_flag,
};
use crate::network::netlink::nft_expr::{Is, Refusal, Reg, Rule, ct, meta};
use crate::service::{Family, FrontendKey, Proto};
use ipnetwork::IpNetwork;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Our table.
pub(super) const TABLE: &str = "sheave";
/// The family that it is of.
pub(super) const TABLE_FAMILY: u8 = INET;
/// In which a kernel is asked whether it has all that we need; never committed.
pub(super) const PROBE_TABLE: &str = "sheave-probe";

/// Plan of frontends that have no endpoint at all: clients are told so.
pub(super) const REJECT: u32 = 0;
/// Plan of frontends that have endpoints, but not here, where policy wants them: clients hear nothing.
pub(super) const DROP: u32 = 1;
/// The first plan that has a chain.
pub(super) const FIRST_PLAN: u32 = 2;

/// Of the base chains: refusing comes after connection tracking and before translation.
const REFUSE_PRIORITY: i32 = -110;
pub(super) const TRANSLATE_PRIORITY: i32 = -100;
pub(super) const MASQUERADE_PRIORITY: i32 = 100;

/// Chain of what local programs send and of what pods send.
const IN: usize = 0;
/// Chain of what arrives from outside.
const OUT: usize = 1;

/// What differs between the families.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) family: u8,
    /// Address and port of a client's packet, and the protocol → pool and plan inside, pool and plan outside.
    pub(super) services: &'static str,
    /// Pool and place in it → endpoint.
    pub(super) endpoints: &'static str,
    /// Client and pool → the endpoint that it had last.
    pub(super) affinity: &'static str,
    /// Pool and endpoint: what a client may come back to.
    pub(super) members: &'static str,
    /// Pool and address that may come from outside.
    pub(super) ranges: &'static str,
    /// Endpoints on this node, twice: who talks to himself.
    pub(super) hairpins: &'static str,
    /// Addresses on which NodePorts are reached.
    pub(super) nodes: &'static str,
    arrive: &'static str,
    find: [&'static str; 2],
    check: &'static str,
    refuse: [&'static str; 2],
    masquerade: &'static str,
    masquerade_node: &'static str,
    /// Offsets in the network header.
    source_at: u32,
    target_at: u32,
    /// Bytes of an address.
    pub(super) bytes: u32,
    ct_to: u32,
    address: Type,
}

/// IPv4's.
pub(super) const V4: Names = Names {
    family: IPV4,
    services: "services4",
    endpoints: "endpoints4",
    affinity: "affinity4",
    members: "members4",
    ranges: "ranges4",
    hairpins: "hairpins4",
    nodes: "nodes4",
    arrive: "arrive4",
    find: ["inside4", "outside4"],
    check: "check4",
    refuse: ["refuse-inside4", "refuse-outside4"],
    masquerade: "masquerade4",
    masquerade_node: "masquerade-node4",
    source_at: 12,
    target_at: 16,
    bytes: 4,
    ct_to: ct::TO_V4,
    address: Type::Ip4,
};

/// IPv6's.
pub(super) const V6: Names = Names {
    family: IPV6,
    services: "services6",
    endpoints: "endpoints6",
    affinity: "affinity6",
    members: "members6",
    ranges: "ranges6",
    hairpins: "hairpins6",
    nodes: "nodes6",
    arrive: "arrive6",
    find: ["inside6", "outside6"],
    check: "check6",
    refuse: ["refuse-inside6", "refuse-outside6"],
    masquerade: "masquerade6",
    masquerade_node: "masquerade-node6",
    source_at: 8,
    target_at: 24,
    bytes: 16,
    ct_to: ct::TO_V6,
    address: Type::Ip6,
};

/// Plan → chain.
pub(super) const PLANS: &str = "plans";
/// Plan without a chain → what becomes of the packet.
const REFUSALS: &str = "refusals";
const REJECT_CHAIN: &str = "reject";

impl Names {
    /// The names for an address's family.
    pub(super) const fn of(addr: IpAddr) -> &'static Self {
        match Family::of(addr) {
            Family::V4 => &V4,
            Family::V6 => &V6,
        }
    }

    /// The register after an address that begins in `at`.
    pub(super) const fn after(&self, at: Reg) -> Reg {
        Reg(at.0 + (self.bytes / 4) as u8)
    }

    /// Loads the client's address.
    pub(super) fn source(&self, rule: Rule, to: Reg) -> Rule {
        rule.network(self.source_at, self.bytes, to)
    }

    /// Looks the packet's destination up: registers 0 to 3 are pool and plan inside, pool and plan outside. `node`:
    /// as a NodePort.
    pub(super) fn find(&self, node: bool) -> Rule {
        let rule = Rule::new();
        let rule = if node { self.any(rule) } else { rule.network(self.target_at, self.bytes, Reg(0)) };
        let rule = rule.meta(meta::L4PROTO, self.after(Reg(0)));
        let rule = rule.transport(2, 2, Reg(self.after(Reg(0)).0 + 1));
        rule.mapped(self.services, Reg(0), Reg(0))
    }

    /// The same with the destination that the connection was begun with.
    fn find_original(&self, node: bool) -> Rule {
        let rule = Rule::new();
        let rule = if node { self.any(rule) } else { rule.ct(self.ct_to, true, Reg(0)) };
        let rule = rule.meta(meta::L4PROTO, self.after(Reg(0)));
        let rule = rule.ct(ct::PORT_TO, true, Reg(self.after(Reg(0)).0 + 1));
        rule.mapped(self.services, Reg(0), Reg(0))
    }

    fn any(&self, rule: Rule) -> Rule {
        rule.constant(&[0; 16][..self.bytes as usize], Reg(0))
    }

    fn to_node(&self) -> Rule {
        Rule::new().network(self.target_at, self.bytes, Reg(0)).contained(self.nodes, Reg(0), true)
    }

    fn sets(&self, affinity_size: u32) -> [Set; 7] {
        let v4 = self.family == IPV4;
        let plain = |name, key, data| Set { name, key, data, flags: 0, size: 0 };
        let pair: &'static [Type] = if v4 { &[Type::Ip4, Type::Ip4] } else { &[Type::Ip6, Type::Ip6] };
        let frontend: &'static [Type] =
            if v4 { &[Type::Ip4, Type::Proto, Type::Port] } else { &[Type::Ip6, Type::Proto, Type::Port] };
        let endpoint: &'static [Type] = if v4 { &[Type::Ip4, Type::Port] } else { &[Type::Ip6, Type::Port] };
        let member: &'static [Type] =
            if v4 { &[Type::Mark, Type::Ip4, Type::Port] } else { &[Type::Mark, Type::Ip6, Type::Port] };
        let client: &'static [Type] = if v4 { &[Type::Mark, Type::Ip4] } else { &[Type::Mark, Type::Ip6] };
        let one: &'static [Type] = if v4 { &[Type::Ip4] } else { &[Type::Ip6] };
        debug_assert_eq!(one[0].bytes(), self.address.bytes());
        let marks = Data::Values(&[Type::Mark, Type::Mark, Type::Mark, Type::Mark]);
        let ranges = Set { flags: set_flag::INTERVAL, ..plain(self.ranges, client, Data::None) };
        let affinity = Set {
            flags: set_flag::TIMEOUT | set_flag::EVAL,
            size: affinity_size,
            ..plain(self.affinity, client, Data::Values(endpoint))
        };
        [
            plain(self.services, frontend, marks),
            plain(self.endpoints, &[Type::Mark, Type::Mark], Data::Values(endpoint)),
            affinity,
            plain(self.members, member, Data::None),
            ranges,
            plain(self.hairpins, pair, Data::None),
            plain(self.nodes, one, Data::None),
        ]
    }

    fn chains(&self) -> [&'static str; 8] {
        let ([inside, outside], [refuse_in, refuse_out]) = (self.find, self.refuse);
        [
            self.arrive,
            inside,
            outside,
            self.check,
            refuse_in,
            refuse_out,
            self.masquerade,
            self.masquerade_node,
        ]
    }
}

/// Writes the fixed part into a transaction. `nodes` are the addresses on which NodePorts are reached.
pub(super) fn create(tx: &mut Transaction<'_>, config: &DataplaneConfig, nodes: &BTreeSet<IpAddr>) {
    let plans = |name| Set { name, key: &[Type::Mark], data: Data::Verdict, flags: 0, size: 0 };
    let sets = V4.sets(config.sizes.affinity).into_iter().chain(V6.sets(config.sizes.affinity));
    for (id, set) in sets.chain([plans(PLANS), plans(REFUSALS)]).enumerate() {
        tx.add_set(&set, id as u32 + 1);
    }
    for chain in V4.chains().into_iter().chain(V6.chains()).chain([REJECT_CHAIN]) {
        tx.add_chain(chain, None);
    }
    let tcp = Rule::new().meta(meta::L4PROTO, Reg(0)).compare(Reg(0), Is::Equal, &[number(Proto::Tcp)]);
    tx.add_rule(REJECT_CHAIN, &tcp.refuse(Refusal::Reset));
    tx.add_rule(REJECT_CHAIN, &Rule::new().refuse(Refusal::PortUnreachable));
    for (plan, verdict) in [(REJECT, Verdict::Goto(REJECT_CHAIN)), (DROP, Verdict::Drop)] {
        let key = plan.to_ne_bytes();
        tx.add_element(REFUSALS, Element { key: &key, end: None, value: Value::Verdict(verdict) });
    }
    for names in [&V4, &V6] {
        finding(tx, names, config);
        refusing(tx, names, config);
        masquerading(tx, names, config);
    }
    base_chains(tx);
    for addr in nodes {
        add_node_element(tx, *addr);
    }
}

/// Adds an address on which NodePorts are reached.
pub(super) fn add_node_element(tx: &mut Transaction<'_>, addr: IpAddr) {
    let key = octets(addr);
    tx.add_element(Names::of(addr).nodes, Element { key: &key, end: None, value: Value::None });
}

/// Removes one.
pub(super) fn delete_node_element(tx: &mut Transaction<'_>, addr: IpAddr) {
    let key = octets(addr);
    tx.delete_element(Names::of(addr).nodes, Element { key: &key, end: None, value: Value::None });
}

fn base_chains(tx: &mut Transaction<'_>) {
    let base = |kind, hook, priority| Some(Base { kind, hook, priority });
    tx.add_chain("refuse-arriving", base("filter", PREROUTING, REFUSE_PRIORITY));
    tx.add_chain("refuse-own", base("filter", OUTPUT, REFUSE_PRIORITY));
    tx.add_chain("prerouting", base("nat", PREROUTING, TRANSLATE_PRIORITY));
    tx.add_chain("output", base("nat", OUTPUT, TRANSLATE_PRIORITY));
    tx.add_chain("postrouting", base("nat", POSTROUTING, MASQUERADE_PRIORITY));
    let of = |family: u8| Rule::new().meta(meta::NFPROTO, Reg(0)).compare(Reg(0), Is::Equal, &[family]);
    for chain in ["refuse-arriving", "refuse-own"] {
        let old = Rule::new().ct(ct::STATE, false, Reg(0)).mask(Reg(0), &ct::NEW.to_ne_bytes(), Reg(0));
        tx.add_rule(chain, &old.compare(Reg(0), Is::Equal, &[0; 4]).then(Verdict::Accept));
    }
    let ours = Rule::new().ct(ct::STATUS, false, Reg(0));
    let ours = ours.mask(Reg(0), &ct::TRANSLATED.to_ne_bytes(), Reg(0));
    tx.add_rule("postrouting", &ours.compare(Reg(0), Is::Equal, &[0; 4]).then(Verdict::Accept));
    for names in [&V4, &V6] {
        let family = || of(names.family);
        tx.add_rule("refuse-arriving", &family().then(Verdict::Goto(names.check)));
        tx.add_rule("refuse-own", &family().then(Verdict::Goto(names.refuse[IN])));
        tx.add_rule("prerouting", &family().then(Verdict::Goto(names.arrive)));
        tx.add_rule("output", &family().then(Verdict::Goto(names.find[IN])));
        for (node, chain) in [(false, names.masquerade), (true, names.masquerade_node)] {
            let rule = family();
            let rule = if node {
                rule.ct(names.ct_to, true, Reg(0)).contained(names.nodes, Reg(0), true)
            } else {
                rule
            };
            tx.add_rule("postrouting", &rule.and(&names.find_original(node)).then(Verdict::Goto(chain)));
        }
    }
}

/// Chains that find the plan of a packet and go there.
fn finding(tx: &mut Transaction<'_>, names: &Names, config: &DataplaneConfig) {
    for inside in Inside::all(names, config) {
        tx.add_rule(names.arrive, &inside.matching(names).then(Verdict::Goto(names.find[IN])));
    }
    tx.add_rule(names.arrive, &Rule::new().then(Verdict::Goto(names.find[OUT])));
    for (chain, plan) in [(names.find[IN], Reg(1)), (names.find[OUT], Reg(3))] {
        tx.add_rule(chain, &names.find(false).by_map(PLANS, plan));
        tx.add_rule(chain, &names.to_node().and(&names.find(true)).by_map(PLANS, plan));
    }
}

/// The same for plans that are none: translation can't refuse.
fn refusing(tx: &mut Transaction<'_>, names: &Names, config: &DataplaneConfig) {
    for inside in Inside::all(names, config) {
        tx.add_rule(names.check, &inside.matching(names).then(Verdict::Goto(names.refuse[IN])));
    }
    tx.add_rule(names.check, &Rule::new().then(Verdict::Goto(names.refuse[OUT])));
    for (chain, plan) in [(names.refuse[IN], Reg(1)), (names.refuse[OUT], Reg(3))] {
        tx.add_rule(chain, &names.find(false).by_map(REFUSALS, plan));
        tx.add_rule(chain, &names.to_node().and(&names.find(true)).by_map(REFUSALS, plan));
    }
}

/// Whose source is translated: everybody's on request, who talks to himself, this node's programs, and clients from
/// outside who were given an endpoint of the whole cluster (whose answers need not come by this node).
fn masquerading(tx: &mut Transaction<'_>, names: &Names, config: &DataplaneConfig) {
    let of_cluster = |node: bool, pool: Reg| {
        let rule = names.find_original(node).mask(pool, &1_u32.to_ne_bytes(), Reg(4));
        rule.compare(Reg(4), Is::Equal, &[0; 4]).masquerade()
    };
    for (node, chain) in [(false, names.masquerade), (true, names.masquerade_node)] {
        if config.masquerade_all {
            tx.add_rule(chain, &Rule::new().masquerade());
            continue;
        }
        let own = names.source(Rule::new(), Reg(0));
        let own = own.network(names.target_at, names.bytes, names.after(Reg(0)));
        tx.add_rule(chain, &own.contained(names.hairpins, Reg(0), true).masquerade());
        /// `RTN_LOCAL`
        const LOCAL: u32 = 2;
        let own = Rule::new().address_kind(true, Reg(0)).compare(Reg(0), Is::Equal, &LOCAL.to_ne_bytes());
        tx.add_rule(chain, &own.masquerade());
        let all = Inside::all(names, config);
        // NodePorts of this node are also reached by pods of other nodes, whose answers must come back by here.
        let (by_link, by_range): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|inside| !matches!(inside, Inside::Range(_)));
        for inside in &by_link {
            tx.add_rule(chain, &inside.matching(names).then(Verdict::Accept));
        }
        let elsewhere = node && !by_link.is_empty();
        for inside in &by_range {
            if elsewhere {
                tx.add_rule(chain, &inside.matching(names).and(&of_cluster(node, Reg(0))));
            }
            tx.add_rule(chain, &inside.matching(names).then(Verdict::Accept));
        }
        tx.add_rule(chain, &of_cluster(node, Reg(2)));
    }
}

/// How clients inside of the cluster are told.
#[derive(Debug, Clone)]
enum Inside {
    /// By their address.
    Range(IpNetwork),
    /// By the beginning of the name of the device that they come in by.
    Link(String),
    /// By coming in by none of these devices.
    NotBy(Vec<String>),
}

impl Inside {
    /// All ways for one family. Where nothing is known of pods, what does not come in by an uplink is theirs.
    fn all(names: &Names, config: &DataplaneConfig) -> Vec<Self> {
        let ranges = config.pod_cidrs.iter().filter(|range| range.is_ipv4() == (names.family == IPV4));
        let mut all: Vec<_> = config.pod_links.iter().cloned().map(Self::Link).collect();
        let unknown = config.pod_links.is_empty() && config.pod_cidrs.is_empty();
        if unknown && !config.uplinks.is_empty() {
            all.push(Self::NotBy(config.uplinks.clone()));
        }
        all.extend(ranges.copied().map(Self::Range));
        all
    }

    fn matching(&self, names: &Names) -> Rule {
        match self {
            Self::Range(range) => {
                let mask = octets(range.mask());
                let rule = names.source(Rule::new(), Reg(0)).mask(Reg(0), &mask, Reg(0));
                rule.compare(Reg(0), Is::Equal, &octets(range.network()))
            }
            Self::Link(prefix) => {
                Rule::new().meta(meta::IN_NAME, Reg(0)).compare(Reg(0), Is::Equal, prefix.as_bytes())
            }
            Self::NotBy(links) => links.iter().fold(Rule::new().meta(meta::IN_NAME, Reg(0)), |rule, link| {
                let mut name = [0; 16];
                for (to, from) in name[..15].iter_mut().zip(link.bytes()) {
                    *to = from;
                }
                rule.compare(Reg(0), Is::Other, &name)
            }),
        }
    }
}

/// IANA's number of a protocol.
pub(super) const fn number(proto: Proto) -> u8 {
    match proto {
        Proto::Tcp => 6,
        Proto::Udp => 17,
        Proto::Sctp => 132,
    }
}

/// The bytes of an address.
pub(super) fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

/// A port as a field of a key or value.
pub(super) fn port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

/// Key of [`Names::services`].
pub(super) fn frontend_key(key: &FrontendKey) -> Vec<u8> {
    let mut bytes = octets(key.addr);
    bytes.extend_from_slice(&[number(key.proto), 0, 0, 0]);
    bytes.extend_from_slice(&port(key.port));
    bytes
}

/// Of the node's addresses those on which NodePorts are reached. Loopback is none of them: what arrives there can't be
/// sent on to a pod without `route_localnet`, which opens the node's own services to its neighbours.
pub(super) fn node_port_addresses(config: &DataplaneConfig, all: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let usable = |addr: &&IpAddr| !addr.is_loopback();
    match &config.node_port_addresses {
        NodePortAddresses::All => all.iter().filter(usable).copied().collect(),
        NodePortAddresses::In(ranges) => {
            let wanted = |addr: &&IpAddr| ranges.iter().any(|range| range.contains(**addr));
            all.iter().filter(usable).filter(wanted).copied().collect()
        }
        NodePortAddresses::Primary => [true, false]
            .into_iter()
            .filter_map(|v4| {
                let named = config.node_ips.iter().filter(|addr| addr.is_ipv4() == v4);
                named.chain(all.iter().filter(usable).filter(|addr| addr.is_ipv4() == v4)).next().copied()
            })
            .collect(),
    }
}
