//! What an attachment's port mappings come to. Invariant: pure; two mappings that would take each other's packets are
//! never both placed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::network::NetworkError;
use crate::network::nat::{Frontend, Target};

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// `IPPROTO_…`.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl Protocol {
    /// The protocol of that `IPPROTO_…`.
    pub(crate) fn of_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|protocol| protocol.number() == number)
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "" | "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            _ => Err(format!("protocol {text:?} is none of tcp, udp and sctp")),
        }
    }
}

/// A port of the node that leads to one of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// The node's; 0 means none.
    pub host_port: u16,
    /// The pod's, from 1.
    pub container_port: u16,
    /// Of both.
    pub protocol: Protocol,
    /// Address of the node on which it is reached. `None` means every one of both families, an unspecified one every
    /// one of its family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A port of the node, and the address and port of the attachment that it leads to.
pub(super) type Wanted = (Frontend, (IpAddr, u16));

/// The node's ports that an attachment wants, and where each is to lead. A mapping on an address of a family that the
/// attachment has no address of leads nowhere and is an error; one on every address is for the families that it has.
pub(super) fn wanted(
    id: &str,
    ips: &[IpAddr],
    mappings: &[PortMapping],
) -> Result<Vec<Wanted>, NetworkError> {
    let first = |v4: bool| ips.iter().copied().find(|ip| ip.is_ipv4() == v4);
    let mut all: Vec<Wanted> = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.host_port != 0) {
        let wrong =
            |why: String| NetworkError::PortMapping { id: id.to_owned(), mapping: in_words(mapping), why };
        if mapping.container_port == 0 {
            return Err(wrong("containerPort is 0; give the port that the container listens on".to_owned()));
        }
        let on: Vec<IpAddr> = match mapping.host_ip {
            Some(ip) => vec![ip],
            None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        for ip in on {
            if ip == IpAddr::V6(Ipv6Addr::LOCALHOST) {
                return Err(wrong("hostIP ::1 can't lead to a pod; give 127.0.0.1".to_owned()));
            }
            if ip.is_multicast() {
                return Err(wrong(format!("hostIP {ip} is a multicast address; give one of the node's")));
            }
            let Some(to) = first(ip.is_ipv4()) else {
                match mapping.host_ip {
                    None => continue,
                    Some(_) => {
                        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
                        return Err(wrong(format!(
                            "the attachment has no {family} address; give a hostIP of the other family, or none"
                        )));
                    }
                }
            };
            let frontend = Frontend { ip, protocol: mapping.protocol.number(), port: mapping.host_port };
            let to = (to, mapping.container_port);
            if all
                .iter()
                .any(|(other, leads)| overlap(other, &frontend) && (*leads != to || *other != frontend))
            {
                return Err(wrong("another mapping of the same attachment has this host port".to_owned()));
            }
            if !all.iter().any(|(other, _)| *other == frontend) {
                all.push((frontend, to));
            }
        }
    }
    Ok(all)
}

/// Whether a packet can be meant for both.
fn overlap(a: &Frontend, b: &Frontend) -> bool {
    let ips =
        a.ip == b.ip || a.ip.is_ipv4() == b.ip.is_ipv4() && (a.ip.is_unspecified() || b.ip.is_unspecified());
    ips && a.protocol == b.protocol && a.port == b.port
}

/// Places an attachment's ports instead of those that it had. On an error nothing is placed.
pub(super) fn replace(
    ports: &mut BTreeMap<Frontend, Target>,
    id: &str,
    label: &str,
    wanted: &[(Frontend, (IpAddr, u16))],
) -> Result<(), NetworkError> {
    for (frontend, _) in wanted {
        let taken = ports.iter().find(|(other, target)| overlap(other, frontend) && target.owner != label);
        if let Some((other, target)) = taken {
            return Err(NetworkError::HostPortTaken {
                id: id.to_owned(),
                port: port_words(frontend),
                ip: if other.ip.is_unspecified() { other.ip } else { frontend.ip.max(other.ip) },
                owner: target.owner.clone(),
            });
        }
    }
    ports.retain(|_, target| target.owner != label);
    for (frontend, (ip, port)) in wanted {
        ports.insert(*frontend, Target { ip: *ip, port: *port, owner: label.to_owned() });
    }
    Ok(())
}

/// What an owner has.
pub(super) fn of(ports: &BTreeMap<Frontend, Target>, label: &str) -> BTreeMap<Frontend, Target> {
    let own = ports.iter().filter(|(_, target)| target.owner == label);
    own.map(|(frontend, target)| (*frontend, target.clone())).collect()
}

/// What is only in one of them.
pub(super) fn difference(
    old: &BTreeMap<Frontend, Target>,
    new: &BTreeMap<Frontend, Target>,
) -> Vec<(Frontend, Target)> {
    let gone = old.iter().filter(|(frontend, target)| new.get(frontend) != Some(target));
    let made = new.iter().filter(|(frontend, target)| old.get(frontend) != Some(target));
    gone.chain(made).map(|(frontend, target)| (*frontend, target.clone())).collect()
}

/// Whether any of these is reached by a loopback address.
pub(super) fn from_loopback(wanted: &[(Frontend, (IpAddr, u16))]) -> bool {
    wanted.iter().any(|(frontend, _)| match frontend.ip {
        IpAddr::V4(ip) => ip.is_unspecified() || ip.is_loopback(),
        IpAddr::V6(_) => false,
    })
}

/// A host port in words, such as `192.0.2.1:80/tcp`.
pub(super) fn words(frontend: &Frontend) -> String {
    let port = port_words(frontend);
    match frontend.ip {
        IpAddr::V6(ip) => format!("[{ip}]:{port}"),
        IpAddr::V4(ip) => format!("{ip}:{port}"),
    }
}

fn port_words(frontend: &Frontend) -> String {
    let protocol = match frontend.protocol {
        6 => "tcp",
        17 => "udp",
        132 => "sctp",
        _ => "?",
    };
    format!("{}/{protocol}", frontend.port)
}

fn in_words(mapping: &PortMapping) -> String {
    let ip = mapping.host_ip.map(|ip| format!("{ip} ")).unwrap_or_default();
    let protocol = format!("{:?}", mapping.protocol).to_lowercase();
    format!("{ip}{} to {}/{protocol}", mapping.host_port, mapping.container_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn mapping(host_port: u16, container_port: u16, host_ip: Option<&str>) -> PortMapping {
        PortMapping { host_port, container_port, protocol: Protocol::Tcp, host_ip: host_ip.map(ip) }
    }

    fn place(
        ports: &mut BTreeMap<Frontend, Target>,
        id: &str,
        mappings: &[PortMapping],
    ) -> Result<(), NetworkError> {
        let wanted = wanted(id, &[ip("10.0.0.2"), ip("fd00::2")], mappings)?;
        replace(ports, id, id, &wanted)
    }

    fn words_of(ports: &BTreeMap<Frontend, Target>) -> Vec<String> {
        ports.keys().map(words).collect()
    }

    #[test]
    fn a_mapping_without_an_address_is_for_the_families_of_the_pod() {
        let all = |ips: &[&str]| {
            let ips: Vec<_> = ips.iter().map(|text| ip(text)).collect();
            wanted("a", &ips, &[mapping(80, 8080, None), mapping(0, 8080, None)]).unwrap()
        };
        assert_eq!(all(&["10.0.0.2", "10.0.0.3", "fd00::2"]).len(), 2);
        assert_eq!(all(&["10.0.0.2", "10.0.0.3"])[0].1, (ip("10.0.0.2"), 8080));
        assert_eq!(all(&["fd00::2"])[0].0.ip, ip("::"));
    }

    #[test]
    fn mappings_that_lead_nowhere_are_named() {
        let error =
            |mapping: PortMapping| wanted("a", &[ip("10.0.0.2")], &[mapping]).unwrap_err().to_string();
        assert!(error(mapping(80, 0, None)).contains("a: port mapping 80 to 0/tcp: containerPort is 0"));
        assert!(error(mapping(80, 1, Some("2001:db8::1"))).contains("no IPv6 address"));
        assert!(error(mapping(80, 1, Some("224.0.0.1"))).contains("multicast"));
        assert!(error(mapping(80, 1, Some("::1"))).contains("127.0.0.1"));
    }

    #[test]
    fn a_port_has_one_owner() {
        let mut ports = BTreeMap::new();
        place(&mut ports, "a", &[mapping(80, 8080, Some("192.0.2.1"))]).unwrap();
        place(&mut ports, "b", &[mapping(80, 8080, Some("192.0.2.2"))]).unwrap();
        let before = ports.clone();
        for (on, says) in [(None, "80/tcp is taken on 192.0.2.1 by a"), (Some("192.0.2.2"), "192.0.2.2 by b")]
        {
            let error = place(&mut ports, "c", &[mapping(81, 1, None), mapping(80, 1, on)]).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        assert_eq!(ports, before, "nothing of c was placed");
        let udp = PortMapping { protocol: Protocol::Udp, ..mapping(80, 1, None) };
        place(&mut ports, "c", &[udp]).unwrap();
        assert_eq!(
            words_of(&ports),
            ["0.0.0.0:80/udp", "192.0.2.1:80/tcp", "192.0.2.2:80/tcp", "[::]:80/udp"]
        );
    }

    #[test]
    fn an_attachment_gives_up_only_what_is_its_own() {
        let mut ports = BTreeMap::new();
        place(&mut ports, "a", &[mapping(80, 8080, None)]).unwrap();
        place(&mut ports, "a", &[mapping(81, 8080, None)]).unwrap();
        place(&mut ports, "b", &[mapping(80, 8080, None)]).unwrap();
        let (old, a) = (ports.clone(), of(&ports, "a"));
        ports.retain(|_, target| target.owner != "a");
        assert_eq!(words_of(&ports), ["0.0.0.0:80/tcp", "[::]:80/tcp"]);
        assert_eq!(difference(&old, &ports).len(), a.len());
    }

    #[test]
    fn mappings_of_one_attachment_may_repeat_but_not_contradict() {
        let ips = [ip("10.0.0.2")];
        let same = [mapping(80, 8080, None), mapping(80, 8080, None)];
        assert_eq!(wanted("a", &ips, &same).unwrap().len(), 1);
        let other = [mapping(80, 8080, None), mapping(80, 8081, None)];
        assert!(wanted("a", &ips, &other).is_err());
        let overlapping = [mapping(80, 8080, None), mapping(80, 8080, Some("192.0.2.1"))];
        assert!(wanted("a", &ips, &overlapping).is_err());
    }
}
