//! Pinned maps. Invariant: a map is used only after the kernel said that its type, key, value and flags are what this
//! build's layouts say.

use super::flows::FlowTable;
use super::rows::{Access, Rows};
use super::sys::{self, ElemSize, MapInfo};
use crate::dataplane::DataplaneError;
use crate::limits;
use sheave_ebpf_abi::{self as abi, Plain, map, net_map};
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// BPF_MAP_TYPE_* (uapi/linux/bpf.h).
mod kind {
    pub(super) const HASH: u32 = 1;
    pub(super) const ARRAY: u32 = 2;
    pub(super) const PROG_ARRAY: u32 = 3;
    pub(super) const PERCPU_ARRAY: u32 = 6;
    pub(super) const LRU_HASH: u32 = 9;
    pub(super) const LPM_TRIE: u32 = 11;
    pub(super) const SK_STORAGE: u32 = 24;
    pub(super) const RINGBUF: u32 = 27;
}

/// BPF_F_NO_PREALLOC (uapi/linux/bpf.h).
const NO_PREALLOC: u32 = 1;
/// BPF_F_MMAPABLE (uapi/linux/bpf.h).
const MMAPABLE: u32 = 1 << 10;

/// From so many rows on they are written in the array's memory, which has to be mapped; fewer by a system call.
const MAPPED_FROM: usize = 128;

/// What a map of this ABI version looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    kind: u32,
    key: usize,
    value: usize,
    flags: u32,
}

impl Shape {
    /// Sizes of a key and a value, as the kernel copies them.
    pub(super) const fn elem_size(&self) -> ElemSize {
        ElemSize { key: self.key, value: self.value }
    }
}

const fn shape<K: Plain, V: Plain>(name: &'static str, kind: u32, flags: u32) -> Shape {
    Shape { name, kind, key: size_of::<K>(), value: size_of::<V>(), flags }
}

/// Every map of this ABI version.
pub(super) const SHAPES: &[Shape] = &[
    shape::<abi::Frontend4Key, abi::Frontend>(map::FRONTENDS4, kind::HASH, NO_PREALLOC),
    shape::<abi::Frontend6Key, abi::Frontend>(map::FRONTENDS6, kind::HASH, NO_PREALLOC),
    shape::<u32, abi::Slot>(map::SLOTS, kind::ARRAY, MMAPABLE),
    shape::<u32, abi::Backend>(map::BACKENDS, kind::ARRAY, MMAPABLE),
    shape::<u32, abi::ReverseEntry>(map::REVERSE_SK, kind::SK_STORAGE, NO_PREALLOC),
    shape::<u32, abi::ReverseEntry>(map::PEERS, kind::ARRAY, 0),
    shape::<u32, u64>(map::PEER_OWNERS, kind::ARRAY, 0),
    shape::<abi::ReverseKey, abi::ReverseValue>(map::REVERSE_LRU, kind::LRU_HASH, 0),
    shape::<u32, abi::FlowSet>(map::FLOWS, kind::ARRAY, MMAPABLE),
    shape::<abi::FragmentKey, abi::Fragment>(map::FRAGMENTS, kind::LRU_HASH, 0),
    shape::<u32, u32>(map::CALLS, kind::PROG_ARRAY, 0),
    shape::<abi::Address, u32>(map::NODE_ADDRS, kind::HASH, NO_PREALLOC),
    shape::<u32, abi::Config>(map::CONFIG, kind::ARRAY, 0),
    shape::<u32, u64>(map::COUNTERS, kind::PERCPU_ARRAY, 0),
    shape::<abi::AffinityKey, abi::Affinity>(map::AFFINITY, kind::LRU_HASH, 0),
    shape::<abi::MemberKey, u32>(map::MEMBERS, kind::HASH, NO_PREALLOC),
    shape::<abi::RangeKey, u32>(map::RANGES, kind::LPM_TRIE, NO_PREALLOC),
    shape::<u32, abi::MaglevTable>(map::MAGLEV, kind::ARRAY, 0),
    Shape { name: map::EVENTS, kind: kind::RINGBUF, key: 0, value: 0, flags: 0 },
    shape::<u32, u64>(map::NETS, kind::ARRAY, 0),
    shape::<u32, u32>(map::MARKS, kind::ARRAY, 0),
    shape::<u32, u32>(map::LISTEN, kind::ARRAY, 0),
    shape::<u32, u64>(map::ANSWERS, kind::PERCPU_ARRAY, 0),
    shape::<u32, abi::Door>(map::DOORS, kind::ARRAY, 0),
];

/// Shapes that maps of this ABI version had in earlier builds, whose content is copied at a start.
const FORMER: &[Shape] = &[
    shape::<abi::FlowKey, abi::Flow>(map::FLOWS, kind::LRU_HASH, 0),
    shape::<u32, abi::Slot>(map::SLOTS, kind::ARRAY, 0),
    shape::<u32, abi::Backend>(map::BACKENDS, kind::HASH, NO_PREALLOC),
];

/// Every map of the network object, which are pinned in a directory of their own.
pub(super) const NET_SHAPES: &[Shape] = &[
    shape::<u32, abi::NetConfig>(net_map::CONFIG, kind::ARRAY, 0),
    shape::<abi::Address, abi::Endpoint>(net_map::ENDPOINTS, kind::HASH, NO_PREALLOC),
    shape::<abi::NetKey, u32>(net_map::RANGES, kind::LPM_TRIE, NO_PREALLOC),
    shape::<abi::VerdictKey, u32>(net_map::VERDICTS, kind::HASH, NO_PREALLOC),
    shape::<abi::PortKey, u32>(net_map::PORTS, kind::LPM_TRIE, NO_PREALLOC),
    shape::<abi::FlowKey, abi::NetFlow>(net_map::FLOWS, kind::LRU_HASH, 0),
    shape::<u32, u64>(net_map::COUNTERS, kind::PERCPU_ARRAY, 0),
];

impl Shape {
    /// Whether keys are the places of rows that are always there.
    pub(super) fn is_array(&self) -> bool {
        self.kind == kind::ARRAY
    }

    fn is_of(&self, info: &MapInfo) -> bool {
        (info.kind, info.key_size as usize, info.value_size as usize, info.flags)
            == (self.kind, self.key, self.value, self.flags)
    }
}

/// Whether an earlier build made the map, with another shape.
pub(super) fn is_former(name: &str, info: &MapInfo) -> bool {
    FORMER.iter().any(|former| former.name == name && former.is_of(info))
}

/// Opens a pinned map and checks it; `Ok(None)` when nothing is pinned there.
pub(super) fn open_pinned(dir: &Path, shape: &Shape) -> Result<Option<(OwnedFd, MapInfo)>, DataplaneError> {
    let path = dir.join(shape.name);
    let fd = match sys::obj_get(&path) {
        Ok(fd) => fd,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DataplaneError::Pin { op: "open", path, source }),
    };
    let info = sys::map_info(fd.as_fd()).map_err(|source| DataplaneError::Pin {
        op: "inspect",
        path: path.clone(),
        source,
    })?;
    if !shape.is_of(&info) && !is_former(shape.name, &info) {
        let held = (info.kind, info.key_size, info.value_size, info.flags);
        return Err(DataplaneError::PinnedMapShape {
            path,
            held: format!("type {} key {} value {} flags {:#x}", held.0, held.1, held.2, held.3),
            wanted: format!(
                "type {} key {} value {} flags {:#x}",
                shape.kind, shape.key, shape.value, shape.flags
            ),
        });
    }
    Ok(Some((fd, info)))
}

/// A map with keys `K` and values `V`.
#[derive(Debug)]
pub(super) struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    max_entries: u32,
    /// Its memory may be mapped.
    mapped: bool,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Plain, V: Plain> Map<K, V> {
    const SIZE: ElemSize = ElemSize { key: size_of::<K>(), value: size_of::<V>() };

    /// The map pinned as `name` in `dir`.
    pub(super) fn open(dir: &Path, name: &'static str) -> Result<Self, DataplaneError> {
        let missing = || DataplaneError::Pin {
            op: "open",
            path: dir.join(name),
            source: io::Error::from(io::ErrorKind::NotFound),
        };
        let mut shapes = SHAPES.iter().chain(NET_SHAPES);
        let shape = shapes.find(|shape| shape.name == name).ok_or_else(missing)?;
        let (fd, info) = open_pinned(dir, shape)?.ok_or_else(missing)?;
        let mapped = info.flags & MMAPABLE != 0;
        Ok(Self { fd, name, max_entries: info.max_entries, mapped, types: PhantomData })
    }

    /// Whether its memory may be mapped.
    pub(super) fn is_mappable(&self) -> bool {
        self.mapped
    }

    pub(super) fn max_entries(&self) -> u32 {
        self.max_entries
    }

    pub(super) fn error(&self, op: &'static str, source: io::Error) -> DataplaneError {
        DataplaneError::Map { op, map: self.name, source }
    }

    pub(super) fn get(&self, key: &K) -> Result<Option<V>, DataplaneError> {
        let mut value = V::zeroed().as_bytes().to_vec();
        match sys::lookup(self.fd.as_fd(), Self::SIZE, key.as_bytes(), &mut value) {
            Ok(()) => Ok(V::from_bytes(&value)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.error("read", e)),
        }
    }

    pub(super) fn put(&self, key: &K, value: &V) -> Result<(), DataplaneError> {
        sys::update(self.fd.as_fd(), Self::SIZE, key.as_bytes(), value.as_bytes())
            .map_err(|e| self.error("write", e))
    }

    /// Writes all entries, in order.
    pub(super) fn put_all(
        &self,
        entries: impl ExactSizeIterator<Item = (K, V)>,
    ) -> Result<(), DataplaneError> {
        let mut entries = entries.peekable();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        while entries.peek().is_some() {
            keys.clear();
            values.clear();
            for (key, value) in entries.by_ref().take(limits::BPF_BATCH_ELEMENTS) {
                keys.extend_from_slice(key.as_bytes());
                values.extend_from_slice(value.as_bytes());
            }
            sys::update_batch(self.fd.as_fd(), Self::SIZE, &keys, &values)
                .map_err(|stopped| self.error("write", stopped.source))?;
        }
        Ok(())
    }

    /// Deletes all keys; those that are gone already don't count.
    pub(super) fn delete_all(&self, keys: impl Iterator<Item = K>) -> Result<(), DataplaneError> {
        let mut bytes = Vec::new();
        for key in keys {
            bytes.extend_from_slice(key.as_bytes());
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(limits::BPF_BATCH_ELEMENTS * Self::SIZE.key)];
            match sys::delete_batch(self.fd.as_fd(), Self::SIZE, chunk) {
                Ok(()) => rest = &rest[chunk.len()..],
                Err(stopped) if stopped.source.raw_os_error() == Some(libc::ENOENT) => {
                    // One was not there: go on behind it.
                    let done = (stopped.done + 1) * Self::SIZE.key;
                    rest = rest.get(done..).unwrap_or_default();
                }
                Err(stopped) => return Err(self.error("delete from", stopped.source)),
            }
        }
        Ok(())
    }

    pub(super) fn delete(&self, key: &K) -> Result<(), DataplaneError> {
        match sys::delete(self.fd.as_fd(), Self::SIZE, key.as_bytes()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.error("delete from", e)),
            _ => Ok(()),
        }
    }

    /// Reads the first `limit` entries in the map's own order.
    pub(super) fn entries(&self, limit: usize) -> Result<Vec<(K, V)>, DataplaneError> {
        let mut found = Vec::new();
        let mut room = limits::BPF_BATCH_ELEMENTS.min(self.max_entries as usize).max(1);
        let mut cursor = None;
        let (mut keys, mut values) = (vec![0; room * Self::SIZE.key], vec![0; room * Self::SIZE.value]);
        while found.len() < limit {
            let read =
                sys::lookup_batch(self.fd.as_fd(), Self::SIZE, cursor.as_ref(), &mut keys, &mut values);
            let batch = match read {
                Ok(batch) => batch,
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < self.max_entries as usize => {
                    room *= 2;
                    keys.resize(room * Self::SIZE.key, 0);
                    values.resize(room * Self::SIZE.value, 0);
                    continue;
                }
                Err(e) => return Err(self.error("read", e)),
            };
            let pairs = keys.chunks_exact(Self::SIZE.key).zip(values.chunks_exact(Self::SIZE.value));
            found.extend(
                pairs
                    .take(batch.count.min(limit - found.len()))
                    .filter_map(|(key, value)| Some((K::from_bytes(key)?, V::from_bytes(value)?))),
            );
            match batch.next {
                Some(next) => cursor = Some(next),
                None => break,
            }
        }
        Ok(found)
    }
}

impl<V: Plain> Map<u32, V> {
    /// Writes all rows, in order: many of them where they lie in memory, if the map lets us, which takes a
    /// twentieth of the time.
    pub(super) fn put_rows(&self, rows: &[(u32, V)]) -> Result<(), DataplaneError> {
        let from = rows.iter().map(|(index, _)| *index).min().unwrap_or(0);
        let to = rows.iter().map(|(index, _)| *index + 1).max().unwrap_or(0);
        // Not when they lie far apart.
        let dense = rows.len() >= MAPPED_FROM && (to - from) as usize / 64 <= rows.len();
        match self.memory(from..to, dense, Access::Write) {
            Some(memory) => rows
                .iter()
                .try_for_each(|(index, value)| memory.write((index - from) as usize, value.as_bytes()))
                .map_err(|e| self.error("write", e)),
            None => self.put_all(rows.iter().map(|(index, value)| (*index, *value))),
        }
    }

    /// Those of the first `count` rows that are to be kept.
    pub(super) fn rows(
        &self,
        count: usize,
        keep: impl Fn(u32, &V) -> bool,
    ) -> Result<Vec<(u32, V)>, DataplaneError> {
        let to = u32::try_from(count).unwrap_or(u32::MAX).min(self.max_entries);
        let mut found = Vec::new();
        let Some(memory) = self.memory(0..to, true, Access::Read) else {
            found = self.entries(count)?;
            found.retain(|(index, value)| keep(*index, value));
            return Ok(found);
        };
        let mut bytes = vec![0; size_of::<V>()];
        for index in 0..to {
            memory.read(index as usize, &mut bytes).map_err(|e| self.error("read", e))?;
            found
                .extend(V::from_bytes(&bytes).filter(|value| keep(index, value)).map(|value| (index, value)));
        }
        Ok(found)
    }

    /// Part of the memory of a map that lets itself be mapped.
    pub(super) fn mapped(&self, rows: Range<u32>, access: Access) -> Result<Rows, DataplaneError> {
        if !self.mapped || rows.end > self.max_entries {
            return Err(self.error("map the memory of", io::Error::from(io::ErrorKind::Unsupported)));
        }
        Rows::map(self.fd.as_fd(), size_of::<V>(), rows, access)
            .map_err(|source| self.error("map the memory of", source))
    }

    /// Part of the map's memory, where it can be had and is worth it.
    fn memory(&self, rows: Range<u32>, worth_it: bool, access: Access) -> Option<Rows> {
        let within = !rows.is_empty() && rows.end <= self.max_entries;
        if !(self.mapped && worth_it && within) {
            return None;
        }
        Rows::map(self.fd.as_fd(), size_of::<V>(), rows, access)
            .inspect_err(
                |error| tracing::debug!(%error, map = self.name, "not mapped; written by system calls"),
            )
            .ok()
    }
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// The map's name.
    pub map: &'static str,
    /// Entries in it; an estimate for large maps.
    pub entries: u64,
    /// Entries that it has room for.
    pub capacity: u64,
}

/// How full the maps are that the programs themselves fill. Costs one or two system calls a map, however full it is.
pub(super) fn pressure(dir: &Path) -> Vec<Pressure> {
    let counted = [
        FlowTable::open(dir).and_then(|table| table.pressure()),
        Map::<abi::AffinityKey, abi::Affinity>::open(dir, map::AFFINITY).and_then(|map| map.pressure()),
        Map::<abi::ReverseKey, abi::ReverseValue>::open(dir, map::REVERSE_LRU).and_then(|map| map.pressure()),
    ];
    let told = |error: DataplaneError| {
        tracing::warn!(error = &error as &dyn std::error::Error, "how full a map is");
    };
    counted.into_iter().filter_map(|pressure| pressure.map_err(told).ok()).collect()
}

/// Entries of a hash map with `buckets` of them, of whose first `walked` buckets `seen` entries were counted.
pub(super) fn extrapolate(seen: u64, walked: u64, buckets: u64) -> u64 {
    seen.saturating_mul(buckets).checked_div(walked).map_or(seen, |all| all.max(seen))
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// How full the (hash) map is, from its first buckets when it is large: keys are spread evenly.
    fn pressure(&self) -> Result<Pressure, DataplaneError> {
        let capacity = u64::from(self.max_entries);
        let mut room = limits::BPF_BATCH_ELEMENTS.min(self.max_entries as usize).max(1);
        loop {
            let (mut keys, mut values) = (vec![0; room * Self::SIZE.key], vec![0; room * Self::SIZE.value]);
            let batch = match sys::lookup_batch(self.fd.as_fd(), Self::SIZE, None, &mut keys, &mut values) {
                Ok(batch) => batch,
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < self.max_entries as usize => {
                    room *= 2;
                    continue;
                }
                Err(e) => return Err(self.error("read", e)),
            };
            let seen = batch.count as u64;
            let entries = match batch.next {
                // A hash map has as many buckets as entries, rounded up to a power of two.
                Some(next) => extrapolate(seen, u64::from(next.bucket()), capacity.next_power_of_two()),
                None => seen,
            };
            return Ok(Pressure { map: self.name, entries: entries.min(capacity), capacity });
        }
    }
}

/// The per-CPU counters.
#[derive(Debug)]
pub struct Counters {
    fd: OwnedFd,
    cpus: usize,
}

/// Sums over all CPUs of the first `count` elements of a per-CPU array of numbers.
pub(super) fn sums(dir: &Path, name: &'static str, count: usize) -> Result<Vec<u64>, DataplaneError> {
    let Map { fd, .. } = Map::<u32, u64>::open(dir, name)?;
    let cpus = sys::possible_cpus().map_err(|source| DataplaneError::Host { op: "count CPUs", source })?;
    let size = ElemSize { key: 4, value: 8 * cpus };
    let mut value = vec![0; size.value];
    let mut sums = Vec::with_capacity(count);
    for index in 0..count as u32 {
        sys::lookup(fd.as_fd(), size, &index.to_ne_bytes(), &mut value)
            .map_err(|source| DataplaneError::Map { op: "read", map: name, source })?;
        sums.push(value.chunks_exact(8).filter_map(u64::from_bytes).fold(0, u64::wrapping_add));
    }
    Ok(sums)
}

impl Counters {
    pub(super) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        let Map { fd, .. } = Map::<u32, u64>::open(dir, map::COUNTERS)?;
        let cpus =
            sys::possible_cpus().map_err(|source| DataplaneError::Host { op: "count CPUs", source })?;
        Ok(Self { fd, cpus })
    }

    /// Every reason and how often it occurred on all CPUs since the maps were made.
    pub fn read(&self) -> Result<Vec<(abi::Counter, u64)>, DataplaneError> {
        let size = ElemSize { key: 4, value: 8 * self.cpus };
        let mut value = vec![0; size.value];
        abi::COUNTERS
            .iter()
            .map(|counter| {
                sys::lookup(self.fd.as_fd(), size, &(*counter as u32).to_ne_bytes(), &mut value)
                    .map_err(|source| DataplaneError::Map { op: "read", map: map::COUNTERS, source })?;
                let sum = value.chunks_exact(8).filter_map(u64::from_bytes).fold(0, u64::wrapping_add);
                Ok((*counter, sum))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fullness_is_extrapolated_from_buckets() {
        assert_eq!(extrapolate(10, 0, 1024), 10);
        assert_eq!(extrapolate(4000, 8192, 65_536), 32_000);
        assert_eq!(extrapolate(0, 512, 1024), 0);
    }

    #[test]
    fn every_map_of_the_abi_has_a_shape() {
        let shapes: Vec<_> = SHAPES.iter().map(|s| s.name).collect();
        assert_eq!(shapes, map::ALL);
        let shapes: Vec<_> = NET_SHAPES.iter().map(|s| s.name).collect();
        assert_eq!(shapes, net_map::ALL);
    }
}
