//! The IPVS data plane: virtual services by generic netlink, and nftables for what IPVS cannot do. Invariant: a
//! service is changed by differences, so that what is established goes on; what others have put into the kernel's
//! table is never touched. Services of ours are known by a mark in their flags word, which kernels keep and ignore, so
//! that no record can be lost or be wrong.

mod book;
mod kernel;
mod message;
mod model;
mod rules;

use super::mirror::Mirror;
use super::{Attached, Dataplane, DataplaneConfig, DataplaneError, Mode, NodePortAddresses};
use crate::network::AddressDevice;
use crate::service::{Abilities, Capacity, Changes, FrontendKey, IpvsScheduler, Observed};
use book::{Book, reached};
use kernel::{Ipvs, about, host, nft};
use model::{Op, Service, ServiceKey, Settings, diff, record};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

/// The device that carries the addresses of services.
pub(crate) const DEVICE: &str = "sheave-ipvs0";

/// Room for everything: the kernel's table has no bounds of its own.
const ROOM: Capacity = Capacity {
    frontends4: 1 << 20,
    frontends6: 1 << 20,
    slots: 1 << 24,
    backends: 1 << 22,
    members: 1 << 24,
    ranges: 1 << 20,
    maglevs: 1 << 16,
};

/// Opens the data plane; what the kernel holds is made equal to the first round.
pub(super) fn open(config: &DataplaneConfig) -> Result<Box<dyn Dataplane>, DataplaneError> {
    Ok(Box::new(IpvsPlane::open(config)?))
}

/// Removes all that it made; what does not exist is fine.
pub(super) fn uninstall(_config: &DataplaneConfig) -> Vec<DataplaneError> {
    let mut errors = Vec::new();
    let mut on_loopback = BTreeSet::new();
    match Ipvs::open() {
        Ok(mut ipvs) => errors.extend(delete_services(&mut ipvs, &mut on_loopback).err()),
        // Without IPVS there are no services.
        Err(DataplaneError::Missing { .. }) => {}
        Err(error) => errors.push(error),
    }
    match AddressDevice::delete(DEVICE) {
        Ok(true) => {}
        Ok(false) if on_loopback.is_empty() => {}
        Ok(false) => errors.extend(clear_loopback(&on_loopback).err()),
        Err(source) => errors.push(host("remove the device of service addresses", source)),
    }
    for arp in [true, false] {
        match nft(&rules::delete(arp)) {
            // Without nft, or without tables of ARP in the kernel, there are none of ours.
            Err(DataplaneError::Missing { .. }) => {}
            Err(_) if arp => continue,
            Err(error) => errors.push(error),
            Ok(()) => {}
        }
        break;
    }
    errors
}

fn delete_services(ipvs: &mut Ipvs, given: &mut BTreeSet<IpAddr>) -> Result<(), DataplaneError> {
    for (key, settings) in ipvs.services()?.into_iter().filter(|(_, settings)| settings.is_ours()) {
        ipvs.change(&key, &Op::DeleteService).map_err(|e| about("delete a service", &key, &e))?;
        if let (ServiceKey::Addr { addr, .. }, true) = (key, settings.is_on_given_address()) {
            given.insert(addr);
        }
    }
    Ok(())
}

fn clear_loopback(given: &BTreeSet<IpAddr>) -> Result<(), DataplaneError> {
    let failed = |source| host("remove service addresses from the loopback device", source);
    let mut device = AddressDevice::loopback().map_err(failed)?;
    given.iter().try_for_each(|addr| device.remove(*addr)).map_err(failed)
}

struct IpvsPlane {
    ipvs: Ipvs,
    device: AddressDevice,
    setting: rules::Setting,
    node_port_addresses: NodePortAddresses,
    /// The node's primary addresses, one a family.
    primary: Vec<IpAddr>,
    mirror: Mirror,
    book: Book,
    /// Our services in the kernel; `None` where that is not known.
    held: Option<BTreeMap<ServiceKey, Service>>,
    /// Services of others that stand where one of ours should.
    in_the_way: BTreeSet<ServiceKey>,
    /// Addresses on the device that are ours.
    addresses: BTreeSet<IpAddr>,
}

/// What a step does to the rules.
enum Rules {
    /// The table is made anew.
    Anew,
    /// Elements that changed are changed.
    Changed,
}

impl IpvsPlane {
    fn open(config: &DataplaneConfig) -> Result<Self, DataplaneError> {
        let ipvs = Ipvs::open()?;
        let device = open_device()?;
        let setting = rules::Setting {
            pods: config.pod_cidrs.clone(),
            pod_links: config.pod_links.clone(),
            masquerade_all: config.masquerade_all,
            arp: true,
        };
        Ok(Self {
            ipvs,
            device,
            setting,
            node_port_addresses: config.node_port_addresses.clone(),
            primary: config.node_ips.clone(),
            mirror: Mirror::default(),
            book: Book::new(config.ipvs_scheduler),
            held: None,
            in_the_way: BTreeSet::new(),
            addresses: BTreeSet::new(),
        })
    }

    /// Makes the kernel equal to what is wanted, whatever it holds.
    fn resync(&mut self) -> Result<(), DataplaneError> {
        kernel::set_up(DEVICE);
        self.held = None;
        let mut held = BTreeMap::new();
        let mut others = BTreeSet::new();
        for (key, settings) in self.ipvs.services()? {
            if settings.is_ours() {
                let service = self.ipvs.whole(&key, settings)?;
                held.insert(key, service);
            } else {
                others.insert(key);
            }
        }
        let on_device = self.device.addresses().map_err(|e| host("list the device's addresses", e))?;
        self.addresses = if self.device.is_own() {
            on_device
        } else {
            // Of the loopback device's addresses those are ours that our services say we gave to the node.
            let given = held.iter().filter_map(|(key, service)| match key {
                ServiceKey::Addr { addr, .. } if service.settings.is_on_given_address() => Some(*addr),
                _ => None,
            });
            given.filter(|addr| on_device.contains(addr)).collect()
        };
        self.book.clear();
        let frontends: Vec<FrontendKey> = self.mirror.frontends().map(|(key, _)| *key).collect();
        self.book.refresh(&self.mirror, frontends);
        self.in_the_way.retain(|key| others.contains(key));
        for key in self.book.service_keys().filter(|key| others.contains(key)).collect::<Vec<_>>() {
            self.yield_to_other(key);
        }
        let mut keys: BTreeSet<ServiceKey> = self.book.service_keys().collect();
        keys.extend(held.keys());
        self.perform(held, &keys, &Rules::Anew)
    }

    /// Brings these services and the rules to what is wanted. Each step leaves packets a whole way: services by mark
    /// come before the rules that mark for them, rules before services, services before addresses.
    fn perform(
        &mut self,
        mut held: BTreeMap<ServiceKey, Service>,
        keys: &BTreeSet<ServiceKey>,
        rules: &Rules,
    ) -> Result<(), DataplaneError> {
        let mut ops = Vec::new();
        for key in keys.iter().filter(|key| !self.in_the_way.contains(key)) {
            let (before, after) = (held.get(key), self.book.service(key));
            let changes = diff(key, before, after);
            if let Some(before) = before {
                let lingers = after.is_none() && !changes.contains(&Op::DeleteService);
                let settings = before.settings.clone();
                self.book.set_lingering(*key, &settings, lingers);
            }
            ops.extend(changes.into_iter().map(|op| (*key, op)));
        }
        let (last, first): (Vec<_>, Vec<_>) = ops.into_iter().partition(|(_, op)| op.is_removal());
        let (by_mark, by_address): (Vec<_>, Vec<_>) = first.into_iter().partition(|(key, _)| key.is_mark());
        self.change(&mut held, by_mark)?;
        self.change_rules(rules)?;
        self.change(&mut held, by_address)?;
        self.give_addresses()?;
        self.change(&mut held, last)?;
        let leaving: Vec<ServiceKey> =
            keys.iter().filter(|key| self.has_leaving(&held, key)).copied().collect();
        self.drain(&mut held, &leaving)?;
        self.take_addresses()?;
        self.held = Some(held);
        Ok(())
    }

    /// Whether a service has destinations that are not wanted, or is not wanted itself.
    fn has_leaving(&self, held: &BTreeMap<ServiceKey, Service>, key: &ServiceKey) -> bool {
        let Some(service) = held.get(key) else { return false };
        let wanted = self.book.service(key);
        let unwanted = |at| wanted.is_none_or(|wanted| !wanted.destinations.contains_key(at));
        wanted.is_none() || service.destinations.keys().any(unwanted)
    }

    /// Deletes what is not wanted and has no connections any more.
    fn drain(
        &mut self,
        held: &mut BTreeMap<ServiceKey, Service>,
        keys: &[ServiceKey],
    ) -> Result<(), DataplaneError> {
        for key in keys {
            let wanted = self.book.service(key);
            let is_wanted = wanted.is_some();
            let kept: BTreeSet<_> =
                wanted.iter().flat_map(|service| service.destinations.keys().copied()).collect();
            let mut ops = Vec::new();
            let mut busy = false;
            for shown in self.ipvs.destinations(key)? {
                if kept.contains(&shown.destination) {
                    continue;
                }
                if shown.connections == 0 {
                    ops.push((*key, Op::DeleteDestination(shown.destination)));
                } else {
                    busy = true;
                }
            }
            if !is_wanted && !busy {
                if let Some(service) = held.get(key) {
                    self.book.set_lingering(*key, &service.settings, false);
                }
                ops = vec![(*key, Op::DeleteService)];
            }
            self.change(held, ops)?;
        }
        self.change_rules(&Rules::Changed)
    }

    fn change(
        &mut self,
        held: &mut BTreeMap<ServiceKey, Service>,
        ops: Vec<(ServiceKey, Op)>,
    ) -> Result<(), DataplaneError> {
        for (key, mut op) in ops {
            if self.in_the_way.contains(&key) {
                continue;
            }
            let mut result = self.ipvs.change(&key, &op);
            if let (Op::AddService(settings) | Op::EditService(settings), Err(error)) = (&op, &result)
                && error.raw_os_error() == Some(libc::ENOENT)
            {
                let replaced = self.without_scheduler(settings)?;
                op = if matches!(op, Op::AddService(_)) {
                    Op::AddService(replaced)
                } else {
                    Op::EditService(replaced)
                };
                result = self.ipvs.change(&key, &op);
            }
            match (&op, result) {
                (Op::AddService(_), Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                    self.yield_to_other(key);
                }
                (_, Err(error)) => return Err(about("change a service", &key, &error)),
                (_, Ok(())) => record(held, key, &op),
            }
        }
        Ok(())
    }

    /// The same settings with a scheduler that every IPVS has.
    fn without_scheduler(&mut self, settings: &Settings) -> Result<Settings, DataplaneError> {
        let name = &settings.scheduler;
        let basic = IpvsScheduler::Rr.name();
        if &**name == basic {
            return Err(DataplaneError::Missing {
                what: "IPVS's scheduler rr",
                hint: "its kernel module ip_vs_rr is neither built in nor can it be loaded".to_owned(),
            });
        }
        if self.book.without_scheduler(name) {
            tracing::warn!(
                scheduler = %name,
                "the kernel has no such IPVS scheduler (module ip_vs_{name}); services that ask for it get {basic}"
            );
        }
        let flags = settings.flags & !model::flag::HASH_PORT;
        Ok(Settings { scheduler: basic.into(), flags, ..settings.clone() })
    }

    fn yield_to_other(&mut self, key: ServiceKey) {
        if self.in_the_way.insert(key) {
            tracing::warn!(
                service = %key,
                "IPVS has a service of somebody else's there, which is left alone; delete it and ours takes its place"
            );
        }
    }

    fn change_rules(&mut self, rules: &Rules) -> Result<(), DataplaneError> {
        let changed = self.book.take_changes();
        match rules {
            Rules::Changed if changed.is_empty() => Ok(()),
            Rules::Changed => match nft(&rules::update(&self.setting, changed)) {
                Err(error @ DataplaneError::Missing { .. }) => Err(error),
                // Somebody has been at the table: it is made anew.
                Err(_) => self.replace_rules(),
                Ok(()) => Ok(()),
            },
            Rules::Anew => self.replace_rules(),
        }
    }

    fn replace_rules(&mut self) -> Result<(), DataplaneError> {
        let with_arp = nft(&rules::replace(&self.setting, self.book.elements()));
        if !self.setting.arp || matches!(with_arp, Ok(()) | Err(DataplaneError::Missing { .. })) {
            return with_arp;
        }
        let without = rules::Setting { arp: false, ..self.setting.clone() };
        nft(&rules::replace(&without, self.book.elements()))?;
        tracing::warn!(
            "this kernel has no nftables for ARP: on links where it matters, set arp_ignore=1 and arp_announce=2"
        );
        self.setting = without;
        Ok(())
    }

    fn give_addresses(&mut self) -> Result<(), DataplaneError> {
        for addr in self.book.given().difference(&self.addresses).copied().collect::<Vec<_>>() {
            self.device
                .add(addr)
                .map_err(|e| address_error("give the node a service's address", addr, &e))?;
            self.addresses.insert(addr);
        }
        Ok(())
    }

    fn take_addresses(&mut self) -> Result<(), DataplaneError> {
        for addr in self.addresses.difference(&self.book.given()).copied().collect::<Vec<_>>() {
            self.device.remove(addr).map_err(|e| address_error("take back a service's address", addr, &e))?;
            self.addresses.remove(&addr);
        }
        Ok(())
    }

    /// Brings what these frontends contribute into the kernel; where that is not known, everything.
    fn follow(&mut self, keys: BTreeSet<FrontendKey>) -> Result<(), DataplaneError> {
        let Some(held) = self.held.take() else { return self.resync() };
        let touched = self.book.refresh(&self.mirror, keys);
        self.perform(held, &touched, &Rules::Changed)
    }

    /// Looks whether the kernel still holds what it was given.
    fn is_intact(&mut self) -> Result<bool, DataplaneError> {
        let shown = self.ipvs.services()?;
        let Some(held) = &self.held else { return Ok(false) };
        let ours = shown.iter().filter(|(_, settings)| settings.is_ours());
        let same = ours.eq(held.iter().map(|(key, service)| (key, &service.settings)));
        let free = self.in_the_way.iter().all(|key| shown.contains_key(key));
        let device = self.device.exists(DEVICE).map_err(|e| host("look for the device", e))?;
        let on_device = self.device.addresses().map_err(|e| host("list the device's addresses", e))?;
        let addresses = self.addresses.is_subset(&on_device);
        Ok(same && free && device && addresses && kernel::has_chain(rules::TABLE, rules::LAST_CHAIN))
    }
}

fn open_device() -> Result<AddressDevice, DataplaneError> {
    let device = AddressDevice::open(DEVICE).map_err(|e| host("make the device of service addresses", e))?;
    if !device.is_own() {
        tracing::warn!(
            "the kernel has no dummy devices (module dummy): addresses of services go on the loopback device"
        );
    }
    Ok(device)
}

fn address_error(op: &'static str, addr: IpAddr, source: &io::Error) -> DataplaneError {
    host(op, io::Error::new(source.kind(), format!("{addr}: {source}")))
}

impl Dataplane for IpvsPlane {
    fn mode(&self) -> Mode {
        Mode::Ipvs
    }

    fn capacity(&self) -> Capacity {
        ROOM
    }

    fn abilities(&self) -> Abilities {
        Abilities { dsr: false, ..Abilities::ALL }
    }

    fn observe(&mut self) -> Result<Observed, DataplaneError> {
        self.mirror = Mirror::default();
        self.held = None;
        Ok(Observed::default())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), DataplaneError> {
        let touched = self.mirror.apply(changes);
        let mut keys: BTreeSet<FrontendKey> = touched.put.into_keys().collect();
        keys.extend(touched.deleted.into_keys());
        if !touched.ranges.is_empty() {
            let ranged = self.mirror.frontends().filter(|(_, at)| touched.ranges.contains(&at.entry.service));
            keys.extend(ranged.map(|(key, _)| *key));
        }
        self.follow(keys)
    }

    fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), DataplaneError> {
        let own: BTreeSet<IpAddr> = addresses.difference(&self.addresses).copied().collect();
        let reached = reached(&self.node_port_addresses, &own, &self.primary);
        if !self.book.set_node(own, reached) || self.held.is_none() {
            return Ok(());
        }
        self.follow(Book::of_the_node(&self.mirror))
    }

    fn attach(&mut self) -> Result<Attached, DataplaneError> {
        if !self.is_intact()? {
            if !self.device.exists(DEVICE).map_err(|e| host("look for the device", e))? {
                self.device = open_device()?;
            }
            self.resync()?;
        }
        if let Some(mut held) = self.held.take() {
            let leaving: Vec<ServiceKey> =
                held.keys().filter(|key| self.has_leaving(&held, key)).copied().collect();
            self.drain(&mut held, &leaving)?;
            self.take_addresses()?;
            self.held = Some(held);
        }
        Ok(Attached::Yes)
    }
}
