//! Filters of clsact qdiscs. Invariant: only read here; a device or qdisc that is gone has no filters.

use std::io;

use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::tc::{TcHandle, TcHeader, TcMessage};

use super::Connection;

/// Whether the clsact qdisc of `link` has, at its ingress or egress, a filter of this priority and handle.
pub(crate) fn has_clsact_filter(link: u32, ingress: bool, priority: u16, handle: u16) -> io::Result<bool> {
    let minor = if ingress { TcHandle::MIN_INGRESS } else { TcHandle::MIN_EGRESS };
    let mut request = TcMessage::default();
    request.header.index = link as i32;
    request.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
    let wanted = |header: &TcHeader| {
        header.info >> 16 == u32::from(priority) && header.handle == (TcHandle { major: 0, minor: handle })
    };
    match Connection::open()?.dump(&Message::GetTrafficFilter(request)) {
        Ok(answers) => Ok(answers.iter().any(|answer| match answer {
            Message::NewTrafficFilter(filter) => wanted(&filter.header),
            _ => false,
        })),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => Ok(false),
        Err(e) => Err(e),
    }
}
