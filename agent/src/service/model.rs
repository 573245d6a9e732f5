//! Services and endpoint slices as this node needs them. Invariant: compact and owned; nothing of the typed API
//! object they came from is kept.

use std::net::IpAddr;
use std::sync::Arc;

/// `namespace/name` of a Service or an EndpointSlice.
pub type ObjectKey = Arc<str>;

/// Transport protocol of a service port. SCTP ports are not balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Proto {
    /// The protocol with this Kubernetes name (`TCP`, `UDP`).
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            _ => None,
        }
    }

    /// The Kubernetes name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
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

/// A Service that is to be balanced (neither headless nor ExternalName).
#[derive(Clone, Debug, PartialEq, Eq)]
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
}
