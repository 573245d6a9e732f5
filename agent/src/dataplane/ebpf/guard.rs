//! The network object in the kernel: policies and the fast path at pods' links. Invariant: what is pinned goes on without
//! this process; a change is written in the order in which nothing is pointed at before it is there, and the epoch is
//! raised when all of it is.

use super::link::{self, DeviceHook, LINKS, Order};
use super::map::{self, Map, NET_SHAPES};
use super::{encode, load, probe, sys, uplink, versioned};
use crate::dataplane::DataplaneError;
use crate::network::RoutedLink;
use crate::policy::{Change, Device, Endpoint, Ids, PortPrefix, Tables};
use aya::{Ebpf, EbpfLoader};
use ipnetwork::IpNetwork;
use sheave_ebpf_abi::{
    self as abi, NET_COUNTERS, NetConfig, NetCounter, NetKey, Plain as _, PortKey, VerdictKey, endpoint_flag,
    net_config_flag, net_flow_flag, net_map, ports,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Directory of the network object's pins below the versioned pin directory.
pub(super) const DIR: &str = "net";

/// The programs at a pod's device.
const POD_HOOKS: &[DeviceHook] = &[("shv_net_from_pod", "ingress", 46), ("shv_net_to_pod", "egress", 47)];

/// The programs at a device that leads out of the node.
const OUT_HOOKS: &[DeviceHook] = &[("shv_net_arrive", "ingress", 46)];

/// Settings of the guard.
#[derive(Clone, Debug, Default)]
pub struct GuardConfig {
    /// Directory of all pins.
    pub pin_dir: PathBuf,
    /// Whether packets of direct flows may go past the stack.
    pub fast: bool,
}

#[derive(Debug)]
struct Maps {
    config: Map<u32, NetConfig>,
    endpoints: Map<abi::Address, abi::Endpoint>,
    ranges: Map<NetKey, u32>,
    verdicts: Map<VerdictKey, u32>,
    ports: Map<PortKey, u32>,
}

impl Maps {
    fn open(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self {
            config: Map::open(dir, net_map::CONFIG)?,
            endpoints: Map::open(dir, net_map::ENDPOINTS)?,
            ranges: Map::open(dir, net_map::RANGES)?,
            verdicts: Map::open(dir, net_map::VERDICTS)?,
            ports: Map::open(dir, net_map::PORTS)?,
        })
    }

    fn read(&self) -> Result<Tables, DataplaneError> {
        let endpoints = self.endpoints.entries(usize::MAX)?.into_iter();
        let ranges = self.ranges.entries(usize::MAX)?.into_iter();
        let verdicts = self.verdicts.entries(usize::MAX)?.into_iter();
        let ports = self.ports.entries(usize::MAX)?.into_iter();
        Ok(Tables {
            endpoints: endpoints
                .map(|(key, held)| (encode::from_address(&key), from_endpoint(held)))
                .collect(),
            ranges: ranges.filter_map(|(key, identity)| Some((from_range(&key)?, identity))).collect(),
            verdicts: verdicts.map(|(key, list)| ((key.set, key.identity), list)).collect(),
            ports: ports.map(|(key, _)| (from_ports(&key), ())).collect(),
        })
    }
}

/// The network object.
pub struct Guard {
    dir: PathBuf,
    fast: bool,
    maps: Maps,
    /// What the kernel holds; `None` when a write failed and nobody knows.
    held: Option<Tables>,
    object: Option<Ebpf>,
    /// Devices that have our programs, by what they are.
    attached: BTreeSet<(String, bool)>,
}

impl Guard {
    /// Adopts the pinned maps, or makes them. Attaches nothing.
    pub fn open(config: &GuardConfig) -> Result<Self, DataplaneError> {
        probe::for_network(&config.pin_dir)?;
        let dir = versioned(&config.pin_dir).join(DIR);
        let links = dir.join(LINKS);
        fs::create_dir_all(&links).map_err(|source| DataplaneError::Pin {
            op: "make",
            path: links,
            source,
        })?;
        let object = if all_pinned(&dir)? { None } else { Some(load(&dir)?) };
        let maps = Maps::open(&dir)?;
        let held = maps.read()?;
        let guard =
            Self { dir, fast: config.fast, maps, held: Some(held), object, attached: BTreeSet::new() };
        let now = guard.config()?;
        let flags = if guard.fast { net_config_flag::FAST } else { 0 };
        guard.maps.config.put(&0, &NetConfig { flags, ..now })?;
        Ok(guard)
    }

    /// The greatest numbers that the kernel's tables use.
    pub fn ids(&self) -> Ids {
        let Some(held) = &self.held else { return Ids::default() };
        let endpoints = held.endpoints.values();
        let of_endpoints = endpoints.clone().map(|e| e.identity).chain(held.ranges.values().copied());
        let sets = endpoints.flat_map(|endpoint| [endpoint.ingress, endpoint.egress]);
        let lists = held.verdicts.values().copied().filter(|list| *list != ports::ALL);
        Ids {
            set: held.verdicts.keys().map(|key| key.0).chain(sets).max().unwrap_or(0),
            identity: held.verdicts.keys().map(|key| key.1).chain(of_endpoints).max().unwrap_or(0),
            ports: lists.chain(held.ports.keys().map(|key| key.0)).max().unwrap_or(0),
        }
    }

    fn config(&self) -> Result<NetConfig, DataplaneError> {
        Ok(self.maps.config.get(&0)?.unwrap_or_else(NetConfig::zeroed))
    }

    /// Brings the kernel's tables to what is wanted. True when there was something to do.
    ///
    /// # Errors
    /// Names the map that is full or can't be written; nothing was pointed at what is not there, and the next call
    /// begins with what the kernel holds.
    pub fn apply(&mut self, wanted: &Tables) -> Result<bool, DataplaneError> {
        let held = match self.held.take() {
            Some(held) => held,
            None => self.maps.read()?,
        };
        let change = Change::between(&held, wanted);
        if change.is_empty() {
            self.held = Some(held);
            return Ok(false);
        }
        self.write(&change)?;
        let now = self.config()?;
        self.maps.config.put(&0, &NetConfig { epoch: now.epoch.wrapping_add(1), ..now })?;
        self.held = Some(wanted.clone());
        Ok(true)
    }

    fn write(&self, change: &Change) -> Result<(), DataplaneError> {
        let maps = &self.maps;
        maps.ports.put_all(change.put_ports.iter().map(|key| (to_ports(key), 1)))?;
        maps.verdicts.put_all(change.put_verdicts.iter().map(|(key, list)| (to_verdict(key), *list)))?;
        maps.ranges
            .put_all(change.put_ranges.iter().map(|(range, identity)| (to_range(*range), *identity)))?;
        let endpoints = change.put_endpoints.iter();
        maps.endpoints.put_all(endpoints.map(|(ip, held)| (encode::address(*ip), to_endpoint(*held))))?;
        maps.endpoints.delete_all(change.delete_endpoints.iter().map(|ip| encode::address(*ip)))?;
        maps.ranges.delete_all(change.delete_ranges.iter().map(|range| to_range(*range)))?;
        maps.verdicts.delete_all(change.delete_verdicts.iter().map(to_verdict))?;
        maps.ports.delete_all(change.delete_ports.iter().map(to_ports))
    }

    /// Lets go of the loaded object, which takes megabytes: the next device that gets the programs has it loaded again.
    pub fn unload(&mut self) {
        self.object = None;
    }

    /// Whether the pod's device of this name has the programs.
    pub fn is_attached(&self, name: &str) -> bool {
        self.attached.contains(&(name.to_owned(), true))
    }

    /// Puts the programs at pods' devices and at those that lead out of the node; devices that are gone are forgotten.
    /// `check`: look at each link again, in case somebody severed one.
    pub fn attach(&mut self, pods: &[String], outs: &[String], check: bool) -> Result<(), DataplaneError> {
        let digest = sheave_ebpf_object::net_digest();
        let words = [digest as u32, (digest >> 32) as u32];
        let held = self.config()?;
        let is_new = held.object_digest != words;
        let wanted: BTreeSet<(String, bool)> = pods
            .iter()
            .map(|name| (name.clone(), true))
            .chain(outs.iter().map(|name| (name.clone(), false)))
            .collect();
        let mut errors = Vec::new();
        let mut done = BTreeSet::new();
        if check {
            // Kept between looks: loading costs far more than attaching.
            self.object = None;
        }
        for (name, pod) in &wanted {
            let known = !is_new && !check && self.attached.contains(&(name.clone(), *pod));
            match if known { Ok(()) } else { self.attach_one(name, *pod, is_new) } {
                Ok(()) => {
                    done.insert((name.clone(), *pod));
                }
                // Pods come and go.
                Err(error) if uplink::index(name).is_err() => {
                    tracing::debug!(device = name, %error, "gone before it was attached");
                }
                Err(error) => errors.push(error),
            }
        }
        if done != self.attached || check {
            uplink::forget_gone(&self.dir)?;
        }
        self.attached = done;
        match errors.pop() {
            Some(error) => Err(error),
            None if is_new => self.maps.config.put(&0, &NetConfig { object_digest: words, ..self.config()? }),
            None => Ok(()),
        }
    }

    fn attach_one(&mut self, name: &str, pod: bool, is_new: bool) -> Result<(), DataplaneError> {
        let hooks = if pod { POD_HOOKS } else { OUT_HOOKS };
        if !is_new && uplink::is_attached(&self.dir, name, hooks, Order::Policies)? {
            return Ok(());
        }
        let object = match &mut self.object {
            Some(object) => object,
            none => none.insert(load(&self.dir)?),
        };
        uplink::attach(&self.dir, object, name, hooks, Order::Policies)
    }

    /// Every reason and how often it occurred on all CPUs since the maps were made.
    pub fn counters(&self) -> Result<Vec<(NetCounter, u64)>, DataplaneError> {
        let sums = map::sums(&self.dir, net_map::COUNTERS, NET_COUNTERS.len())?;
        Ok(NET_COUNTERS.iter().copied().zip(sums).collect())
    }

    /// Flows that went past the stack: protocol, and both ends.
    pub(crate) fn fast_flows(&self) -> Result<HashSet<(u8, SocketAddr, SocketAddr)>, DataplaneError> {
        let flows =
            Map::<abi::FlowKey, abi::NetFlow>::open(&self.dir, net_map::FLOWS)?.entries(usize::MAX)?;
        let fast = flows.into_iter().filter(|(_, flow)| flow.flags & net_flow_flag::FAST != 0);
        let end =
            |ip: &abi::Address, port: u16| SocketAddr::new(encode::from_address(ip), u16::from_be(port));
        Ok(fast.map(|(key, _)| (key.proto, end(&key.src, key.sport), end(&key.dst, key.dport))).collect())
    }

    /// Devices that have our programs.
    pub fn devices(&self) -> usize {
        self.attached.len()
    }
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What a node's pins say of policies and the fast path.
#[derive(Clone, Debug, Default)]
pub struct GuardStatus {
    /// Devices that have the programs.
    pub devices: usize,
    /// Addresses of this node's pods that the tables know.
    pub pods: usize,
    /// Those of them that some policy isolates.
    pub isolated: usize,
    /// Whether flows may go past the stack.
    pub fast: bool,
    /// Pods whose device has no peer, so that their flows can't.
    pub without_peer: usize,
    /// Pods whose device has a queue, such as a limit of what they receive, so that their flows may not.
    pub queued: usize,
    /// Reasons and how often they occurred.
    pub counters: Vec<(NetCounter, u64)>,
}

/// Reads the pins below `pin_dir`; `None` where no agent does the network.
pub fn guard_status(pin_dir: &Path) -> Result<Option<GuardStatus>, DataplaneError> {
    let dir = versioned(pin_dir).join(DIR);
    if !dir.join(net_map::CONFIG).exists() {
        return Ok(None);
    }
    let maps = Maps::open(&dir)?;
    let tables = maps.read()?;
    let pods = || tables.endpoints.values().filter(|end| end.device != 0);
    let links = fs::read_dir(dir.join(LINKS)).into_iter().flatten().flatten();
    let names = links.filter_map(|link| Some(link.file_name().to_str()?.split('_').nth(1)?.to_owned()));
    let flags = maps.config.get(&0)?.map_or(0, |config| config.flags);
    let sums = map::sums(&dir, net_map::COUNTERS, NET_COUNTERS.len())?;
    Ok(Some(GuardStatus {
        devices: names.collect::<BTreeSet<String>>().len(),
        pods: pods().count(),
        isolated: pods().filter(|end| end.ingress != 0 || end.egress != 0).count(),
        fast: flags & net_config_flag::FAST != 0,
        without_peer: pods().filter(|end| !end.peer).count(),
        queued: pods().filter(|end| end.queued).count(),
        counters: NET_COUNTERS.iter().copied().zip(sums).collect(),
    }))
}

/// What the kernel says of devices that addresses are routed to.
pub(crate) fn devices_of(routes: &[RoutedLink]) -> BTreeMap<IpAddr, Device> {
    let mut drivers: HashMap<u32, bool> = HashMap::new();
    let mut device = |route: &RoutedLink| {
        let RoutedLink { name, index, pod, queued, .. } = route;
        let index = *index;
        let peer = *drivers.entry(index).or_insert_with(|| {
            sys::driver(name).is_ok_and(|driver| matches!(driver.as_str(), "veth" | "netkit"))
        });
        Device { index, peer, queued: *queued, pod: pod.clone() }
    };
    routes.iter().map(|route| (route.ip, device(route))).collect()
}

fn all_pinned(dir: &Path) -> Result<bool, DataplaneError> {
    for shape in NET_SHAPES {
        if map::open_pinned(dir, shape)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the maps that are not pinned yet and loads the object over all of them.
fn load(dir: &Path) -> Result<Ebpf, DataplaneError> {
    let mut loader = EbpfLoader::new();
    for shape in NET_SHAPES {
        map::open_pinned(dir, shape)?;
        loader.map_pin_path(shape.name, dir.join(shape.name));
    }
    loader.load(sheave_ebpf_object::NET_BYTES).map_err(|e| load::classify(e.into(), "the network's maps"))
}

/// Takes the network's links off their hooks and removes its pins below the versioned directory; goes on past errors.
pub(super) fn remove(versioned: &Path) -> Vec<DataplaneError> {
    let dir = versioned.join(DIR);
    if !dir.exists() {
        return Vec::new();
    }
    let mut errors = uplink::detach_clsact(&dir, Order::Policies);
    errors.extend(link::detach_all(&dir.join(LINKS)));
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        if entry.file_name() != LINKS {
            errors.extend(link::unlink(&entry.path()).err());
        }
    }
    for dir in [dir.join(LINKS), dir] {
        match fs::remove_dir(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                errors.push(DataplaneError::Pin { op: "remove", path: dir, source });
            }
            _ => {}
        }
    }
    errors
}

fn to_endpoint(held: Endpoint) -> abi::Endpoint {
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    abi::Endpoint {
        device: held.device,
        identity: held.identity,
        ingress: held.ingress,
        egress: held.egress,
        flags: flag(held.host, endpoint_flag::HOST)
            | flag(held.peer, endpoint_flag::PEER)
            | flag(held.queued, endpoint_flag::QUEUED),
    }
}

fn from_endpoint(held: abi::Endpoint) -> Endpoint {
    Endpoint {
        device: held.device,
        peer: held.flags & endpoint_flag::PEER != 0,
        queued: held.flags & endpoint_flag::QUEUED != 0,
        host: held.flags & endpoint_flag::HOST != 0,
        identity: held.identity,
        ingress: held.ingress,
        egress: held.egress,
    }
}

/// Bits of a prefix before those of the address: the family word, and what an IPv4 address is mapped into.
const fn lead(v4: bool) -> u32 {
    if v4 { 32 + 96 } else { 32 }
}

fn to_range(range: IpNetwork) -> NetKey {
    NetKey {
        bits: lead(range.is_ipv4()) + u32::from(range.prefix()),
        family: if range.is_ipv4() { 4 } else { 6 },
        address: encode::address(range.network()),
    }
}

fn from_range(key: &NetKey) -> Option<IpNetwork> {
    let bits = key.bits.checked_sub(lead(key.family == 4))?;
    IpNetwork::new(encode::from_address(&key.address), u8::try_from(bits).ok()?).ok()
}

fn to_verdict((set, identity): &(u32, u32)) -> VerdictKey {
    VerdictKey { set: *set, identity: *identity }
}

fn to_ports((list, prefix): &(u32, PortPrefix)) -> PortKey {
    PortKey {
        bits: 48 + u32::from(prefix.bits),
        ports: *list,
        proto: prefix.proto,
        pad: 0,
        port: prefix.port.to_be(),
    }
}

fn from_ports(key: &PortKey) -> (u32, PortPrefix) {
    let bits = key.bits.saturating_sub(48).min(16) as u8;
    (key.ports, PortPrefix { proto: key.proto, port: u16::from_be(key.port), bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "2001:db8::/32", "10.1.2.3/32"] {
            let range: IpNetwork = text.parse().unwrap();
            assert_eq!(from_range(&to_range(range)), Some(range), "{text}");
        }
        let prefix = (7, PortPrefix { proto: 6, port: 8192, bits: 3 });
        assert_eq!(from_ports(&to_ports(&prefix)), prefix);
        let endpoint = Endpoint { device: 1, identity: 2, ingress: 3, egress: 4, ..Endpoint::default() };
        for endpoint in [
            Endpoint { peer: true, ..endpoint },
            Endpoint { queued: true, ..endpoint },
            Endpoint { host: true, ..endpoint },
        ] {
            assert_eq!(from_endpoint(to_endpoint(endpoint)), endpoint);
        }
    }
}
