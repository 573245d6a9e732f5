//! What the table and its data planes say to each other. Invariant: plain data; a data plane needs nothing else of this
//! room, and [`Changes`] has its fields in the order in which they are to be made.

use super::model::{ObjectKey, Proto};
use super::plan::{BackendAddr, FrontendKey, FrontendPolicy};
use super::runs::Run;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet};

/// Id of a service port in one family; 0 is nobody's.
pub type ServiceId = u32;
/// Id of a backend, 1 to [`Capacity::backends`]; 0 is nobody's.
pub type BackendId = u32;

/// Element of the Maglev array; 0 is nobody's.
pub type MaglevId = u32;

/// What the kernel holds for one frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendEntry {
    /// Whose run it is.
    pub service: ServiceId,
    /// First slot.
    pub base: u32,
    /// Slots of each kind, in the order of [`Counts`].
    pub counts: [u16; 4],
    /// Of the local ready slots, those at the start that policy Cluster must not pick.
    pub local_only: u16,
    /// Maglev table for policy Cluster; 0 means none.
    pub maglev: MaglevId,
    /// How it may choose.
    pub policy: FrontendPolicy,
}

impl FrontendEntry {
    /// The slots that the entry refers to.
    pub fn run(&self) -> Run {
        Run { base: self.base, len: self.counts.iter().map(|n| u32::from(*n)).sum() }
    }
}

/// A slot to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWrite {
    /// Which one.
    pub index: u32,
    /// Whose run it is in.
    pub service: ServiceId,
    /// What is in it.
    pub backend: BackendId,
}

/// What the members map says of one usable backend of a service with session affinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member {
    /// It is on this node.
    pub local: bool,
    /// It is ready; otherwise it serves while it terminates.
    pub ready: bool,
    /// Policy Cluster may pick it.
    pub cluster: bool,
}

/// A Maglev table to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaglevWrite {
    /// Which element.
    pub id: MaglevId,
    /// Picks, counted from the first slot that policy Cluster may use; `sheave_ebpf_abi::MAGLEV_SLOTS` of them.
    pub picks: std::sync::Arc<[u16]>,
}

/// Entries that the kernel's maps have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// IPv4 frontends.
    pub frontends4: u32,
    /// IPv6 frontends.
    pub frontends6: u32,
    /// Slots.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Members of services with session affinity.
    pub members: u32,
    /// Source ranges.
    pub ranges: u32,
    /// Maglev tables.
    pub maglevs: u32,
}

/// What a data plane can do beside holding entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// It balances SCTP.
    pub sctp: bool,
    /// It lets backends of other nodes answer clients themselves; where not, clients are masqueraded.
    pub dsr: bool,
    /// It has the kernel's IPVS schedulers; where not, services that name one get the default.
    pub ipvs_schedulers: bool,
    /// Services that one round of changes is made for at most. A data plane that makes the kernel equal to the first
    /// round after it observed needs all of them at once.
    pub services_per_round: usize,
}

impl Abilities {
    /// A data plane that can do everything, in rounds of any size.
    pub const ALL: Self =
        Self { sctp: true, dsr: true, ipvs_schedulers: true, services_per_round: usize::MAX };
}

/// All that the kernel holds.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Frontends.
    pub frontends: Vec<(FrontendKey, FrontendEntry)>,
    /// Slots from 0 on, as far as frontends refer to them: owner and backend.
    pub slots: Vec<(ServiceId, BackendId)>,
    /// Backends.
    pub backends: Vec<(BackendId, BackendAddr)>,
    /// Members of services with session affinity.
    pub members: Vec<((ServiceId, BackendId), Member)>,
    /// Source ranges.
    pub ranges: Vec<(ServiceId, IpNetwork)>,
    /// Maglev tables that frontends follow, by [`maglev::fingerprint`](super::maglev::fingerprint).
    pub maglevs: Vec<(MaglevId, u64)>,
}

/// What is to be done to the kernel, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// 1. Backends that are new, each once.
    pub put_backends: Vec<(BackendId, BackendAddr)>,
    /// 2. Slots of runs that nobody refers to yet, run by run.
    pub put_slots: Vec<SlotWrite>,
    /// 3. Maglev tables that nobody refers to yet.
    pub put_maglevs: Vec<MaglevWrite>,
    /// 4. Members of services with session affinity, new and changed.
    pub put_members: BTreeMap<(ServiceId, BackendId), Member>,
    /// 5. Source ranges that are new.
    pub put_ranges: BTreeSet<(ServiceId, IpNetwork)>,
    /// 6. Frontends: each write flips one to its new run.
    pub put_frontends: BTreeMap<FrontendKey, FrontendEntry>,
    /// 7. Frontends that are gone.
    pub delete_frontends: BTreeSet<FrontendKey>,
    /// 8. Source ranges that are gone.
    pub delete_ranges: BTreeSet<(ServiceId, IpNetwork)>,
    /// 9. Members that are gone.
    pub delete_members: BTreeSet<(ServiceId, BackendId)>,
    /// 10. Backends that nothing refers to any more.
    pub delete_backends: BTreeSet<BackendId>,
    /// What the other fields take from UDP and SCTP clients: service ports that have lost a backend wholly (it neither
    /// is ready nor serves), so that flows and sockets which still point there can be ended. TCP is left to resets.
    pub lost: BTreeSet<(ServiceId, BackendAddr)>,
}

impl Changes {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.put_backends.is_empty()
            && self.put_slots.is_empty()
            && self.put_maglevs.is_empty()
            && self.put_members.is_empty()
            && self.put_ranges.is_empty()
            && self.put_frontends.is_empty()
            && self.delete_frontends.is_empty()
            && self.delete_ranges.is_empty()
            && self.delete_members.is_empty()
            && self.lost.is_empty()
            && self.delete_backends.is_empty()
    }
}

/// Why (a part of) a service is not in the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A map is full. The service keeps what it had before.
    #[error("the table of {what} is full ({capacity})")]
    Full {
        /// Which: `frontends`, `slots`, `backends`, `members`, `source ranges` or `Maglev tables`.
        what: &'static str,
        /// Its size.
        capacity: u32,
    },
    /// More endpoints than a run can count. The service keeps what it had before.
    #[error("{count} endpoints on one port, at most 65535 are possible")]
    TooManyEndpoints {
        /// How many.
        count: usize,
    },
    /// A field of the object, or of one of its EndpointSlices, can't be used; the rest of the service is programmed.
    #[error("{text}")]
    Unusable {
        /// The EndpointSlice; `None` when the field is the Service's own.
        slice: Option<ObjectKey>,
        /// Names the field, what it holds, and what it should.
        text: Box<str>,
    },
    /// The data plane in use does not balance the protocol; the rest of the service is programmed.
    #[error("this node's data plane does not balance {}: port {port} is left out; nftables and ipvs do", .proto.name())]
    Protocol {
        /// The port, as its first frontend has it.
        port: u16,
        /// Its protocol.
        proto: Proto,
    },
    /// The data plane in use does not let backends answer clients themselves; they are masqueraded.
    #[error(
        "metadata.annotations[sheave.io/forwarding]: this node's data plane cannot do dsr, its clients are masqueraded; \
         ebpf can"
    )]
    Forwarding,
    /// Another service has the frontend; the rest of the service is programmed.
    #[error("{} {} port {} belongs to {owner}", .frontend.proto.name(), .frontend.addr, .frontend.port)]
    Taken {
        /// The frontend.
        frontend: FrontendKey,
        /// Who has it.
        owner: ObjectKey,
    },
}

impl Refusal {
    /// Whether the same service may fit when others go.
    pub const fn may_pass(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Taken { .. })
    }
}

/// How full the table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Services that have at least one frontend.
    pub services: usize,
    /// Frontends of both families.
    pub frontends: usize,
    /// Slots in use or about to be free.
    pub slots: usize,
    /// Backends.
    pub backends: usize,
    /// Members of services with session affinity.
    pub members: usize,
    /// Source ranges.
    pub ranges: usize,
    /// Maglev tables in use or about to be free.
    pub maglevs: usize,
    /// What there is room for.
    pub capacity: Capacity,
}
