//! The nftables data plane: maps in a table of its own, `inet sheave`. Invariant: the table is changed in transactions,
//! so that no packet meets a half-written service, and a packet's way does not grow with the number of services.
//!
//! A connection's first packet looks its destination up in `services4` or `services6`, which tells for clients inside
//! and outside of the cluster a pool of endpoints and a plan. A map of verdicts leads from the plan to its chain, which
//! draws a number and finds the endpoint in `endpoints4` or `endpoints6` by pool and number. Services with equally many
//! endpoints share a chain. The large maps hold data and no verdicts: with every verdict that is added the kernel checks
//! the whole table for loops, which is what makes other layouts slow with many services.
//!
//! The table is written by netlink, without the `nft` program, in one transaction a round.
//!
//! `nft` 1.0.6 (Debian 12) aborts when it is to list these rules: it can't name a key that is made of what a map gave.
//! `nft list map inet sheave services4` and its like work.
//!
//! What it does not do: NodePorts on loopback addresses; Maglev and direct server return, which are ignored.

mod drain;
mod flows;
mod plan;
mod schema;
mod state;

use super::mirror::{Mirror, Touched};
use super::{Attached, Dataplane, DataplaneConfig, DataplaneError, Mode};
use crate::network::netlink::nfnl::Netfilter;
use crate::network::netlink::nft::Transaction;
use crate::service::{Abilities, Capacity, Changes, Family, Observed};
use state::State;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

pub(super) use drain::drain;

/// The kernel's maps grow; these bounds only keep a mistake from eating the memory.
const CAPACITY: Capacity = Capacity {
    frontends4: 1 << 22,
    frontends6: 1 << 22,
    slots: 1 << 26,
    backends: 1 << 24,
    members: 1 << 24,
    ranges: 1 << 20,
    maglevs: 1 << 16,
};

/// Opens the data plane; what the table holds is replaced by the first round.
pub(super) fn open(config: &DataplaneConfig) -> Result<Box<dyn Dataplane>, DataplaneError> {
    let mut netfilter = Netfilter::open().map_err(|source| DataplaneError::Missing {
        what: "nf_tables",
        hint: format!("no netfilter socket: {source}; the kernel needs CONFIG_NF_TABLES and CONFIG_NF_NAT"),
    })?;
    probe(&mut netfilter, config)?;
    warn_of_forwarding();
    Ok(Box::new(Nftables {
        netfilter,
        config: config.clone(),
        nodes: BTreeSet::new(),
        mirror: Mirror::default(),
        state: State::default(),
        fresh: true,
        fixed_rules: 0,
        seen: None,
    }))
}

/// Removes the table; one that does not exist is fine.
pub(super) fn uninstall(_config: &DataplaneConfig) -> Vec<DataplaneError> {
    let removed = Netfilter::open().and_then(|mut netfilter| {
        if netfilter.table_handle(schema::TABLE_FAMILY, schema::TABLE)?.is_none() {
            return Ok(());
        }
        let mut tx = Transaction::new(schema::TABLE_FAMILY, schema::TABLE);
        tx.delete_table();
        match tx.commit(&mut netfilter) {
            // Somebody was quicker.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    });
    match removed {
        Ok(()) => Vec::new(),
        // A kernel without nf_tables holds no table.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL)) => Vec::new(),
        Err(source) => vec![DataplaneError::Host { op: "remove the nftables table sheave", source }],
    }
}

/// Asks the kernel whether it has everything, by a transaction that ends in removing what it has made.
fn probe(netfilter: &mut Netfilter, config: &DataplaneConfig) -> Result<(), DataplaneError> {
    let mut tx = Transaction::new(schema::TABLE_FAMILY, schema::PROBE_TABLE);
    tx.add_table();
    schema::create(&mut tx, config, &BTreeSet::new());
    plan::probe(&mut tx);
    tx.delete_table();
    tx.commit(netfilter).map_err(|error| DataplaneError::Missing {
        what: "a part of nf_tables",
        hint: format!(
            "could not {error}; the kernel needs NF_TABLES_INET, NFT_NAT, NFT_MASQ, NFT_CT, NFT_NUMGEN, \
             NFT_FIB_INET and NFT_REJECT_INET (Debian: modules of the linux-image package), and the agent CAP_NET_ADMIN"
        ),
    })
}

/// Translated packets are forwarded like any others; whether they are is the host's affair.
fn warn_of_forwarding() {
    for knob in ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"] {
        if std::fs::read_to_string(knob).is_ok_and(|value| value.trim() == "0") {
            tracing::warn!(
                knob,
                "forwarding is off: what arrives for a service reaches endpoints on this node's own addresses only; \
                 write 1 there"
            );
        }
    }
}

struct Nftables {
    netfilter: Netfilter,
    config: DataplaneConfig,
    /// All addresses of the node, as last told.
    nodes: BTreeSet<IpAddr>,
    mirror: Mirror,
    state: State,
    /// The next round replaces all that the table holds.
    fresh: bool,
    fixed_rules: usize,
    /// Ruleset generation in which the table was last found to be whole.
    seen: Option<u32>,
}

impl Nftables {
    fn error(source: io::Error) -> DataplaneError {
        DataplaneError::Host { op: "change the nftables table sheave", source }
    }

    /// The whole table in one transaction.
    fn replace(&mut self, touched: &Touched) -> Result<(), DataplaneError> {
        let mut tx = Transaction::new(schema::TABLE_FAMILY, schema::TABLE);
        // Adding one that is there already does nothing, so that there is one to delete.
        tx.add_table();
        tx.delete_table();
        tx.add_table();
        let nodes = schema::node_port_addresses(&self.config, &self.nodes);
        schema::create(&mut tx, &self.config, &nodes);
        self.fixed_rules = tx.rules();
        self.state = State::default();
        self.state.update(touched, &self.mirror, &mut tx);
        tx.commit(&mut self.netfilter).map_err(Self::error)?;
        self.fresh = false;
        Ok(())
    }

    fn change(&mut self, touched: &Touched) -> Result<(), DataplaneError> {
        let mut tx = Transaction::new(schema::TABLE_FAMILY, schema::TABLE);
        self.state.update(touched, &self.mirror, &mut tx);
        tracing::trace!(elements = tx.elements(), rules = tx.rules(), "nftables transaction");
        tx.commit(&mut self.netfilter).map_err(Self::error)
    }

    /// Ends flows that the round has made wrong. What can't be ended ends by itself when its client pauses, so an error
    /// is no reason to write the table again.
    fn end_wrong_flows(&mut self, touched: &Touched, changes: &Changes, first: bool) {
        let nodes = schema::node_port_addresses(&self.config, &self.nodes);
        let known = first.then(|| self.mirror.backends().copied().collect());
        let (mirror, lost, nodes) = (&self.mirror, &changes.lost, &nodes);
        let round = flows::Round { touched, mirror, lost, nodes, known };
        for (family, proto) in round.concerned() {
            let wrong = |flow: &_| round.makes_wrong(flow, proto);
            match self.netfilter.end_flows(family == Family::V6, schema::number(proto), wrong) {
                Ok(0) => {}
                Ok(ended) => tracing::debug!(ended, proto = proto.name(), "flows to endpoints that left"),
                Err(error) => tracing::warn!(
                    %error,
                    proto = proto.name(),
                    "cannot end flows to endpoints that left; the kernel needs CONFIG_NF_CT_NETLINK"
                ),
            }
        }
    }

    /// Whether the table is there, with as many rules as it should have.
    fn is_whole(&mut self) -> io::Result<bool> {
        let generation = self.netfilter.generation()?;
        if self.seen == Some(generation) {
            return Ok(true);
        }
        if self.netfilter.table_handle(schema::TABLE_FAMILY, schema::TABLE)?.is_none() {
            return Ok(false);
        }
        let rules = self.netfilter.rules(schema::TABLE_FAMILY, schema::TABLE)?.len();
        let whole = rules == self.fixed_rules + self.state.rule_count();
        self.seen = whole.then_some(generation);
        Ok(whole)
    }
}

impl Dataplane for Nftables {
    fn mode(&self) -> Mode {
        Mode::Nftables
    }

    fn capacity(&self) -> Capacity {
        CAPACITY
    }

    fn abilities(&self) -> Abilities {
        Abilities { dsr: false, ..Abilities::ALL }
    }

    fn observe(&mut self) -> Result<Observed, DataplaneError> {
        self.fresh = true;
        Ok(Observed::default())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), DataplaneError> {
        let first = self.fresh;
        if first {
            self.mirror = Mirror::default();
        }
        let touched = self.mirror.apply(changes);
        if first {
            self.replace(&touched)?;
        } else {
            self.change(&touched)?;
        }
        self.end_wrong_flows(&touched, changes, first);
        Ok(())
    }

    fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), DataplaneError> {
        if *addresses == self.nodes {
            return Ok(());
        }
        let old = schema::node_port_addresses(&self.config, &self.nodes);
        let new = schema::node_port_addresses(&self.config, addresses);
        if !self.fresh {
            let mut tx = Transaction::new(schema::TABLE_FAMILY, schema::TABLE);
            old.difference(&new).for_each(|addr| schema::delete_node_element(&mut tx, *addr));
            new.difference(&old).for_each(|addr| schema::add_node_element(&mut tx, *addr));
            tx.commit(&mut self.netfilter).map_err(Self::error)?;
        }
        self.nodes.clone_from(addresses);
        Ok(())
    }

    fn attach(&mut self) -> Result<Attached, DataplaneError> {
        if self.fresh {
            // No service so far: the table is there all the same, and what an earlier run left in it is gone.
            self.apply(&Changes::default())?;
        }
        let whole = self
            .is_whole()
            .map_err(|source| DataplaneError::Host { op: "read the nftables table sheave", source })?;
        if whole {
            return Ok(Attached::Yes);
        }
        tracing::warn!("the nftables table sheave was changed by somebody else; writing it anew");
        Ok(Attached::TableIsNew)
    }
}
