//! Doors: pods' devices by which connections go past the node's stack. Invariant: a device is a door only while the program
//! that takes its pod's answers past the stack is at it; it is none before that comes and none any more before that goes.

use super::map::Map;
use crate::dataplane::{DataplaneConfig, DataplaneError};
use crate::network;
use sheave_ebpf_abi::{Door, Plain as _, door_flag, map as names};
use std::collections::BTreeMap;
use std::path::Path;

/// The doors as the kernel has them, by their places.
#[derive(Debug)]
pub(super) struct Doors {
    map: Map<u32, Door>,
    held: BTreeMap<u16, Door>,
}

impl Doors {
    /// Reads what the map pinned in `dir` holds.
    pub(super) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        let map: Map<u32, Door> = Map::open(dir, names::DOORS)?;
        let all = map.entries(usize::MAX)?.into_iter();
        let held =
            all.filter(|(_, door)| door.device != 0).map(|(place, door)| (place as u16, door)).collect();
        Ok(Self { map, held })
    }

    /// Those of a map that was just made: to read its 65,536 places takes longer than to make it.
    pub(super) fn none(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self { map: Map::open(dir, names::DOORS)?, held: BTreeMap::new() })
    }

    /// Whether these are the doors.
    pub(super) fn are(&self, wanted: &BTreeMap<u16, Door>) -> bool {
        self.held == *wanted
    }

    /// Shuts all doors but these.
    pub(super) fn keep(&mut self, wanted: &BTreeMap<u16, Door>) -> Result<(), DataplaneError> {
        let gone: Vec<u16> =
            self.held.iter().filter(|(at, door)| wanted.get(at) != Some(door)).map(|(at, _)| *at).collect();
        for place in gone {
            self.map.put(&u32::from(place), &Door::zeroed())?;
            self.held.remove(&place);
        }
        Ok(())
    }

    /// Opens these doors.
    pub(super) fn open_all(&mut self, wanted: &BTreeMap<u16, Door>) -> Result<(), DataplaneError> {
        for (place, door) in wanted {
            if self.held.get(place) != Some(door) {
                self.map.put(&u32::from(*place), door)?;
                self.held.insert(*place, *door);
            }
        }
        Ok(())
    }
}

/// Pods' devices by which connections go past the node's stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostRouting {
    /// How many there are.
    pub devices: usize,
    /// Those of them whose pods packets enter at once.
    pub entered: usize,
}

/// Reads the pins below `pin_dir`. Those of a build without host routing have no doors.
///
/// # Errors
/// When they are there and can't be read.
pub fn host_routing(pin_dir: &Path) -> Result<HostRouting, DataplaneError> {
    let dir = super::versioned(pin_dir);
    if !dir.join(names::DOORS).exists() {
        return Ok(HostRouting::default());
    }
    let doors = Doors::open(&dir)?.held;
    let entered = doors.values().filter(|door| door.flags & door_flag::ENTER != 0).count();
    Ok(HostRouting { devices: doors.len(), entered })
}

/// The doors that there are to be.
pub(super) fn wanted(config: &DataplaneConfig) -> Result<BTreeMap<u16, Door>, DataplaneError> {
    if !config.host_routing || config.masquerade_all {
        return Ok(BTreeMap::new());
    }
    let devices = network::pod_devices(&config.pod_links)
        .map_err(|source| DataplaneError::Host { op: "list pods' devices", source })?;
    let doors = devices.into_iter().filter(|device| !is_uplink(config, device.index)).map(|device| {
        // Who enters meets neither the device's queue nor its programs.
        let enter = device.across && !device.queued && !config.watched_pod_links;
        let flags = if enter { door_flag::ENTER } else { 0 };
        let mtu = u16::try_from(device.mtu).unwrap_or(u16::MAX);
        // Place 0 stands for no door, and of two devices with one place the later one has it.
        (device.index as u16, Door { device: device.index, mtu, flags })
    });
    Ok(doors.filter(|(place, _)| *place != 0).collect())
}

fn is_uplink(config: &DataplaneConfig, index: u32) -> bool {
    super::device_name(index).is_some_and(|name| config.uplinks.contains(&name))
}
