//! Traffic control on uplinks and pods' devices. Invariant: a program does one stage of the way and continues in the
//! program of the next; which one is core's word. The long and seldom stages are programs of their own, since each
//! must fit into what the verifier of every kernel takes.

use crate::maps::{self, CALLS, Maps};
use crate::skb::Env;
use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh},
    helpers::generated::{bpf_ktime_get_ns, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    macros::classifier,
    programs::TcContext,
};
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};
use sheave_ebpf_abi::{Counter, call};
use sheave_ebpf_core::answer::{self, Answer};
use sheave_ebpf_core::balance::{self, Link, Side, Stage, Verdict, Work};
use sheave_ebpf_core::env::{Claim, Route, Table as _};
use sheave_ebpf_core::{icmp, open, quick, tunnel};
use sheave_ebpf_kernel::frame::Skb;

/// What is carried from program to program in the packet's control block: the device's kind and side, and the answer.
/// The first word is cleared when the way ends, for a control block is handed on with the packet.
const WORD_WHERE: usize = 0;
const WORD_ANSWER: usize = 1;
/// Two words: the ticket of the packet for a program that goes on with the work area as it is.
const WORD_TICKET: usize = 2;
const AT_UPLINK: u32 = 0x5e01;
const AT_POD: u32 = 0x5e02;
const LEAVING: u32 = 0x5e03;
/// At an uplink, within a header.
const WRAPPED: u32 = 0x5e04;
/// On its way out by a redirection, translated: nobody translates it again. The answer's word says so too, since what the
/// stack sends has what it likes in the first.
const SENT: u32 = 0x5e05;
const SENT_TOO: u32 = 0x7368_7665;
/// A bit of the first word: a flow was written for the packet already.
const OPENED: u32 = 0x100;

/// AF_INET and AF_INET6 (linux/socket.h).
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

#[classifier]
pub fn shv_tc_ingress(ctx: TcContext) -> i32 {
    ingress(&ctx, Link::Uplink, AT_UPLINK)
}

#[classifier]
pub fn shv_pod_ingress(ctx: TcContext) -> i32 {
    ingress(&ctx, Link::Pod, AT_POD)
}

/// Where the pods' sockets need no help, but their answers go past the stack.
#[classifier]
pub fn shv_pod_answer(ctx: TcContext) -> i32 {
    // As for what leaves: only what has a flow is of interest.
    if quick::passes(&Skb { ctx: &ctx }, &Env { ctx: &ctx }, Side::Egress) {
        return TC_ACT_UNSPEC;
    }
    set(&ctx, WORD_WHERE, AT_POD);
    let Some(work) = maps::work() else { return TC_ACT_UNSPEC };
    let stage = balance::from_pod(&mut Skb { ctx: &ctx }, &Env { ctx: &ctx }, work);
    go_on(&ctx, work, stage)
}

#[classifier]
pub fn shv_tc_egress(ctx: TcContext) -> i32 {
    if get(&ctx, WORD_WHERE) == SENT && get(&ctx, WORD_ANSWER) == SENT_TOO {
        set(&ctx, WORD_WHERE, 0);
        return TC_ACT_UNSPEC;
    }
    if quick::passes(&Skb { ctx: &ctx }, &Env { ctx: &ctx }, Side::Egress) {
        return TC_ACT_UNSPEC;
    }
    set(&ctx, WORD_WHERE, LEAVING);
    let Some(work) = maps::work() else { return TC_ACT_UNSPEC };
    let stage = balance::egress(&mut Skb { ctx: &ctx }, &Env { ctx: &ctx }, work);
    go_on(&ctx, work, stage)
}

/// Called only: finds a backend.
#[classifier]
pub fn shv_tc_open(ctx: TcContext) -> i32 {
    let place = get(&ctx, WORD_WHERE);
    if place & OPENED != 0 {
        // The flow that was written is gone again: the table is too small for what goes on.
        Env { ctx: &ctx }.count(Counter::FlowFull);
        return TC_ACT_SHOT as i32;
    }
    let Some(work) = maps::work() else { return TC_ACT_SHOT as i32 };
    let ticket = u64::from(get(&ctx, WORD_TICKET)) | u64::from(get(&ctx, WORD_TICKET + 1)) << 32;
    if ticket == 0 || work.ticket != ticket {
        // While the programs are replaced one may call another that has its own work area.
        return go_on(&ctx, work, Stage::Again);
    }
    work.ticket = 0;
    set(&ctx, WORD_WHERE, place | OPENED);
    let stage = open::open(&mut Skb { ctx: &ctx }, &Env { ctx: &ctx }, work, link(place));
    go_on(&ctx, work, stage)
}

/// The answers of [`shv_try_port`].
pub const STORED: u32 = 0;
pub const TAKEN: u32 = 1;
pub const REFUSED: u32 = 2;

/// One attempt to find a port for the flow in this processor's work area. It is a global function: the verifier looks at it
/// once, and not at every attempt of every way to it, which was a quarter of all its work.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shv_try_port(ctx: *mut __sk_buff, attempt: u32) -> u32 {
    let ctx = TcContext::new(ctx);
    let Some(work) = maps::work() else { return REFUSED };
    match open::try_port(&Env { ctx: &ctx }, work, attempt) {
        Claim::Stored => STORED,
        Claim::Taken => TAKEN,
        Claim::Refused => REFUSED,
    }
}

/// A few steps of the search for the endpoint that a header names, among the slots from that in this processor's work area on. A
/// global function like [`shv_try_port`]: followed from wherever it is called, the search was two thirds of what the verifier
/// did for its program.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shv_is_near(len: u32) -> u32 {
    let Some(work) = maps::work() else { return 0 };
    u32::from(tunnel::is_near(&Maps, work, len))
}

/// Called only: translates an ICMP error.
#[classifier]
pub fn shv_tc_icmp(ctx: TcContext) -> i32 {
    let place = get(&ctx, WORD_WHERE);
    let side = if place == LEAVING { Side::Egress } else { Side::Ingress };
    let Some(work) = maps::work() else { return TC_ACT_SHOT as i32 };
    let stage = icmp::error(&mut Skb { ctx: &ctx }, &Env { ctx: &ctx }, work, side, link(place));
    go_on(&ctx, work, stage)
}

/// Called only: takes a packet out of the header that it was sent on in.
#[classifier]
pub fn shv_tc_unwrap(ctx: TcContext) -> i32 {
    if get(&ctx, WORD_WHERE) != WRAPPED | OPENED {
        set(&ctx, WORD_WHERE, WRAPPED);
    }
    let Some(work) = maps::work() else { return TC_ACT_SHOT as i32 };
    let stage = tunnel::unwrap(&mut Skb { ctx: &ctx }, &Env { ctx: &ctx }, work);
    go_on(&ctx, work, stage)
}

/// Called only: answers.
#[classifier]
pub fn shv_tc_answer(ctx: TcContext) -> i32 {
    let Some(work) = maps::work() else { return TC_ACT_SHOT as i32 };
    let told = || Answer::from_word(get(&ctx, WORD_ANSWER));
    let verdict = answer::give(&mut Skb { ctx: &ctx }, &Env { ctx: &ctx }, work, told);
    code(&ctx, work, verdict)
}

/// A packet's way begins, or begins again after a flow was written for it.
#[inline(always)]
fn ingress(ctx: &TcContext, link: Link, place: u32) -> i32 {
    if quick::passes(&Skb { ctx }, &Env { ctx }, Side::Ingress) {
        return TC_ACT_UNSPEC;
    }
    if get(ctx, WORD_WHERE) != place | OPENED {
        set(ctx, WORD_WHERE, place);
    }
    let Some(work) = maps::work() else { return TC_ACT_UNSPEC };
    let stage = balance::ingress(&mut Skb { ctx }, &Env { ctx }, work, link);
    go_on(ctx, work, stage)
}

#[inline(always)]
fn go_on(ctx: &TcContext, work: &mut Work, stage: Stage) -> i32 {
    let next = match stage {
        Stage::Done(verdict) => return code(ctx, work, verdict),
        Stage::Open => {
            // SAFETY: the helper takes nothing and cannot fail.
            work.ticket = unsafe { bpf_ktime_get_ns() };
            work.now_s = (work.ticket / 1_000_000_000) as u32;
            set(ctx, WORD_TICKET, work.ticket as u32);
            set(ctx, WORD_TICKET + 1, (work.ticket >> 32) as u32);
            call::OPEN
        }
        Stage::Again => match get(ctx, WORD_WHERE) & !OPENED {
            AT_POD => call::POD_INGRESS,
            WRAPPED => call::UNWRAP,
            _ => call::INGRESS,
        },
        Stage::Unwrap => call::UNWRAP,
        Stage::Icmp => call::ICMP,
        Stage::Answer(answer) => {
            set(ctx, WORD_ANSWER, answer.to_word());
            call::ANSWER
        }
    };
    // SAFETY: nothing here needs to be dropped, and the programs in the array are of this kind.
    unsafe { CALLS.tail_call(ctx, next) };
    Env { ctx }.count(Counter::CallMissing);
    TC_ACT_SHOT as i32
}

#[inline(always)]
const fn link(place: u32) -> Link {
    match place {
        AT_POD => Link::Pod,
        WRAPPED => Link::Tunnel,
        _ => Link::Uplink,
    }
}

/// `TC_ACT_UNSPEC` hands the packet to the next program on a clsact qdisc and, as TCX_NEXT, on a tcx hook.
#[inline(always)]
fn code(ctx: &TcContext, work: &Work, verdict: Verdict) -> i32 {
    let sent = matches!(verdict, Verdict::Redirect);
    set(ctx, WORD_WHERE, if sent { SENT } else { 0 });
    match verdict {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop => TC_ACT_SHOT as i32,
        Verdict::Redirect => {
            set(ctx, WORD_ANSWER, SENT_TOO);
            redirect(&work.route)
        }
        // SAFETY: the helper takes numbers only.
        Verdict::Enter => (unsafe { bpf_redirect_peer(work.route.device, 0) }) as i32,
        Verdict::Reply => {
            // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
            let device = unsafe { read_volatile(addr_of!((*ctx.skb.skb).ifindex)) };
            // SAFETY: the helper takes numbers only.
            (unsafe { bpf_redirect(device, 0) }) as i32
        }
    }
}

/// Lets the kernel find the neighbour's link-layer address, and wait for it where it must.
#[inline(always)]
fn redirect(route: &Route) -> i32 {
    let mut to = MaybeUninit::<bpf_redir_neigh>::zeroed();
    let place = to.as_mut_ptr();
    // SAFETY: all fields of the zeroed struct are integers; each is written where it lies.
    unsafe {
        match route.next_hop.as_v4() {
            Some(word) => {
                addr_of_mut!((*place).nh_family).write(AF_INET);
                addr_of_mut!((*place).__bindgen_anon_1.ipv4_nh).write(word);
            }
            None => {
                addr_of_mut!((*place).nh_family).write(AF_INET6);
                addr_of_mut!((*place).__bindgen_anon_1.ipv6_nh).write(route.next_hop.words);
            }
        }
        let sent = bpf_redirect_neigh(route.device, place, size_of::<bpf_redir_neigh>() as i32, 0);
        if sent < 0 { TC_ACT_SHOT as i32 } else { TC_ACT_REDIRECT as i32 }
    }
}

#[inline(always)]
fn get(ctx: &TcContext, word: usize) -> u32 {
    // SAFETY: as in `code`; `word` is one of five.
    unsafe { read_volatile(addr_of!((*ctx.skb.skb).cb).cast::<u32>().add(word)) }
}

#[inline(always)]
fn set(ctx: &TcContext, word: usize, value: u32) {
    // SAFETY: as in `get`, and the field may be written.
    unsafe { write_volatile(addr_of_mut!((*ctx.skb.skb).cb).cast::<u32>().add(word), value) };
}
