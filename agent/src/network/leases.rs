//! Leases on disk, a file an attachment. Invariant: a lease that this room hands out is in its directory, whole, before the
//! caller sees it; two leases never share an address.
//!
//! Files are renamed into place but not flushed: pods do not outlive the machine they run on, so a lease matters for
//! as long as the kernel that holds the page cache runs. Leases carry the boot they belong to, and those of another
//! one are dropped on opening.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::asked::{Asked, Demand};
use super::error::NetworkError;
use super::ipam::{self, Pool};
use super::plan::is_cni;
use super::quarantine::Quarantine;
use crate::limits;

/// Longest uid, bytes.
const UID_BYTES_MAX: usize = 128;

/// A network namespace, told apart from a later one at the same path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Netns {
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) inode: u64,
}

impl Netns {
    /// Opens the namespace at `path`.
    pub(super) fn open(path: &Path) -> io::Result<(Netns, fs::File)> {
        let file = fs::File::open(path)?;
        Ok((Netns::of(&file, path)?, file))
    }

    /// The open namespace, which others know by `path`.
    pub(super) fn of(file: &fs::File, path: &Path) -> io::Result<Netns> {
        let meta = file.metadata()?;
        Ok(Netns { path: path.to_owned(), device: meta.dev(), inode: meta.ino() })
    }
}

/// The addresses of a pod or of what a runtime connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    /// The pod's uid, or [`super::asked::key`].
    pub(super) uid: String,
    /// IPv4 first.
    pub(super) ips: Vec<IpAddr>,
    /// Where the pod was connected last.
    pub(super) netns: Option<Netns>,
    /// What a runtime asked for; `None` for pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) asked: Option<Asked>,
    boot: String,
}

/// Every lease of the node.
#[derive(Debug)]
pub(super) struct Leases {
    dir: PathBuf,
    boot: String,
    by_uid: BTreeMap<String, Lease>,
    /// Who has an address.
    by_ip: HashMap<IpAddr, String>,
    /// Addresses that were freed a moment ago.
    quarantine: Quarantine,
    /// The address given last, a range.
    last: HashMap<IpNetwork, IpAddr>,
    /// Whose leases an agent before this one ended a short while before it ended itself: their links may be left.
    ended: BTreeSet<String>,
}

fn fail(op: &'static str, path: &Path) -> impl Fn(io::Error) -> NetworkError {
    let path = path.to_owned();
    move |source| NetworkError::Io { op, path: path.clone(), source }
}

impl Leases {
    /// Reads the leases below `dir`; what was dropped comes back in words.
    pub(super) fn open(dir: &Path) -> Result<(Self, Vec<String>), NetworkError> {
        let boot_path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_path).map_err(fail("read", boot_path))?.trim().to_owned();
        for sub in ["leases", "freed"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(fail("make", &path))?;
        }
        let mut leases = Leases {
            dir: dir.to_owned(),
            boot,
            by_uid: BTreeMap::new(),
            by_ip: HashMap::new(),
            quarantine: Quarantine::default(),
            last: HashMap::new(),
            ended: BTreeSet::new(),
        };
        let mut dropped = Vec::new();
        for path in files(&dir.join("leases"))? {
            if let Some(why) = leases.load(&path)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                dropped.push(format!("lease {name}: {why}"));
                fs::remove_file(&path).map_err(fail("remove", &path))?;
            }
        }
        leases.load_freed()?;
        Ok((leases, dropped))
    }

    /// Takes a lease in, or says why it is dropped.
    fn load(&mut self, path: &Path) -> Result<Option<String>, NetworkError> {
        if path.extension().is_none_or(|ext| ext != "json") {
            return Ok(Some("it was being written when its writer was killed".to_owned()));
        }
        let bytes = fs::read(path).map_err(fail("read", path))?;
        let lease: Lease = match serde_json::from_slice(&bytes) {
            Ok(lease) => lease,
            Err(e) => return Ok(Some(format!("it is not readable ({e})"))),
        };
        if lease.boot != self.boot {
            return Ok(Some("the machine was started again since".to_owned()));
        }
        if path != self.path(&lease.uid) {
            return Ok(Some(format!("it names pod {}", lease.uid)));
        }
        if let Some(other) = lease.ips.iter().find_map(|ip| self.by_ip.get(ip)) {
            return Ok(Some(format!("its address is leased to pod {other}")));
        }
        self.remember(lease);
        Ok(None)
    }

    fn load_freed(&mut self) -> Result<(), NetworkError> {
        let quarantine = Duration::from_millis(limits::ADDRESS_QUARANTINE_MS);
        let mut waiting = Vec::new();
        for path in files(&self.dir.join("freed"))? {
            let meta = fs::metadata(&path).map_err(fail("look at", &path))?;
            let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            let left = quarantine.saturating_sub(age.unwrap_or_default());
            let lease = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Lease>(&bytes).ok());
            if let Some(lease) = &lease {
                self.ended.insert(lease.uid.clone());
            }
            match lease {
                Some(lease) if !left.is_zero() => waiting.push((left, lease)),
                _ => fs::remove_file(&path).map_err(fail("remove", &path))?,
            }
        }
        waiting.sort_by_key(|(left, _)| *left);
        for (left, lease) in waiting {
            self.quarantine.add(&lease.uid, &lease.ips, Instant::now() + left);
        }
        Ok(())
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.dir.join("leases").join(file_name(uid))
    }

    fn remember(&mut self, lease: Lease) {
        self.by_ip.extend(lease.ips.iter().map(|ip| (*ip, lease.uid.clone())));
        self.by_uid.insert(lease.uid.clone(), lease);
    }

    fn write(&mut self, lease: Lease) -> Result<Lease, NetworkError> {
        let path = self.path(&lease.uid);
        let new = path.with_extension("new");
        let bytes = serde_json::to_vec(&lease)
            .map_err(|source| NetworkError::Lease { path: path.clone(), source })?;
        fs::write(&new, bytes).map_err(fail("write", &new))?;
        fs::rename(&new, &path).map_err(fail("rename to", &path))?;
        self.remember(lease.clone());
        Ok(lease)
    }

    /// Every lease, ordered by uid.
    pub(super) fn all(&self) -> Vec<Lease> {
        self.by_uid.values().cloned().collect()
    }

    /// Ranges whose traffic anybody's network wants to leave with the node's address, and addresses whose networks want
    /// that it does not.
    pub(super) fn masquerade(&self) -> (BTreeSet<IpNetwork>, BTreeSet<IpAddr>) {
        let (mut wanted, mut spared) = (BTreeSet::new(), BTreeSet::new());
        for lease in self.by_uid.values() {
            let Some(asked) = &lease.asked else { continue };
            wanted.extend(&asked.masquerade);
            if asked.spared {
                spared.extend(&lease.ips);
            }
        }
        (wanted, spared)
    }

    /// The pod's lease.
    pub(super) fn get(&self, uid: &str) -> Option<&Lease> {
        self.by_uid.get(uid)
    }

    /// Who has `ip`.
    pub(super) fn holder(&self, ip: IpAddr) -> Option<&str> {
        self.by_ip.get(&ip).map(String::as_str)
    }

    /// The pod's lease, made if it has none: one address of the first range of each family that has one left.
    pub(super) fn acquire(
        &mut self,
        uid: &str,
        ranges: &[IpNetwork],
        netns: &Netns,
    ) -> Result<Lease, NetworkError> {
        if let Some(lease) = self.by_uid.get(uid) {
            if lease.netns.as_ref() == Some(netns) {
                return Ok(lease.clone());
            }
            let lease = Lease { netns: Some(netns.clone()), ..lease.clone() };
            return self.write(lease);
        }
        self.make(uid, &Demand::of(ranges), netns, None)
    }

    /// Makes a lease for what has none.
    pub(super) fn make(
        &mut self,
        uid: &str,
        demand: &Demand,
        netns: &Netns,
        asked: Option<Asked>,
    ) -> Result<Lease, NetworkError> {
        self.end_quarantines();
        let chosen = self.choose(uid, demand)?;
        if chosen.is_empty() {
            return Err(NetworkError::NoRange);
        }
        let lease = Lease {
            uid: uid.to_owned(),
            ips: chosen.iter().map(|(ip, _)| *ip).collect(),
            netns: Some(netns.clone()),
            asked,
            boot: self.boot.clone(),
        };
        let lease = self.write(lease)?;
        self.last.extend(chosen.into_iter().filter_map(|(ip, net)| Some((net?, ip))));
        Ok(lease)
    }

    /// Addresses that meet the demand, IPv4 first, with the range that each was the next of.
    fn choose(&self, uid: &str, demand: &Demand) -> Result<Vec<(IpAddr, Option<IpNetwork>)>, NetworkError> {
        for ip in &demand.ips {
            if let Some(holder) = self.by_ip.get(ip) {
                let (uid, holder) = (uid.to_owned(), holder.clone());
                return Err(NetworkError::AddressTaken { uid, ip: *ip, holder });
            }
        }
        let mut chosen: Vec<(IpAddr, Option<IpNetwork>)> = Vec::new();
        if demand.chosen {
            chosen.extend(demand.ips.iter().map(|ip| (*ip, None)));
        }
        for set in demand.sets.iter().filter(|_| !demand.chosen) {
            let given = |ip: &IpAddr| chosen.iter().any(|(other, _)| other == ip);
            let asked = demand.ips.iter().find(|ip| !given(ip) && set.iter().any(|pool| pool.has(**ip)));
            if let Some(ip) = asked {
                chosen.push((*ip, None));
                continue;
            }
            let taken = |ip: IpAddr| {
                self.by_ip.contains_key(&ip)
                    || self.quarantine.has(ip)
                    || given(&ip)
                    || demand.ips.contains(&ip)
            };
            let next = |pool: &Pool| {
                let ip = ipam::choose(pool, self.last.get(&pool.net).copied(), taken)?;
                Some((ip, Some(pool.net)))
            };
            match (set.iter().find_map(next), set.first()) {
                (Some(found), _) => chosen.push(found),
                (None, Some(pool)) => return Err(self.exhausted(uid, pool)),
                (None, None) => {}
            }
        }
        if let Some(ip) = demand.ips.iter().find(|ip| !chosen.iter().any(|(other, _)| other == *ip)) {
            return Err(NetworkError::AddressOutside { uid: uid.to_owned(), ip: *ip });
        }
        chosen.sort_by_key(|(ip, _)| ip.is_ipv6());
        Ok(chosen)
    }

    fn exhausted(&self, uid: &str, pool: &Pool) -> NetworkError {
        NetworkError::RangeExhausted {
            uid: uid.to_owned(),
            range: pool.net,
            capacity: pool.capacity(),
            leased: self.by_ip.keys().filter(|ip| pool.has(**ip)).count(),
            quarantined: self.quarantine.waiting(pool, Instant::now()),
        }
    }

    /// Fails where a demand without addresses of its own could not be met now.
    pub(super) fn could_meet(&self, demand: &Demand) -> Result<(), NetworkError> {
        let now = Instant::now();
        for set in &demand.sets {
            let left = |pool: &&Pool| {
                let leased = self.by_ip.keys().filter(|ip| pool.has(**ip)).count();
                let used = leased + self.quarantine.waiting(pool, now);
                pool.capacity() > u128::try_from(used).unwrap_or(u128::MAX)
            };
            if let (None, Some(pool)) = (set.iter().find(left), set.first()) {
                return Err(self.exhausted("the next", pool));
            }
        }
        if demand.sets.is_empty() { Err(NetworkError::NoRange) } else { Ok(()) }
    }

    /// Whose links, if there are any, are left of an attachment that was taken away.
    pub(super) fn ended(&self) -> BTreeSet<String> {
        let lately = self.quarantine.names();
        self.ended.iter().cloned().chain(lately).filter(|uid| !self.by_uid.contains_key(uid)).collect()
    }

    /// The links of those that an agent before this one took away were looked for.
    pub(super) fn forget_ended(&mut self) {
        self.ended.clear();
    }

    /// Ends a lease whose addresses were in no use: they may be given again at once.
    pub(super) fn cancel(&mut self, uid: &str) -> Result<(), NetworkError> {
        let Some(lease) = self.by_uid.get(uid) else { return Ok(()) };
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail("remove", &path)(e)),
            _ => {}
        }
        for ip in &lease.ips {
            self.by_ip.remove(ip);
        }
        self.by_uid.remove(uid);
        Ok(())
    }

    /// Writes a lease for addresses that a pod has in the kernel.
    pub(super) fn adopt(
        &mut self,
        uid: &str,
        ips: Vec<IpAddr>,
        asked: Option<Asked>,
    ) -> Result<Lease, NetworkError> {
        self.write(Lease { uid: uid.to_owned(), ips, netns: None, asked, boot: self.boot.clone() })
    }

    /// Ends the pod's lease; false if it has none. Its addresses are not given again for a while.
    pub(super) fn release(&mut self, uid: &str) -> Result<bool, NetworkError> {
        let Some(lease) = self.by_uid.get(uid) else { return Ok(false) };
        let (path, freed) = (self.path(uid), self.freed_path(uid));
        // The time of the file is the time of the release.
        let touched =
            fs::File::options().append(true).open(&path).and_then(|f| f.set_modified(SystemTime::now()));
        match touched.and_then(|()| fs::rename(&path, &freed)) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail("end lease", &path)(e)),
            _ => {}
        }
        let until = Instant::now() + Duration::from_millis(limits::ADDRESS_QUARANTINE_MS);
        for ip in &lease.ips {
            self.by_ip.remove(ip);
        }
        self.quarantine.add(uid, &lease.ips, until);
        self.by_uid.remove(uid);
        Ok(true)
    }

    fn end_quarantines(&mut self) {
        let now = Instant::now();
        while let Some(uid) = self.quarantine.end_next(now) {
            match fs::remove_file(self.freed_path(&uid)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::debug!(uid, %error, "record of a freed address stays");
                }
                _ => {}
            }
        }
    }

    fn freed_path(&self, uid: &str) -> PathBuf {
        self.dir.join("freed").join(file_name(uid))
    }
}

/// A uid is a name of its own; other keys may be long and have a `/`.
fn file_name(uid: &str) -> String {
    if !is_cni(uid) {
        return format!("{uid}.json");
    }
    let hash = Sha256::digest(uid.as_bytes());
    let hex: String = hash[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("@{hex}.json")
}

fn files(dir: &Path) -> Result<Vec<PathBuf>, NetworkError> {
    let list = fs::read_dir(dir).and_then(|list| list.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>());
    let mut list = list.map_err(fail("list", dir))?;
    list.sort();
    Ok(list)
}

/// Refuses uids that would not be a file name of their own.
pub(super) fn check_uid(uid: &str) -> Result<(), NetworkError> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !uid.is_empty() && uid.len() <= UID_BYTES_MAX && !uid.starts_with('.') && uid.bytes().all(fits) {
        Ok(())
    } else {
        Err(NetworkError::Uid(uid.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netns() -> Netns {
        Netns { path: "/proc/1/ns/net".into(), device: 4, inode: 7 }
    }

    fn ranges(texts: &[&str]) -> Vec<IpNetwork> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn leases_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut leases, _) = Leases::open(dir.path()).unwrap();
        let both = ranges(&["fd00::/64", "10.0.0.0/24"]);
        let a = leases.acquire("a", &both, &netns()).unwrap();
        assert!(a.ips[0].is_ipv4() && a.ips[1].is_ipv6());
        assert_eq!(leases.acquire("a", &both, &netns()).unwrap(), a);
        let b = leases.acquire("b", &both, &netns()).unwrap();
        assert!(a.ips.iter().all(|ip| !b.ips.contains(ip)));
        let (again, dropped) = Leases::open(dir.path()).unwrap();
        assert_eq!((again.all(), dropped), (vec![a, b], vec![]));
    }

    #[test]
    fn freed_addresses_wait_also_across_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let net = ranges(&["10.0.0.0/30"]);
        let (mut leases, _) = Leases::open(dir.path()).unwrap();
        leases.acquire("a", &net, &netns()).unwrap();
        assert!(leases.release("a").unwrap() && !leases.release("a").unwrap());
        for mut leases in [leases, Leases::open(dir.path()).unwrap().0] {
            let error = leases.acquire("b", &net, &netns()).unwrap_err();
            let NetworkError::RangeExhausted { capacity, leased, quarantined, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!((*capacity, *leased, *quarantined), (1, 0, 1));
            assert!(error.to_string().contains("10.0.0.0/30") && error.to_string().contains("--pod-cidr"));
            leases.quarantine.end_all();
            leases.acquire("b", &net, &netns()).unwrap();
            leases.by_uid.clear();
        }
    }

    #[test]
    fn a_family_that_is_used_up_takes_nothing_of_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let (mut leases, _) = Leases::open(dir.path()).unwrap();
        let both = ranges(&["10.0.0.0/24", "fd00::/127"]);
        leases.acquire("a", &both, &netns()).unwrap();
        leases.acquire("b", &both, &netns()).unwrap();
        let error = leases.acquire("c", &both, &netns()).unwrap_err();
        assert!(error.to_string().contains("fd00::/127 is used up: 2 of its 2"), "{error}");
        assert_eq!(leases.all().len(), 2);
    }

    #[test]
    fn damaged_and_foreign_leases_are_dropped_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let net = ranges(&["10.0.0.0/24"]);
        let (mut leases, _) = Leases::open(dir.path()).unwrap();
        let a = leases.acquire("a", &net, &netns()).unwrap();
        let file = |name: &str| dir.path().join("leases").join(name);
        let text = serde_json::to_string(&a).unwrap();
        fs::write(file("b.json"), "{").unwrap();
        fs::write(file("c.new"), "").unwrap();
        fs::write(file("d.json"), text.replace("\"a\"", "\"d\"")).unwrap();
        fs::write(file("e.json"), text.replace(&a.boot, "another").replace("\"a\"", "\"e\"")).unwrap();
        let (leases, dropped) = Leases::open(dir.path()).unwrap();
        assert_eq!(leases.all(), [a]);
        assert_eq!(dropped.len(), 4, "{dropped:?}");
        assert!(dropped.iter().any(|why| why.contains("started again")), "{dropped:?}");
        assert!(dropped.iter().any(|why| why.contains("leased to pod a")), "{dropped:?}");
        assert_eq!(fs::read_dir(dir.path().join("leases")).unwrap().count(), 1);
    }

    #[test]
    fn demands_are_met_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut leases, _) = Leases::open(dir.path()).unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let both = ranges(&["10.0.0.0/24", "fd00::/64"]);
        let ask = |ips: &[&str]| Demand { ips: ips.iter().map(|i| ip(i)).collect(), ..Demand::of(&both) };
        let key = "net/c1/eth0";
        let asked = Asked { network: "net".to_owned(), mtu: 1400, ..Asked::default() };
        let lease = leases.make(key, &ask(&["10.0.0.77"]), &netns(), Some(asked)).unwrap();
        assert_eq!(lease.ips, [ip("10.0.0.77"), ip("fd00::2")]);
        let taken = leases.make("net/c2/eth0", &ask(&["10.0.0.77"]), &netns(), None).unwrap_err();
        assert!(taken.to_string().contains("10.0.0.77") && taken.to_string().contains(key), "{taken}");
        for outside in ["10.0.1.7", "10.0.0.255", "fd01::1"] {
            let error = leases.make("net/c2/eth0", &ask(&[outside]), &netns(), None).unwrap_err();
            assert!(error.to_string().contains(outside), "{error}");
        }
        let chosen = Demand { ips: vec![ip("192.0.2.9")], chosen: true, ..Demand::default() };
        assert_eq!(leases.make("net/c3/eth0", &chosen, &netns(), None).unwrap().ips, chosen.ips);
        let again = Leases::open(dir.path()).unwrap().0;
        assert_eq!(again.get(key).unwrap().asked.as_ref().unwrap().mtu, 1400);
        assert_eq!(again.all().len(), 2);
        // What was never in use waits for nothing.
        leases.cancel(key).unwrap();
        leases.cancel(key).unwrap();
        leases.make("net/c4/eth0", &ask(&["10.0.0.77"]), &netns(), None).unwrap();
        leases.could_meet(&Demand::of(&both)).unwrap();
        let full = Demand::of(&ranges(&["10.0.0.77/32"]));
        assert!(matches!(leases.could_meet(&full), Err(NetworkError::RangeExhausted { .. })));
    }

    #[test]
    fn uids_are_file_names() {
        check_uid("0f3c7d1e-1111-2222-3333-444455556666").unwrap();
        for bad in ["", ".", "..", "a/b", ".x", "a b", &"x".repeat(200)] {
            assert!(check_uid(bad).is_err(), "{bad:?}");
        }
    }
}
