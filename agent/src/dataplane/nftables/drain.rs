//! What stays of the table while connections that it translated live. Invariant: an emptied table decides nothing, and it
//! goes with the last such connection.
//!
//! The kernel goes on translating known connections only as long as some chain of type `nat` exists and some rule looks
//! at connections, since it tracks none otherwise. So there are chains, and one rule that looks and does nothing.

use super::schema::{self, TABLE, TABLE_FAMILY};
use crate::network::netlink::nfnl::Netfilter;
use crate::network::netlink::nft::{Base, OUTPUT, POSTROUTING, PREROUTING, Transaction};
use crate::network::netlink::nft_expr::{Reg, Rule, ct};
use std::cell::Cell;
use std::io;

/// The chains that keep translation going; none has a rule that decides.
const CHAINS: [(&str, u32, i32); 3] = [
    ("drain-prerouting", PREROUTING, schema::TRANSLATE_PRIORITY),
    ("drain-output", OUTPUT, schema::TRANSLATE_PRIORITY),
    ("drain-postrouting", POSTROUTING, schema::MASQUERADE_PRIORITY),
];

/// Whether any connection of a service protocol is translated, whoever wanted it.
fn is_anything_translated(netfilter: &mut Netfilter) -> io::Result<bool> {
    for v6 in [false, true] {
        for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP] {
            let found = Cell::new(false);
            // None is picked, so none is ended.
            netfilter.end_flows(v6, protocol as u8, |flow| {
                found.set(found.get() || flow.translated);
                false
            })?;
            if found.get() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Empties the table, or removes it where nothing that is translated lives any more. True when it is gone.
pub(crate) fn drain() -> io::Result<bool> {
    let mut netfilter = Netfilter::open()?;
    if netfilter.table_handle(TABLE_FAMILY, TABLE)?.is_none() {
        return Ok(true);
    }
    let mut tx = Transaction::new(TABLE_FAMILY, TABLE);
    let keep = is_anything_translated(&mut netfilter)?;
    let chains = netfilter.chains(TABLE_FAMILY)?;
    let ours: Vec<_> = chains.iter().filter(|row| row.table == TABLE).collect();
    let is_empty = ours.iter().all(|row| CHAINS.iter().any(|(name, ..)| *name == row.name));
    if keep && is_empty && !ours.is_empty() {
        return Ok(false);
    }
    // In one transaction: at no moment is there no chain.
    tx.delete_table();
    if keep {
        tx.add_table();
        for (name, hook, priority) in CHAINS {
            tx.add_chain(name, Some(Base { kind: "nat", hook, priority }));
        }
        tx.add_rule(CHAINS[0].0, &Rule::new().ct(ct::TO_V4, true, Reg(0)));
    }
    tx.commit(&mut netfilter)?;
    Ok(!keep)
}
