//! How full the tables are, looked at now and then. Invariant: a table that fills up is warned of once, and again only
//! after it had room in between.

use super::super::{Dataplane, Pressure, StatsHandle};
use crate::limits;
use crate::service::Usage;
use std::collections::BTreeSet;

/// What was warned of already.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    warned: BTreeSet<&'static str>,
}

/// How full the planned part of the table is.
fn planned(usage: &Usage) -> Vec<Pressure> {
    let room = &usage.capacity;
    let part = |map, entries: usize, capacity: u32| Pressure {
        map,
        entries: entries as u64,
        capacity: u64::from(capacity),
    };
    vec![
        part("frontends", usage.frontends, room.frontends4.saturating_add(room.frontends6)),
        part("slots", usage.slots, room.slots),
        part("backends", usage.backends, room.backends),
        part("members", usage.members, room.members),
        part("ranges", usage.ranges, room.ranges),
        part("maglevs", usage.maglevs, room.maglevs),
    ]
}

impl Sampler {
    /// Looks at all tables, warns of those that fill up and puts the figures where `/metrics` finds them.
    pub(super) fn sample(&mut self, plane: &mut dyn Dataplane, usage: &Usage, stats: &StatsHandle) {
        let mut all = planned(usage);
        all.extend(plane.pressure());
        for full in self.newly_full(&all) {
            tracing::warn!(
                table = full.map,
                entries = full.entries,
                capacity = full.capacity,
                "a table of the service proxy is nearly full; --service-map-sizes makes it larger"
            );
        }
        stats.update(|figures| figures.pressure = all);
    }

    /// The tables that are nearly full and were not when they were last looked at.
    fn newly_full(&mut self, all: &[Pressure]) -> Vec<Pressure> {
        let mut found = Vec::new();
        for at in all {
            let full =
                at.capacity != 0 && at.entries * 100 >= at.capacity * limits::MAP_PRESSURE_WARN_PERCENT;
            if !full {
                self.warned.remove(at.map);
            } else if self.warned.insert(at.map) {
                found.push(*at);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_is_warned_of_once() {
        let mut sampler = Sampler::default();
        let at = |entries| [Pressure { map: "flows", entries, capacity: 100 }];
        assert_eq!(sampler.newly_full(&at(89)).len(), 0);
        assert_eq!(sampler.newly_full(&at(90)).len(), 1);
        assert_eq!(sampler.newly_full(&at(100)).len(), 0);
        assert_eq!(sampler.newly_full(&at(10)).len(), 0);
        assert_eq!(sampler.newly_full(&at(95)).len(), 1);
        assert_eq!(sampler.newly_full(&[Pressure { map: "empty", entries: 0, capacity: 0 }]).len(), 0);
    }
}
