//! How fast an attachment may receive and send. Invariant: both limits are token buckets at the sending side of its
//! pair of links: what it receives at the node's end, what it sends at its own. No device is made for it.
//!
//! Who may administer the pod's namespace (`CAP_NET_ADMIN`) can lift the limit of what it sends; the next
//! reconciliation puts it back.

use std::fs::File;
use std::io;
use std::thread;

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::NetworkError;
use super::leases::Lease;
use super::netlink::Connection;
use super::netlink::bucket::Bucket;
use super::plan::node_link_name;

/// How long a packet may wait for its turn before the queue is full, milliseconds: enough to keep a stream going,
/// little enough to keep its answers quick.
const QUEUE_MS: u64 = 25;

/// Limits of an attachment. A rate of 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bandwidth {
    /// What it receives, bits a second.
    pub ingress_bps: u64,
    /// What it may receive at once, bits; not 0 with a rate.
    pub ingress_burst_bits: u64,
    /// What it sends, bits a second.
    pub egress_bps: u64,
    /// What it may send at once, bits; not 0 with a rate.
    pub egress_burst_bits: u64,
}

/// Where an attachment's links are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends<'a> {
    /// The attachment, for errors.
    pub(crate) id: &'a str,
    /// The node's link.
    pub(crate) host_link: &'a str,
    /// The pod's namespace.
    pub(crate) netns: &'a File,
    /// The pod's link.
    pub(crate) ifname: &'a str,
}

impl Bandwidth {
    /// Fails, naming what is wrong, where a limit can't be kept.
    pub fn check(&self) -> Result<(), String> {
        bucket("ingress", self.ingress_bps, self.ingress_burst_bits)?;
        bucket("egress", self.egress_bps, self.egress_burst_bits).map(drop)
    }

    /// True where nothing is limited.
    pub fn is_none(&self) -> bool {
        self.ingress_bps == 0 && self.egress_bps == 0
    }
}

fn bucket(name: &str, bps: u64, burst_bits: u64) -> Result<Option<Bucket>, String> {
    if bps == 0 && burst_bits == 0 {
        return Ok(None);
    }
    if bps < 8 || burst_bits < 8 {
        return Err(format!(
            "{name} rate {bps} bit/s with a burst of {burst_bits} bits: give both, of at least 8, or neither"
        ));
    }
    let (rate, burst) = (bps / 8, burst_bits.div_ceil(8));
    let too_much = |_| {
        format!("{name} burst of {burst_bits} bits: a bucket holds at most {} bits", 8 * u64::from(u32::MAX))
    };
    let burst = u32::try_from(burst).map_err(too_much)?;
    let waiting = u64::from(burst).saturating_add((rate / 1000).saturating_mul(QUEUE_MS));
    Ok(Some(Bucket { rate, burst, queue: u32::try_from(waiting).unwrap_or(u32::MAX) }))
}

/// Gives what was connected by a lease the limits that it asked for, if any; says what it had to change, in words.
pub(super) fn keep(lease: &Lease, netns: &File) -> Result<Vec<String>, NetworkError> {
    by_lease(lease, netns, Mode::Set)
}

/// Says what a lease's attachment lacks of the limits that it asked for.
pub(super) fn lacks(lease: &Lease, netns: &File) -> Result<Vec<String>, NetworkError> {
    by_lease(lease, netns, Mode::Look)
}

fn by_lease(lease: &Lease, netns: &File, mode: Mode) -> Result<Vec<String>, NetworkError> {
    // What others put on a link that nobody asked to limit, such as a plugin after ours, is not ours to judge.
    let Some(asked) = lease.asked.as_ref().filter(|asked| !asked.bandwidth.is_none()) else {
        return Ok(Vec::new());
    };
    let host_link = node_link_name(&lease.uid);
    let ends = Ends { id: &lease.uid, host_link: &host_link, netns, ifname: &asked.ifname };
    both(&ends, &asked.bandwidth, mode)
}

/// What is to be done at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Set,
    Look,
}

/// Gives an attachment exactly these limits; says what it had to change, in words.
pub(crate) fn set(ends: &Ends<'_>, limits: &Bandwidth) -> Result<Vec<String>, NetworkError> {
    both(ends, limits, Mode::Set)
}

fn both(ends: &Ends<'_>, limits: &Bandwidth, mode: Mode) -> Result<Vec<String>, NetworkError> {
    let wrong = |why| NetworkError::Bandwidth { id: ends.id.to_owned(), why };
    let into = bucket("ingress", limits.ingress_bps, limits.ingress_burst_bits).map_err(wrong)?;
    let out = bucket("egress", limits.egress_bps, limits.egress_burst_bits).map_err(wrong)?;
    let failed = |step: &str, source| NetworkError::Step {
        uid: ends.id.to_owned(),
        step: format!("limit what it {step}"),
        source,
    };
    let mut said = Vec::new();
    if one(ends.host_link, into.as_ref(), mode).map_err(|e| failed("receives", e))? {
        said.push("the limit of what it receives".to_owned());
    }
    let inside = thread::scope(|scope| {
        // The thread ends with this visit.
        let visit = scope.spawn(|| {
            setns(ends.netns, CloneFlags::CLONE_NEWNET)?;
            one(ends.ifname, out.as_ref(), mode)
        });
        visit.join().unwrap_or_else(|_| Err(io::Error::other("the visiting thread died")))
    });
    if inside.map_err(|e| failed("sends", e))? {
        said.push("the limit of what it sends".to_owned());
    }
    Ok(said)
}

/// Whether a link of the calling thread's namespace had another bucket than wanted; sets it where asked to.
fn one(link: &str, wanted: Option<&Bucket>, mode: Mode) -> io::Result<bool> {
    let mut connection = Connection::open()?;
    let index = connection.link(link)?.ok_or_else(|| io::Error::other(format!("link {link} is gone")))?.index;
    let found = connection.bucket(index)?;
    if found.map(|found| (found.rate, found.queue)) == wanted.map(|bucket| (bucket.rate, bucket.queue)) {
        return Ok(false);
    }
    match (mode, wanted) {
        (Mode::Look, _) => {}
        (Mode::Set, Some(bucket)) => connection.set_bucket(index, bucket)?,
        (Mode::Set, None) => {
            connection.delete_bucket(index)?;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bps: u64, burst: u64) -> Bandwidth {
        Bandwidth { ingress_bps: bps, ingress_burst_bits: burst, ..Bandwidth::default() }
    }

    #[test]
    fn a_rate_needs_a_burst_and_the_other_way_round() {
        assert_eq!(limits(0, 0).check(), Ok(()));
        assert!(limits(0, 0).is_none() && !limits(8, 8).is_none());
        for (bps, burst) in [(1000, 0), (0, 1000), (7, 1000), (1000, 7)] {
            let error = limits(bps, burst).check().unwrap_err();
            assert!(error.contains("ingress") && error.contains("both"), "{error}");
        }
        let error = Bandwidth { egress_bps: 8, ..Bandwidth::default() }.check().unwrap_err();
        assert!(error.contains("egress"), "{error}");
    }

    #[test]
    fn buckets_are_counted_in_bytes() {
        let one = bucket("x", 8_000_000, u64::from(u32::MAX)).unwrap().unwrap();
        assert_eq!((one.rate, one.burst), (1_000_000, 1 << 29));
        assert_eq!(one.queue, (1 << 29) + 25_000);
        assert_eq!(bucket("x", u64::MAX, 8).unwrap().unwrap().queue, u32::MAX);
        assert!(bucket("x", 8, 9 * u64::from(u32::MAX)).unwrap_err().contains("at most"));
    }
}
