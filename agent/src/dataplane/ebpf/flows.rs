//! The connection table, from outside. Invariant: only what has no connections of its own (UDP, SCTP) is ever taken out
//! of it; a TCP connection stays with its backend until one of its ends closes it.

use super::encode;
use super::map::Map;
use crate::dataplane::DataplaneError;
use crate::service::{BackendAddr, Proto, ServiceId};
use sheave_ebpf_abi::{Address, Flow, FlowKey, PROTO_SCTP, PROTO_TCP, PROTO_UDP};
use std::collections::BTreeSet;

/// Takes out the flows of backends that services have lost, so that their next datagram goes to another one.
pub(super) fn forget(
    flows: &Map<FlowKey, Flow>,
    lost: &BTreeSet<(ServiceId, BackendAddr)>,
) -> Result<(), DataplaneError> {
    let lost: BTreeSet<_> = lost.iter().map(|(service, at)| part(*service, at)).collect();
    if lost.is_empty() {
        return Ok(());
    }
    let held = flows.entries(usize::MAX)?;
    let gone = held.iter().filter(|(key, flow)| is_of(key, flow, &lost)).map(|(key, _)| *key);
    flows.delete_all(gone)
}

/// A service's backend as the table knows it.
type Part = (ServiceId, [u32; 4], u16, u8);

fn part(service: ServiceId, at: &BackendAddr) -> Part {
    let proto = match at.proto {
        Proto::Tcp => PROTO_TCP,
        Proto::Udp => PROTO_UDP,
        Proto::Sctp => PROTO_SCTP,
    };
    (service, encode::address(at.addr).words, at.port.to_be(), proto)
}

fn is_of(key: &FlowKey, flow: &Flow, lost: &BTreeSet<Part>) -> bool {
    let is = |addr: &Address, port| lost.contains(&(flow.service, addr.words, port, key.proto));
    // The backend is the new destination of the client's packets, and the source of its own.
    key.proto != PROTO_TCP && (is(&flow.dst, flow.dport) || is(&key.src, key.sport))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheave_ebpf_abi::Plain as _;

    #[test]
    fn both_entries_of_a_lost_backend_and_no_others() {
        let (client, vip) = ("198.51.100.2".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let backend = |last: u8, proto| BackendAddr { addr: [10, 0, 0, last].into(), port: 8080, proto };
        let lost: BTreeSet<_> =
            [Proto::Udp, Proto::Tcp].map(|proto| part(7, &backend(1, proto))).into_iter().collect();
        let entries = |service, to: BackendAddr| {
            let (_, words, port, proto) = part(service, &to);
            let to = Address { words };
            let (client, vip) = (encode::address(client), encode::address(vip));
            let key = FlowKey { src: client, dst: vip, proto, ..FlowKey::zeroed() };
            let flow = Flow { src: client, dst: to, dport: port, service, ..Flow::zeroed() };
            let back = FlowKey { src: to, dst: client, sport: port, proto, ..FlowKey::zeroed() };
            [(key, flow), (back, Flow { src: vip, dst: client, service, ..Flow::zeroed() })]
        };
        for (service, to, expected) in [
            (7, backend(1, Proto::Udp), true),
            (7, backend(2, Proto::Udp), false),
            (8, backend(1, Proto::Udp), false),
            (7, backend(1, Proto::Tcp), false),
        ] {
            for (key, flow) in entries(service, to) {
                assert_eq!(is_of(&key, &flow, &lost), expected, "{service} {to:?}");
            }
        }
    }
}
