//! The eBPF data plane: programs on cgroup and uplink hooks over pinned maps. Invariant: everything that balances is
//! pinned under `<pin dir>/v<ABI version>/` and does its work without this process; opening adopts what is there.

mod ahead;
mod doors;
mod encode;
mod events;
mod flows;
mod grow;
mod guard;
mod link;
mod list;
mod load;
mod map;
mod nets;
mod node;
mod probe;
mod rows;
mod sockets;
mod sys;
mod trace;
mod uplink;
mod xdp;

pub use doors::{HostRouting, host_routing};
pub use events::{Listener, Seen};
pub(crate) use guard::devices_of;
pub use guard::{Guard, GuardConfig, GuardStatus, guard_status};
pub use list::{Lookup, RowBackend, ServiceRow, list};
pub use map::{Counters, Pressure};
pub use probe::cgroup2_root;
pub use sys::monotonic_ns;
pub use trace::{Candidate, Origin, Outcome, Question, Step, Trace, trace};

use super::{Attached, Dataplane, DataplaneConfig, DataplaneError, Mode};
use crate::limits;
use crate::service::{
    Abilities, Capacity, Changes, FrontendEntry, FrontendKey, FrontendKind, Observed, maglev,
};
use aya::Ebpf;
use flows::FlowTable;
use link::{ANSWER_HOOKS, CALLS, CGROUP_HOOKS, DeviceHook, LINKS, Order, POD_HOOKS, Target, UPLINK_HOOKS};
use map::Map;
use nix::mount::MntFlags;
use sheave_ebpf_abi::{
    ABI_VERSION, Address, Backend, Config, Door, Frontend, Frontend4Key, Frontend6Key, MAGLEV_SLOTS,
    MaglevTable, MemberKey, Plain as _, RangeKey, Slot, call, config_flag, map as names,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// The name of a network device of this namespace.
pub fn device_name(index: u32) -> Option<String> {
    // What is not there comes back as an empty name, not as an error.
    let name = nix::net::if_::if_indextoname(index).ok()?.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}

/// The pin directory of this build's layouts.
pub fn versioned(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("v{ABI_VERSION}"))
}

/// The maps that this process reads and writes.
#[derive(Debug)]
struct Maps {
    frontends4: Map<Frontend4Key, Frontend>,
    frontends6: Map<Frontend6Key, Frontend>,
    slots: Map<u32, Slot>,
    backends: Map<u32, Backend>,
    node_addrs: Map<Address, u32>,
    config: Map<u32, Config>,
    members: Map<MemberKey, u32>,
    ranges: Map<RangeKey, u32>,
    maglev: Map<u32, MaglevTable>,
    flows: FlowTable,
}

impl Maps {
    fn open(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self {
            frontends4: Map::open(dir, names::FRONTENDS4)?,
            frontends6: Map::open(dir, names::FRONTENDS6)?,
            slots: Map::open(dir, names::SLOTS)?,
            backends: Map::open(dir, names::BACKENDS)?,
            node_addrs: Map::open(dir, names::NODE_ADDRS)?,
            config: Map::open(dir, names::CONFIG)?,
            members: Map::open(dir, names::MEMBERS)?,
            ranges: Map::open(dir, names::RANGES)?,
            maglev: Map::open(dir, names::MAGLEV)?,
            flows: FlowTable::open(dir)?,
        })
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendEntry)>, DataplaneError> {
        let v4 = self.frontends4.entries(usize::MAX)?;
        let v6 = self.frontends6.entries(usize::MAX)?;
        let v4 = v4.iter().filter_map(|(k, v)| Some((encode::from_key4(k)?, encode::from_frontend(v))));
        let v6 = v6.iter().filter_map(|(k, v)| Some((encode::from_key6(k)?, encode::from_frontend(v))));
        Ok(v4.chain(v6).collect())
    }

    fn observe(&self) -> Result<Observed, DataplaneError> {
        let frontends = self.frontends()?;
        let used =
            frontends.iter().map(|(_, entry)| entry.run()).map(|run| run.base.saturating_add(run.len)).max();
        let used = used.unwrap_or(0).min(self.slots.max_entries()) as usize;
        let slots = self.slots.rows(used, |_, _| true)?;
        let slots = slots.into_iter().map(|(_, slot)| (slot.service, slot.backend)).collect();
        let backends = self.backends.rows(usize::MAX, |id, held| id != 0 && id == held.id)?;
        let backends = backends.iter().filter_map(|(id, b)| Some((*id, encode::from_backend(b)?))).collect();
        let members = self.members.entries(usize::MAX)?;
        let members = members.iter().map(|(key, flags)| encode::from_member(key, *flags)).collect();
        let ranges = self.ranges.entries(usize::MAX)?;
        let ranges = ranges.iter().filter_map(|(key, _)| encode::from_range_key(key)).collect();
        let followed: BTreeSet<_> = frontends.iter().map(|(_, entry)| entry.maglev).collect();
        let mut maglevs = Vec::new();
        for id in followed.into_iter().filter(|id| *id != 0) {
            let table = self.maglev.get(&id)?;
            maglevs.extend(table.map(|table| (id, maglev::fingerprint(&table.picks))));
        }
        Ok(Observed { frontends, slots, backends, members, ranges, maglevs })
    }

    /// Makes the changes, in the order of their fields.
    fn apply(&self, changes: &Changes) -> Result<(), DataplaneError> {
        let maps = self;
        let backends: Vec<_> =
            changes.put_backends.iter().map(|(id, at)| (*id, encode::backend(*id, at))).collect();
        maps.backends.put_rows(&backends)?;
        let slots: Vec<_> = changes.put_slots.iter().map(encode::slot).collect();
        maps.slots.put_rows(&slots)?;
        for write in &changes.put_maglevs {
            let mut table = MaglevTable { picks: [0; MAGLEV_SLOTS] };
            table.picks.iter_mut().zip(write.picks.iter()).for_each(|(slot, pick)| *slot = *pick);
            maps.maglev.put(&write.id, &table)?;
        }
        let members: Vec<_> = changes
            .put_members
            .iter()
            .map(|(key, held)| (encode::member_key(*key), encode::member(*held)))
            .collect();
        maps.members.put_all(members.into_iter())?;
        for (service, range) in &changes.put_ranges {
            maps.ranges.put(&encode::range_key(*service, range), &1)?;
        }
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (key, entry) in &changes.put_frontends {
            match encode::key(key) {
                encode::Key::V4(key) => v4.push((key, encode::frontend(entry))),
                encode::Key::V6(key) => v6.push((key, encode::frontend(entry))),
            }
        }
        maps.frontends4.put_all(v4.into_iter())?;
        maps.frontends6.put_all(v6.into_iter())?;
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for key in &changes.delete_frontends {
            match encode::key(key) {
                encode::Key::V4(key) => v4.push(key),
                encode::Key::V6(key) => v6.push(key),
            }
        }
        maps.frontends4.delete_all(v4.into_iter())?;
        maps.frontends6.delete_all(v6.into_iter())?;
        for (service, range) in &changes.delete_ranges {
            maps.ranges.delete(&encode::range_key(*service, range))?;
        }
        maps.members.delete_all(changes.delete_members.iter().map(|key| encode::member_key(*key)))?;
        let gone: Vec<_> = changes.delete_backends.iter().map(|id| (*id, Backend::zeroed())).collect();
        maps.backends.put_rows(&gone)
    }
}

/// Whether the frontend has every address of the node and a port beyond the range of NodePorts, which the programs look at
/// only when told.
fn is_beyond_range(key: &FrontendKey, entry: &FrontendEntry, (min, max): (u16, u16)) -> bool {
    let every_address = matches!(entry.policy.kind, FrontendKind::HostPort | FrontendKind::NodePort);
    every_address && key.addr.is_unspecified() && !(min..=max).contains(&key.port)
}

/// Programs, maps and links of one node.
#[derive(Debug)]
pub struct EbpfDataplane {
    dir: PathBuf,
    cgroup: PathBuf,
    settings: DataplaneConfig,
    maps: Maps,
    /// Loaded only when something has to be attached.
    object: Option<Ebpf>,
    /// The object while its programs are being loaded.
    ahead: Option<ahead::Ahead>,
    node_addresses: BTreeSet<IpAddr>,
    /// Their flags are of these settings.
    told_addresses: bool,
    nets: nets::Nets,
    doors: doors::Doors,
    /// Frontends of every address of the node with ports beyond the range of NodePorts.
    beyond_range: BTreeSet<FrontendKey>,
    sockets: sockets::Ender,
    /// What another agent left undone was looked for, and ports were reserved.
    prepared: bool,
}

impl EbpfDataplane {
    /// Adopts the pinned maps, or makes them. Attaches nothing: [`Dataplane::attach`] does, when the maps are filled.
    pub fn open(config: &DataplaneConfig) -> Result<Self, DataplaneError> {
        let cgroup = match &config.cgroup_path {
            Some(path) => path.clone(),
            None => probe::cgroup2_root()?,
        };
        probe::check(&config.pin_dir, &cgroup)?;
        let dir = versioned(&config.pin_dir);
        let links = dir.join(LINKS);
        fs::create_dir_all(&links).map_err(|source| DataplaneError::Pin {
            op: "make",
            path: links,
            source,
        })?;
        let has_doors = dir.join(names::DOORS).exists();
        let object = if load::all_pinned(&dir)? { None } else { Some(load::load(&dir, &config.sizes)?) };
        let maps = Maps::open(&dir)?;
        let node_addresses = maps.node_addrs.entries(usize::MAX)?;
        let node_addresses = node_addresses.iter().map(|(a, _)| encode::from_address(a)).collect();
        let nets = nets::Nets::open(&dir)?;
        let doors = if has_doors { doors::Doors::open(&dir)? } else { doors::Doors::none(&dir)? };
        let sockets = sockets::Ender::new(&dir, &cgroup, config.stats.clone());
        let mut plane = Self {
            dir,
            cgroup,
            settings: config.clone(),
            maps,
            object,
            ahead: None,
            node_addresses,
            told_addresses: false,
            nets,
            doors,
            beyond_range: BTreeSet::new(),
            sockets,
            prepared: false,
        };
        plane.write_config(config, plane.config()?.object_digest)?;
        if let Some((growth, object)) = grow::begin(&plane.dir, &config.sizes)? {
            plane.grow(growth, object)?;
        }
        plane.load_ahead()?;
        Ok(plane)
    }

    /// Puts programs over larger maps to work in place of those at work, with what the maps hold.
    fn grow(&mut self, mut growth: grow::Growth, object: Ebpf) -> Result<(), DataplaneError> {
        growth.copy_live()?;
        self.object = Some(object);
        let held = self.config()?;
        if held.object_digest != 0 {
            // Makes attaching replace every program.
            self.maps.config.put(&0, &Config { object_digest: 0, ..held })?;
            if let Err(error) = self.attach() {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "maps keep their size: not every program could be replaced"
                );
                self.object = None;
                return grow::remove_side(&self.dir);
            }
            growth.copy_live()?;
        }
        growth.finish()?;
        self.maps = Maps::open(&self.dir)?;
        Ok(())
    }

    fn config(&self) -> Result<Config, DataplaneError> {
        Ok(self.maps.config.get(&0)?.unwrap_or_else(Config::zeroed))
    }

    fn write_config(&self, config: &DataplaneConfig, object_digest: u64) -> Result<(), DataplaneError> {
        let node_netns_cookie = sys::netns_cookie()
            .map_err(|source| DataplaneError::Host { op: "ask for the netns cookie", source })?;
        let (node_port_min, node_port_max) = config.node_port_range;
        let primary = |v4: bool| config.node_ips.iter().find(|ip| ip.is_ipv4() == v4);
        let address = |v4| primary(v4).map_or(Address { words: [0; 4] }, |ip| encode::address(*ip));
        let (local_port_min, local_port_max) = node::local_ports();
        let wanted = Config {
            node_netns_cookie,
            object_digest,
            node_port_min,
            node_port_max,
            flags: node::config_flags(config) | self.config()?.flags & config_flag::HOST_PORTS,
            local_port_min,
            local_port_max,
            snat_port_min: limits::SNAT_PORTS.0,
            snat_port_max: limits::SNAT_PORTS.1,
            node4: address(true),
            node6: address(false),
            maglev_seed: 0,
            snat_more_min: limits::SNAT_MORE_PORTS.0,
            snat_more_max: limits::SNAT_MORE_PORTS.1,
            pad: 0,
        };
        self.maps.config.put(&0, &wanted)
    }

    /// Begins to load the programs that attaching will want, unless those at work are of this build.
    fn load_ahead(&mut self) -> Result<(), DataplaneError> {
        if self.config()?.object_digest == sheave_ebpf_object::digest() {
            return Ok(());
        }
        let object = match self.object.take() {
            Some(object) => object,
            None => load::load(&self.dir, &self.settings.sizes)?,
        };
        let devices = self.devices()?;
        let at_devices = devices.iter().flat_map(|(_, hooks)| *hooks).map(|(name, ..)| *name);
        let mut names: Vec<_> = self.calls(&devices).iter().map(|(_, name)| *name).collect();
        names.extend(CGROUP_HOOKS.iter().map(|(name, _)| *name).chain(at_devices));
        self.ahead = Some(ahead::Ahead::start(object, names)?);
        Ok(())
    }

    fn object(&mut self) -> Result<&mut Ebpf, DataplaneError> {
        if let Some(ahead) = self.ahead.take() {
            self.object = Some(ahead.finish()?);
        }
        if self.object.is_none() {
            self.object = Some(load::load(&self.dir, &self.settings.sizes)?);
        }
        self.object
            .as_mut()
            .ok_or_else(|| DataplaneError::Load { what: "the object".to_owned(), source: "not kept".into() })
    }

    fn link_path(&self, hook: &str) -> PathBuf {
        self.dir.join(LINKS).join(hook)
    }

    /// Takes note of ports beyond the range, and tells the programs when there are some, before they are written, or none any more,
    /// after they were deleted.
    fn note_beyond_range(&mut self, beyond_range: BTreeSet<FrontendKey>) -> Result<(), DataplaneError> {
        let held = self.config()?;
        let without = held.flags & !config_flag::HOST_PORTS;
        let flags = if beyond_range.is_empty() { without } else { held.flags | config_flag::HOST_PORTS };
        if flags != held.flags {
            self.maps.config.put(&0, &Config { flags, ..held })?;
        }
        self.beyond_range = beyond_range;
        Ok(())
    }

    /// Whether every hook holds its link, whatever program is in it.
    fn all_attached(&self, target: &Target) -> Result<bool, DataplaneError> {
        for (hook, _) in CGROUP_HOOKS {
            if link::state(&self.link_path(hook), target)? != link::State::Attached {
                return Ok(false);
            }
        }
        let devices = self.devices()?;
        if !uplink::others(&self.dir, &devices).is_empty() {
            return Ok(false);
        }
        for (name, hooks) in devices {
            if !uplink::is_attached(&self.dir, &name, hooks, Order::Services)? {
                return Ok(false);
            }
        }
        for name in &self.settings.uplinks {
            if !xdp::is_settled(&self.dir, name, self.settings.xdp)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The devices that programs belong at. An uplink is nothing else, whatever its name begins with.
    fn devices(&self) -> Result<Vec<(String, &'static [DeviceHook])>, DataplaneError> {
        let (settings, uplinks) = (&self.settings, &self.settings.uplinks);
        let at_pods = if settings.pod_packets || settings.masquerade_all {
            POD_HOOKS
        } else if settings.host_routing {
            ANSWER_HOOKS
        } else {
            &[]
        };
        let pods = if at_pods.is_empty() { Vec::new() } else { uplink::named(&settings.pod_links)? };
        let pods = pods.into_iter().filter(|name| !uplinks.contains(name)).map(|name| (name, at_pods));
        Ok(uplinks.iter().map(|name| (name.clone(), UPLINK_HOOKS)).chain(pods).collect())
    }

    /// Opens the doors that have their program by now: a pod may have come since they were looked for.
    fn open_doors(&mut self, mut doors: BTreeMap<u16, Door>) -> Result<(), DataplaneError> {
        let mut ready = BTreeSet::new();
        for (name, hooks) in self.devices()? {
            if uplink::is_attached(&self.dir, &name, hooks, Order::Services).unwrap_or(false) {
                ready.insert(uplink::index(&name)?);
            }
        }
        doors.retain(|_, door| ready.contains(&door.device));
        self.doors.open_all(&doors)
    }

    /// The programs that those at such devices continue in. What begins at pods' devices is wanted where it is, or may be still.
    fn calls(&self, devices: &[(String, &'static [DeviceHook])]) -> Vec<&'static (u32, &'static str)> {
        let begins_at_pods = devices.iter().any(|(_, hooks)| *hooks == POD_HOOKS)
            || !uplink::others(&self.dir, devices).is_empty();
        CALLS.iter().filter(|(place, _)| begins_at_pods || *place != call::POD_INGRESS).collect()
    }

    /// Puts the programs that others continue in into their places.
    fn fill_calls(
        dir: &Path,
        object: &mut Ebpf,
        wanted: &[&(u32, &'static str)],
    ) -> Result<(), DataplaneError> {
        let calls = Map::<u32, u32>::open(dir, names::CALLS)?;
        for (place, name) in wanted {
            let program = load::program(object, name)?;
            // The kernel takes the program's descriptor for a value.
            calls.put(place, &(program.as_raw_fd() as u32))?;
        }
        Ok(())
    }

    /// The counters, to be read at any time by anybody.
    pub fn counters(&self) -> Result<Counters, DataplaneError> {
        Counters::open(&self.dir)
    }
}

impl Dataplane for EbpfDataplane {
    fn mode(&self) -> Mode {
        Mode::Ebpf
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            frontends4: self.maps.frontends4.max_entries(),
            frontends6: self.maps.frontends6.max_entries(),
            slots: self.maps.slots.max_entries(),
            // Row 0 is nobody's.
            backends: self.maps.backends.max_entries().saturating_sub(1),
            members: self.maps.members.max_entries(),
            ranges: self.maps.ranges.max_entries(),
            // Element 0 is nobody's.
            maglevs: self.maps.maglev.max_entries().saturating_sub(1),
        }
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            sctp: false,
            dsr: true,
            ipvs_schedulers: false,
            services_per_round: limits::DATAPLANE_SERVICES_PER_ROUND_MAX,
        }
    }

    fn pressure(&mut self) -> Vec<Pressure> {
        map::pressure(&self.dir)
    }

    fn observe(&mut self) -> Result<Observed, DataplaneError> {
        let observed = self.maps.observe()?;
        let range = self.settings.node_port_range;
        let held = observed.frontends.iter().filter(|(key, entry)| is_beyond_range(key, entry, range));
        self.note_beyond_range(held.map(|(key, _)| *key).collect())?;
        self.nets.be(observed.frontends.iter().map(|(key, _)| key.addr))?;
        Ok(observed)
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), DataplaneError> {
        let range = self.settings.node_port_range;
        let mut beyond_range = self.beyond_range.clone();
        beyond_range.extend(
            changes
                .put_frontends
                .iter()
                .filter(|(key, entry)| is_beyond_range(key, entry, range))
                .map(|(key, _)| *key),
        );
        if beyond_range.len() != self.beyond_range.len() {
            self.note_beyond_range(beyond_range.clone())?;
        }
        self.nets.add(changes.put_frontends.keys().map(|key| key.addr))?;
        self.maps.apply(changes)?;
        self.maps.flows.forget(&changes.lost)?;
        self.sockets.end(&changes.lost);
        let is_gone = |key: &FrontendKey| {
            changes.delete_frontends.contains(key)
                || changes.put_frontends.get(key).is_some_and(|entry| !is_beyond_range(key, entry, range))
        };
        beyond_range.retain(|key| !is_gone(key));
        if beyond_range.len() != self.beyond_range.len() {
            self.note_beyond_range(beyond_range)
        } else {
            Ok(())
        }
    }

    fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), DataplaneError> {
        // All of them: which one is primary depends on the others, and what was adopted on other settings.
        for addr in addresses.iter().filter(|_| !self.told_addresses || *addresses != self.node_addresses) {
            let flags = node::address_flags(*addr, addresses, &self.settings);
            self.maps.node_addrs.put(&encode::address(*addr), &flags)?;
        }
        for addr in self.node_addresses.difference(addresses) {
            self.maps.node_addrs.delete(&encode::address(*addr))?;
        }
        self.node_addresses.clone_from(addresses);
        self.told_addresses = true;
        Ok(())
    }

    fn set_draining(&mut self, draining: bool) -> Result<(), DataplaneError> {
        let held = self.config()?;
        let others = held.flags & !config_flag::LEAVE_STRAYS;
        let flags = if draining { others | config_flag::LEAVE_STRAYS } else { others };
        if flags == held.flags {
            return Ok(());
        }
        self.maps.config.put(&0, &Config { flags, ..held })
    }

    fn attach(&mut self) -> Result<Attached, DataplaneError> {
        if !load::all_pinned(&self.dir)? {
            tracing::warn!(dir = %self.dir.display(), "pins are gone, starting anew");
            let counters = self.settings.stats.clone();
            *self = Self::open(&self.settings)?;
            counters.set_counters(self.counters()?);
            return Ok(Attached::TableIsNew);
        }
        if !std::mem::replace(&mut self.prepared, true) {
            self.sockets.end_all();
            if let Err(error) = node::reserve_ports(self.settings.node_port_range) {
                tracing::warn!(%error, "sockets that ask for no port may be given a NodePort");
            }
        }
        let target = Target::cgroup(&self.cgroup)?;
        let digest = sheave_ebpf_object::digest();
        let held = self.config()?;
        let doors = doors::wanted(&self.settings)?;
        self.doors.keep(&doors)?;
        if held.object_digest == digest && self.doors.are(&doors) && self.all_attached(&target)? {
            return Ok(Attached::Yes);
        }
        let (dir, devices) = (self.dir.clone(), self.devices()?);
        let (uplinks, with_xdp) = (self.settings.uplinks.clone(), self.settings.xdp);
        let calls = self.calls(&devices);
        let object = self.object()?;
        Self::fill_calls(&dir, object, &calls)?;
        for (hook, attach_type) in CGROUP_HOOKS {
            let program = load::program(object, hook)?;
            let inherited = link::inherited(&dir, hook);
            link::attach(&dir.join(LINKS).join(hook), &target, *attach_type, program.as_fd(), &inherited)?;
        }
        for (name, hooks) in &devices {
            match uplink::attach(&dir, object, name, hooks, Order::Services) {
                // Pods come and go; an uplink that is gone is for the operator to know.
                Err(error) if !uplinks.contains(name) && uplink::index(name).is_err() => {
                    tracing::debug!(device = name, %error, "gone before it was attached");
                }
                done => done?,
            }
        }
        let mut in_xdp = Vec::new();
        if with_xdp {
            for name in &uplinks {
                xdp::attach(&dir, object, name)?;
                in_xdp.push(uplink::index(name)?);
            }
        }
        xdp::detach_others(&dir, &in_xdp)?;
        uplink::forget_gone(&dir)?;
        uplink::detach_others(&dir, &devices, Order::Services)?;
        self.maps.config.put(&0, &Config { object_digest: digest, ..held })?;
        self.open_doors(doors)?;
        for other in link::other_versions(&self.dir) {
            remove_version(&other).into_iter().for_each(|error| {
                tracing::warn!(dir = %other.display(), %error, "left over from another version");
            });
        }
        // The links hold the programs, the pins hold the maps.
        self.object = None;
        Ok(Attached::Yes)
    }
}

/// Takes a pin directory's links off their hooks and removes all its pins, of every ABI version; goes on past errors.
/// A directory that does not exist is fine. Ends services: nothing is balanced on this node afterwards.
pub fn uninstall(pin_dir: &Path) -> Result<(), Vec<DataplaneError>> {
    let mut errors = Vec::new();
    let here = versioned(pin_dir);
    for dir in std::iter::once(here.clone()).chain(link::other_versions(&here)) {
        errors.extend(remove_version(&dir));
    }
    let mut removed = fs::remove_dir(pin_dir);
    if removed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy) {
        // The directory itself is a mount: the bpffs that opening made.
        // A process that is being started may hold a directory of it open for a moment.
        let unmounted = nix::mount::umount2(pin_dir, MntFlags::MNT_DETACH);
        removed = unmounted.map_err(io::Error::from).and_then(|()| fs::remove_dir(pin_dir));
    }
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            errors.push(DataplaneError::Pin { op: "remove", path: pin_dir.to_owned(), source });
        }
        _ => {}
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn remove_version(dir: &Path) -> Vec<DataplaneError> {
    let mut errors = guard::remove(dir);
    errors.extend(uplink::detach_clsact(dir, Order::Services));
    errors.extend(link::detach_all(&dir.join(LINKS)));
    errors.extend(grow::remove_side(dir).err());
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name() != LINKS && entry.file_name() != guard::DIR {
            errors.extend(link::unlink(&entry.path()).err());
        }
    }
    for dir in [dir.join(LINKS), dir.to_owned()] {
        match fs::remove_dir(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                errors.push(DataplaneError::Pin { op: "remove", path: dir, source });
            }
            _ => {}
        }
    }
    errors
}
