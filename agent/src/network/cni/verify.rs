//! What CHECK finds, PURE. Invariant: what ADD answered is there; what plugins later in the chain may have changed
//! (settings, the table that a route is in) is no fault.

use ipnetwork::IpNetwork;
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
        let there = |to: &IpNetwork| (to.ip(), to.prefix()) == (route.dst.ip, route.dst.prefix);
        if !checked.pod.destinations.iter().any(there) {
            found.push(format!("the route to {} is gone", route.dst));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::netlink::Link;
    use crate::network::plan::Observed;
    use serde_json::json;

    fn whole() -> (Outcome, Checked) {
        let prev = json!({
            "interfaces": [{"name": "shv0"}, {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/n"}],
            "ips": [{"address": "10.0.0.5/32", "interface": 1}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
        });
        let link = Link {
            index: 2,
            name: "eth0".to_owned(),
            alias: None,
            mtu: 1500,
            up: true,
            running: true,
            loopback: false,
            mac: Some([2, 0, 0, 0, 0, 1]),
            peer: Some(7),
            queued: false,
            across: false,
        };
        let pod = Observed {
            link: Some(link),
            addresses: vec!["10.0.0.5".parse().unwrap()],
            destinations: vec!["0.0.0.0/0".parse().unwrap()],
            ..Observed::default()
        };
        let checked = Checked { missing: Vec::new(), pod, ips: vec!["10.0.0.5".parse().unwrap()] };
        (Outcome::read(&prev, "prevResult").unwrap(), checked)
    }

    #[test]
    fn what_is_there_is_fine_and_what_is_not_is_named() {
        let (prev, checked) = whole();
        assert_eq!(verify(&prev, "/n", "eth0", &checked), [""; 0]);
        type Damage = (fn(&mut Checked), &'static str);
        let damage: [Damage; 6] = [
            (|c| c.missing.push("lost".to_owned()), "lost"),
            (|c| c.pod.link = None, "is gone from /n"),
            (|c| c.pod.link.as_mut().unwrap().mac = Some([2; 6]), "hardware address"),
            (|c| c.pod.addresses.clear(), "lost the address 10.0.0.5"),
            (|c| c.ips.clear(), "not leased"),
            (|c| c.pod.destinations.clear(), "route to 0.0.0.0/0"),
        ];
        for (damage, expected) in damage {
            let mut damaged = checked.clone();
            damage(&mut damaged);
            let found = verify(&prev, "/n", "eth0", &damaged);
            assert!(found.len() == 1 && found[0].contains(expected), "{expected}: {found:?}");
        }
        assert!(verify(&prev, "/m", "eth0", &checked)[0].contains("no eth0 in /m"));
    }
}
