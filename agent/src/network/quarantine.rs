//! Addresses that were freed and are not given again for a while. Invariant: an address waits from the last time that it
//! was freed; who had it is remembered as long.
//!
//! What is kept lies in a few rows that move on as one: thousands of names a minute, each in a place of its own, would
//! hold on to as many pages between them.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Instant;

use super::ipam::Pool;

/// The addresses, and who had them.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// From when on an address may be given again.
    until: HashMap<IpAddr, Instant>,
    /// The first to end comes first, here and in the rows that it counts.
    rows: VecDeque<Row>,
    names: VecDeque<u8>,
    ips: VecDeque<IpAddr>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    until: Instant,
    name_bytes: usize,
    ips: usize,
}

impl Quarantine {
    /// Addresses that `uid` had wait until then; calls come in the order of the times.
    pub(super) fn add(&mut self, uid: &str, ips: &[IpAddr], until: Instant) {
        self.until.extend(ips.iter().map(|ip| (*ip, until)));
        self.rows.push_back(Row { until, name_bytes: uid.len(), ips: ips.len() });
        self.names.extend(uid.as_bytes());
        self.ips.extend(ips);
    }

    /// Lets go of who waited long enough, one a call.
    pub(super) fn end_next(&mut self, now: Instant) -> Option<String> {
        let row = *self.rows.front().filter(|row| row.until <= now)?;
        self.rows.pop_front();
        for ip in self.ips.drain(..row.ips) {
            // Somebody may have asked for it by name meanwhile, and given it back.
            if self.until.get(&ip).is_some_and(|until| *until <= now) {
                self.until.remove(&ip);
            }
        }
        let name: Vec<u8> = self.names.drain(..row.name_bytes).collect();
        if self.rows.is_empty() {
            // Room for a busy moment's thousands.
            *self = Self::default();
        }
        Some(text(&name))
    }

    /// Whether the address waits, or would be let go with the next.
    pub(super) fn has(&self, ip: IpAddr) -> bool {
        self.until.contains_key(&ip)
    }

    /// How many addresses of the pool wait beyond `now`.
    pub(super) fn waiting(&self, pool: &Pool, now: Instant) -> usize {
        self.until.iter().filter(|(ip, until)| pool.has(**ip) && **until > now).count()
    }

    /// Who had what waits.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = self.names.iter().copied();
        self.rows.iter().map(|row| text(&names.by_ref().take(row.name_bytes).collect::<Vec<_>>())).collect()
    }

    #[cfg(test)]
    pub(super) fn end_all(&mut self) {
        let now = Instant::now();
        self.until.values_mut().for_each(|until| *until = now);
        self.rows.iter_mut().for_each(|row| row.until = now);
    }
}

/// A name, which went in as text.
fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_address_waits_from_when_it_was_freed_last() {
        let (a, b, c) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), "fd00::1".parse().unwrap());
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut quarantine = Quarantine::default();
        quarantine.add("net/one/eth0", &[a, c], at(1));
        quarantine.add("zwei-ä", &[b], at(2));
        quarantine.add("net/three/eth0", &[a], at(3));
        assert_eq!(quarantine.names(), ["net/one/eth0", "zwei-ä", "net/three/eth0"]);
        assert_eq!(quarantine.end_next(start), None);
        assert_eq!(quarantine.end_next(at(1)).as_deref(), Some("net/one/eth0"));
        assert_eq!(quarantine.end_next(at(1)), None);
        assert!(quarantine.has(a) && quarantine.has(b) && !quarantine.has(c));
        assert_eq!(quarantine.names(), ["zwei-ä", "net/three/eth0"]);
        assert_eq!(quarantine.end_next(at(3)).as_deref(), Some("zwei-ä"));
        assert_eq!(quarantine.end_next(at(3)).as_deref(), Some("net/three/eth0"));
        assert!(!quarantine.has(a) && quarantine.names().is_empty());
        assert_eq!(quarantine.end_next(at(9)), None);
    }
}
