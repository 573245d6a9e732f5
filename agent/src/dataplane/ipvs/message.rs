//! Virtual services and destinations as the kernel's IPVS family writes them (uapi `linux/ip_vs.h`). Invariant: pure;
//! what the kernel sends and we do not understand is left out, never guessed.

use super::model::{Destination, ServiceKey, Settings, flag};
use crate::network::{Attributes, attributes};
use crate::service::{Family, Proto};
use std::net::IpAddr;

/// The family's name.
pub(super) const FAMILY: &str = "IPVS";

/// Commands (`IPVS_CMD_…`).
pub(super) mod command {
    pub(in super::super) const NEW_SERVICE: u8 = 1;
    pub(in super::super) const SET_SERVICE: u8 = 2;
    pub(in super::super) const DEL_SERVICE: u8 = 3;
    pub(in super::super) const GET_SERVICE: u8 = 4;
    pub(in super::super) const NEW_DEST: u8 = 5;
    pub(in super::super) const SET_DEST: u8 = 6;
    pub(in super::super) const DEL_DEST: u8 = 7;
    pub(in super::super) const GET_DEST: u8 = 8;
    pub(in super::super) const GET_INFO: u8 = 15;
}

/// What a command is about (`IPVS_CMD_ATTR_…`).
const SERVICE: u16 = 1;
const DESTINATION: u16 = 2;

/// Attributes of a service (`IPVS_SVC_ATTR_…`).
mod service {
    pub(super) const FAMILY: u16 = 1;
    pub(super) const PROTOCOL: u16 = 2;
    pub(super) const ADDRESS: u16 = 3;
    pub(super) const PORT: u16 = 4;
    pub(super) const MARK: u16 = 5;
    pub(super) const SCHEDULER: u16 = 6;
    pub(super) const FLAGS: u16 = 7;
    pub(super) const TIMEOUT: u16 = 8;
    pub(super) const NETMASK: u16 = 9;
}

/// Attributes of a destination (`IPVS_DEST_ATTR_…`).
mod destination {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const PORT: u16 = 2;
    pub(super) const FORWARDING: u16 = 3;
    pub(super) const WEIGHT: u16 = 4;
    pub(super) const UPPER: u16 = 5;
    pub(super) const LOWER: u16 = 6;
    pub(super) const ACTIVE: u16 = 7;
    pub(super) const INACTIVE: u16 = 8;
    pub(super) const FAMILY: u16 = 11;
}

/// Addresses are translated (`IP_VS_CONN_F_MASQ`).
const FORWARD_BY_TRANSLATION: u32 = 0;

/// A destination as the kernel shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) destination: Destination,
    pub(super) weight: u32,
    /// Connections that are established, and those that are not yet or not any more.
    pub(super) connections: u32,
}

fn family_number(family: Family) -> u16 {
    match family {
        Family::V4 => libc::AF_INET as u16,
        Family::V6 => libc::AF_INET6 as u16,
    }
}

fn protocol_number(proto: Proto) -> u16 {
    match proto {
        Proto::Tcp => libc::IPPROTO_TCP as u16,
        Proto::Udp => libc::IPPROTO_UDP as u16,
        Proto::Sctp => libc::IPPROTO_SCTP as u16,
    }
}

fn protocol(number: u16) -> Option<Proto> {
    [Proto::Tcp, Proto::Udp, Proto::Sctp].into_iter().find(|proto| protocol_number(*proto) == number)
}

/// Addresses fill 16 bytes whatever their family.
fn address_bytes(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&addr.octets());
            bytes
        }
        IpAddr::V6(addr) => addr.octets(),
    }
}

fn address(family: u16, bytes: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => bytes.first_chunk::<4>().map(|bytes| IpAddr::from(*bytes)),
        libc::AF_INET6 => bytes.first_chunk::<16>().map(|bytes| IpAddr::from(*bytes)),
        _ => None,
    }
}

fn u16_of(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_of(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn port_of(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_be_bytes)
}

fn key_attributes(key: &ServiceKey) -> Attributes {
    let mut inner = Attributes::default();
    inner.put(service::FAMILY, &family_number(key.family()).to_ne_bytes());
    match key {
        ServiceKey::Mark { mark, .. } => {
            inner.put(service::MARK, &mark.to_ne_bytes());
        }
        ServiceKey::Addr { addr, port, proto } => {
            inner.put(service::PROTOCOL, &protocol_number(*proto).to_ne_bytes());
            inner.put(service::ADDRESS, &address_bytes(*addr));
            inner.put(service::PORT, &port.to_be_bytes());
        }
    }
    inner
}

/// Names a service.
pub(super) fn named(key: &ServiceKey) -> Attributes {
    let mut all = Attributes::default();
    all.nest(SERVICE, &key_attributes(key));
    all
}

/// A service with its settings.
pub(super) fn with_settings(key: &ServiceKey, settings: &Settings) -> Attributes {
    let mut inner = key_attributes(key);
    inner.put(service::SCHEDULER, format!("{}\0", settings.scheduler).as_bytes());
    let mut flags = settings.flags.to_ne_bytes().to_vec();
    flags.extend(u32::MAX.to_ne_bytes());
    inner.put(service::FLAGS, &flags);
    inner.put(service::TIMEOUT, &settings.timeout_s.to_ne_bytes());
    // Every client for itself: a mask of 32 bits, a prefix of 128.
    let netmask = match key.family() {
        Family::V4 => u32::MAX,
        Family::V6 => 128,
    };
    inner.put(service::NETMASK, &netmask.to_ne_bytes());
    let mut all = Attributes::default();
    all.nest(SERVICE, &inner);
    all
}

/// A service's destination; without a weight it is only named.
pub(super) fn with_destination(
    key: &ServiceKey,
    (addr, port): Destination,
    weight: Option<u32>,
) -> Attributes {
    let mut inner = Attributes::default();
    inner.put(destination::ADDRESS, &address_bytes(addr));
    inner.put(destination::PORT, &port.to_be_bytes());
    inner.put(destination::FAMILY, &family_number(Family::of(addr)).to_ne_bytes());
    if let Some(weight) = weight {
        inner.put(destination::FORWARDING, &FORWARD_BY_TRANSLATION.to_ne_bytes());
        inner.put(destination::WEIGHT, &weight.to_ne_bytes());
        inner.put(destination::UPPER, &0_u32.to_ne_bytes());
        inner.put(destination::LOWER, &0_u32.to_ne_bytes());
    }
    let mut all = named(key);
    all.nest(DESTINATION, &inner);
    all
}

/// The service in an answer.
pub(super) fn service(answer: &[u8]) -> Option<(ServiceKey, Settings)> {
    let (_, inner) = attributes(answer).find(|(kind, _)| *kind == SERVICE)?;
    let (mut family, mut proto, mut addr, mut port, mut mark) = (None, None, None, None, None);
    let (mut scheduler, mut flags, mut timeout_s) = (None, None, 0);
    for (kind, value) in attributes(inner) {
        match kind {
            service::FAMILY => family = u16_of(value),
            service::PROTOCOL => proto = u16_of(value).and_then(protocol),
            service::ADDRESS => addr = Some(value),
            service::PORT => port = port_of(value),
            service::MARK => mark = u32_of(value),
            service::SCHEDULER => {
                scheduler = Some(String::from_utf8_lossy(value).trim_end_matches('\0').into());
            }
            service::FLAGS => flags = u32_of(value),
            service::TIMEOUT => timeout_s = u32_of(value)?,
            _ => {}
        }
    }
    let family = family?;
    let key = match mark {
        Some(mark) => {
            let family = if i32::from(family) == libc::AF_INET { Family::V4 } else { Family::V6 };
            ServiceKey::Mark { family, mark }
        }
        None => ServiceKey::Addr { addr: address(family, addr?)?, port: port?, proto: proto? },
    };
    Some((key, Settings { scheduler: scheduler?, flags: flags? & !flag::HASHED, timeout_s }))
}

/// The destination in an answer; where it does not say its family it has its service's.
pub(super) fn shown(key: &ServiceKey, answer: &[u8]) -> Option<Shown> {
    let (_, inner) = attributes(answer).find(|(kind, _)| *kind == DESTINATION)?;
    let (mut family, mut addr, mut port) = (family_number(key.family()), None, None);
    let (mut weight, mut active, mut inactive) = (None, 0, 0);
    for (kind, value) in attributes(inner) {
        match kind {
            destination::FAMILY => family = u16_of(value)?,
            destination::ADDRESS => addr = Some(value),
            destination::PORT => port = port_of(value),
            destination::WEIGHT => weight = u32_of(value),
            destination::ACTIVE => active = u32_of(value)?,
            destination::INACTIVE => inactive = u32_of(value)?,
            _ => {}
        }
    }
    let destination = (address(family, addr?)?, port?);
    Some(Shown { destination, weight: weight?, connections: active.saturating_add(inactive) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> [ServiceKey; 4] {
        let v4: IpAddr = [10, 96, 0, 1].into();
        let v6: IpAddr = "fd00:96::1".parse().expect("an address");
        [
            ServiceKey::Addr { addr: v4, port: 80, proto: Proto::Tcp },
            ServiceKey::Addr { addr: v6, port: 0x1234, proto: Proto::Sctp },
            ServiceKey::Mark { family: Family::V4, mark: 0x5e00_0001 },
            ServiceKey::Mark { family: Family::V6, mark: 7 },
        ]
    }

    #[test]
    fn services_survive_the_way_there_and_back() {
        let owner = Settings::owner(true);
        let settings = Settings { scheduler: "wlc".into(), flags: owner | flag::PERSISTENT, timeout_s: 300 };
        for key in keys() {
            let sent = with_settings(&key, &settings);
            assert_eq!(service(sent.bytes()), Some((key, settings.clone())));
            // The kernel's own flag is not part of it.
            let seen = Settings { flags: settings.flags | flag::HASHED, ..settings.clone() };
            assert_eq!(service(with_settings(&key, &seen).bytes()), Some((key, settings.clone())));
            assert_eq!(service(named(&key).bytes()), None, "a service without settings is not one");
        }
    }

    #[test]
    fn destinations_survive_the_way_there_and_back() {
        for key in keys() {
            let addr: IpAddr = match key.family() {
                Family::V4 => [10, 244, 0, 5].into(),
                Family::V6 => "fd00:244::5".parse().expect("an address"),
            };
            let sent = with_destination(&key, (addr, 8080), Some(3));
            let expected = Shown { destination: (addr, 8080), weight: 3, connections: 0 };
            assert_eq!(shown(&key, sent.bytes()), Some(expected));
            assert_eq!(shown(&key, with_destination(&key, (addr, 8080), None).bytes()), None);
        }
    }

    #[test]
    fn bytes_are_those_of_the_kernels_header() {
        let key = keys()[0];
        let text: String = named(&key).bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let family = "0600010002000000";
        let proto = "0600020006000000";
        let addr = "140003000a600001000000000000000000000000";
        let port = "0600040000500000";
        assert_eq!(text, format!("30000180{family}{proto}{addr}{port}"));
    }

    #[test]
    fn cut_answers_are_left_out() {
        let settings = Settings { scheduler: "rr".into(), flags: 0, timeout_s: 0 };
        let sent = with_settings(&keys()[0], &settings);
        for length in 0..sent.bytes().len() - 1 {
            assert_eq!(service(&sent.bytes()[..length]), None, "{length} bytes");
        }
    }
}
