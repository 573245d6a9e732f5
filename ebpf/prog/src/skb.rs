//! The node that a packet at a device came to. Invariant: what the kernel answers is handed on as it is.

use crate::event::tell;
use crate::flows;
use crate::maps::{ANSWERS, DOORS, FRAGMENTS, MARKS, Maps, RANGES};
use crate::tc::{STORED, TAKEN, shv_is_near, shv_try_port};
use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_CURRENT_NETNS, bpf_sock_tuple},
    btf_maps::lpm_trie::Key,
    helpers::generated::{
        bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp,
    },
    programs::TcContext,
};
use core::mem::MaybeUninit;
use sheave_ebpf_abi::{
    Address, Affinity, AffinityKey, Backend, Config, Counter, Door, Event, Flow, FlowKey, Fragment,
    FragmentKey, Frontend, Frontend4Key, Frontend6Key, MemberKey, PROTO_TCP, Plain as _, Slot, event_hook,
    event_kind,
};
use sheave_ebpf_core::balance::Work;
use sheave_ebpf_core::env::{Affinities, Claim, Flows, Journey, Node, Route, Table, Way};
use sheave_ebpf_kernel::fib::{AF_INET, AF_INET6, FIB_FRAG_NEEDED, FIB_NO_NEIGH, FIB_SUCCESS, FibLookup};
use sheave_ebpf_kernel::frame;
use sheave_ebpf_kernel::value::{copy, replace};

/// A program's context at a network device.
pub trait Hook: EbpfContext {
    /// Whether a later hook is there for what this one can't do: it then wants the neighbour's address at once, and
    /// leaves to the other whatever is out of the ordinary, to be counted there.
    const EARLY: bool;
    /// Index of the device.
    fn device(&self) -> u32;
}

impl Hook for TcContext {
    const EARLY: bool = false;
    #[inline(always)]
    fn device(&self) -> u32 {
        frame::device(self)
    }
}

/// The node that the packet came to.
pub struct Env<'a, C> {
    pub ctx: &'a C,
}

impl<C: Hook> Table for Env<'_, C> {
    #[inline(always)]
    fn serves_net(&self, net: u32) -> bool {
        Maps.serves_net(net)
    }
    #[inline(always)]
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend> {
        Maps.frontend4(key)
    }
    #[inline(always)]
    fn frontend6(&self, key: &Frontend6Key) -> Option<Frontend> {
        Maps.frontend6(key)
    }
    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        Maps.slot(index)
    }
    #[inline(always)]
    fn backend(&self, id: u32) -> Option<Backend> {
        Maps.backend(id)
    }
    #[inline(always)]
    fn maglev(&self, table: u32, slot: u32) -> Option<u16> {
        Maps.maglev(table, slot)
    }
    #[inline(always)]
    fn node_flags(&self, address: &Address) -> u32 {
        Maps.node_flags(address)
    }
    #[inline(always)]
    fn config(&self) -> Option<Config> {
        Maps.config()
    }
    #[inline(always)]
    fn count(&self, counter: Counter) {
        if !(C::EARLY && matches!(counter, Counter::TooBig | Counter::Expired)) {
            Maps.count(counter);
        }
    }
}

impl<C: Hook> Affinities for Env<'_, C> {
    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        Maps.affinity(key)
    }
    #[inline(always)]
    fn bind(&self, key: &AffinityKey, value: &Affinity, fresh: bool) -> bool {
        Maps.bind(key, value, fresh)
    }
    #[inline(always)]
    fn member(&self, key: &MemberKey) -> Option<u32> {
        Maps.member(key)
    }
}

impl<C: Hook> Flows for Env<'_, C> {
    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        flows::get(key)
    }

    #[inline(always)]
    fn flow_into(&self, key: &FlowKey, into: &mut Flow) -> bool {
        flows::get_into(key, into)
    }

    #[inline(always)]
    fn touch(&self, key: &FlowKey, now_s: u32, state: u16) -> Option<Flow> {
        flows::touch(key, now_s, state)
    }

    #[inline(always)]
    fn claim(&self, key: &FlowKey, flow: &Flow) -> Claim {
        flows::put(key, flow, true, || self.count(Counter::FlowEvicted))
    }

    #[inline(always)]
    fn replace(&self, key: &FlowKey, flow: &Flow) -> bool {
        flows::put(key, flow, false, || self.count(Counter::FlowEvicted)) == Claim::Stored
    }

    #[inline(always)]
    fn remove(&self, key: &FlowKey) {
        flows::remove(key);
    }

    #[inline(always)]
    fn mark(&self, place: u32) -> u32 {
        MARKS.get_ptr(place).map_or(0, copy)
    }

    #[inline(always)]
    fn set_mark(&self, place: u32, now_s: u32) {
        if let Some(mark) = MARKS.get_ptr_mut(place) {
            replace(mark, &now_s);
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        FRAGMENTS.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        // Without it the later fragments are left to the stack, and counted.
        let _ = FRAGMENTS.insert(key, fragment, 0);
    }

    /// Of the coarse clock, which is some milliseconds late and takes a fraction of the time.
    #[inline(always)]
    fn now_s(&self) -> u32 {
        // SAFETY: the helper takes nothing and cannot fail.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }
}

impl<C: Hook> Node for Env<'_, C> {
    #[inline(always)]
    fn in_source_range(&self, service: u32, client: &Address) -> bool {
        const BITS: u32 = 32 + 128;
        let [a, b, c, d] = client.words;
        RANGES.get(&Key::new(BITS, [service, a, b, c, d])).is_some()
    }

    #[inline(always)]
    fn try_port(&self, work: &mut Work, attempt: u32) -> Claim {
        if C::EARLY {
            return Claim::Refused;
        }
        match apart(work, || shv_try_port(self.ctx.as_ptr().cast(), attempt)) {
            STORED => Claim::Stored,
            TAKEN => Claim::Taken,
            _ => Claim::Refused,
        }
    }

    #[inline(always)]
    fn is_near(&self, work: &mut Work, len: u32) -> bool {
        !C::EARLY && apart(work, || shv_is_near(len)) != 0
    }

    #[inline(always)]
    fn has_socket(&self, key: &FlowKey) -> bool {
        let mut tuple = MaybeUninit::<[u32; 9]>::zeroed();
        let words = tuple.as_mut_ptr().cast::<u32>();
        let ports = u32::from(key.sport) | u32::from(key.dport) << 16;
        // SAFETY: the words are those of `struct bpf_sock_tuple`, IPv4's and IPv6's laid over each other; its size says
        // which. A socket that is found is released.
        unsafe {
            let size = match (key.src.as_v4(), key.dst.as_v4()) {
                (Some(src), Some(dst)) => {
                    words.write(src);
                    words.add(1).write(dst);
                    words.add(2).write(ports);
                    12
                }
                _ => {
                    let (s, d) = (key.src.words, key.dst.words);
                    words.write(s[0]);
                    words.add(1).write(s[1]);
                    words.add(2).write(s[2]);
                    words.add(3).write(s[3]);
                    words.add(4).write(d[0]);
                    words.add(5).write(d[1]);
                    words.add(6).write(d[2]);
                    words.add(7).write(d[3]);
                    words.add(8).write(ports);
                    36
                }
            };
            let netns = BPF_F_CURRENT_NETNS as i64 as u64;
            let tuple = words.cast::<bpf_sock_tuple>();
            let found = if key.proto == PROTO_TCP {
                bpf_skc_lookup_tcp(self.ctx.as_ptr(), tuple, size, netns, 0)
            } else {
                bpf_sk_lookup_udp(self.ctx.as_ptr(), tuple, size, netns, 0)
            };
            if found.is_null() {
                return false;
            }
            bpf_sk_release(found.cast());
        }
        true
    }

    #[inline(always)]
    fn route(&self, journey: &Journey) -> Way {
        let device = self.ctx.device();
        let family = if journey.v6 { AF_INET6 } else { AF_INET };
        let place = |address: &Address| {
            if journey.v6 { address.words } else { [address.words[3], 0, 0, 0] }
        };
        let mut fib = FibLookup {
            family,
            proto: journey.proto,
            sport: journey.sport,
            dport: journey.dport,
            // One that the field can't say is longer than any way takes in one piece.
            len: if journey.len > 0xffff { 0xffff } else { journey.len as u16 },
            device,
            flow_info: 0,
            src: place(&journey.src),
            dst: place(&journey.dst),
            vlan: 0,
            smac: [0; 6],
            dmac: [0; 6],
        };
        // SAFETY: it is the program's own context. What is not sent at once is given its link-layer addresses by the kernel.
        let answer = unsafe { fib.ask(self.ctx.as_ptr(), C::EARLY) };
        if C::EARLY {
            let here = answer == FIB_SUCCESS && fib.device == device;
            let (d, s) = (fib.dmac, fib.smac);
            let link = [d[0], d[1], d[2], d[3], d[4], d[5], s[0], s[1], s[2], s[3], s[4], s[5]];
            let route = Route { device, next_hop: Address::v4(0), link, has_link: true };
            return if here { Way::To(route) } else { Way::Later };
        }
        if answer == FIB_FRAG_NEEDED {
            return Way::TooBig(u32::from(fib.len));
        }
        if answer != FIB_SUCCESS && answer != FIB_NO_NEIGH {
            return Way::None;
        }
        let next_hop = if fib.family == AF_INET { Address::v4(fib.dst[0]) } else { Address::v6(fib.dst) };
        // The kernel finds the neighbour when it sends the packet.
        Way::To(Route { device: fib.device, next_hop, link: [0; 12], has_link: false })
    }

    #[inline(always)]
    fn door(&self, place: u16) -> Option<Door> {
        if C::EARLY {
            return None;
        }
        Some(DOORS.get_ptr(u32::from(place)).map_or(Door::zeroed(), copy))
    }

    #[inline(always)]
    fn answered(&self, kind: u32) -> u32 {
        let Some(held) = ANSWERS.get_ptr_mut(kind) else { return u32::MAX };
        // SAFETY: the helper takes nothing and cannot fail.
        let second = unsafe { bpf_ktime_get_ns() } / 1_000_000_000;
        // SAFETY: the element is this processor's own, and stays until the program ends.
        unsafe {
            let so_far = if *held >> 32 == second & 0xffff_ffff { *held & 0xffff_ffff } else { 0 };
            *held = second << 32 | (so_far + 1);
            (so_far + 1) as u32
        }
    }

    #[inline(always)]
    fn tell(&self, work: &Work, reason: Counter) {
        let hook = if C::EARLY { event_hook::XDP } else { event_hook::TC_INGRESS };
        tell_packet(work, reason, self.ctx.device(), hook);
    }
}

/// Calls a global function that reads and writes this processor's work area, which is what `work` is: it finds that by itself,
/// and the compiler does not see it.
#[inline(always)]
fn apart<T>(work: &mut Work, function: impl FnOnce() -> T) -> T {
    core::hint::black_box(&mut *work);
    let answer = function();
    core::hint::black_box(&mut *work);
    answer
}

/// In a frame of its own: an event is much for a stack. Only packets on their way in open connections or are refused.
#[inline(never)]
fn tell_packet(work: &Work, reason: Counter, device: u32, hook: u8) {
    tell(|| {
        let connection = reason == Counter::Opened;
        let of_flow = connection || reason == Counter::TooBig || reason == Counter::NoRoute;
        let headers = &work.headers;
        Event {
            client: headers.src,
            asked: headers.dst,
            backend: if connection { work.flow.dst } else { Address::zeroed() },
            backend_port: if connection { work.flow.dport } else { 0 },
            service: if of_flow { work.flow.service } else { work.frontend.service },
            device,
            client_port: headers.sport,
            asked_port: headers.dport,
            reason: reason as u16,
            proto: headers.proto,
            kind: if connection { event_kind::CONNECTION } else { event_kind::DROP },
            hook,
            ..Event::zeroed()
        }
    });
}
