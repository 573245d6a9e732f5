//! What a listener is told. Invariant: as long as nobody listens an event costs one look at an array, and one that
//! does not fit into the ring is counted, never waited for.

use crate::maps::{EVENTS, LISTEN, Maps};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use sheave_ebpf_abi::{Counter, Event};
use sheave_ebpf_core::env::Table as _;
use sheave_ebpf_kernel::value::copy;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;

/// Writes the event that `make` gives, if somebody listens. Its `time_ns` is filled in here.
#[inline(always)]
pub fn tell(make: impl FnOnce() -> Event) {
    let until_s = LISTEN.get_ptr(0).map_or(0, copy);
    if until_s == 0 {
        return;
    }
    // SAFETY: the helper takes nothing and cannot fail.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if now_ns >= u64::from(until_s) * SECOND_NS {
        return;
    }
    let event = Event { time_ns: now_ns, ..make() };
    match EVENTS.reserve(0) {
        Some(mut room) => {
            room.write(event);
            room.submit(0);
        }
        None => Maps.count(Counter::EventLost),
    }
}
