//! Looks at the kernel and carries steps out. Invariant: decides nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;

use super::super::error::NetworkError;
use super::super::netlink::tunnel::{Forward, NewVxlan, OwnedRoute, TunnelLink, up_with_mtu};
use super::super::netlink::{Connection, Neighbour, offload};
use super::super::node::{read_sysctl, write_sysctl};
use super::plan::{Kernel, RP_FILTER_ALL, Step, WantedRoute, Wish, is_tunnel, sysctls};

/// The network namespace of the calling thread.
pub(super) struct Hands {
    connection: Connection,
    /// Indexes by name.
    links: HashMap<String, u32>,
}

impl Hands {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Hands { connection: Connection::open()?, links: HashMap::new() })
    }

    /// All that a plan for `wish` looks at.
    pub(super) fn observe(&mut self, wish: &Wish) -> io::Result<Kernel> {
        let links = self.connection.tunnel_links()?;
        let ours: Vec<&TunnelLink> = links.iter().filter(|l| is_tunnel(&l.link.name)).collect();
        let indexes: BTreeSet<u32> = ours.iter().map(|l| l.link.index).collect();
        let mut kernel = Kernel {
            addresses: self.connection.addresses()?,
            routes: self.connection.owned_routes()?,
            ..Kernel::default()
        };
        kernel.neighbours =
            self.connection.neighbours()?.into_iter().filter(|n| indexes.contains(&n.link)).collect();
        for link in ours.iter().filter(|l| l.vxlan.is_some()) {
            match self.connection.forwards(link.link.index) {
                Ok(entries) => kernel.forwards.extend(entries),
                // Gone since it was listed: the next look sees it so.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error),
            }
            if !wish.tx_checksum && offload::is_on(&link.link.name)? {
                kernel.offloading.insert(link.link.name.clone());
            }
        }
        for ip in wish.peers.iter().flat_map(|peer| &peer.node_ips) {
            if let Some(reach) = self.connection.reach(*ip)? {
                kernel.reach.insert(*ip, reach);
            }
        }
        let under: BTreeSet<u32> = kernel.reach.values().map(|reach| reach.link).collect();
        let under: Vec<&str> =
            links.iter().filter(|l| under.contains(&l.link.index)).map(|l| l.link.name.as_str()).collect();
        let ours: Vec<&str> = ours.iter().map(|l| l.link.name.as_str()).collect();
        let keys = sysctls(&ours, &under, wish.ipv6).into_iter().map(|(key, _)| key);
        kernel.sysctls = read_all(keys.chain([RP_FILTER_ALL.to_owned()]));
        kernel.links = links;
        Ok(kernel)
    }

    fn index(&mut self, name: &str) -> io::Result<u32> {
        if let Some(index) = self.links.get(name) {
            return Ok(*index);
        }
        let link = self.connection.link(name)?;
        let index = link.ok_or_else(|| io::Error::other(format!("link {name} is gone")))?.index;
        self.links.insert(name.to_owned(), index);
        Ok(index)
    }

    /// Forgets what may have changed since.
    pub(super) fn look_again(&mut self) {
        self.links.clear();
    }

    /// Carries out one step.
    pub(super) fn apply(&mut self, step: &Step) -> io::Result<()> {
        match step {
            Step::DeleteLink { name } => {
                self.links.remove(name);
                self.connection.delete_link(name).map(drop)
            }
            Step::CreateVxlan { name, mac, mtu, vxlan } => {
                self.links.remove(name);
                self.connection.create_vxlan(&NewVxlan { name, mac: *mac, mtu: *mtu, vxlan: *vxlan })
            }
            Step::Sysctl { key, value } => write_sysctl(key, value).map_err(|error| match error {
                NetworkError::Io { source, .. } => source,
                other => io::Error::other(other),
            }),
            Step::ChecksumHere { name } => offload::turn_off(name),
            Step::SetLink { name, mtu } => {
                let index = self.index(name)?;
                up_with_mtu(&mut self.connection, index, *mtu)
            }
            Step::Address { link, ip } => {
                let index = self.index(link)?;
                self.connection.set_tunnel_address(index, *ip)
            }
            Step::DeleteAddress { link, ip } => {
                let index = self.index(link)?;
                self.connection.delete_tunnel_address(index, *ip).map(drop)
            }
            Step::Neighbour { link, ip, mac } => {
                let neighbour = Neighbour { link: self.index(link)?, ip: *ip, mac: *mac };
                self.connection.set_neighbour(&neighbour)
            }
            Step::DeleteNeighbour { link, ip, mac } => {
                let neighbour = Neighbour { link: self.index(link)?, ip: *ip, mac: *mac };
                self.connection.delete_neighbour(&neighbour).map(drop)
            }
            Step::Forward { link, mac, to } => {
                let entry = Forward { link: self.index(link)?, mac: *mac, to: *to };
                self.connection.set_forward(&entry)
            }
            Step::DeleteForward { link, mac, to } => {
                let entry = Forward { link: self.index(link)?, mac: *mac, to: *to };
                self.connection.delete_forward(&entry).map(drop)
            }
            Step::Route(want) => {
                let route = self.route(want)?;
                self.connection.set_owned_route(&route)
            }
            Step::DeleteRoute(route) => self.connection.delete_owned_route(route).map(drop),
        }
    }

    fn route(&mut self, want: &WantedRoute) -> io::Result<OwnedRoute> {
        let link = match &want.link {
            Some(name) => Some(self.index(name)?),
            None => None,
        };
        Ok(OwnedRoute {
            to: want.to,
            kind: want.kind,
            link,
            via: want.via,
            src: want.src,
            metric: want.metric,
            protocol: super::plan::PROTOCOL,
            mtu: 0,
        })
    }
}

fn read_all(keys: impl Iterator<Item = String>) -> BTreeMap<String, String> {
    keys.filter_map(|key| Some((key.clone(), read_sysctl(&key).ok()?))).collect()
}

/// What the operator's host should go on setting, as a sysctl file.
pub(super) fn write_drop_in(dir: &Path, keys: &[(String, &'static str)]) -> io::Result<()> {
    let path = dir.join("90-sheave-network.conf");
    let mut text = String::from("# Written by the sheave agent; what its overlay needs.\n");
    for (key, value) in keys {
        text.push_str(&format!("{key} = {value}\n"));
    }
    if std::fs::read_to_string(&path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    std::fs::create_dir_all(dir)?;
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, &path)
}
