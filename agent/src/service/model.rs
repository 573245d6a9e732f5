//! Services and endpoint slices as this node needs them. Invariant: compact and owned; nothing of the typed API
//! object they came from is kept.

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::sync::Arc;

/// `namespace/name` of a Service or an EndpointSlice.
pub type ObjectKey = Arc<str>;

/// Transport protocol of a service port. Not every data plane balances SCTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Proto {
    /// The protocol with this Kubernetes name (`TCP`, `UDP`, `SCTP`).
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The Kubernetes name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Port name; empty when there is one port without a name.
    pub name: Box<str>,
    /// Port on the cluster IPs.
    pub port: u16,
    /// NodePort; 0 when there is none.
    pub node_port: u16,
    /// Protocol.
    pub proto: Proto,
}

/// How a service picks among its endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// The data plane's own default: random.
    #[default]
    Default,
    /// Consistent hashing, equal on all nodes (annotation `sheave.io/scheduler: maglev`; IPVS calls it `mh`).
    Maglev,
    /// One of the kernel's IPVS schedulers by name; other data planes use their default.
    Ipvs(IpvsScheduler),
}

/// The kernel's IPVS schedulers (net/netfilter/ipvs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the kernel's names")]
pub enum IpvsScheduler {
    Rr,
    Wrr,
    Lc,
    Wlc,
    Lblc,
    Lblcr,
    Sh,
    Dh,
    Sed,
    Nq,
    Mh,
}

impl IpvsScheduler {
    /// All of them, with the kernel's names.
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::Rr, "rr"),
        (Self::Wrr, "wrr"),
        (Self::Lc, "lc"),
        (Self::Wlc, "wlc"),
        (Self::Lblc, "lblc"),
        (Self::Lblcr, "lblcr"),
        (Self::Sh, "sh"),
        (Self::Dh, "dh"),
        (Self::Sed, "sed"),
        (Self::Nq, "nq"),
        (Self::Mh, "mh"),
    ];

    /// The scheduler with the kernel's name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, held)| *held == name).map(|(scheduler, _)| *scheduler)
    }

    /// The kernel's name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(held, _)| *held == self).map_or("rr", |(_, name)| name)
    }
}

/// `trafficDistribution`; what endpoints carry as hints is followed in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Distribution {
    /// No preference.
    #[default]
    Even,
    /// `PreferSameZone` or `PreferClose` (KEP-4444, KEP-3015).
    SameZone,
    /// `PreferSameNode` (KEP-3015).
    SameNode,
}

/// Settings that most services leave alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceExtras {
    /// `spec.externalIPs`.
    pub external_ips: Box<[IpAddr]>,
    /// Ingress addresses of the load balancer whose `ipMode` is `VIP` (or unset, KEP-1860).
    pub ingress_ips: Box<[IpAddr]>,
    /// `spec.loadBalancerSourceRanges`; empty lets everybody in. They concern ingress addresses only.
    pub source_ranges: Box<[IpNetwork]>,
    /// `spec.healthCheckNodePort`; 0 when there is none.
    pub health_check_node_port: u16,
    /// `spec.trafficDistribution`.
    pub distribution: Distribution,
    /// How endpoints are picked.
    pub scheduler: Scheduler,
    /// Annotation `sheave.io/forwarding: dsr`: backends on other nodes answer the client themselves.
    pub dsr: bool,
    /// What of the object can't be used, in words that name field and fix; the rest of it is.
    pub problems: Box<[Box<str>]>,
}

/// A Service that is to be balanced (neither headless nor ExternalName).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its key.
    pub key: ObjectKey,
    /// Cluster IPs, at most one a family.
    pub cluster_ips: Box<[IpAddr]>,
    /// Ports.
    pub ports: Box<[ServicePort]>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `sessionAffinity: ClientIP`: its timeout in seconds (1 to 86,400); 0 means none.
    pub affinity_timeout_s: u32,
    /// The rest, for those that have any of it.
    pub extras: Option<Box<ServiceExtras>>,
}

/// One port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the service port that it serves.
    pub name: Box<str>,
    /// Port of the endpoints.
    pub port: u16,
    /// Protocol.
    pub proto: Proto,
}

/// Whether an endpoint takes new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Readiness {
    /// Ready.
    Ready,
    /// Serving, but terminating: used only where nothing is ready (KEP-1669).
    Terminating,
}

/// One endpoint that may be used. Those that neither are ready nor serve are left out of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub addr: IpAddr,
    /// Whether `nodeName` is this node.
    pub on_this_node: bool,
    /// Whether it takes new connections.
    pub readiness: Readiness,
    /// What the endpoint's hints say of this node.
    pub hint: Hint,
}

/// An endpoint's topology hints (`hints.forZones`, `hints.forNodes`), seen from this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hint {
    /// The endpoint has none; hints of the service's other endpoints are void then.
    #[default]
    None,
    /// Hints name other zones or nodes only.
    Elsewhere,
    /// Hints name this node's zone.
    Zone,
    /// Hints name this node.
    Node,
}

/// An EndpointSlice of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Its key.
    pub key: ObjectKey,
    /// Key of the Service that it belongs to.
    pub service: ObjectKey,
    /// Ports.
    pub ports: Box<[SlicePort]>,
    /// Endpoints.
    pub endpoints: Box<[Endpoint]>,
    /// Weight of each endpoint (annotation `sheave.io/weight`, 1 to 100): how often it is in the service's run.
    pub weight: u8,
    /// What of the object can't be used, in words that name field and fix; the rest of it is.
    pub problems: Box<[Box<str>]>,
}
