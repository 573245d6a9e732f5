//! The table of scenarios: a service, its endpoints, who asks, and what they must see. It is the same for every mode;
//! where a mode does otherwise, the table says what it does instead, and why.

use std::net::SocketAddr;

use sheave_agent::dataplane::Mode;
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Scheduler, Service, ServiceExtras, ServicePort, Slice, SlicePort,
};

use crate::service_bed::{NODE, NODE_LAN, Pod, SERVER_PORT, Who};
use crate::service_world::{address, at};

/// What is to be seen.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    /// Every one of these answers, and nobody else does.
    Spread(Vec<Pod>),
    /// Always the same one of these answers.
    Sticky(Vec<Pod>),
    /// Refused at once.
    Refused,
    /// No answer.
    Silent,
    /// No connection, whether refused or not.
    Nothing,
}

/// By which address a server must see the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Does not matter.
    Any,
    /// One of the client's own.
    Own,
    /// Remote servers see the node.
    MasqueradedIfRemote,
}

/// Which of a service's frontends is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    Cluster,
    /// The second port of the cluster IP.
    ClusterSecond,
    /// The NodePort on the node's primary address.
    NodePort,
    /// The NodePort on another address of the node.
    NodePortLan,
    /// The NodePort on loopback.
    NodePortLoopback,
    LoadBalancer,
    External,
}

/// One question and its answer, asked with TCP and UDP over IPv4 and IPv6.
pub(crate) struct Check {
    pub(crate) who: Who,
    pub(crate) to: To,
    pub(crate) expect: Expect,
    pub(crate) seen: Seen,
    /// What a mode does instead, and why.
    pub(crate) but: Vec<(Mode, Expect, &'static str)>,
}

impl Check {
    pub(crate) fn seen(mut self, seen: Seen) -> Self {
        self.seen = seen;
        self
    }

    pub(crate) fn but(mut self, mode: Mode, expect: Expect, why: &'static str) -> Self {
        self.but.push((mode, expect, why));
        self
    }
}

pub(crate) fn check(who: Who, to: To, expect: Expect) -> Check {
    Check { who, to, expect, seen: Seen::Any, but: Vec::new() }
}

/// A state of the service, reached from the one before, and what is seen then.
pub(crate) struct Step {
    pub(crate) spec: Spec,
    pub(crate) checks: Vec<Check>,
}

/// A service that lives through some states.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<Step>,
}

/// An endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ep(pub(crate) Pod, pub(crate) Readiness, pub(crate) Hint);

pub(crate) fn ready(pods: &[Pod]) -> Vec<Ep> {
    pods.iter().map(|pod| Ep(*pod, Readiness::Ready, Hint::None)).collect()
}

fn terminating(pods: &[Pod]) -> Vec<Ep> {
    pods.iter().map(|pod| Ep(*pod, Readiness::Terminating, Hint::None)).collect()
}

fn hinted(pods: &[(Pod, Hint)]) -> Vec<Ep> {
    pods.iter().map(|(pod, hint)| Ep(*pod, Readiness::Ready, *hint)).collect()
}

/// A service in short.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spec {
    endpoints: Vec<Ep>,
    node_port: u16,
    lb: bool,
    external: bool,
    internal_local: bool,
    external_local: bool,
    affinity_timeout_s: u32,
    source_ranges: &'static [&'static str],
    scheduler: Scheduler,
    weights: &'static [(Pod, u8)],
    dsr: bool,
}

pub(crate) fn spec(endpoints: Vec<Ep>) -> Spec {
    Spec { endpoints, ..Spec::default() }
}

impl Spec {
    pub(crate) fn node_port(self, node_port: u16) -> Self {
        Self { node_port, ..self }
    }
    fn dsr(self) -> Self {
        Self { dsr: true, ..self }
    }
    fn lb(self) -> Self {
        Self { lb: true, ..self }
    }
    fn external(self) -> Self {
        Self { external: true, ..self }
    }
    fn internal_local(self) -> Self {
        Self { internal_local: true, ..self }
    }
    fn external_local(self) -> Self {
        Self { external_local: true, ..self }
    }
    fn affinity(self, affinity_timeout_s: u32) -> Self {
        Self { affinity_timeout_s, ..self }
    }
    fn source_ranges(self, source_ranges: &'static [&'static str]) -> Self {
        Self { source_ranges, ..self }
    }

    /// The frontend that is asked; `number` is the scenario's own, `v6` the family.
    pub(crate) fn target(&self, to: To, number: u8, v6: bool) -> SocketAddr {
        let family = usize::from(v6);
        match to {
            To::Cluster => at(&cluster(number)[family], 80),
            To::ClusterSecond => at(&cluster(number)[family], 81),
            To::NodePort => at(NODE[family], self.node_port),
            To::NodePortLan => at(NODE_LAN[family], self.node_port),
            To::NodePortLoopback => at(["127.0.0.1", "::1"][family], self.node_port),
            To::LoadBalancer => at(&outside(number)[family], 80),
            To::External => at(&outside(number + 100)[family], 80),
        }
    }

    /// The objects, one service a protocol.
    pub(crate) fn events(&self, number: u8, proto: Proto) -> Vec<Event> {
        let name = format!("s{number}-{}", proto.name().to_lowercase());
        let both = |texts: [String; 2]| texts.iter().map(|text| address(text)).collect();
        let none = |on: bool, texts: [String; 2]| if on { both(texts) } else { Box::default() };
        let extras = ServiceExtras {
            external_ips: none(self.external, outside(number + 100)),
            ingress_ips: none(self.lb, outside(number)),
            source_ranges: self.source_ranges.iter().map(|text| text.parse().expect("a range")).collect(),
            scheduler: self.scheduler,
            dsr: self.dsr,
            ..ServiceExtras::default()
        };
        let port = |name: &str, port, node_port| ServicePort { name: name.into(), port, node_port, proto };
        let mut events = vec![Event::Service(Service {
            key: format!("default/{name}").into(),
            cluster_ips: both(cluster(number)),
            ports: [port("first", 80, self.node_port), port("second", 81, 0)].into(),
            internal_local: self.internal_local,
            external_local: self.external_local,
            affinity_timeout_s: self.affinity_timeout_s,
            extras: (extras != ServiceExtras::default()).then(|| Box::new(extras)),
        })];
        for pod in Pod::ALL {
            for family in 0..2 {
                events.push(self.slice(&name, proto, pod, family));
            }
        }
        events
    }

    /// One slice a pod and family, so that each can have a weight; without the pod it is empty.
    fn slice(&self, name: &str, proto: Proto, pod: Pod, family: usize) -> Event {
        let port = |name: &str| SlicePort { name: name.into(), port: SERVER_PORT, proto };
        let endpoints =
            self.endpoints.iter().filter(|ep| ep.0 == pod).map(|Ep(pod, readiness, hint)| Endpoint {
                addr: address(pod.addresses()[family]),
                on_this_node: pod.is_local(),
                readiness: *readiness,
                hint: *hint,
            });
        Event::Slice(Slice {
            key: format!("default/{name}-{pod:?}-{family}").into(),
            service: format!("default/{name}").into(),
            ports: [port("first"), port("second")].into(),
            endpoints: endpoints.collect(),
            weight: self.weights.iter().find(|(at, _)| *at == pod).map_or(1, |(_, weight)| *weight),
            problems: Box::default(),
        })
    }
}

fn cluster(number: u8) -> [String; 2] {
    [format!("10.96.0.{number}"), format!("fd00:96::{number:x}")]
}

fn outside(number: u8) -> [String; 2] {
    [format!("203.0.113.{number}"), format!("2001:db8:113::{number:x}")]
}

use Pod::{L1, L2, R1, R2};
use Who::{Node, Outside, PodL1};

fn spread(pods: &[Pod]) -> Expect {
    Expect::Spread(pods.to_vec())
}

fn sticky(pods: &[Pod]) -> Expect {
    Expect::Sticky(pods.to_vec())
}

fn step(spec: Spec, checks: Vec<Check>) -> Step {
    Step { spec, checks }
}

fn scenario(name: &'static str, steps: Vec<Step>) -> Scenario {
    Scenario { name, steps }
}

/// Everything.
pub(crate) fn table() -> Vec<Scenario> {
    [
        cluster_ips(),
        node_ports(),
        outside_addresses(),
        terminating_endpoints(),
        hints(),
        affinity(),
        changes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn cluster_ips() -> Vec<Scenario> {
    let all = [L1, L2, R1, R2];
    vec![
        scenario(
            "a ClusterIP reaches every endpoint on every port",
            vec![step(
                spec(ready(&all)),
                vec![
                    check(Node, To::Cluster, spread(&all)),
                    check(PodL1, To::Cluster, spread(&all)),
                    check(PodL1, To::ClusterSecond, spread(&all)),
                ],
            )],
        ),
        scenario(
            "a pod reaches others by its own address",
            vec![step(
                spec(ready(&[L2, R1])),
                vec![check(PodL1, To::Cluster, spread(&[L2, R1])).seen(Seen::Own)],
            )],
        ),
        scenario(
            "a pod reaches itself through its service",
            vec![step(spec(ready(&[L1])), vec![check(PodL1, To::Cluster, spread(&[L1]))])],
        ),
        scenario(
            "a service without endpoints refuses",
            vec![step(
                spec(Vec::new()).node_port(30_101).lb(),
                vec![
                    check(Node, To::Cluster, Expect::Refused),
                    check(PodL1, To::Cluster, Expect::Refused),
                    check(PodL1, To::LoadBalancer, Expect::Refused),
                    check(Node, To::NodePort, Expect::Refused),
                    check(Outside, To::NodePort, Expect::Refused),
                    check(Outside, To::LoadBalancer, Expect::Refused),
                ],
            )],
        ),
        scenario(
            "internalTrafficPolicy Local stays on the node",
            vec![
                step(
                    spec(ready(&all)).internal_local().node_port(30_102),
                    vec![
                        check(Node, To::Cluster, spread(&[L1, L2])),
                        check(PodL1, To::Cluster, spread(&[L1, L2])),
                        check(Node, To::NodePort, spread(&all)),
                        check(Outside, To::NodePort, spread(&all)),
                    ],
                ),
                step(
                    spec(ready(&[R1, R2])).internal_local().node_port(30_102),
                    vec![
                        check(Node, To::Cluster, Expect::Nothing),
                        check(PodL1, To::Cluster, Expect::Nothing),
                        check(Node, To::NodePort, spread(&[R1, R2])),
                    ],
                ),
            ],
        ),
    ]
}

fn node_ports() -> Vec<Scenario> {
    let all = [L1, L2, R1, R2];
    vec![
        scenario(
            "a NodePort is reached on every address of the node",
            vec![step(
                spec(ready(&all)).node_port(30_111),
                vec![
                    check(Outside, To::NodePort, spread(&all)).seen(Seen::MasqueradedIfRemote),
                    check(Node, To::NodePort, spread(&all)),
                    check(Node, To::NodePortLan, spread(&all)),
                    check(PodL1, To::NodePort, spread(&all)),
                    check(PodL1, To::NodePortLan, spread(&all)),
                    check(Node, To::NodePortLoopback, spread(&all))
                        .but(Mode::Nftables, Expect::Nothing, LOOPBACK)
                        .but(Mode::Ipvs, Expect::Nothing, LOOPBACK),
                ],
            )],
        ),
        scenario(
            "direct return concerns endpoints of other nodes and clients outside only",
            vec![
                step(
                    spec(ready(&[L1, L2])).node_port(30_113).lb().dsr(),
                    vec![
                        check(Outside, To::NodePort, spread(&[L1, L2])).seen(Seen::MasqueradedIfRemote),
                        check(Outside, To::LoadBalancer, spread(&[L1, L2])).seen(Seen::MasqueradedIfRemote),
                        check(PodL1, To::NodePort, spread(&[L1, L2])),
                    ],
                ),
                step(
                    spec(ready(&[R1, R2])).node_port(30_113).lb().dsr(),
                    vec![
                        check(Node, To::Cluster, spread(&[R1, R2])),
                        check(PodL1, To::NodePort, spread(&[R1, R2])),
                        check(Outside, To::NodePort, spread(&[R1, R2])).seen(Seen::MasqueradedIfRemote).but(
                            Mode::Ebpf,
                            Expect::Nothing,
                            NO_AGENT,
                        ),
                    ],
                ),
                step(
                    spec(ready(&[R1, R2])).node_port(30_113).lb(),
                    vec![check(Outside, To::NodePort, spread(&[R1, R2])).seen(Seen::MasqueradedIfRemote)],
                ),
            ],
        ),
        scenario(
            "externalTrafficPolicy Local keeps the client's address and the node",
            vec![
                step(
                    spec(ready(&all)).node_port(30_112).lb().external_local(),
                    vec![
                        check(Outside, To::NodePort, spread(&[L1, L2])).seen(Seen::Own),
                        check(Outside, To::LoadBalancer, spread(&[L1, L2])).seen(Seen::Own),
                        check(PodL1, To::LoadBalancer, spread(&all)),
                        check(Node, To::LoadBalancer, spread(&all)),
                        check(Node, To::NodePort, spread(&all)),
                        check(PodL1, To::NodePort, spread(&all)),
                        check(Node, To::Cluster, spread(&all)),
                    ],
                ),
                step(
                    spec(ready(&[R1])).node_port(30_112).lb().external_local(),
                    vec![
                        check(Outside, To::NodePort, Expect::Silent),
                        check(Outside, To::LoadBalancer, Expect::Silent),
                        check(PodL1, To::LoadBalancer, spread(&[R1])),
                        check(Node, To::NodePort, spread(&[R1])),
                    ],
                ),
            ],
        ),
    ]
}

const NO_AGENT: &str = "the second node has no agent here that would take packets out of the header in which they come; \
                        with one it answers the client itself (service_direct)";

const LOOPBACK: &str =
    "NodePorts on loopback need route_localnet, which opens the node's own loopback services";

fn outside_addresses() -> Vec<Scenario> {
    let all = [L1, L2, R1, R2];
    vec![
        scenario(
            "a load balancer's address works outside and inside",
            vec![step(
                spec(ready(&all)).lb(),
                vec![
                    check(Outside, To::LoadBalancer, spread(&all)).seen(Seen::MasqueradedIfRemote),
                    check(Node, To::LoadBalancer, spread(&all)),
                    check(PodL1, To::LoadBalancer, spread(&all)),
                ],
            )],
        ),
        scenario(
            "source ranges that hold the client let it in",
            vec![step(
                spec(ready(&all)).lb().source_ranges(&[
                    "198.51.100.0/24",
                    "2001:db8:ffff::/64",
                    "192.0.2.128/25",
                ]),
                vec![check(Outside, To::LoadBalancer, spread(&all))],
            )],
        ),
        scenario(
            "source ranges keep others out of the load balancer's address only",
            vec![
                step(
                    spec(ready(&all))
                        .lb()
                        .node_port(30_121)
                        .source_ranges(&["192.0.2.128/25", "2001:db8:1::/64"]),
                    vec![
                        check(Outside, To::LoadBalancer, Expect::Silent),
                        check(Outside, To::NodePort, spread(&all)),
                    ],
                ),
                step(
                    spec(ready(&all)).lb().node_port(30_121),
                    vec![check(Outside, To::LoadBalancer, spread(&all))],
                ),
            ],
        ),
        scenario(
            "an external address works from outside",
            vec![step(
                spec(ready(&all)).external(),
                vec![check(Outside, To::External, spread(&all)).seen(Seen::MasqueradedIfRemote)],
            )],
        ),
        scenario(
            "consistent hashing spreads over connections",
            vec![step(
                Spec { scheduler: Scheduler::Maglev, ..spec(ready(&all)).lb() },
                vec![check(Outside, To::LoadBalancer, spread(&all))],
            )],
        ),
        scenario(
            "weights leave nobody out",
            vec![step(
                Spec { weights: &[(L1, 3), (R2, 2)], ..spec(ready(&all)) },
                vec![check(Node, To::Cluster, spread(&all))],
            )],
        ),
    ]
}

fn terminating_endpoints() -> Vec<Scenario> {
    let mixed = || [ready(&[L1, R1]), terminating(&[L2, R2])].concat();
    vec![scenario(
        "terminating endpoints serve only where nothing is ready",
        vec![
            step(
                spec(mixed()).node_port(30_131),
                vec![
                    check(Node, To::Cluster, spread(&[L1, R1])),
                    check(Outside, To::NodePort, spread(&[L1, R1])),
                ],
            ),
            step(
                spec([ready(&[R1]), terminating(&[L2])].concat()).node_port(30_131).external_local(),
                vec![
                    check(Outside, To::NodePort, spread(&[L2])).seen(Seen::Own),
                    check(Node, To::Cluster, spread(&[R1])),
                ],
            ),
            step(
                spec(terminating(&[L2, R2])).node_port(30_131),
                vec![
                    check(Node, To::Cluster, spread(&[L2, R2])),
                    check(PodL1, To::Cluster, spread(&[L2, R2])),
                    check(Outside, To::NodePort, spread(&[L2, R2])),
                ],
            ),
            step(
                spec(Vec::new()).node_port(30_131),
                vec![
                    check(Node, To::Cluster, Expect::Refused),
                    check(Outside, To::NodePort, Expect::Refused),
                ],
            ),
        ],
    )]
}

fn hints() -> Vec<Scenario> {
    vec![scenario(
        "topology hints choose for policy Cluster, and not for policy Local",
        vec![
            step(
                spec(hinted(&[
                    (L1, Hint::Elsewhere),
                    (L2, Hint::Zone),
                    (R1, Hint::Zone),
                    (R2, Hint::Elsewhere),
                ]))
                .node_port(30_141),
                vec![
                    check(Node, To::Cluster, spread(&[L2, R1])),
                    check(PodL1, To::Cluster, spread(&[L2, R1])),
                    check(Outside, To::NodePort, spread(&[L2, R1])),
                ],
            ),
            step(
                spec(hinted(&[
                    (L1, Hint::Elsewhere),
                    (L2, Hint::Zone),
                    (R1, Hint::Zone),
                    (R2, Hint::Elsewhere),
                ]))
                .node_port(30_141)
                .external_local(),
                vec![check(Outside, To::NodePort, spread(&[L1, L2]))],
            ),
            step(
                spec(hinted(&[(L1, Hint::None), (L2, Hint::Zone), (R1, Hint::Zone), (R2, Hint::Elsewhere)])),
                vec![check(Node, To::Cluster, spread(&[L1, L2, R1, R2]))],
            ),
            step(
                spec(hinted(&[(L1, Hint::Elsewhere), (R1, Hint::Elsewhere)])),
                vec![check(Node, To::Cluster, spread(&[L1, R1]))],
            ),
        ],
    )]
}

fn affinity() -> Vec<Scenario> {
    let all = [L1, L2, R1, R2];
    vec![
        scenario(
            "a client with affinity stays with one endpoint",
            vec![step(
                spec(ready(&all)).node_port(30_151).lb().affinity(3_600),
                vec![
                    check(Node, To::Cluster, sticky(&all)),
                    check(PodL1, To::Cluster, sticky(&all)),
                    check(Outside, To::NodePort, sticky(&all)),
                    check(Outside, To::LoadBalancer, sticky(&all)),
                ],
            )],
        ),
        scenario(
            "affinity ends with its endpoint",
            vec![
                step(
                    spec(ready(&[L1, R1])).node_port(30_152).affinity(3_600),
                    vec![
                        check(Node, To::Cluster, sticky(&[L1, R1])),
                        check(Outside, To::NodePort, sticky(&[L1, R1])),
                    ],
                ),
                step(
                    spec(ready(&[L2])).node_port(30_152).affinity(3_600),
                    vec![
                        check(Node, To::Cluster, sticky(&[L2])),
                        check(Outside, To::NodePort, sticky(&[L2])),
                    ],
                ),
                step(
                    spec(ready(&all)).node_port(30_152).affinity(3_600),
                    vec![
                        check(Node, To::Cluster, sticky(&[L2])),
                        check(Outside, To::NodePort, sticky(&[L2])),
                    ],
                ),
                step(
                    spec(ready(&all)).node_port(30_152),
                    vec![check(Node, To::Cluster, spread(&all)), check(Outside, To::NodePort, spread(&all))],
                ),
            ],
        ),
    ]
}

fn changes() -> Vec<Scenario> {
    vec![scenario(
        "a live service changes its endpoints, NodePort, addresses and policies",
        vec![
            step(
                spec(ready(&[L1])).node_port(30_161).lb(),
                vec![
                    check(Node, To::Cluster, spread(&[L1])),
                    check(Outside, To::NodePort, spread(&[L1])),
                    check(Outside, To::LoadBalancer, spread(&[L1])),
                ],
            ),
            step(
                spec(ready(&[L2, R2])).node_port(30_162),
                vec![
                    check(Node, To::Cluster, spread(&[L2, R2])),
                    check(Outside, To::NodePort, spread(&[L2, R2])),
                    check(Outside, To::LoadBalancer, Expect::Nothing),
                ],
            ),
            step(
                spec(ready(&[L2, R2])).node_port(30_162).external_local().internal_local(),
                vec![
                    check(PodL1, To::Cluster, spread(&[L2])),
                    check(Outside, To::NodePort, spread(&[L2])).seen(Seen::Own),
                ],
            ),
            step(
                spec(ready(&[R1])).lb(),
                vec![
                    check(PodL1, To::Cluster, spread(&[R1])),
                    check(Outside, To::LoadBalancer, spread(&[R1])),
                ],
            ),
        ],
    )]
}
