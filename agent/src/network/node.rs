//! The node's own links and addresses. Invariant: what is chosen depends only on what the kernel shows, so the same
//! network gives the same answer after every start.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::error::NetworkError;
use super::netlink::{Address, Connection, Link, Route};
use super::overlay::is_tunnel;
use super::plan::{GATEWAY_V4, is_node_link};

/// MTU where no uplink says otherwise.
const DEFAULT_MTU: u32 = 1500;

/// How the node is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAddresses {
    /// Links to the outside: those named, else those of the default routes, else the first with an address.
    pub uplinks: Vec<String>,
    /// The node's address of each family it has one of, IPv4 first.
    pub ips: Vec<IpAddr>,
    /// The smallest MTU of the uplinks, bytes.
    pub mtu: u32,
}

/// Finds the node's uplinks and addresses in the calling thread's network namespace. `uplinks` replaces the search
/// for links. Blocks for well under a millisecond.
pub fn node_addresses(uplinks: &[String]) -> Result<NodeAddresses, NetworkError> {
    let tables = Tables::read()?;
    let found = tables.uplinks(uplinks)?;
    let ips = tables.ips(&found);
    if ips.is_empty() {
        return Err(NetworkError::NoNodeAddress);
    }
    Ok(NodeAddresses { mtu: mtu(&found), uplinks: found.iter().map(|link| link.name.clone()).collect(), ips })
}

/// What the kernel shows of a namespace.
pub(super) struct Tables {
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
}

impl Tables {
    pub(super) fn read() -> Result<Self, NetworkError> {
        let netlink = |op: &str| {
            let op = op.to_owned();
            move |source| NetworkError::Netlink { op, source }
        };
        let mut connection = Connection::open().map_err(netlink("open a socket"))?;
        Ok(Tables {
            links: connection.links().map_err(netlink("list links"))?,
            addresses: connection.addresses().map_err(netlink("list addresses"))?,
            routes: connection.routes().map_err(netlink("list routes"))?,
        })
    }

    /// The node's uplinks: those `named`, else those of default routes by metric, else the first with an address.
    pub(super) fn uplinks(&self, named: &[String]) -> Result<Vec<&Link>, NetworkError> {
        if !named.is_empty() {
            let find = |name: &String| self.links.iter().find(|link| link.name == *name);
            return named.iter().map(|n| find(n).ok_or_else(|| NetworkError::NoUplink(n.clone()))).collect();
        }
        let mut defaults: Vec<&Route> = self.routes.iter().filter(|route| route.to.prefix() == 0).collect();
        defaults.sort_by_key(|route| (route.to.is_ipv6(), route.metric));
        let mut found: Vec<&Link> = Vec::new();
        for link in defaults.iter().filter_map(|route| self.outside(route.link?)) {
            if !found.iter().any(|known| known.index == link.index) {
                found.push(link);
            }
        }
        if found.is_empty() {
            let has_address = |link: &&Link| self.addresses.iter().any(|a| a.link == link.index && a.global);
            let up = self.links.iter().filter(|link| link.up && is_outside(link));
            found.extend(up.filter(has_address).min_by_key(|link| link.index));
        }
        Ok(found)
    }

    fn outside(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index && is_outside(link))
    }

    /// The best address of each family on `uplinks`, IPv4 first.
    pub(super) fn ips(&self, uplinks: &[&Link]) -> Vec<IpAddr> {
        let best = |v4: bool| {
            let at = |address: &Address| uplinks.iter().position(|link| link.index == address.link);
            let usable = self.addresses.iter().filter(|a| a.global && a.ip.is_ipv4() == v4);
            let ranked = usable.filter_map(|a| Some((a.second_choice, at(a)?, a.ip)));
            ranked.min_by_key(|(second, at, _)| (*second, *at)).map(|(_, _, ip)| ip)
        };
        [best(true), best(false)].into_iter().flatten().collect()
    }

    /// Those of `ips` that the kernel takes as a source address now.
    pub(super) fn sources(&self, ips: &[IpAddr]) -> Vec<IpAddr> {
        let usable = |ip: &IpAddr| self.addresses.iter().any(|a| a.ip == *ip && !a.tentative);
        ips.iter().copied().filter(usable).collect()
    }
}

/// Neither the loopback nor one of our pods' links or tunnels.
fn is_outside(link: &Link) -> bool {
    !link.loopback && !is_node_link(&link.name) && !is_tunnel(&link.name)
}

/// The MTU that fits through all of `uplinks`.
pub(super) fn mtu(uplinks: &[&Link]) -> u32 {
    uplinks.iter().map(|link| link.mtu).min().unwrap_or(DEFAULT_MTU)
}

/// Settings of the whole namespace that routing pods needs; those that were not so are returned in words.
pub(super) fn prepare(v4: bool, v6: bool, uplinks: &[&Link]) -> Result<Vec<String>, NetworkError> {
    let mut changed = Vec::new();
    let mut set = |key: String, value: &str| -> Result<(), NetworkError> {
        if read_sysctl(&key)? != value {
            write_sysctl(&key, value)?;
            changed.push(format!("{} = {value}", key.replace('/', ".")));
        }
        Ok(())
    };
    if v4 {
        set("net/ipv4/ip_forward".to_owned(), "1")?;
    }
    if v6 {
        for link in uplinks {
            // A router ignores advertisements unless told twice; without this the node would lose the default
            // route that it learned from one.
            let key = format!("net/ipv6/conf/{}/accept_ra", link.name);
            if read_sysctl(&key)? == "1" {
                set(key, "2")?;
            }
        }
        set("net/ipv6/conf/all/forwarding".to_owned(), "1")?;
    }
    Ok(changed)
}

/// Gives the loopback the pods' IPv4 gateway, where it lacks it: a pod that asks whether its gateway is there gets an
/// answer. The address is no source of anything else. Returns what was done, in words.
pub(super) fn answer_as_gateway(tables: &Tables) -> Result<Option<String>, NetworkError> {
    let Some(lo) = tables.links.iter().find(|link| link.loopback) else { return Ok(None) };
    if tables.addresses.iter().any(|address| address.link == lo.index && address.ip == GATEWAY_V4) {
        return Ok(None);
    }
    let op = || format!("give {} the address {GATEWAY_V4}", lo.name);
    Connection::open()
        .and_then(|mut connection| connection.set_quiet_address(lo.index, GATEWAY_V4))
        .map_err(|source| NetworkError::Netlink { op: op(), source })?;
    Ok(Some(format!("{GATEWAY_V4} on {}", lo.name)))
}

/// Takes it away again; returns what failed, in words.
pub(super) fn answer_no_more() -> Option<String> {
    let told = |why: String| format!("taking {GATEWAY_V4} from the loopback: {why}");
    let tables = match Tables::read() {
        Ok(tables) => tables,
        Err(error) => return Some(told(super::in_full(&error))),
    };
    let held = tables.addresses.iter().find(|address| address.ip == GATEWAY_V4)?;
    let removed =
        Connection::open().and_then(|mut connection| connection.delete_address(held.link, GATEWAY_V4));
    removed.err().map(|error| told(error.to_string()))
}

/// True where the kernel has IPv6.
pub(super) fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

fn sysctl_path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key)
}

/// Reads a setting of the calling thread's network namespace.
pub(super) fn read_sysctl(key: &str) -> Result<String, NetworkError> {
    let path = sysctl_path(key);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(NetworkError::Io { op: "read", path, source }),
    }
}

/// Writes a setting of the calling thread's network namespace.
pub(super) fn write_sysctl(key: &str, value: &str) -> Result<(), NetworkError> {
    let path = sysctl_path(key);
    std::fs::write(&path, value).map_err(|source| NetworkError::Io { op: "write", path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, mtu: u32) -> Link {
        Link {
            index,
            name: name.to_owned(),
            alias: None,
            mtu,
            up: true,
            running: true,
            loopback: name == "lo",
            mac: None,
            peer: None,
            queued: false,
            across: false,
        }
    }

    fn address(link: u32, ip: &str, second_choice: bool) -> Address {
        let ip: IpAddr = ip.parse().unwrap();
        Address { link, ip, global: !ip.is_loopback(), second_choice, tentative: false }
    }

    fn default_route(link: u32, to: &str, metric: u32) -> Route {
        Route { link: Some(link), to: to.parse().unwrap(), via: None, src: None, metric }
    }

    fn tables(routes: Vec<Route>) -> Tables {
        Tables {
            links: vec![
                link(1, "lo", 65536),
                link(2, "ens3", 9000),
                link(3, "wg0", 1420),
                link(4, "shv0123456789ab", 1500),
            ],
            addresses: vec![
                address(1, "127.0.0.1", false),
                address(4, "10.244.0.1", false),
                address(3, "10.9.0.1", false),
                address(2, "192.0.2.7", true),
                address(2, "192.0.2.5", false),
                address(2, "2001:db8::7", true),
            ],
            routes,
        }
    }

    fn names(links: &[&Link]) -> Vec<String> {
        links.iter().map(|link| link.name.clone()).collect()
    }

    #[test]
    fn default_routes_name_the_uplinks() {
        let t = tables(vec![
            default_route(3, "::/0", 10),
            default_route(3, "0.0.0.0/0", 200),
            default_route(2, "0.0.0.0/0", 100),
            default_route(1, "0.0.0.0/0", 0),
        ]);
        let up = t.uplinks(&[]).unwrap();
        assert_eq!((names(&up), mtu(&up)), (vec!["ens3".to_owned(), "wg0".to_owned()], 1420));
        let ips: Vec<IpAddr> = ["192.0.2.5", "2001:db8::7"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(t.ips(&up), ips);
    }

    #[test]
    fn without_a_default_route_the_first_link_with_an_address_is_taken() {
        let mut t = tables(Vec::new());
        assert_eq!(names(&t.uplinks(&[]).unwrap()), ["ens3"]);
        t.addresses.retain(|a| a.link == 1 || a.link == 4);
        let none = t.uplinks(&[]).unwrap();
        assert_eq!((none.len(), mtu(&none)), (0, DEFAULT_MTU));
        assert!(t.ips(&none).is_empty());
        assert!(NetworkError::NoNodeAddress.to_string().contains("--node-ip"));
    }

    #[test]
    fn named_uplinks_win_and_must_exist() {
        let t = tables(vec![default_route(2, "0.0.0.0/0", 0)]);
        let up = t.uplinks(&["wg0".to_owned()]).unwrap();
        assert_eq!(t.ips(&up), ["10.9.0.1".parse::<IpAddr>().unwrap()]);
        let error = t.uplinks(&["eth9".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("eth9"), "{error}");
    }

    #[test]
    fn only_usable_addresses_are_sources() {
        let mut t = tables(Vec::new());
        t.addresses[4].tentative = true;
        let ips: Vec<IpAddr> = ["192.0.2.5", "10.9.0.1", "198.51.100.1"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(t.sources(&ips), ["10.9.0.1".parse::<IpAddr>().unwrap()]);
    }
}
