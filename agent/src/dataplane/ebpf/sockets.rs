//! Connected UDP sockets whose backend is gone. Invariant: a socket is ended only when its own record says that it was
//! connected to that backend through that service, so a socket that asked for the backend itself is let alone.
//!
//! A thread of its own goes through the network namespaces of the processes that are served, and is thrown away.

use super::map::Map;
use super::{Maps, encode, sys};
use crate::dataplane::{DataplaneError, StatsHandle};
use crate::limits;
use crate::network::{ConnectedUdp, Diag, InetFamily};
use crate::service::{BackendAddr, FrontendEntry, Proto, ServiceId};
use nix::sched::{CloneFlags, setns};
use sheave_ebpf_abi::{Address, PROTO_UDP, ReverseEntry, ReverseKey, ReverseValue, map as names};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Which sockets are to be ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Job {
    /// Those of these services' backends.
    lost: BTreeSet<(ServiceId, BackendAddr)>,
    /// Those whose backend the table does not have, too.
    all: bool,
}

impl Job {
    fn is_empty(&self) -> bool {
        self.lost.is_empty() && !self.all
    }

    fn add(&mut self, other: &Self) {
        self.lost.extend(&other.lost);
        self.all |= other.all;
    }
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Job,
    running: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Whoever panicked left a whole queue behind.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends sockets in the background.
#[derive(Debug)]
pub(super) struct Ender {
    dir: PathBuf,
    cgroup: PathBuf,
    stats: StatsHandle,
    shared: Arc<Shared>,
}

impl Ender {
    /// For the maps pinned in `dir` and the processes in and below `cgroup`.
    pub(super) fn new(dir: &Path, cgroup: &Path, stats: StatsHandle) -> Self {
        Self { dir: dir.to_owned(), cgroup: cgroup.to_owned(), stats, shared: Arc::default() }
    }

    /// Ends the sockets of backends that services have lost. The maps must have been written.
    pub(super) fn end(&self, lost: &BTreeSet<(ServiceId, BackendAddr)>) {
        // The hooks translate no SCTP.
        let lost = lost.iter().filter(|(_, backend)| backend.proto == Proto::Udp).copied().collect();
        self.enqueue(&Job { lost, all: false });
    }

    /// Ends every socket whose backend the table does not have: what an agent that was killed left undone.
    pub(super) fn end_all(&self) {
        self.enqueue(&Job { lost: BTreeSet::new(), all: true });
    }

    fn enqueue(&self, job: &Job) {
        let mut queue = self.shared.queue();
        if job.is_empty() {
            return;
        }
        queue.waiting.add(job);
        self.shared.more.notify_one();
        if queue.running {
            return;
        }
        let here = File::open("/proc/thread-self/ns/net");
        let (dir, cgroup) = (self.dir.clone(), self.cgroup.clone());
        let (stats, shared) = (self.stats.clone(), Arc::clone(&self.shared));
        let work = move |here| work(&dir, &cgroup, here, &stats, &shared);
        let started = here.and_then(|here| {
            std::thread::Builder::new().name("stale-sockets".to_owned()).spawn(move || work(here))
        });
        match started {
            Ok(_) => queue.running = true,
            Err(error) => tracing::warn!(%error, "cannot end UDP sockets of backends that are gone"),
        }
    }
}

/// Until nothing is waiting. Everything is looked at twice: a call that had read the table before it was written may
/// connect its socket after the first look.
fn work(dir: &Path, cgroup: &Path, here: File, stats: &StatsHandle, shared: &Shared) {
    let mut previous = Job::default();
    loop {
        let fresh = {
            let mut queue = shared.queue();
            let fresh = std::mem::take(&mut queue.waiting);
            if fresh.is_empty() && previous.is_empty() {
                queue.running = false;
                return;
            }
            fresh
        };
        previous.add(&fresh);
        match pass(dir, cgroup, &here, &previous) {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(count, "ended UDP sockets that were connected to backends that are gone");
                stats.update(|figures| figures.sockets_ended_total += count);
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "UDP sockets may stay connected to backends that are gone"
            ),
        }
        previous = fresh;
        let pause = Duration::from_millis(limits::STALE_SOCKETS_AGAIN_MS);
        let queue = shared.queue();
        if queue.waiting.is_empty() && !previous.is_empty() {
            drop(shared.more.wait_timeout(queue, pause).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// One look at every namespace, going on past errors; the number of sockets ended, or the first error.
fn pass(dir: &Path, cgroup: &Path, here: &File, job: &Job) -> Result<u64, DataplaneError> {
    let records = Records::open(dir)?;
    let mut result = Ok(0);
    for namespace in namespaces(cgroup, here) {
        let ended = setns(&namespace.door, CloneFlags::CLONE_NEWNET)
            .map_err(io::Error::from)
            .and_then(|()| records.end_in_namespace(job, &namespace.processes))
            .map_err(|source| DataplaneError::Host {
                op: "end UDP sockets of a network namespace (CONFIG_INET_UDP_DIAG, CONFIG_INET_DIAG_DESTROY)",
                source,
            });
        result = match (result, ended) {
            (Ok(sum), Ok(count)) => Ok(sum + count),
            (Err(first), _) | (_, Err(first)) => Err(first),
        };
    }
    result
}

/// What the kernel remembers of translations, and the table to hold it against.
struct Records {
    storage: Map<u32, ReverseEntry>,
    overflow: Map<ReverseKey, ReverseValue>,
    maps: Maps,
}

/// A socket's translation.
struct Translation {
    service: ServiceId,
    /// What it asked for.
    asked: SocketAddr,
}

impl Records {
    fn open(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self {
            storage: Map::open(dir, names::REVERSE_SK)?,
            overflow: Map::open(dir, names::REVERSE_LRU)?,
            maps: Maps::open(dir)?,
        })
    }

    fn end_in_namespace(&self, job: &Job, processes: &[u32]) -> io::Result<u64> {
        let mut diag = Diag::open()?;
        let mut sockets = diag.connected_udp(InetFamily::V4)?;
        sockets.extend(diag.connected_udp(InetFamily::V6)?);
        let lost: BTreeSet<SocketAddr> =
            job.lost.iter().map(|(_, backend)| SocketAddr::new(backend.addr, backend.port)).collect();
        sockets.retain(|socket| job.all || lost.contains(&socket.remote));
        if sockets.is_empty() {
            return Ok(0);
        }
        let stored = self.stored(&sockets, processes);
        let mut count = 0;
        for socket in sockets {
            let stale = match &stored {
                Ok(stored) => self.is_stale(job, &socket, stored.get(&socket.inode)),
                Err(_) => lost.contains(&socket.remote),
            };
            if stale && diag.destroy(&socket)? {
                count += 1;
            }
        }
        if let Err(error) = stored {
            tracing::warn!(%error, "cannot see which UDP sockets were translated; those connected to a backend that \
                is gone were ended by its address alone");
        }
        Ok(count)
    }

    /// What the storage holds for these sockets, by their inode: read through a descriptor of each, borrowed from one
    /// of `processes` that has it. What nobody of them has any more is left out.
    fn stored(&self, sockets: &[ConnectedUdp], processes: &[u32]) -> io::Result<HashMap<u32, ReverseEntry>> {
        let mut wanted: HashSet<u32> = sockets.iter().map(|socket| socket.inode).collect();
        let mut found = HashMap::new();
        for process in processes {
            // Processes and descriptors come and go meanwhile.
            for entry in fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten() {
                if wanted.is_empty() {
                    return Ok(found);
                }
                let Some(inode) = fs::read_link(entry.path()).ok().as_deref().and_then(socket_inode) else {
                    continue;
                };
                let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                if !wanted.contains(&inode) {
                    continue;
                }
                match sys::descriptor_of(*process, fd) {
                    Ok(socket) => {
                        wanted.remove(&inode);
                        let entry = self.storage.get(&(socket.as_raw_fd() as u32)).ok().flatten();
                        found.extend(entry.map(|entry| (inode, entry)));
                    }
                    Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EBADF)) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(found)
    }

    fn is_stale(&self, job: &Job, socket: &ConnectedUdp, stored: Option<&ReverseEntry>) -> bool {
        let Some(translation) = self.translation(socket, stored) else { return false };
        job.lost.contains(&(translation.service, backend(socket.remote)))
            || job.all && !self.has(&translation, socket.remote)
    }

    /// How the socket came to be connected where it is, if by a service.
    fn translation(&self, socket: &ConnectedUdp, stored: Option<&ReverseEntry>) -> Option<Translation> {
        let at = |addr: &Address, port| SocketAddr::new(encode::from_address(addr), u16::from_be(port));
        if let Some(entry) = stored
            && at(&entry.backend, entry.backend_port) == socket.remote
        {
            let asked = at(&entry.service, entry.service_port);
            return Some(Translation { service: entry.service_id, asked });
        }
        let key = ReverseKey {
            cookie: [socket.cookie as u32, (socket.cookie >> 32) as u32],
            backend: encode::address(socket.remote.ip()),
            port: socket.remote.port().to_be(),
            proto: PROTO_UDP,
            pad: 0,
        };
        // An unreadable map is as one that has evicted the entry.
        let value = self.overflow.get(&key).ok().flatten()?;
        Some(Translation { service: value.service_id, asked: at(&value.service, value.port) })
    }

    /// Whether the table still has this backend for that service. What cannot be read is taken for so.
    fn has(&self, translation: &Translation, backend: SocketAddr) -> bool {
        let found = [translation.asked.ip(), any(translation.asked.ip())]
            .into_iter()
            .filter_map(|addr| self.frontend(addr, translation.asked.port()).transpose())
            .next();
        let entry = match found {
            None => return false,
            Some(Err(_)) => return true,
            Some(Ok(entry)) => entry,
        };
        let run = entry.run();
        entry.service == translation.service
            && (run.base..run.base.saturating_add(run.len)).any(|slot| {
                let held = self.maps.slots.get(&slot).and_then(|slot| match slot {
                    Some(slot) => self.maps.backends.get(&slot.backend),
                    None => Ok(None),
                });
                match held {
                    Ok(held) => {
                        let held = held.as_ref().and_then(encode::from_backend);
                        held.is_some_and(|held| SocketAddr::new(held.addr, held.port) == backend)
                    }
                    Err(_) => true,
                }
            })
    }

    fn frontend(&self, addr: IpAddr, port: u16) -> Result<Option<FrontendEntry>, DataplaneError> {
        use crate::service::FrontendKey;
        let found = match encode::key(&FrontendKey { addr, port, proto: Proto::Udp }) {
            encode::Key::V4(key) => self.maps.frontends4.get(&key)?,
            encode::Key::V6(key) => self.maps.frontends6.get(&key)?,
        };
        Ok(found.as_ref().map(encode::from_frontend))
    }
}

/// The unspecified address of the same family, which NodePorts have in the table.
fn any(addr: IpAddr) -> IpAddr {
    if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn backend(at: SocketAddr) -> BackendAddr {
    BackendAddr { addr: at.ip(), port: at.port(), proto: Proto::Udp }
}

/// The number in `socket:[number]`, which the link of a socket's descriptor is.
fn socket_inode(link: &Path) -> Option<u32> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// A network namespace and who is in it.
struct Namespace {
    door: File,
    processes: Vec<u32>,
}

/// The network namespaces of the processes in and below `cgroup`, and this one, each once. What goes away meanwhile is
/// left out: its sockets go with it.
fn namespaces(cgroup: &Path, here: &File) -> Vec<Namespace> {
    let inode = |file: &File| file.metadata().ok().map(|meta| meta.ino());
    let mut found: BTreeMap<u64, Namespace> = BTreeMap::new();
    if let (Some(inode), Ok(door)) = (inode(here), here.try_clone()) {
        found.insert(inode, Namespace { door, processes: Vec::new() });
    }
    let mut groups = vec![cgroup.to_owned()];
    while let Some(group) = groups.pop() {
        let below = fs::read_dir(&group).into_iter().flatten().flatten();
        groups.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        for process in processes.lines().filter_map(|line| line.parse::<u32>().ok()) {
            let path = format!("/proc/{process}/ns/net");
            let Ok(held) = fs::metadata(&path).map(|meta| meta.ino()) else { continue };
            if let Some(namespace) = found.get_mut(&held) {
                namespace.processes.push(process);
            } else if let Ok(door) = File::open(&path)
                && let Some(inode) = inode(&door)
            {
                let namespace = found.entry(inode).or_insert(Namespace { door, processes: Vec::new() });
                namespace.processes.push(process);
            }
        }
    }
    found.into_values().collect()
}
