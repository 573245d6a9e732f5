//! What the network holds, for those who look: addresses given, and what nobody owns. Invariant: reads only; whatever it
//! says may have changed by the time it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ipnetwork::IpNetwork;

use super::error::NetworkError;
use super::ipam::Pool;
use super::leases::Lease;
use super::our_links;
use super::plan::node_link_name;

/// A range and what is given of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolUse {
    /// The range.
    pub range: IpNetwork,
    /// Addresses that pods can have.
    pub capacity: u128,
    /// Of them leased.
    pub leased: usize,
}

/// What the network of a node holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Ranges of the node.
    pub pools: Vec<PoolUse>,
    /// Pods with an address.
    pub attachments: usize,
    /// Links without a lease and leases without a link, in words. What comes or goes this moment may be among them.
    pub leaks: Vec<String>,
}

/// Looks at the leases below `<state_dir>/network` and at the links of the calling thread's network namespace.
pub fn inventory(state_dir: &Path, ranges: &[IpNetwork]) -> Result<Inventory, NetworkError> {
    let links = our_links(|_| false)?.into_iter().map(|link| link.name).collect();
    Ok(compare(ranges, &read(&state_dir.join("network/leases"))?, &links))
}

fn read(dir: &Path) -> Result<Vec<Lease>, NetworkError> {
    let failed = |source| NetworkError::Io { op: "list", path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut leases = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        // One that is gone or half written belongs to a change that is under way.
        let lease = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        leases.extend(lease.filter(|_| path.extension().is_some_and(|ext| ext == "json")));
    }
    Ok(leases)
}

fn compare(ranges: &[IpNetwork], leases: &[Lease], links: &BTreeSet<String>) -> Inventory {
    let owners: BTreeMap<String, &str> =
        leases.iter().map(|lease| (node_link_name(&lease.uid), lease.uid.as_str())).collect();
    let ips = || leases.iter().flat_map(|lease| &lease.ips);
    let pool = |range: &IpNetwork| PoolUse {
        range: *range,
        capacity: Pool::whole(*range).capacity(),
        leased: ips().filter(|ip| range.contains(**ip)).count(),
    };
    let nobodys = links.iter().filter(|link| !owners.contains_key(*link));
    let unlinked = owners.iter().filter(|(link, _)| !links.contains(*link));
    Inventory {
        pools: ranges.iter().map(pool).collect(),
        attachments: leases.len(),
        leaks: nobodys
            .map(|link| format!("link {link} has no lease"))
            .chain(unlinked.map(|(link, uid)| format!("the lease of {uid} has no link {link}")))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_owns_is_named() {
        let lease = |uid: &str, ip: &str| -> Lease {
            serde_json::from_value(serde_json::json!({"uid": uid, "ips": [ip], "netns": null, "boot": "b"}))
                .unwrap()
        };
        let leases = [lease("a", "10.244.1.5"), lease("b", "10.244.1.6")];
        let links = [node_link_name("a"), node_link_name("c")].into();
        let found = compare(&["10.244.1.0/24".parse().unwrap()], &leases, &links);
        assert_eq!((found.pools[0].leased, found.attachments), (2, 2));
        assert!(found.pools[0].capacity > 250);
        assert_eq!(found.leaks.len(), 2, "{:?}", found.leaks);
        assert!(found.leaks.iter().any(|leak| leak.contains(&node_link_name("c"))));
        assert!(found.leaks.iter().any(|leak| leak.contains("lease of b")));
    }
}
