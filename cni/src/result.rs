//! What ADD answers. Invariant: in memory there is one form, the newest; older ones exist only at the door, and what
//! they can't say is left out.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use crate::error::{Error, code};
use crate::value::At;
use crate::version::Version;

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    /// The address, with its host part.
    pub ip: IpAddr,
    /// Bits.
    pub prefix: u8,
}

impl Cidr {
    /// The address alone.
    pub fn host(ip: IpAddr) -> Self {
        Cidr { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
    }
}

impl FromStr for Cidr {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ip, prefix) = text.split_once('/').ok_or(())?;
        let all = Cidr::host(ip.parse().map_err(|_| ())?);
        let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
        let prefix: u8 = prefix.parse().map_err(|_| ())?;
        if digits && prefix <= all.prefix { Ok(Cidr { prefix, ..all }) } else { Err(()) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// An interface that was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address; empty where it has none.
    pub mac: String,
    /// Largest packet, bytes.
    pub mtu: Option<u32>,
    /// Path of the namespace it is in; empty for the host's.
    pub sandbox: String,
}

/// An address that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// The address.
    pub address: Cidr,
    /// Where it sends what is not for its own network.
    pub gateway: Option<IpAddr>,
    /// Index of its interface in [`Outcome::interfaces`].
    pub interface: Option<usize>,
}

/// A route that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The destination.
    pub dst: Cidr,
    /// The next hop.
    pub gw: Option<IpAddr>,
    /// What else was said of it, by name (`mtu`, `advmss`, `priority`, `table`, `scope`).
    pub more: Vec<(String, u32)>,
}

/// Name resolution.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Servers, by precedence.
    pub nameservers: Vec<String>,
    /// The local domain.
    pub domain: String,
    /// Suffixes that are tried.
    pub search: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

impl Dns {
    /// True where nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Dns::default()
    }

    pub(crate) fn read(at: &At<'_>) -> Result<Dns, Error> {
        Ok(Dns {
            nameservers: at.items("nameservers", At::text)?,
            domain: at.field("domain", At::text)?.unwrap_or_default(),
            search: at.items("search", At::text)?,
            options: at.items("options", At::text)?,
        })
    }

    fn to_value(&self) -> Value {
        let mut dns = Map::new();
        let mut list = |key: &str, items: &Vec<String>| {
            if !items.is_empty() {
                dns.insert(key.to_owned(), json!(items));
            }
        };
        list("nameservers", &self.nameservers);
        list("search", &self.search);
        list("options", &self.options);
        if !self.domain.is_empty() {
            dns.insert("domain".to_owned(), self.domain.clone().into());
        }
        Value::Object(dns)
    }
}

/// The result of ADD.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Interfaces, those of earlier plugins first.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<Ip>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Name resolution.
    pub dns: Dns,
}

/// Fields of a route that are numbers.
const ROUTE_NUMBERS: [&str; 5] = ["mtu", "advmss", "priority", "table", "scope"];

impl Outcome {
    /// Reads a result of any version that is spoken, or of 0.1.0 and 0.2.0 as address management plugins may still
    /// give. Complaints name `what` (`prevResult`).
    pub fn read(value: &Value, what: &str) -> Result<Outcome, Error> {
        Outcome::from_value(value).map_err(|error| {
            let of = if error.message.starts_with("the configuration ") { "" } else { "." };
            let message = error.message.strip_prefix("the configuration ").unwrap_or(&error.message);
            let space = if of.is_empty() { " " } else { "" };
            Error::new(error.code, format!("{what}{of}{space}{message}"))
        })
    }

    fn from_value(value: &Value) -> Result<Outcome, Error> {
        let at = At::root(value);
        let mut outcome = Outcome {
            interfaces: at.items("interfaces", interface)?,
            ips: at.items("ips", ip)?,
            routes: at.items("routes", route)?,
            dns: at.field("dns", Dns::read)?.unwrap_or_default(),
        };
        for key in ["ip4", "ip6"] {
            if let Some(old) = at.get(key)? {
                let address = old.field("ip", |at| at.parse("an address with a prefix length"))?;
                let address = address.ok_or_else(|| old.wrong("an object with \"ip\""))?;
                outcome.ips.push(Ip { address, gateway: old.field("gateway", At::ip)?, interface: None });
                outcome.routes.extend(old.items("routes", route)?);
            }
        }
        for ip in &outcome.ips {
            if ip.interface.is_some_and(|index| index >= outcome.interfaces.len()) {
                let message = format!("ips: {} names an interface that is not listed", ip.address);
                return Err(Error::new(code::BAD_CONFIG, message));
            }
        }
        Ok(outcome)
    }

    /// As printed for a caller that speaks `version`.
    pub fn to_value(&self, version: Version) -> Value {
        let mut value = Map::new();
        value.insert("cniVersion".to_owned(), version.to_string().into());
        let interfaces: Vec<Value> =
            self.interfaces.iter().map(|link| interface_value(link, version)).collect();
        let ips: Vec<Value> = self.ips.iter().map(|ip| ip_value(ip, version)).collect();
        let routes: Vec<Value> = self.routes.iter().map(|route| route_value(route, version)).collect();
        for (key, list) in [("interfaces", interfaces), ("ips", ips), ("routes", routes)] {
            if !list.is_empty() {
                value.insert(key.to_owned(), list.into());
            }
        }
        value.insert("dns".to_owned(), self.dns.to_value());
        Value::Object(value)
    }
}

fn interface(at: &At<'_>) -> Result<Interface, Error> {
    Ok(Interface {
        name: at.field("name", At::text)?.ok_or_else(|| at.wrong("an object with a \"name\""))?,
        mac: at.field("mac", At::text)?.unwrap_or_default(),
        mtu: at.field("mtu", |mtu| mtu.small(0, u32::MAX))?,
        sandbox: at.field("sandbox", At::text)?.unwrap_or_default(),
    })
}

fn ip(at: &At<'_>) -> Result<Ip, Error> {
    let address = at.field("address", |at| at.parse("an address with a prefix length"))?;
    let index = |at: &At<'_>| match at.value.as_i64() {
        // How some say that there is none.
        Some(-1) => Ok(None),
        _ => at.number(0, 1 << 16).map(|n| usize::try_from(n).ok()),
    };
    Ok(Ip {
        address: address.ok_or_else(|| at.wrong("an object with an \"address\""))?,
        gateway: at.field("gateway", At::ip)?,
        interface: at.field("interface", index)?.flatten(),
    })
}

pub(crate) fn route(at: &At<'_>) -> Result<Route, Error> {
    let dst = at.field("dst", |at| at.parse("a destination with a prefix length"))?;
    let mut more = Vec::new();
    for key in ROUTE_NUMBERS {
        if let Some(number) = at.field(key, |at| at.small(0, u32::MAX))? {
            more.push((key.to_owned(), number));
        }
    }
    Ok(Route {
        dst: dst.ok_or_else(|| at.wrong("an object with a \"dst\""))?,
        gw: at.field("gw", At::ip)?,
        more,
    })
}

fn interface_value(link: &Interface, version: Version) -> Value {
    let mut value = json!({"name": link.name});
    if !link.mac.is_empty() {
        value["mac"] = link.mac.clone().into();
    }
    if let Some(mtu) = link.mtu.filter(|_| version >= Version::V1_1_0) {
        value["mtu"] = mtu.into();
    }
    if !link.sandbox.is_empty() {
        value["sandbox"] = link.sandbox.clone().into();
    }
    value
}

fn ip_value(ip: &Ip, version: Version) -> Value {
    let mut value = json!({"address": ip.address.to_string()});
    if version < Version::V1_0_0 {
        value["version"] = if ip.address.ip.is_ipv4() { "4" } else { "6" }.into();
    }
    if let Some(gateway) = ip.gateway {
        value["gateway"] = gateway.to_string().into();
    }
    if let Some(index) = ip.interface {
        value["interface"] = index.into();
    }
    value
}

fn route_value(route: &Route, version: Version) -> Value {
    let mut value = json!({"dst": route.dst.to_string()});
    if let Some(gw) = route.gw {
        value["gw"] = gw.to_string().into();
    }
    if version >= Version::V1_1_0 {
        for (key, number) in &route.more {
            value[key] = (*number).into();
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Outcome {
        Outcome {
            interfaces: vec![
                Interface {
                    name: "shv0".to_owned(),
                    mac: "02:00:00:00:00:01".to_owned(),
                    ..Default::default()
                },
                Interface {
                    name: "eth0".to_owned(),
                    mtu: Some(1450),
                    sandbox: "/run/netns/a".to_owned(),
                    ..Default::default()
                },
            ],
            ips: vec![Ip {
                address: "10.0.0.5/32".parse().unwrap(),
                gateway: Some("169.254.1.1".parse().unwrap()),
                interface: Some(1),
            }],
            routes: vec![Route {
                dst: "::/0".parse().unwrap(),
                gw: Some("fe80::1".parse().unwrap()),
                more: vec![("mtu".to_owned(), 1400)],
            }],
            dns: Dns { nameservers: vec!["10.0.0.10".to_owned()], ..Dns::default() },
        }
    }

    #[test]
    fn each_version_says_what_it_can() {
        for version in Version::ALL {
            let value = example().to_value(version);
            assert_eq!(value["cniVersion"], version.to_string());
            let old = version < Version::V1_0_0;
            assert_eq!(value["ips"][0].get("version").is_some(), old, "{version}");
            let newest = version == Version::V1_1_0;
            assert_eq!(value["interfaces"][1].get("mtu").is_some(), newest, "{version}");
            assert_eq!(value["routes"][0].get("mtu").is_some(), newest, "{version}");
            let back = Outcome::read(&value, "prevResult").unwrap();
            assert_eq!((back.ips, back.dns), (example().ips, example().dns));
        }
        let empty = Outcome::default().to_value(Version::NEWEST);
        assert_eq!(empty, json!({"cniVersion": "1.1.0", "dns": {}}));
    }

    #[test]
    fn the_oldest_forms_are_read() {
        let old =
            json!({"ip4": {"ip": "10.0.0.5/24", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0"}]}});
        let read = Outcome::read(&old, "ipam").unwrap();
        assert_eq!((read.ips.len(), read.routes.len()), (1, 1));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, expected) in [
            (json!({"ips": [{"address": "10.0.0.5"}]}), "prevResult.ips[0].address \"10.0.0.5\""),
            (json!({"ips": [{}]}), "prevResult.ips[0] {}"),
            (json!({"ips": [{"address": "10.0.0.5/33"}]}), "10.0.0.5/33"),
            (json!({"ips": [{"address": "10.0.0.5/24", "interface": 3}]}), "not listed"),
            (json!({"interfaces": [{"mac": "x"}]}), "prevResult.interfaces[0]"),
            (json!({"routes": [{"dst": 3}]}), "prevResult.routes[0].dst 3"),
            (json!(["x"]), "prevResult [\"x\"]"),
        ] {
            let error = Outcome::read(&bad, "prevResult").unwrap_err();
            assert_eq!(error.code, code::BAD_CONFIG, "{bad}");
            assert!(error.message.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn the_newest_form_loses_nothing(ip in any::<u32>(), prefix in 0_u8..=32, index in 0_usize..2) {
            let mut outcome = example();
            outcome.ips[0].address = Cidr { ip: IpAddr::from(ip.to_be_bytes()), prefix };
            outcome.ips[0].interface = Some(index);
            let text = outcome.to_value(Version::NEWEST).to_string();
            let value: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(Outcome::read(&value, "x").unwrap(), outcome);
        }

        #[test]
        fn any_text_is_judged_without_panic(text in ".{0,20}") {
            prop_assert!(text.parse::<Cidr>().is_err() || text.contains('/'));
        }
    }
}
