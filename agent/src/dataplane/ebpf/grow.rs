//! Larger maps under programs at work. Invariant: until every hook has programs over the new maps the pins show the old
//! ones, whose content is copied and not moved; a start after a crash at any moment takes up what was left and finishes.
//!
//! New maps are pinned in a directory beside the others and filled; programs are loaded over them and over those maps
//! that stay; links are updated in place; then the new pins are moved over the old ones.

use super::flows::{self, FlowTable};
use super::load;
use super::map::{self, Map, SHAPES, Shape};
use super::sys::{self, ElemSize};
use crate::dataplane::{DataplaneError, MapSizes};
use aya::Ebpf;
use sheave_ebpf_abi::{Backend, Flow, FlowKey, FlowSet, Plain as _, flow_elements, map as names};
use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// Directory of maps that are about to replace others, below the versioned pin directory.
pub(super) const SIDE: &str = "grow";

/// Bytes of keys and values in one system call.
const BATCH_BYTES: usize = 1 << 20;

/// The entries that settings ask for; `None` for maps whose size is not a setting.
pub(super) fn wanted(name: &str, sizes: &MapSizes) -> Option<u32> {
    Some(match name {
        names::FRONTENDS4 | names::FRONTENDS6 => sizes.frontends,
        names::SLOTS => sizes.slots,
        names::BACKENDS => sizes.backends,
        names::FLOWS => flow_elements(sizes.flows),
        names::AFFINITY => sizes.affinity,
        names::MEMBERS => sizes.members,
        names::RANGES => sizes.ranges,
        names::MAGLEV => sizes.maglevs,
        _ => return None,
    })
}

/// Backends that are taken over from an earlier build's map at most (100 MB): their ids grew with every backend that ever was.
const TAKEN_OVER_MAX: u32 = 1 << 22;

/// The sizes with room for what maps of an earlier build hold: none is laid out anew smaller than it was.
fn roomy(dir: &Path, sizes: &MapSizes) -> Result<MapSizes, DataplaneError> {
    let mut sizes = *sizes;
    for shape in SHAPES {
        let Some((_, info)) = map::open_pinned(dir, shape)? else { continue };
        if !map::is_former(shape.name, &info) {
            continue;
        }
        match shape.name {
            names::SLOTS => sizes.slots = sizes.slots.max(info.max_entries),
            names::FLOWS => sizes.flows = sizes.flows.max(info.max_entries),
            names::BACKENDS => {
                let held = Map::<u32, Backend>::open(dir, shape.name)?.entries(usize::MAX)?;
                let rows = held.iter().map(|(id, _)| id.saturating_add(1)).max().unwrap_or(0);
                if rows > TAKEN_OVER_MAX {
                    tracing::warn!(
                        rows,
                        most = TAKEN_OVER_MAX,
                        "backends with larger ids are found anew when all services were told"
                    );
                }
                sizes.backends = sizes.backends.max(info.max_entries).max(rows.min(TAKEN_OVER_MAX));
            }
            _ => {}
        }
    }
    Ok(sizes)
}

/// Whether the programs write the map themselves, so that it is copied last.
fn is_live(name: &str) -> bool {
    name == names::FLOWS || name == names::AFFINITY
}

/// A map that is being replaced by a larger one.
struct Growing {
    shape: &'static Shape,
    old: OwnedFd,
    /// Its keys and values, which may be those of an earlier build.
    old_size: ElemSize,
    new: OwnedFd,
    /// Where the new one is pinned.
    side: PathBuf,
    /// How many rows an array has.
    rows: Option<u32>,
    /// Keys that were copied already, of a map that the programs write; `None` before the first copy.
    copied: Option<HashSet<Vec<u8>>>,
}

/// A growth that has begun.
pub(super) struct Growth {
    dir: PathBuf,
    maps: Vec<Growing>,
}

/// The entries that so many elements of a map have room for.
fn entries(shape: &Shape, elements: u32) -> u64 {
    if shape.name == names::FLOWS { flows::entries_of(elements) } else { u64::from(elements) }
}

/// Names of the maps in `dir` that are smaller than asked for, or as an earlier build made them. Says which ones are larger:
/// they keep their size.
fn too_small(dir: &Path, sizes: &MapSizes) -> Result<Vec<&'static str>, DataplaneError> {
    let mut small = Vec::new();
    for shape in SHAPES {
        let Some(wanted) = wanted(shape.name, sizes) else { continue };
        let Some((_, info)) = map::open_pinned(dir, shape)? else { continue };
        if map::is_former(shape.name, &info) {
            tracing::info!(map = shape.name, "map is laid out anew, its content stays");
            small.push(shape.name);
        } else if info.max_entries < wanted {
            tracing::info!(
                map = shape.name,
                from = entries(shape, info.max_entries),
                to = entries(shape, wanted),
                "map grows, its content stays"
            );
            small.push(shape.name);
        } else if info.max_entries > wanted {
            tracing::warn!(
                map = shape.name,
                entries = entries(shape, info.max_entries),
                asked = entries(shape, wanted),
                "map keeps its larger size: shrinking would lose content; `sheave down` removes it"
            );
        }
    }
    Ok(small)
}

/// Removes maps that an earlier build was about to put in the place of others: they are begun anew.
fn forget_former(side: &Path) -> Result<(), DataplaneError> {
    for shape in SHAPES {
        if map::open_pinned(side, shape)?.is_some_and(|(_, info)| map::is_former(shape.name, &info)) {
            super::link::unlink(&side.join(shape.name))?;
        }
    }
    Ok(())
}

/// Begins to grow what is smaller than `sizes` ask for, or goes on with what an earlier start began: makes the maps,
/// loads the programs over them and copies everything but what the programs write. `None` when nothing has to grow.
pub(super) fn begin(dir: &Path, sizes: &MapSizes) -> Result<Option<(Growth, Ebpf)>, DataplaneError> {
    let side = dir.join(SIDE);
    forget_former(&side)?;
    let mut growing: Vec<&'static str> =
        SHAPES.iter().map(|shape| shape.name).filter(|name| side.join(name).exists()).collect();
    for name in too_small(dir, sizes)? {
        if !growing.contains(&name) {
            growing.push(name);
        }
    }
    if growing.is_empty() {
        remove_side(dir)?;
        return Ok(None);
    }
    fs::create_dir_all(&side).map_err(|source| DataplaneError::Pin {
        op: "make",
        path: side.clone(),
        source,
    })?;
    let object = load::load_at(&roomy(dir, sizes)?, |name| {
        if growing.contains(&name) { side.join(name) } else { dir.join(name) }
    })?;
    let mut maps = Vec::new();
    for shape in SHAPES.iter().filter(|shape| growing.contains(&shape.name)) {
        // Without an old one the pin was moved already, and another start died right after it.
        let (Some((old, old_info)), Some((new, info))) =
            (map::open_pinned(dir, shape)?, map::open_pinned(&side, shape)?)
        else {
            continue;
        };
        let rows = shape.is_array().then_some(info.max_entries);
        let old_size = ElemSize { key: old_info.key_size as usize, value: old_info.value_size as usize };
        let mut growing = Growing { shape, old, old_size, new, side: side.clone(), rows, copied: None };
        if !is_live(shape.name) {
            growing.copy_all()?;
        }
        maps.push(growing);
    }
    Ok(Some((Growth { dir: dir.to_owned(), maps }, object)))
}

impl Growth {
    /// Copies what the programs write; to be called right before the links are updated, and again right after.
    pub(super) fn copy_live(&mut self) -> Result<(), DataplaneError> {
        for growing in self.maps.iter_mut().filter(|growing| is_live(growing.shape.name)) {
            match growing.copied.take() {
                None => growing.copy_all()?,
                Some(copied) => growing.copy_missed(&copied)?,
            }
        }
        Ok(())
    }

    /// Moves the new maps' pins over the old ones.
    pub(super) fn finish(self) -> Result<(), DataplaneError> {
        for growing in &self.maps {
            let (from, to) =
                (self.dir.join(SIDE).join(growing.shape.name), self.dir.join(growing.shape.name));
            fs::rename(&from, &to).map_err(|source| DataplaneError::Pin {
                op: "replace",
                path: to,
                source,
            })?;
        }
        remove_side(&self.dir)
    }
}

/// Removes the side directory and what is in it; one that does not exist is fine.
pub(super) fn remove_side(dir: &Path) -> Result<(), DataplaneError> {
    let side = dir.join(SIDE);
    for entry in fs::read_dir(&side).into_iter().flatten().flatten() {
        super::link::unlink(&entry.path())?;
    }
    match fs::remove_dir(&side) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DataplaneError::Pin { op: "remove", path: side, source })
        }
        _ => Ok(()),
    }
}

impl Growing {
    fn error(&self, op: &'static str) -> impl Fn(io::Error) -> DataplaneError + use<> {
        let map = self.shape.name;
        move |source| DataplaneError::Map { op, map, source }
    }

    fn size(&self) -> ElemSize {
        self.shape.elem_size()
    }

    /// Walks the old map and hands out keys and values, many at once.
    fn walk(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), DataplaneError>,
    ) -> Result<(), DataplaneError> {
        let size = self.old_size;
        let mut room = (BATCH_BYTES / (size.key + size.value)).max(1);
        let mut cursor = None;
        loop {
            let (mut keys, mut values) = (vec![0; room * size.key], vec![0; room * size.value]);
            let read = sys::lookup_batch(self.old.as_fd(), size, cursor.as_ref(), &mut keys, &mut values);
            let batch = match read {
                Ok(batch) => batch,
                // One bucket has more entries than there is room for.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 26 => {
                    room *= 2;
                    continue;
                }
                Err(e) => return Err(self.error("read")(e)),
            };
            let (keys, values) = (keys.get(..batch.count * size.key), values.get(..batch.count * size.value));
            each(keys.unwrap_or_default(), values.unwrap_or_default())?;
            match batch.next {
                Some(next) => cursor = Some(next),
                None => return Ok(()),
            }
        }
    }

    fn copy_all(&mut self) -> Result<(), DataplaneError> {
        if self.shape.name == names::FLOWS {
            return self.copy_flows();
        }
        let mut copied = HashSet::new();
        let live = is_live(self.shape.name);
        self.walk(|keys, values| {
            let (mut fitting, size) = ((Vec::new(), Vec::new()), self.size());
            for (key, value) in keys.chunks_exact(size.key).zip(values.chunks_exact(size.value)) {
                if self.has_place(key) {
                    fitting.0.extend_from_slice(key);
                    fitting.1.extend_from_slice(value);
                }
            }
            sys::update_batch(self.new.as_fd(), size, &fitting.0, &fitting.1)
                .map_err(|stopped| self.error("write")(stopped.source))?;
            if live {
                copied.extend(keys.chunks_exact(self.size().key).map(<[u8]>::to_vec));
            }
            Ok(())
        })?;
        self.copied = Some(copied);
        Ok(())
    }

    /// Whether the new map can have an entry with this key.
    fn has_place(&self, key: &[u8]) -> bool {
        let index = key.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        self.rows.is_none_or(|rows| index.is_some_and(|index| index < rows))
    }

    /// The entries of the old connection table, whichever build made it.
    fn flows(&self) -> Result<Vec<(FlowKey, Flow)>, DataplaneError> {
        let mut found = Vec::new();
        self.walk(|keys, values| {
            if self.old_size.value == FlowSet::SIZE {
                // The head holds no entries.
                let sets = values.chunks_exact(FlowSet::SIZE).zip(keys.chunks_exact(4));
                let sets = sets.filter(|(_, index)| **index != [0; 4]);
                for set in sets.filter_map(|(value, _)| FlowSet::from_bytes(value)) {
                    found.extend(flows::of_set(&set).map(|(_, entry)| (entry.key, entry.flow)));
                }
            } else {
                let pairs = keys.chunks_exact(FlowKey::SIZE).zip(values.chunks_exact(Flow::SIZE));
                found.extend(
                    pairs.filter_map(|(key, value)| {
                        Some((FlowKey::from_bytes(key)?, Flow::from_bytes(value)?))
                    }),
                );
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// [`Self::copy_all`] for the connection table, whose entries have other places in the new one.
    fn copy_flows(&mut self) -> Result<(), DataplaneError> {
        let table = FlowTable::open(&self.side)?;
        let writer = table.writer()?;
        let mut copied = HashSet::new();
        for (key, flow) in self.flows()? {
            writer.put(&key, &flow, true)?;
            copied.insert(key.as_bytes().to_vec());
        }
        self.copied = Some(copied);
        Ok(())
    }

    /// [`Self::copy_missed`] for the connection table.
    fn copy_missed_flows(&self, copied: &HashSet<Vec<u8>>) -> Result<(), DataplaneError> {
        let table = FlowTable::open(&self.side)?;
        let writer = table.writer()?;
        let missed = self.flows()?.into_iter().filter(|(key, _)| !copied.contains(key.as_bytes()));
        missed.into_iter().try_for_each(|(key, flow)| writer.put(&key, &flow, false))
    }

    /// Copies entries that came after they were copied, unless the new map has them by now.
    fn copy_missed(&self, copied: &HashSet<Vec<u8>>) -> Result<(), DataplaneError> {
        if self.shape.name == names::FLOWS {
            return self.copy_missed_flows(copied);
        }
        let size = self.size();
        self.walk(|keys, values| {
            for (key, value) in keys.chunks_exact(size.key).zip(values.chunks_exact(size.value)) {
                if copied.contains(key) {
                    continue;
                }
                match sys::insert(self.new.as_fd(), size, key, value) {
                    Err(e) if e.raw_os_error() != Some(libc::EEXIST) => return Err(self.error("write")(e)),
                    _ => {}
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_its_map() {
        let sizes = MapSizes {
            frontends: 1,
            slots: 2,
            backends: 3,
            flows: 4,
            affinity: 5,
            members: 6,
            ranges: 7,
            maglevs: 8,
        };
        let mut found: Vec<u32> = names::ALL.iter().filter_map(|name| wanted(name, &sizes)).collect();
        found.sort_unstable();
        found.dedup();
        // Four flows are a set, beside the head of the table.
        assert_eq!(found, [1, 2, 3, 5, 6, 7, 8]);
    }
}
