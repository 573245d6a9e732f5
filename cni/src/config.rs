//! The network configuration. Invariant: what is read has been judged whole: a value that can't be meant is refused
//! with its path, and what is not ours to know is ignored.

use std::net::IpAddr;
use std::path::PathBuf;

use serde_json::Value;

use crate::call::is_name;
use crate::error::{Error, code};
use crate::result::{Cidr, Dns, Outcome};
use crate::value::At;
use crate::version::Version;

/// Smallest MTU that carries IPv4, and the largest a link has.
const MTU_BYTES: (u32, u32) = (576, 65_535);

/// What the plugin itself must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The version that the caller speaks.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// The agent's socket, where it is not the default.
    pub socket: Option<PathBuf>,
    /// Where DEL waits for an agent that is away, where it is not the default.
    pub spool: Option<PathBuf>,
    /// The plugin that manages addresses, where it is not us.
    pub ipam: Option<String>,
}

impl Head {
    /// Judges what the plugin needs. Code 6 for what is no object, 1 for a version that is not spoken, 7 for the rest.
    pub fn read(config: &Value) -> Result<Head, Error> {
        if !config.is_object() {
            let message = format!("the configuration {config} must be an object");
            return Err(Error::new(code::DECODE, message));
        }
        let at = At::root(config);
        let version = at.field("cniVersion", At::text)?.unwrap_or_default();
        let version = Version::parse(&version)?;
        let name = at.field("name", At::text)?.unwrap_or_default();
        if !is_name(&name) {
            let rule = "must start with a letter or digit and go on with those, '_', '.' or '-'";
            return Err(Error::new(code::BAD_CONFIG, format!("name {name:?} of the network {rule}")));
        }
        let ipam = at.get("ipam")?;
        let kind = ipam.map(|ipam| ipam.field("type", At::text)).transpose()?.flatten();
        Ok(Head {
            version,
            name,
            socket: at.field("socket", At::text)?.map(PathBuf::from),
            spool: at.field("spool", At::text)?.map(PathBuf::from),
            ipam: kind.filter(|kind| !kind.is_empty() && kind != "sheave-cni"),
        })
    }
}

/// A range that addresses are taken from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// The network.
    pub subnet: Cidr,
    /// The first address, where not the network's first.
    pub start: Option<IpAddr>,
    /// The last address, where not the network's last.
    pub end: Option<IpAddr>,
}

/// Protocol of a mapped port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

/// A port of the host that leads into the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    /// The host's port.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The host's address; `None` means all of them.
    pub host_ip: Option<IpAddr>,
}

/// Shaping. Zero means that a direction is not shaped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Into the container, bits a second.
    pub ingress_rate: u64,
    /// Bits at once into the container.
    pub ingress_burst: u64,
    /// Out of the container, bits a second.
    pub egress_rate: u64,
    /// Bits at once out of the container.
    pub egress_burst: u64,
}

/// Everything that a network and a runtime can ask of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What the plugin knows too.
    pub head: Head,
    /// What leaves the pod ranges gets the node's address; `None` leaves it to the agent.
    pub ip_masq: Option<bool>,
    /// The interface's MTU, bytes; `None` means what the way out carries.
    pub mtu: Option<u32>,
    /// Name resolution that overrides what address management says; `None` where no field is set.
    pub dns: Option<Dns>,
    /// Name resolution by the runtime, which wins.
    pub runtime_dns: Option<Dns>,
    /// Sets of ranges, an address from each; empty means the node's.
    pub ranges: Vec<Vec<Range>>,
    /// Addresses that are asked for.
    pub ips: Vec<IpAddr>,
    /// The hardware address that is asked for.
    pub mac: Option<[u8; 6]>,
    /// Mapped ports, without those whose host port is 0.
    pub port_mappings: Vec<PortMapping>,
    /// Shaping.
    pub bandwidth: Option<Bandwidth>,
    /// What earlier plugins of the chain did.
    pub prev: Option<Outcome>,
    /// GC: attachments that are in use, as container and interface. `None` where the caller does not say.
    pub valid: Option<Vec<(String, String)>>,
}

impl Config {
    /// Judges the whole configuration; `args` is `CNI_ARGS`.
    pub fn read(config: &Value, args: &str) -> Result<Config, Error> {
        let head = Head::read(config)?;
        let at = At::root(config);
        let runtime = at.get("runtimeConfig")?;
        let convention = at.field("args", |args| args.get("cni"))?.flatten();
        let ipam = at.get("ipam")?.filter(|_| head.ipam.is_none());
        let asked = Asked { runtime: runtime.as_ref(), convention: convention.as_ref(), args };
        let static_bandwidth = at.get("bandwidth")?.or_else(|| direct_bandwidth(&at));
        let bandwidth = match (static_bandwidth, &runtime) {
            (Some(fixed), _) => Some(bandwidth(&fixed)?),
            (None, Some(runtime)) => runtime.field("bandwidth", bandwidth)?,
            (None, None) => None,
        };
        let ipam_dns = ipam.as_ref().map(|ipam| ipam.field("dns", Dns::read)).transpose()?.flatten();
        let dns = at.field("dns", Dns::read)?.filter(|dns| !dns.is_empty());
        Ok(Config {
            ip_masq: at.field("ipMasq", At::flag)?,
            mtu: at.field("mtu", mtu)?.flatten(),
            dns: dns.or(ipam_dns.filter(|dns| !dns.is_empty())),
            runtime_dns: match &runtime {
                Some(runtime) => runtime.field("dns", runtime_dns)?.filter(|dns| !dns.is_empty()),
                None => None,
            },
            ranges: ranges(runtime.as_ref(), ipam.as_ref())?,
            ips: asked.ips()?,
            mac: asked.mac()?,
            port_mappings: match &runtime {
                Some(runtime) => runtime.items("portMappings", port_mapping)?.into_iter().flatten().collect(),
                None => Vec::new(),
            },
            bandwidth: bandwidth.filter(|all| *all != Bandwidth::default()),
            prev: at.get("prevResult")?.map(|prev| Outcome::read(prev.value, "prevResult")).transpose()?,
            valid: valid(&at)?,
            head,
        })
    }
}

/// 0 means what an absent field means.
fn mtu(at: &At<'_>) -> Result<Option<u32>, Error> {
    match at.value.as_u64() {
        Some(0) => Ok(None),
        _ => at.small(MTU_BYTES.0, MTU_BYTES.1).map(Some),
    }
}

/// Where addresses may be asked for, by precedence.
struct Asked<'a> {
    runtime: Option<&'a At<'a>>,
    convention: Option<&'a At<'a>>,
    /// `CNI_ARGS`, which an `args` object with the same key overrides.
    args: &'a str,
}

impl Asked<'_> {
    fn ips(&self) -> Result<Vec<IpAddr>, Error> {
        for place in [self.runtime, self.convention].into_iter().flatten() {
            let ips = place.items("ips", |at| {
                let text = at.text()?;
                address(&text).ok_or_else(|| at.wrong("an IP address, with or without a prefix length"))
            })?;
            if !ips.is_empty() {
                return one_of_each(ips);
            }
        }
        match argument(self.args, "IP") {
            None | Some("") => Ok(Vec::new()),
            Some(text) => {
                let bad = || Error::new(code::BAD_ENVIRONMENT, format!("CNI_ARGS: IP={text} is no address"));
                let ips = text.split(',').map(|ip| address(ip.trim()).ok_or_else(bad));
                one_of_each(ips.collect::<Result<_, _>>()?)
            }
        }
    }

    fn mac(&self) -> Result<Option<[u8; 6]>, Error> {
        let read = |at: &At<'_>| {
            let text = at.text()?;
            if text.is_empty() {
                return Ok(None);
            }
            let mac = parse_mac(&text).ok_or_else(|| at.wrong("a unicast hardware address"))?;
            Ok(Some(mac))
        };
        for place in [self.runtime, self.convention].into_iter().flatten() {
            if let Some(mac) = place.field("mac", read)?.flatten() {
                return Ok(Some(mac));
            }
        }
        match argument(self.args, "MAC") {
            None | Some("") => Ok(None),
            Some(text) => parse_mac(text).map(Some).ok_or_else(|| {
                let message = format!("CNI_ARGS: MAC={text} is no unicast hardware address");
                Error::new(code::BAD_ENVIRONMENT, message)
            }),
        }
    }
}

fn one_of_each(mut ips: Vec<IpAddr>) -> Result<Vec<IpAddr>, Error> {
    ips.sort_by_key(IpAddr::is_ipv6);
    match ips.windows(2).find(|pair| pair[0].is_ipv4() == pair[1].is_ipv4()) {
        Some(pair) => Err(Error::new(
            code::UNSUPPORTED_FIELD,
            format!(
                "ips {}, {} is not supported: an interface has one address of a family",
                pair[0], pair[1]
            ),
        )),
        None => Ok(ips),
    }
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| text.parse::<Cidr>().ok().map(|cidr| cidr.ip))
}

/// The value of `key` in `K=V;K=V`; the last one counts.
fn argument<'a>(args: &'a str, key: &str) -> Option<&'a str> {
    args.split(';')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(k, _)| *k == key)
        .map(|(_, v)| v)
        .next_back()
}

/// Six hexadecimal bytes with `:` or `-` between them; not of a group, not all zero.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = part.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u8::from_str_radix(part, 16).ok())??;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// A hardware address as text.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn ranges(runtime: Option<&At<'_>>, ipam: Option<&At<'_>>) -> Result<Vec<Vec<Range>>, Error> {
    let set = |at: &At<'_>| {
        let set = at.list(range)?;
        match set.first() {
            None => Err(at.wrong("a list of ranges that is not empty")),
            Some(first) if set.iter().any(|range| range.subnet.ip.is_ipv4() != first.subnet.ip.is_ipv4()) => {
                Err(at.wrong("ranges of one family"))
            }
            Some(_) => Ok(set),
        }
    };
    if let Some(runtime) = runtime {
        let asked = runtime.items("ipRanges", set)?;
        if !asked.is_empty() {
            return Ok(asked);
        }
    }
    let Some(ipam) = ipam else { return Ok(Vec::new()) };
    let listed = ipam.items("ranges", set)?;
    if listed.is_empty() && ipam.get("subnet")?.is_some() {
        return Ok(vec![vec![range(ipam)?]]);
    }
    Ok(listed)
}

fn range(at: &At<'_>) -> Result<Range, Error> {
    let subnet = at.field("subnet", |at| at.parse("a network with its prefix length"))?;
    let subnet: Cidr = subnet.ok_or_else(|| at.wrong("an object with a \"subnet\""))?;
    let within = |at: &At<'_>| {
        let ip = at.ip()?;
        if contains(subnet, ip) { Ok(ip) } else { Err(at.wrong(&format!("an address of {subnet}"))) }
    };
    let (start, end) = (at.field("rangeStart", within)?, at.field("rangeEnd", within)?);
    if let (Some(start), Some(end)) = (start, end)
        && start > end
    {
        return Err(at.wrong("a range whose rangeStart is not above its rangeEnd"));
    }
    at.field("gateway", At::ip)?;
    Ok(Range { subnet, start, end })
}

/// True where `ip` lies in the network.
pub fn contains(net: Cidr, ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    };
    let differ = bits(net.ip) ^ bits(ip);
    net.ip.is_ipv4() == ip.is_ipv4() && differ.leading_zeros() >= u32::from(net.prefix)
}

fn port_mapping(at: &At<'_>) -> Result<Option<PortMapping>, Error> {
    let port = |key: &str, min: u32| {
        let port = at.field(key, |at| at.small(min, u32::from(u16::MAX)))?;
        Ok(port.map(|port| u16::try_from(port).unwrap_or_default()))
    };
    let Some(host_port) = port("hostPort", 0)?.filter(|port| *port > 0) else { return Ok(None) };
    let container_port =
        port("containerPort", 1)?.ok_or_else(|| at.wrong("an object with a \"containerPort\""))?;
    let protocol = at.field("protocol", |at| match at.text()?.to_ascii_lowercase().as_str() {
        "" | "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "sctp" => Ok(Protocol::Sctp),
        _ => Err(at.unsupported("it is none of tcp, udp and sctp")),
    })?;
    let host_ip = at.field("hostIP", |at| match at.value.as_str() {
        Some("") => Ok(None),
        _ => at.ip().map(|ip| Some(ip).filter(|ip| !ip.is_unspecified() || ip.is_ipv6())),
    })?;
    let protocol = protocol.unwrap_or(Protocol::Tcp);
    Ok(Some(PortMapping { host_port, container_port, protocol, host_ip: host_ip.flatten() }))
}

/// The reference plugin for shaping takes the fields without an object around them.
fn direct_bandwidth<'a>(at: &At<'a>) -> Option<At<'a>> {
    let keys = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
    keys.iter().any(|key| at.value.get(*key).is_some()).then(|| at.clone())
}

fn bandwidth(at: &At<'_>) -> Result<Bandwidth, Error> {
    let get = |key: &str| Ok(at.field(key, |at| at.number(0, u64::MAX))?.unwrap_or(0));
    let all = Bandwidth {
        ingress_rate: get("ingressRate")?,
        ingress_burst: get("ingressBurst")?,
        egress_rate: get("egressRate")?,
        egress_burst: get("egressBurst")?,
    };
    for (name, rate, burst) in
        [("ingress", all.ingress_rate, all.ingress_burst), ("egress", all.egress_rate, all.egress_burst)]
    {
        // A bucket counts bytes in 32 bits.
        let fits = burst.div_ceil(8) <= u64::from(u32::MAX);
        if (rate == 0) != (burst == 0) || !fits {
            let why =
                format!("{name}Rate {rate} and {name}Burst {burst}: both or neither, bursts below 2^35");
            return Err(Error::new(code::BAD_CONFIG, format!("bandwidth: {why}")));
        }
    }
    Ok(all)
}

/// The runtime's name resolution has names of its own for the same things.
fn runtime_dns(at: &At<'_>) -> Result<Dns, Error> {
    Ok(Dns {
        nameservers: at.items("servers", At::text)?,
        domain: String::new(),
        search: at.items("searches", At::text)?,
        options: at.items("options", At::text)?,
    })
}

fn valid(at: &At<'_>) -> Result<Option<Vec<(String, String)>>, Error> {
    let one = |at: &At<'_>| {
        let text = |key: &str| {
            let text = at.field(key, At::text)?;
            text.ok_or_else(|| at.wrong("an object with \"containerID\" and \"ifname\""))
        };
        Ok((text("containerID")?, text("ifname")?))
    };
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        if let Some(listed) = at.get(key)? {
            return listed.list(one).map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(more: Value) -> Value {
        let mut config = json!({"cniVersion": "1.1.0", "name": "net", "type": "sheave-cni"});
        let more = more.as_object().cloned().unwrap_or_default();
        config.as_object_mut().unwrap().extend(more);
        config
    }

    fn read(more: Value) -> Result<Config, Error> {
        Config::read(&config(more), "")
    }

    #[test]
    fn little_is_enough_and_the_unknown_is_ignored() {
        let plain = read(json!({"unknown": {"x": 1}, "keyA": [1, 2], "capabilities": {"x": true}})).unwrap();
        assert_eq!((plain.mtu, plain.ip_masq, &plain.valid), (None, None, &None));
        assert_eq!(plain.head.ipam, None);
        let own = read(json!({"ipam": {"type": "sheave-cni"}, "mtu": 0, "ipMasq": "true"})).unwrap();
        assert_eq!((own.head.ipam, own.ip_masq), (None, Some(true)));
        assert_eq!(read(json!({"ipam": {"type": "host-local"}})).unwrap().head.ipam.unwrap(), "host-local");
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (more, code, expected) in [
            (json!({"cniVersion": "0.2.0"}), 1, "0.2.0"),
            (json!({"cniVersion": null}), 1, "\"\""),
            (json!({"name": ""}), 7, "name \"\""),
            (json!({"name": "a/b"}), 7, "a/b"),
            (json!({"name": 5}), 7, "name 5"),
            (json!({"mtu": 100}), 7, "mtu 100"),
            (json!({"mtu": "1500"}), 7, "mtu \"1500\""),
            (json!({"ipMasq": 1}), 7, "ipMasq 1"),
            (json!({"ipam": []}), 7, "ipam []"),
            (json!({"ipam": {"type": 1}}), 7, "ipam.type 1"),
            (json!({"ipam": {"ranges": [[{"subnet": "10.0.0.0"}]]}}), 7, "ipam.ranges[0][0].subnet"),
            (json!({"ipam": {"ranges": [[]]}}), 7, "ipam.ranges[0] []"),
            (json!({"dns": {"nameservers": "1.1.1.1"}}), 7, "dns.nameservers"),
            (json!({"socket": 1}), 7, "socket 1"),
            (json!({"runtimeConfig": {"ips": ["10.0.0.300"]}}), 7, "runtimeConfig.ips[0] \"10.0.0.300\""),
            (json!({"runtimeConfig": {"ips": ["10.0.0.1", "10.0.0.2"]}}), 2, "10.0.0.2"),
            (json!({"runtimeConfig": {"mac": "01:00:00:00:00:00"}}), 7, "runtimeConfig.mac"),
            (
                json!({"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 2, "protocol": "icmp"}]}}),
                2,
                "runtimeConfig.portMappings[0].protocol \"icmp\"",
            ),
            (
                json!({"runtimeConfig": {"portMappings": [{"hostPort": 70000, "containerPort": 2}]}}),
                7,
                "hostPort 70000",
            ),
            (json!({"runtimeConfig": {"portMappings": [{"hostPort": 1}]}}), 7, "containerPort"),
            (json!({"runtimeConfig": {"bandwidth": {"ingressRate": 5}}}), 7, "ingressRate 5"),
            (json!({"args": {"cni": {"ips": ["x"]}}}), 7, "args.cni.ips[0]"),
            (json!({"prevResult": {"ips": [{"address": "x"}]}}), 7, "prevResult.ips[0].address"),
            (json!({"cni.dev/valid-attachments": [{"ifname": "x"}]}), 7, "cni.dev/valid-attachments[0]"),
        ] {
            let error = read(more.clone()).unwrap_err();
            assert_eq!(error.code, code, "{more}: {error}");
            assert!(error.message.contains(expected), "{more}: {error}");
        }
        assert_eq!(Config::read(&json!("x"), "").unwrap_err().code, 6);
    }

    #[test]
    fn requests_have_an_order() {
        let all = config(json!({
            "runtimeConfig": {"ips": ["10.0.0.1/24"], "mac": "02:00:00:00:00:01"},
            "args": {"cni": {"ips": ["10.0.0.2"], "mac": "02:00:00:00:00:02"}},
        }));
        let args = "IgnoreUnknown=1;IP=10.0.0.3,fd00::3/64;MAC=02-00-00-00-00-03";
        let read = |config: &Value| Config::read(config, args).unwrap();
        assert_eq!(read(&all).ips, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        let mut less = all.clone();
        less["runtimeConfig"] = json!({});
        assert_eq!(read(&less).ips, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(read(&less).mac.unwrap()[5], 2);
        let least = config(json!({}));
        assert_eq!(read(&least).ips.len(), 2);
        assert_eq!(mac_text(read(&least).mac.unwrap()), "02:00:00:00:00:03");
        for bad in ["IP=x", "MAC=zz"] {
            assert_eq!(Config::read(&least, bad).unwrap_err().code, code::BAD_ENVIRONMENT);
        }
    }

    #[test]
    fn ports_and_shaping_are_read() {
        let read = read(json!({
            "ingressRate": 1000, "ingressBurst": 4_294_967_295_u64,
            "runtimeConfig": {
                "portMappings": [
                    {"hostPort": 0, "containerPort": 80},
                    {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "0.0.0.0"},
                    {"hostPort": 8081, "containerPort": 81, "protocol": "sctp", "hostIP": "192.0.2.1"},
                    {"hostPort": 8082, "containerPort": 82, "hostIP": ""},
                ],
                "bandwidth": {"ingressRate": 7, "ingressBurst": 7},
            },
        }))
        .unwrap();
        let ips: Vec<Option<IpAddr>> = read.port_mappings.iter().map(|port| port.host_ip).collect();
        assert_eq!(ips, [None, Some("192.0.2.1".parse().unwrap()), None]);
        assert_eq!(read.port_mappings[1].protocol, Protocol::Sctp);
        assert_eq!(read.bandwidth.unwrap().ingress_rate, 1000, "the configuration wins over the runtime");
    }

    #[test]
    fn lists_of_the_living_are_told_from_none() {
        assert_eq!(read(json!({"cni.dev/valid-attachments": []})).unwrap().valid, Some(vec![]));
        let old = json!({"cni.dev/attachments": [{"containerID": "a", "ifname": "eth0"}]});
        assert_eq!(read(old).unwrap().valid, Some(vec![("a".to_owned(), "eth0".to_owned())]));
    }

    #[test]
    fn ranges_are_read() {
        let ranges = json!({"ipam": {"ranges": [
            [{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.10", "rangeEnd": "10.0.0.20", "gateway": "10.0.0.1"}],
            [{"subnet": "fd00::/64"}],
        ]}});
        assert_eq!(read(ranges).unwrap().ranges.len(), 2);
        assert_eq!(read(json!({"ipam": {"subnet": "10.0.0.0/24"}})).unwrap().ranges.len(), 1);
        for bad in [
            json!({"subnet": "10.0.0.0/24", "rangeStart": "10.0.1.1"}),
            json!({"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"}),
        ] {
            assert_eq!(read(json!({"runtimeConfig": {"ipRanges": [[bad]]}})).unwrap_err().code, 7);
        }
    }
}
