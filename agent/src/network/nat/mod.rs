//! Translation for pods: one nftables table of its own, `inet sheave-net`, written by netlink. Invariant: the table
//! is what [`Desired`] says or is not there, it is changed in transactions, and where nothing is wanted there is none.
//!
//! Two owners share it: `network::ports` wants host ports, the overlay wants what leaves the pod ranges to have the
//! node's address. Each edits its part of [`Desired`] by [`Nat::change`]; whoever notices that the table was changed
//! by somebody else, on a timer or by a watch, calls [`Nat::repair`], which costs one request while nothing changed.
//!
//! A table that an earlier run of the agent left is taken over as it is, its host ports with their owners, which the
//! elements' comments name.

mod ranges;
mod schema;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;

use super::NetworkError;
use super::netlink::nfnl::Netfilter;
use super::netlink::nft::INET;
use schema::FAMILIES;

/// Our table.
pub(crate) const TABLE: &str = "sheave-net";
/// The family that it is of.
const TABLE_FAMILY: u8 = INET;

/// A port of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Frontend {
    /// On which address; unspecified means all of that family that the node has.
    pub(crate) ip: IpAddr,
    /// `IPPROTO_…`.
    pub(crate) protocol: u8,
    /// The port.
    pub(crate) port: u16,
}

/// Where a port of the node leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// A pod's address, of the frontend's family.
    pub(crate) ip: IpAddr,
    /// The pod's port.
    pub(crate) port: u16,
    /// Whose it is: what [`owner`] makes of an attachment's id.
    pub(crate) owner: String,
}

/// What leaves with the node's address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Masquerade {
    /// Whose traffic: ranges of this node's pods. They may overlap.
    pub(crate) from: Vec<IpNetwork>,
    /// To where it keeps its source: all pods' ranges, and what the configuration excepts. They may overlap.
    pub(crate) except: Vec<IpNetwork>,
    /// Whose traffic keeps its source although a range of `from` has it.
    pub(crate) spared: BTreeSet<IpAddr>,
}

/// What the table is to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Desired {
    /// Host ports. Owner: `network::ports`.
    pub(crate) ports: BTreeMap<Frontend, Target>,
    /// Owner: the overlay. `None` until it is told; until then what the table has is kept.
    pub(crate) masquerade: Option<Masquerade>,
    /// Ranges of networks that ask for it themselves (`ipMasq`). Owner: attachments of runtimes.
    pub(crate) asked: BTreeSet<IpNetwork>,
    /// Addresses whose networks ask that it is not done. The same owner's.
    pub(crate) spared: BTreeSet<IpAddr>,
}

impl Desired {
    /// Everything that is to leave with the node's address; `None` while nobody has told.
    fn leaving(&self) -> Option<Masquerade> {
        if self.asked.is_empty() && (self.spared.is_empty() || self.masquerade.is_none()) {
            return self.masquerade.clone();
        }
        let mut all = self.masquerade.clone().unwrap_or_default();
        all.from.extend(&self.asked);
        all.except.extend(&self.asked);
        all.spared.extend(&self.spared);
        Some(all)
    }
}

/// The table in the network namespace of the thread that uses it first. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Nat {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    netfilter: Option<Netfilter>,
    desired: Desired,
    /// The kernel's table holds `desired`, as far as is known.
    applied: bool,
    /// The table was found with ranges to masquerade, by whom nobody told yet.
    found_masquerade: bool,
    /// Ruleset generation in which the table was last found to be whole.
    seen: Option<u32>,
}

/// How an attachment is named beside its host ports.
pub(crate) fn owner(id: &str) -> String {
    schema::label(id)
}

impl Nat {
    /// A poisoned lock is taken over: the wanted state is replaced whole, after the kernel has taken it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Edits what is wanted and brings the kernel there in one transaction. On an error, of `edit` or of the kernel,
    /// nothing has changed.
    pub(crate) fn change<T>(
        &self,
        edit: impl FnOnce(&mut Desired) -> Result<T, NetworkError>,
    ) -> Result<T, NetworkError> {
        let mut state = self.state();
        state.load().map_err(failed)?;
        let mut next = state.desired.clone();
        let result = edit(&mut next)?;
        state.apply(next).map_err(failed)?;
        Ok(result)
    }

    /// What is wanted, without asking the kernel more than once.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Desired) -> T) -> Result<T, NetworkError> {
        let mut state = self.state();
        state.load().map_err(failed)?;
        Ok(look(&state.desired))
    }

    /// Writes the table anew where it is not what it should be; true where that was so.
    pub(crate) fn repair(&self) -> Result<bool, NetworkError> {
        let mut state = self.state();
        state.load().and_then(|()| state.repair()).map_err(failed)
    }

    /// True if the kernel's table is what it should be.
    pub(crate) fn is_whole(&self) -> Result<bool, NetworkError> {
        let mut state = self.state();
        state.load().and_then(|()| state.is_whole()).map_err(failed)
    }

    /// Ends tracked flows of a protocol and family, of which `unwanted` gets destination and who answers; says how
    /// many.
    pub(crate) fn end_flows(
        &self,
        v6: bool,
        protocol: u8,
        unwanted: impl Fn(&super::netlink::conntrack::Flow) -> bool,
    ) -> io::Result<usize> {
        self.state().netfilter()?.end_flows(v6, protocol, unwanted)
    }

    /// Removes the table; one that does not exist is fine.
    pub(crate) fn uninstall() -> Result<(), NetworkError> {
        let removed = Netfilter::open().and_then(|mut netfilter| {
            if !exists(&mut netfilter)? {
                return Ok(());
            }
            let mut tx = schema::transaction();
            tx.delete_table();
            tx.commit(&mut netfilter)
        });
        removed.map_err(failed)
    }
}

fn failed(source: io::Error) -> NetworkError {
    NetworkError::Netlink {
        op: format!(
            "change the nftables table inet {TABLE} (the kernel needs NF_TABLES_INET, NFT_NAT, NFT_MASQ)"
        ),
        source,
    }
}

/// Whether the table is there; a kernel without nf_tables has none.
fn exists(netfilter: &mut Netfilter) -> io::Result<bool> {
    match netfilter.table_handle(TABLE_FAMILY, TABLE) {
        Ok(handle) => Ok(handle.is_some()),
        Err(e)
            if matches!(e.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP)) =>
        {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// How many rules the table has.
fn rules() -> usize {
    let mut tx = schema::transaction();
    schema::create(&mut tx, &Desired::default());
    tx.rules()
}

impl State {
    fn netfilter(&mut self) -> io::Result<&mut Netfilter> {
        if self.netfilter.is_none() {
            self.netfilter = Some(Netfilter::open()?);
        }
        self.netfilter.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Takes over what an earlier run left, the first time.
    fn load(&mut self) -> io::Result<()> {
        if self.netfilter.is_some() {
            return Ok(());
        }
        let mut netfilter = Netfilter::open()?;
        if exists(&mut netfilter)? {
            let found = netfilter.rules(TABLE_FAMILY, TABLE)?.len();
            self.desired.ports = ports(&mut netfilter)?;
            let ranges = FAMILIES.iter().flat_map(|names| [names.from, names.except]);
            for set in ranges {
                self.found_masquerade |= !netfilter.elements(TABLE_FAMILY, TABLE, set)?.is_empty();
            }
            // A table of another make is written anew with the first change.
            self.applied = found == rules();
        } else {
            self.applied = true;
        }
        self.netfilter = Some(netfilter);
        Ok(())
    }

    /// Whether the table is to be there at all.
    fn needed(&self, desired: &Desired) -> bool {
        let masquerades = match desired.leaving() {
            Some(masquerade) => !masquerade.from.is_empty(),
            None => self.found_masquerade,
        };
        !desired.ports.is_empty() || masquerades
    }

    fn apply(&mut self, next: Desired) -> io::Result<()> {
        if self.applied && next == self.desired {
            return Ok(());
        }
        let stays = self.needed(&self.desired) && self.needed(&next);
        let ports_only = stays && self.applied && next.leaving() == self.desired.leaving();
        if ports_only {
            let mut tx = schema::transaction();
            schema::change(&mut tx, &self.desired, &next);
            match tx.commit(self.netfilter()?) {
                Ok(()) => {
                    self.desired = next;
                    self.seen = None;
                    return Ok(());
                }
                Err(error) => tracing::debug!(%error, "the table is not as we left it; writing it anew"),
            }
        }
        self.write(next)
    }

    /// The whole table in one transaction.
    fn write(&mut self, next: Desired) -> io::Result<()> {
        let needed = self.needed(&next);
        let mut tx = schema::transaction();
        // Adding one that is there already does nothing, so that there is one to delete.
        tx.add_table();
        tx.delete_table();
        if needed {
            schema::create(&mut tx, &next);
        }
        let netfilter = self.netfilter()?;
        if needed || exists(netfilter)? {
            tx.commit(netfilter)?;
        }
        self.found_masquerade = false;
        self.desired = next;
        self.applied = true;
        self.seen = None;
        Ok(())
    }

    fn repair(&mut self) -> io::Result<bool> {
        if self.applied && self.is_whole()? {
            return Ok(false);
        }
        let desired = self.desired.clone();
        self.write(desired)?;
        Ok(true)
    }

    /// Whether the kernel's table is what it should be: rules by number, elements one by one.
    fn is_whole(&mut self) -> io::Result<bool> {
        let needed = self.needed(&self.desired);
        let (seen, desired) = (self.seen, self.desired.clone());
        let netfilter = self.netfilter()?;
        if !needed {
            return Ok(!exists(netfilter)?);
        }
        let generation = netfilter.generation()?;
        if seen == Some(generation) {
            return Ok(true);
        }
        if !exists(netfilter)? || netfilter.rules(TABLE_FAMILY, TABLE)?.len() != rules() {
            return Ok(false);
        }
        if ports(netfilter)? != desired.ports {
            return Ok(false);
        }
        if let Some(masquerade) = desired.leaving() {
            for set in FAMILIES.iter().flat_map(|names| [names.from, names.except]) {
                let rows = netfilter.elements(TABLE_FAMILY, TABLE, set)?.into_iter();
                // The kernel may show where the ranges begin as the end of one before them.
                let found = rows.map(|row| (row.key, row.range_end)).filter(|(key, end)| !end || any(key));
                if found.collect::<BTreeSet<_>>() != schema::range_keys(&masquerade, set) {
                    return Ok(false);
                }
            }
        }
        self.seen = Some(generation);
        Ok(true)
    }
}

fn any(key: &[u8]) -> bool {
    key.iter().any(|byte| *byte != 0)
}

/// The host ports that the kernel holds.
fn ports(netfilter: &mut Netfilter) -> io::Result<BTreeMap<Frontend, Target>> {
    let mut found = BTreeMap::new();
    for names in &FAMILIES {
        for (set, any) in [(names.ports, false), (names.any_ports, true)] {
            let rows = netfilter.elements(TABLE_FAMILY, TABLE, set)?;
            let read = |row: super::netlink::nft::ElementRow| {
                schema::port_of(names, any, &row.key, &row.value, row.note)
            };
            found.extend(rows.into_iter().filter_map(read));
        }
    }
    Ok(found)
}
