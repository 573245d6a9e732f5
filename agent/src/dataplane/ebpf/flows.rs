//! The connection table, from outside. Invariant: only what has no connections of its own (UDP, SCTP) is ever taken out
//! of it; a TCP connection stays with its backend until one of its ends closes it.
//!
//! The programs write it at any time. An entry is taken out by freeing its tag where that is still the one that was read, and is
//! put in as a program does it, under the lock of its set.

use super::encode;
use super::map::{Map, Pressure, extrapolate};
use super::rows::{Access, Rows};
use super::sys;
use crate::dataplane::DataplaneError;
use crate::limits;
use crate::service::{BackendAddr, Proto, ServiceId};
use sheave_ebpf_abi::{
    Address, FLOW_LOCK_STALE_S, FLOW_SECRETS, FLOW_WAYS, FLOWS_PER_SET, Flow, FlowEntry, FlowHead, FlowKey,
    FlowSet, PROTO_SCTP, PROTO_TCP, PROTO_UDP, Plain as _, map as names, place, until_s,
};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::Ordering;

/// Entries for which a table with so many elements is made.
pub(super) fn entries_of(elements: u32) -> u64 {
    u64::from(elements.saturating_sub(1)) * u64::from(FLOWS_PER_SET)
}

/// The entries of a set and their places in it, but for those that are being written.
pub(super) fn of_set(set: &FlowSet) -> impl Iterator<Item = (usize, &FlowEntry)> {
    let whole = |(_, (entry, tag)): &(usize, (&FlowEntry, u32))| *tag != 0 && entry.tag == *tag;
    set.entries.iter().zip(set.tags).enumerate().filter(whole).map(|(way, (entry, _))| (way, entry))
}

/// The pinned table.
#[derive(Debug)]
pub(super) struct FlowTable {
    map: Map<u32, FlowSet>,
}

impl FlowTable {
    pub(super) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self { map: Map::open(dir, names::FLOWS)? })
    }

    /// Gives a table that is new its head, without which the programs know one set only.
    pub(super) fn prepare(dir: &Path) -> Result<(), DataplaneError> {
        let table = Map::<u32, FlowHead>::open(dir, names::FLOWS)?;
        if !table.is_mappable() || table.get(&0)?.is_some_and(|head| head.sets != 0) {
            return Ok(());
        }
        let mut random = [0; 4 * FLOW_SECRETS];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut random))
            .map_err(|source| DataplaneError::Host { op: "read /dev/urandom", source })?;
        let mut secret = [0; FLOW_SECRETS];
        for (word, bytes) in secret.iter_mut().zip(random.as_chunks::<4>().0) {
            *word = u32::from_ne_bytes(*bytes);
        }
        table.put(&0, &FlowHead { sets: table.max_entries().saturating_sub(1), secret, ..FlowHead::zeroed() })
    }

    fn error(&self, op: &'static str) -> impl Fn(io::Error) -> DataplaneError + use<'_> {
        move |source| self.map.error(op, source)
    }

    /// Takes out the flows of backends that services have lost, so that their next datagram goes to another one.
    pub(super) fn forget(&self, lost: &BTreeSet<(ServiceId, BackendAddr)>) -> Result<(), DataplaneError> {
        // Those of TCP stay, and most changes have no others.
        let lost: BTreeSet<_> = lost
            .iter()
            .filter(|(_, at)| at.proto != Proto::Tcp)
            .map(|(service, at)| part(*service, at))
            .collect();
        if lost.is_empty() || !self.map.is_mappable() {
            return Ok(());
        }
        let rows = self.map.mapped(0..self.map.max_entries(), Access::Write)?;
        let mut bytes = vec![0; FlowSet::SIZE];
        for row in 1..self.map.max_entries() as usize {
            if !self.is_used(&rows, row)? {
                continue;
            }
            rows.read(row, &mut bytes).map_err(self.error("read"))?;
            let Some(set) = FlowSet::from_bytes(&bytes) else { continue };
            for (way, entry) in of_set(&set).filter(|(_, entry)| is_of(&entry.key, &entry.flow, &lost)) {
                let tag = rows.half(row, tag_at(way)).map_err(self.error("write"))?;
                if tag.compare_exchange(entry.tag, 0, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    tracing::trace!(row, way, "another entry took the place meanwhile");
                }
            }
        }
        Ok(())
    }

    /// Whether a set has any entry; most have none, and need not be read.
    fn is_used(&self, rows: &Rows, row: usize) -> Result<bool, DataplaneError> {
        for way in 0..FLOW_WAYS {
            if rows.half(row, tag_at(way)).map_err(self.error("read"))?.load(Ordering::Relaxed) != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How full the table is, from its first sets when it is large: tuples are spread evenly.
    pub(super) fn pressure(&self) -> Result<Pressure, DataplaneError> {
        let sets = self.map.max_entries().saturating_sub(1);
        let looked_at = sets.min(limits::FLOW_SETS_COUNTED);
        let rows = self.map.mapped(0..looked_at + 1, Access::Read)?;
        let (now_s, mut seen) = (sys::monotonic_s(), 0);
        for row in 1..=looked_at as usize {
            for way in 0..FLOW_WAYS {
                let half = |at| rows.half(row, at).map(|half| half.load(Ordering::Relaxed));
                let (tag, until_s) = (half(tag_at(way)), half(until_at(way)));
                let (tag, until_s) = (tag.map_err(self.error("read"))?, until_s.map_err(self.error("read"))?);
                seen += u64::from(tag != 0 && until_s >= now_s);
            }
        }
        let capacity = entries_of(self.map.max_entries());
        let entries = extrapolate(seen, u64::from(looked_at), u64::from(sets)).min(capacity);
        Ok(Pressure { map: names::FLOWS, entries, capacity })
    }

    /// The table with its memory, to put entries in.
    pub(super) fn writer(&self) -> Result<Writer<'_>, DataplaneError> {
        let rows = self.map.mapped(0..self.map.max_entries(), Access::Write)?;
        let mut bytes = vec![0; FlowHead::SIZE];
        rows.read(0, &mut bytes).map_err(self.error("read"))?;
        let head = FlowHead::from_bytes(&bytes).unwrap_or_else(FlowHead::zeroed);
        Ok(Writer { table: self, rows, head })
    }
}

/// Where a set has an entry's tag, in bytes.
fn tag_at(way: usize) -> usize {
    offset_of!(FlowSet, tags) + 4 * way
}

/// Where a set has the last second in which an entry counts.
fn until_at(way: usize) -> usize {
    offset_of!(FlowSet, until_s) + 4 * way
}

/// Puts entries into a table that programs may write meanwhile.
pub(super) struct Writer<'a> {
    table: &'a FlowTable,
    rows: Rows,
    head: FlowHead,
}

impl Writer<'_> {
    /// Stores an entry; where there is one with its key already only when `replace` says so.
    pub(super) fn put(&self, key: &FlowKey, flow: &Flow, replace: bool) -> Result<(), DataplaneError> {
        self.try_put(key, flow, replace).map_err(self.table.error("write"))
    }

    fn try_put(&self, key: &FlowKey, flow: &Flow, replace: bool) -> io::Result<()> {
        let secret = |word: usize| self.head.secret.get(word).copied().unwrap_or_default();
        let place = place::place(key, secret, self.head.sets);
        let row = place.set as usize;
        let lock = self.rows.word(row, offset_of!(FlowSet, lock))?;
        let mine = self.lock(row)?;
        let done = self.store(row, place.tag, (key, flow), replace);
        if lock.compare_exchange(mine, 0, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            tracing::debug!(row, "a lock was taken from this process, which stood still for seconds");
        }
        done
    }

    /// Takes the lock of a set, and gives what it says then.
    fn lock(&self, row: usize) -> io::Result<u64> {
        let lock = self.rows.word(row, offset_of!(FlowSet, lock))?;
        loop {
            let mine = u64::from(sys::monotonic_s()) + 1;
            let held = lock.load(Ordering::Relaxed);
            let free = held == 0 || held + FLOW_LOCK_STALE_S < mine;
            if free && lock.compare_exchange(held, mine, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Ok(mine);
            }
            std::thread::yield_now();
        }
    }

    /// Stores an entry in a set whose lock is held, as the programs do.
    fn store(&self, row: usize, tag: u32, (key, flow): (&FlowKey, &Flow), replace: bool) -> io::Result<()> {
        let mut bytes = vec![0; FlowSet::SIZE];
        self.rows.read(row, &mut bytes)?;
        let set = FlowSet::from_bytes(&bytes).unwrap_or_else(FlowSet::zeroed);
        let is_held = of_set(&set).any(|(_, entry)| entry.tag == tag && entry.key == *key);
        if is_held && !replace {
            return Ok(());
        }
        let at = |words: &[u32; FLOW_WAYS], way: usize| words.get(way).copied().unwrap_or_default();
        let found = place::find(|way| at(&set.tags, way), tag, |number| number) as usize;
        let way = match found {
            FLOW_WAYS.. => {
                place::victim(|way| at(&set.tags, way), |way| at(&set.until_s, way), |number| number) as usize
            }
            way => way,
        };
        let half = |at| self.rows.half(row, at);
        let entry_at = offset_of!(FlowSet, entries) + way * FlowEntry::SIZE;
        half(tag_at(way))?.store(0, Ordering::SeqCst);
        half(entry_at + offset_of!(FlowEntry, tag))?.store(0, Ordering::SeqCst);
        let entry = FlowEntry { key: *key, flow: *flow, tag };
        // Its tag comes last, and the set's after it.
        for (at, word) in entry.as_bytes().as_chunks::<4>().0.iter().enumerate() {
            half(entry_at + 4 * at)?.store(u32::from_ne_bytes(*word), Ordering::Release);
        }
        half(until_at(way))?.store(until_s(flow.seen_s, flow.flags, key.proto), Ordering::Release);
        half(tag_at(way))?.store(tag, Ordering::SeqCst);
        Ok(())
    }
}

/// A service's backend as the table knows it.
type Part = (ServiceId, [u32; 4], u16, u8);

fn part(service: ServiceId, at: &BackendAddr) -> Part {
    let proto = match at.proto {
        Proto::Tcp => PROTO_TCP,
        Proto::Udp => PROTO_UDP,
        Proto::Sctp => PROTO_SCTP,
    };
    (service, encode::address(at.addr).words, at.port.to_be(), proto)
}

fn is_of(key: &FlowKey, flow: &Flow, lost: &BTreeSet<Part>) -> bool {
    let is = |addr: &Address, port| lost.contains(&(flow.service, addr.words, port, key.proto));
    // The backend is the new destination of the client's packets, and the source of its own.
    key.proto != PROTO_TCP && (is(&flow.dst, flow.dport) || is(&key.src, key.sport))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_entries_of_a_lost_backend_and_no_others() {
        let (client, vip) = ("198.51.100.2".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let backend = |last: u8, proto| BackendAddr { addr: [10, 0, 0, last].into(), port: 8080, proto };
        let lost: BTreeSet<_> =
            [Proto::Udp, Proto::Tcp].map(|proto| part(7, &backend(1, proto))).into_iter().collect();
        let entries = |service, to: BackendAddr| {
            let (_, words, port, proto) = part(service, &to);
            let to = Address { words };
            let (client, vip) = (encode::address(client), encode::address(vip));
            let key = FlowKey { src: client, dst: vip, proto, ..FlowKey::zeroed() };
            let flow = Flow { src: client, dst: to, dport: port, service, ..Flow::zeroed() };
            let back = FlowKey { src: to, dst: client, sport: port, proto, ..FlowKey::zeroed() };
            [(key, flow), (back, Flow { src: vip, dst: client, service, ..Flow::zeroed() })]
        };
        for (service, to, expected) in [
            (7, backend(1, Proto::Udp), true),
            (7, backend(2, Proto::Udp), false),
            (8, backend(1, Proto::Udp), false),
            (7, backend(1, Proto::Tcp), false),
        ] {
            for (key, flow) in entries(service, to) {
                assert_eq!(is_of(&key, &flow, &lost), expected, "{service} {to:?}");
            }
        }
    }
}
