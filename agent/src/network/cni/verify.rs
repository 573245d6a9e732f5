//! What CHECK finds, PURE. Invariant: what ADD answered is there; what plugins later in the chain may have changed
//! (settings, the table that a route is in) is no fault.

use sheave_cni::config::mac_text;
use sheave_cni::result::Outcome;

use crate::network::attachment::Checked;

/// What is not as the result says, in words.
pub(super) fn verify(prev: &Outcome, netns: &str, ifname: &str, checked: &Checked) -> Vec<String> {
    let mut found = checked.missing.clone();
    let inner = prev.interfaces.iter().position(|link| link.name == ifname && link.sandbox == netns);
    let Some(index) = inner else {
        found.push(format!("prevResult.interfaces: there is no {ifname} in {netns}"));
        return found;
    };
    let Some(link) = &checked.pod.link else {
        found.push(format!("link {ifname} is gone from {netns}"));
        return found;
    };
    let mac = &prev.interfaces[index].mac;
    let now = link.mac.map(mac_text).unwrap_or_default();
    if !mac.is_empty() && !mac.eq_ignore_ascii_case(&now) {
        found.push(format!("link {ifname} has the hardware address {now}, not {mac}"));
    }
    for ip in prev.ips.iter().filter(|ip| ip.interface == Some(index)) {
        if !checked.pod.addresses.contains(&ip.address.ip) {
            found.push(format!("link {ifname} has lost the address {}", ip.address.ip));
        }
        if !checked.ips.contains(&ip.address.ip) {
            found.push(format!("the agent has not leased {} to it", ip.address.ip));
        }
    }
    for route in &prev.routes {
        let there = |(to, _, _): &(ipnetwork::IpNetwork, _, _)| {
            (to.ip(), to.prefix()) == (route.dst.ip, route.dst.prefix)
        };
        if !checked.pod.routes.iter().any(there) {
            found.push(format!("the route to {} is gone", route.dst));
        }
    }
    found
}
