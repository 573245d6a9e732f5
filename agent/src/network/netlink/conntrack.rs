//! The kernel's connection tracking: flows are read and ended. Invariant: a flow is ended by its whole original tuple
//! and its id, so that one which began meanwhile is left alone.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use super::nfnl::{Netfilter, Writer, attribute, number};
use super::nft::{IPV4, IPV6};

/// `NFNL_SUBSYS_CTNETLINK`.
const SUBSYSTEM: u8 = 1;
/// `IPCTNL_MSG_CT_GET`, `IPCTNL_MSG_CT_DELETE`.
const GET: u8 = 1;
const DELETE: u8 = 2;

/// `CTA_…`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
/// Flag of `CTA_FILTER_ORIG_FLAGS` that compares the protocol.
const BY_PROTOCOL: u32 = 1 << 3;
/// `IPS_DST_NAT`.
const TRANSLATED: u32 = 1 << 5;

/// One tracked flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flow {
    /// Who sent its first packet.
    pub(crate) from: SocketAddr,
    /// Where its first packet was sent.
    pub(crate) to: SocketAddr,
    /// Who answers.
    pub(crate) by: SocketAddr,
    /// The destination is translated.
    pub(crate) translated: bool,
    original: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
}

impl Netfilter {
    /// Ends the flows of a protocol (`IPPROTO_…`) and family that `unwanted` picks, and says how many.
    pub(crate) fn end_flows(
        &mut self,
        v6: bool,
        protocol: u8,
        unwanted: impl Fn(&Flow) -> bool,
    ) -> io::Result<usize> {
        let family = if v6 { IPV6 } else { IPV4 };
        let by_protocol = |writer: &mut Writer| {
            // CTA_TUPLE_ORIG { CTA_TUPLE_PROTO { CTA_PROTO_NUM } }, CTA_FILTER { ORIG_FLAGS, REPLY_FLAGS }
            let tuple = writer.nest(ORIGINAL);
            let proto = writer.nest(2);
            writer.put(1, &[protocol]);
            writer.end(proto);
            writer.end(tuple);
            let filter = writer.nest(FILTER);
            writer.put(1, &BY_PROTOCOL.to_ne_bytes());
            writer.put(2, &0_u32.to_ne_bytes());
            writer.end(filter);
        };
        let found = self.dump(SUBSYSTEM, GET, family, by_protocol, |bytes| flow(bytes).filter(&unwanted))?;
        let mut ended = 0;
        for flow in &found {
            let sent = self.request(SUBSYSTEM, DELETE, family, |writer| {
                writer.put(ORIGINAL | 0x8000, &flow.original);
                writer.put(ID, &flow.id);
                if let Some(zone) = &flow.zone {
                    writer.put(ZONE, zone);
                }
            });
            match sent {
                Ok(()) => ended += 1,
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(ended)
    }
}

/// Ends the tracking of untranslated TCP and UDP flows between these ends (protocol, and two ends in any order), in the
/// calling thread's network namespace. Gives how many entries went.
pub(crate) fn end_tracking(flows: &HashSet<(u8, SocketAddr, SocketAddr)>) -> io::Result<usize> {
    let mut netfilter = Netfilter::open()?;
    let mut ended = 0;
    for (v6, protocol) in [(false, 6), (false, 17), (true, 6), (true, 17)] {
        let ours = |(held, a, _): &&(u8, SocketAddr, SocketAddr)| *held == protocol && a.is_ipv6() == v6;
        if flows.iter().any(|flow| ours(&flow)) {
            ended += netfilter.end_flows(v6, protocol, |flow| {
                let held = |a, b| flows.contains(&(protocol, a, b));
                !flow.translated && (held(flow.from, flow.to) || held(flow.to, flow.from))
            })?;
        }
    }
    Ok(ended)
}

fn flow(bytes: &[u8]) -> Option<Flow> {
    let (original, reply) = (attribute(bytes, ORIGINAL)?, attribute(bytes, REPLY)?);
    let status = attribute(bytes, STATUS).and_then(number)?;
    Some(Flow {
        from: end(original, [1, 3], 2)?,
        to: end(original, [2, 4], 3)?,
        by: end(reply, [1, 3], 2)?,
        translated: status & TRANSLATED != 0,
        original: original.to_vec(),
        id: attribute(bytes, ID)?.to_vec(),
        zone: attribute(bytes, ZONE).map(<[u8]>::to_vec),
    })
}

/// Source or destination of a tuple: attributes of its IPv4 and IPv6 address, and of its port.
fn end(tuple: &[u8], addresses: [u16; 2], port: u16) -> Option<SocketAddr> {
    let (ips, proto) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
    let v4 = attribute(ips, addresses[0]).and_then(|v| <[u8; 4]>::try_from(v).ok()).map(IpAddr::from);
    let ip = v4.or_else(|| {
        attribute(ips, addresses[1]).and_then(|v| <[u8; 16]>::try_from(v).ok()).map(IpAddr::from)
    });
    let port = attribute(proto, port)?.try_into().ok().map(u16::from_be_bytes)?;
    Some(SocketAddr::new(ip?, port))
}
