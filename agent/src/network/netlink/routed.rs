//! Which links addresses are routed to. Invariant: as everywhere in this room, nothing is decided here.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use super::{Connection, Link};

/// A link that an address is routed to.
#[derive(Debug, Clone)]
pub(crate) struct RoutedLink {
    /// The address.
    pub(crate) ip: IpAddr,
    /// The link's name.
    pub(crate) name: String,
    /// Its index.
    pub(crate) index: u32,
    /// What it sends waits in a queue.
    pub(crate) queued: bool,
    /// Uid of the pod that its alias tells of.
    pub(crate) pod: Option<Box<str>>,
}

/// The addresses that are routed, alone, to links whose name begins with one of `prefixes`. `pod` reads aliases.
pub(crate) fn routed_to(
    prefixes: &[String],
    pod: impl Fn(&str) -> Option<String>,
) -> io::Result<Vec<RoutedLink>> {
    let mut connection = Connection::open()?;
    let ours = |link: &Link| prefixes.iter().any(|prefix| link.name.starts_with(prefix.as_str()));
    let links: BTreeMap<u32, Link> =
        connection.links()?.into_iter().filter(ours).map(|link| (link.index, link)).collect();
    let routes = connection.routes()?.into_iter().filter(|route| route.via.is_none());
    let found = routes.filter_map(|route| {
        let (link, ip) = (links.get(&route.link?)?, route.to_one()?);
        let pod = link.alias.as_deref().and_then(&pod).map(Into::into);
        let (name, index, queued) = (link.name.clone(), link.index, link.queued);
        Some(RoutedLink { ip, name, index, queued, pod })
    });
    Ok(found.collect())
}
