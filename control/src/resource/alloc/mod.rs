//! Cluster IPs and node ports: who holds which, and what a Service gets. The state is rebuilt from the stored
//! services, so there is no second truth to repair.

mod ip;
mod port;
mod service;

pub use ip::{IpRange, IpRangeError};
pub use port::{PortRange, PortRangeError};
pub use service::{AllocatorError, Grant, ServiceAllocator};
