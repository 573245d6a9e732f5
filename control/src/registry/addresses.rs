//! Cluster IPs and node ports around a write: what an attempt took is given back unless the write
//! it was taken for succeeded.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use serde_json::Value;

use crate::resource::alloc::{AllocatorError, Grant, ServiceAllocator};
use crate::resource::{ApiError, Kind, kinds};

/// From where services get their addresses.
#[derive(Clone, Debug)]
pub struct AddressRanges {
    /// One network, or one of each family; the first is the primary one.
    pub service_cidrs: Vec<IpNetwork>,
    /// First and last node port.
    pub node_ports: (u16, u16),
}

pub(super) struct Addresses {
    allocator: Mutex<ServiceAllocator>,
    first: Vec<IpAddr>,
}

/// What one attempt at a write took; given back when dropped before [`Claim::keep`].
pub(super) struct Claim<'a> {
    addresses: &'a Addresses,
    grant: Option<Grant>,
}

impl Addresses {
    pub(super) fn new(
        ranges: &AddressRanges,
        services: impl Iterator<Item = Value>,
    ) -> Result<Self, AllocatorError> {
        let mut allocator = ServiceAllocator::new(&ranges.service_cidrs, ranges.node_ports)?;
        for service in services {
            for problem in allocator.adopt(&service) {
                tracing::warn!("{problem}");
            }
        }
        let first = allocator.ranges().iter().map(|range| range.api_server()).collect();
        Ok(Self { allocator: Mutex::new(allocator), first })
    }

    /// The API server's own address in each range.
    pub(super) fn api_server(&self) -> &[IpAddr] {
        &self.first
    }

    /// Fills in the addresses of a service; does nothing for other kinds.
    pub(super) fn claim(
        &self,
        kind: &Kind,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Claim<'_>, ApiError> {
        let grant = if kind == &kinds::SERVICES { Some(self.lock().allocate(object, old)?) } else { None };
        Ok(Claim { addresses: self, grant })
    }

    /// Gives back what a removed service held.
    pub(super) fn release(&self, kind: &Kind, object: &Value) {
        if kind == &kinds::SERVICES {
            self.lock().release(object);
        }
    }

    fn lock(&self) -> MutexGuard<'_, ServiceAllocator> {
        // Grants are taken and ended whole, so a panic elsewhere leaves nothing half done.
        self.allocator.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// The write succeeded: what it took stays taken, what it let go of is free.
    pub(super) fn keep(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.addresses.lock().commit(grant);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.addresses.lock().rollback(grant);
        }
    }
}
