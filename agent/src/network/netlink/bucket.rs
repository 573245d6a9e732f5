//! Token buckets (`tbf`) as links' root queues. Invariant: sizes are given whole, in bytes, so that what is read back
//! can be compared with what was asked for.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE, Nla};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use super::Connection;
use super::nfnl::attribute;

const KIND: &str = "tbf";
/// `TC_H_ROOT`.
const ROOT: TcHandle = TcHandle { major: 0xffff, minor: 0xffff };
/// Ours, to tell it from what others make.
const HANDLE: TcHandle = TcHandle { major: 0x5348, minor: 0 };
/// `TCA_OPTIONS`, `TCA_TBF_…`.
const OPTIONS: u16 = 2;
const PARMS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`.
const ETHERNET: u8 = 1;
/// Where `struct tc_tbf_qopt` has the rate's lower half and the queue's length.
const RATE_AT: usize = 8;
const QUEUE_AT: usize = 24;
const PARMS_BYTES: usize = 36;

/// How fast a link may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// Bytes a second.
    pub(crate) rate: u64,
    /// Bytes at once.
    pub(crate) burst: u32,
    /// Bytes that may wait, those of a burst included; what is more is dropped.
    pub(crate) queue: u32,
}

/// A link's bucket as the kernel shows it, which keeps the burst as a time only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Bytes a second.
    pub(crate) rate: u64,
    /// Bytes that may wait.
    pub(crate) queue: u32,
}

fn message(link: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = link as i32;
    message.header.parent = ROOT;
    message.header.handle = HANDLE;
    message
}

fn options(bucket: &Bucket) -> Vec<u8> {
    let mut parms = [0; PARMS_BYTES];
    let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
    parms[1] = ETHERNET;
    parms[RATE_AT..RATE_AT + 4].copy_from_slice(&rate.to_ne_bytes());
    parms[QUEUE_AT..QUEUE_AT + 4].copy_from_slice(&bucket.queue.to_ne_bytes());
    let mut bytes = Vec::new();
    let rate64 = bucket.rate.to_ne_bytes();
    let burst = bucket.burst.to_ne_bytes();
    for (kind, value) in [(PARMS, &parms[..]), (BURST, &burst), (RATE64, &rate64)] {
        bytes.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
    }
    bytes
}

fn shown(message: &TcMessage, link: u32) -> Option<Shown> {
    let kind = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == KIND);
    let header = &message.header;
    let ours = header.index == link as i32 && header.parent == ROOT && header.handle == HANDLE;
    if !ours || !message.attributes.iter().any(kind) {
        return None;
    }
    // The options of a kind that the library does not know are one attribute, as it came.
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.iter().find_map(|option| match option {
            TcOption::Other(whole) => {
                let mut value = vec![0; whole.value_len()];
                whole.emit_value(&mut value);
                Some(value)
            }
            _ => None,
        }),
        _ => None,
    })?;
    let parms = attribute(&options, PARMS)?;
    let word = |at: usize| parms.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let rate64 = attribute(&options, RATE64).and_then(|value| value.try_into().ok()).map(u64::from_ne_bytes);
    Some(Shown { rate: rate64.unwrap_or(u64::from(word(RATE_AT)?)), queue: word(QUEUE_AT)? })
}

impl Connection {
    /// The bucket of ours that a link has.
    pub(crate) fn bucket(&mut self, link: u32) -> io::Result<Option<Shown>> {
        let mut request = TcMessage::default();
        request.header.index = link as i32;
        let all = self.dump(&Message::GetQueueDiscipline(request))?;
        Ok(all.iter().find_map(|answer| match answer {
            Message::NewQueueDiscipline(found) => shown(found, link),
            _ => None,
        }))
    }

    /// Gives a link this bucket in place of whatever its root queue is.
    pub(crate) fn set_bucket(&mut self, link: u32, bucket: &Bucket) -> io::Result<()> {
        let mut message = message(link);
        message.attributes.push(TcAttribute::Kind(KIND.to_owned()));
        message.attributes.push(TcAttribute::Other(DefaultNla::new(OPTIONS, options(bucket))));
        self.change(Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes a link's bucket of ours away; false where it has none.
    pub(crate) fn delete_bucket(&mut self, link: u32) -> io::Result<bool> {
        if self.bucket(link)?.is_none() {
            return Ok(false);
        }
        self.change(Message::DelQueueDiscipline(message(link)), 0)?;
        Ok(true)
    }
}
