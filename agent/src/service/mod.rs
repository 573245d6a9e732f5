//! PURE: services, endpoint slices and facts about this node become the desired load-balancing table, and its diff
//! against the kernel's. Invariant: nothing here does I/O or reads a clock; the same events in the same order give
//! the same changes.

#[cfg(test)]
mod beside_tests;
mod changes;
pub mod maglev;
mod model;
mod plan;
#[cfg(test)]
mod plan_tests;
mod planner;
#[cfg(test)]
pub(crate) mod pretend;
#[cfg(test)]
mod property_tests;
mod runs;
mod table;
#[cfg(test)]
mod table_tests;

pub use changes::{
    Abilities, BackendId, Capacity, Changes, FrontendEntry, MaglevId, MaglevWrite, Member, Observed, Refusal,
    ServiceId, SlotWrite, Usage,
};
pub use model::{
    Distribution, Endpoint, Family, Hint, IpvsScheduler, ObjectKey, Proto, Readiness, Scheduler, Service,
    ServiceExtras, ServicePort, Slice, SlicePort,
};
pub use plan::{
    BackendAddr, Counts, DesiredPort, FrontendKey, FrontendKind, FrontendPolicy, NodeFacts, desired,
    local_ready,
};
pub use planner::{HealthCheck, NoLocalEndpoints, Planner};
pub use runs::Run;
pub use table::Table;

use std::collections::BTreeSet;

/// One thing that the API said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A Service exists with this content.
    Service(Service),
    /// A Service is gone, or is none that is balanced.
    ServiceGone(ObjectKey),
    /// An EndpointSlice exists with this content.
    Slice(Slice),
    /// An EndpointSlice is gone, or belongs to no Service.
    SliceGone(ObjectKey),
    /// All Services that exist were told, which are `0`; others in the model are gone.
    ServicesSynced(BTreeSet<ObjectKey>),
    /// All EndpointSlices that exist were told, which are `0`; others in the model are gone.
    SlicesSynced(BTreeSet<ObjectKey>),
    /// The node's facts changed.
    Node(NodeFacts),
}
