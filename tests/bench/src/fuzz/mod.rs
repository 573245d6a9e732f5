//! Fuzzing of the packet core. Invariant: whatever the bytes, nothing panics, nothing beyond headers changes, right
//! checksums stay right, and what was translated comes back as what it was; the checks are made by code that shares
//! nothing with the code that they judge.

mod frames;
mod kernel;
mod oracle;
mod tunnel;

use frames::{Dice, End, Spec, TCP, UDP, error, frame, mutate, v4, v6};
use kernel::{Buffer, Kernel, POD_DEVICE, address};
use sheave_ebpf_abi::{
    Backend, Counter, Door, Flow, FlowKey, Frontend, Frontend4Key, Frontend6Key, Plain as _, Slot,
    config_flag, door_flag, flow_flag, frontend_flag, member_flag,
};
use sheave_ebpf_core::balance::{self, Link, Side, Verdict, Work};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Frames between two looks at the clock.
const ROUND: usize = 512;
/// Frames through one node before another is made, so that tables are met empty and full.
const LIFE: usize = 20_000;

/// What a run did.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Frames that went through the core.
    pub(crate) frames: u64,
    /// Of them, frames that were changed and went on.
    pub(crate) translated: u64,
    /// Of them, frames whose answer was made.
    pub(crate) answered: u64,
    /// Translations that were undone by their answer.
    pub(crate) returned: u64,
    /// Frames that went to another node whole.
    pub(crate) sent: u64,
    /// Frames that were taken out of a header and translated.
    pub(crate) received: u64,
    /// Errors about such frames that their senders were told.
    pub(crate) told: u64,
    /// Frames that went into a pod past the stack.
    pub(crate) entered: u64,
    /// What the core counted.
    pub(crate) counters: BTreeMap<Counter, u64>,
}

/// A property that does not hold, and how to meet it again.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) what: String,
    pub(crate) hook: (Side, Link),
    pub(crate) input: Vec<u8>,
    pub(crate) output: Vec<u8>,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        write!(f, "{} ({:?})\n in {}\nout {}", self.what, self.hook, hex(&self.input), hex(&self.output))
    }
}

/// Addresses and ports that something is at.
const PORTS: [u16; 8] = [80, 53, 30_080, 30_081, 30_082, 8080, 40_000, 61_003];

fn addresses(is_v6: bool) -> Vec<IpAddr> {
    let at = |last, net| if is_v6 { v6(last, net) } else { v4(last, net) };
    // Node, cluster IPs, load balancers, pods here, pods elsewhere, clients.
    vec![
        at(1, 0),
        at(2, 0),
        at(9, 1),
        at(10, 1),
        at(9, 2),
        at(5, 3),
        at(6, 3),
        at(7, 3),
        at(5, 4),
        at(6, 4),
        at(7, 5),
        at(8, 5),
    ]
}

/// A node with services of every kind, over pods here and elsewhere.
fn node(dice: &mut Dice) -> Kernel {
    let mut kernel = Kernel { now_s: 1_000, ..Kernel::default() };
    for is_v6 in [false, true] {
        let all = addresses(is_v6);
        kernel.node.extend([address(all[0]), address(all[1])]);
        for proto in [TCP, UDP] {
            services(&mut kernel, &all, proto, dice);
        }
    }
    if dice.one_in(4) {
        kernel.flags = config_flag::MASQUERADE_ALL;
    }
    if dice.one_in(2) {
        kernel.flags |= config_flag::HOST_ROUTING;
        kernel.door = door(dice);
    }
    if dice.one_in(3) {
        kernel.refuses = 20;
    }
    kernel.dice.replace(Some(Dice(dice.next())));
    kernel
}

fn door(dice: &mut Dice) -> Door {
    Door { device: POD_DEVICE, mtu: dice.pick(&[600, 1400, 1500]), flags: dice.pick(&[0, door_flag::ENTER]) }
}

fn services(kernel: &mut Kernel, all: &[IpAddr], proto: u8, dice: &mut Dice) {
    use frontend_flag::{
        DSR, EXTERNAL_IP, EXTERNAL_LOCAL, INTERNAL_LOCAL, LOAD_BALANCER, NODE_PORT, SOURCE_RANGES,
    };
    let any = if all[0].is_ipv6() { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
    let shapes: [(IpAddr, u16, u32); 9] = [
        (all[2], 80, 0),
        (all[3], 53, INTERNAL_LOCAL),
        (all[4], 80, LOAD_BALANCER | SOURCE_RANGES | dice.pick(&[0, DSR, DSR])),
        (all[4], 53, LOAD_BALANCER | EXTERNAL_LOCAL),
        (all[3], 8080, EXTERNAL_IP),
        (any, 30_080, NODE_PORT | dice.pick(&[0, DSR, DSR])),
        (any, 30_081, NODE_PORT | EXTERNAL_LOCAL),
        (any, 30_082, NODE_PORT | dice.pick(&[0, frontend_flag::MASQUERADE_ALL])),
        (all[0], 40_000, EXTERNAL_IP | dice.pick(&[0, DSR])),
    ];
    for (addr, port, flags) in shapes {
        let service = kernel.slots.len() as u32 + 100;
        let mut entry = Frontend { service, base: kernel.slots.len() as u32, flags, ..Frontend::zeroed() };
        let counts = [dice.below(3), dice.below(3), dice.below(2), dice.below(2)];
        for (part, count) in counts.into_iter().enumerate() {
            for _ in 0..count {
                let pod = if part % 2 == 0 { all[5 + dice.below(3)] } else { all[8 + dice.below(2)] };
                // Now and then an endpoint that is the node itself, as host network pods are.
                let pod = if dice.one_in(9) { all[0] } else { pod };
                let id = kernel.backends.len() as u32 + 1;
                kernel.backends.insert(
                    id,
                    Backend { addr: address(pod), id, port: dice.pick(&PORTS).to_be(), proto, flags: 0 },
                );
                kernel.slots.push(Slot { backend: id, service });
                let local = if part % 2 == 0 { member_flag::LOCAL } else { 0 };
                let ready = if part < 2 { member_flag::READY | member_flag::CLUSTER } else { 0 };
                kernel.members.insert((service, id), local | ready);
            }
        }
        [entry.local_ready, entry.remote_ready, entry.local_terminating, entry.remote_terminating] =
            counts.map(|count| count as u16);
        entry.affinity_timeout_s = dice.pick(&[0, 0, 60]);
        entry.maglev = dice.pick(&[0, 0, 1, 2]);
        let port = port.to_be();
        if let Some(addr) = address(addr).as_v4() {
            kernel.frontends4.insert(Frontend4Key { addr, port, proto, pad: 0 }, entry);
        } else {
            let addr = address(addr).words;
            kernel.frontends6.insert(Frontend6Key { addr, port, proto, pad: 0 }, entry);
        }
    }
}

fn end(all: &[IpAddr], dice: &mut Dice) -> End {
    (dice.pick(all), dice.pick(&PORTS))
}

/// Where a service of the kernel is reached.
fn service(kernel: &Kernel, all: &[IpAddr], dice: &mut Dice) -> End {
    let at = dice.below(kernel.frontends4.len());
    // The shapes are the same in both families.
    let port = kernel.frontends4.keys().nth(at).map_or(80, |key| u16::from_be(key.port));
    (dice.pick(&all[..5]), port)
}

fn spec(kernel: &Kernel, dice: &mut Dice) -> Spec {
    let all = addresses(dice.one_in(2));
    let proto = dice.pick(&[TCP, UDP]);
    Spec {
        src: end(&all, dice),
        dst: if dice.one_in(3) { end(&all, dice) } else { service(kernel, &all, dice) },
        proto,
        flags: dice.pick(&[0x02, 0x02, 0x10, 0x18, 0x11, 0x12, 0x04, 0x14, 0]),
        no_sum: dice.one_in(4) && !all[0].is_ipv6(),
        hops: dice.pick(&[64, 64, 64, 2, 1, 0, 255]),
        options: (0..dice.below(4)).map(|_| dice.below(4) as u8).collect(),
        fragment: if dice.one_in(6) { Some((dice.pick(&[0, 8, 1480]), dice.one_in(2))) } else { None },
        payload: dice.pick(&[0, 1, 2, 7, 8, 11, 32, 60, 100, 1400, 1480]),
    }
}

/// A well-formed frame of some kind.
fn sound(kernel: &Kernel, dice: &mut Dice) -> Vec<u8> {
    let spec = spec(kernel, dice);
    if dice.one_in(6) {
        return sent_on(&frame(&spec), dice);
    }
    if !dice.one_in(5) {
        return frame(&spec);
    }
    let v6 = spec.src.0.is_ipv6();
    let from = dice.pick(&addresses(v6));
    let kind = if v6 {
        dice.pick(&[(1, 4), (2, 0), (3, 0), (128, 0)])
    } else {
        dice.pick(&[(3, 3), (3, 4), (11, 0), (8, 0)])
    };
    let about = Spec { hops: 60, ..spec };
    error(from, &about, dice.pick(&[20, 28, 48, 68, 2000]), kind)
}

/// The frame as another node sends it on to a pod of this one, mostly.
fn sent_on(inner: &[u8], dice: &mut Dice) -> Vec<u8> {
    let Some(view) = oracle::frame(inner) else { return inner.to_vec() };
    let all = addresses(view.v6);
    let asked = ip_of(view.dst(inner)).filter(|_| !dice.one_in(4));
    let pod = if dice.one_in(8) { dice.pick(&all) } else { all[5 + dice.below(3)] };
    tunnel::within(inner, asked.unwrap_or_else(|| dice.pick(&all)), pod)
}

/// An error of a router about a frame that was sent on.
fn about_sent(output: &[u8], dice: &mut Dice) -> Option<Vec<u8>> {
    let view = oracle::frame(output)?;
    let kind = if view.v6 { dice.pick(&[(2, 0), (1, 0)]) } else { dice.pick(&[(3, 4), (3, 1)]) };
    let router = addresses(view.v6)[10];
    let quoted = &output[14..output.len().min(14 + dice.pick(&[60, 100, 2000]))];
    Some(tunnel::error(router, ip_of(view.src(output))?, quoted, kind))
}

/// Whether the frame is an error about a frame within another header.
fn is_told(input: &[u8]) -> bool {
    let quoted = oracle::frame(input).and_then(|view| view.quoted(input));
    quoted.is_some_and(|quoted| matches!(quoted.proto, 4 | 41))
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

/// The error that the way would send about what was just translated.
fn about(output: &[u8], dice: &mut Dice) -> Option<Vec<u8>> {
    let view = oracle::frame(output)?;
    let ports = view.ports(output)?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    let quoted = Spec {
        src: (ip_of(view.src(output))?, port(0)),
        dst: (ip_of(view.dst(output))?, port(2)),
        proto: view.proto,
        flags: 0x10,
        no_sum: false,
        hops: 3,
        options: Vec::new(),
        fragment: None,
        payload: 40,
    };
    let kind = if view.v6 { (2, 0) } else { (3, 4) };
    let from = dice.pick(&[quoted.dst.0, addresses(view.v6)[10]]);
    Some(error(from, &quoted, dice.pick(&[28, 40, 60, 2000]), kind))
}

thread_local! {
    static LAST: RefCell<(Side, Link, Vec<u8>)> = const { RefCell::new((Side::Ingress, Link::Uplink, Vec::new())) };
}

/// The frame that is in the core's hands, for who tells of a panic.
pub(crate) fn last() -> Finding {
    LAST.with_borrow(|(side, link, input)| Finding {
        what: "it panicked".to_owned(),
        hook: (*side, *link),
        input: input.clone(),
        output: Vec::new(),
    })
}

/// Runs while `more` says so, or to the first finding. Equal seeds give equal frames.
pub(crate) fn run(seed: u64, more: impl Fn(&Tally) -> bool) -> (Tally, Option<Finding>) {
    let mut tally = Tally::default();
    let mut dice = Dice(seed);
    while more(&tally) {
        let mut kernel = node(&mut dice);
        let found = live(&mut kernel, &mut dice, &mut tally, &more);
        for (counter, count) in kernel.counters.take() {
            *tally.counters.entry(counter).or_default() += count;
        }
        if found.is_some() {
            return (tally, found);
        }
    }
    (tally, None)
}

/// Sends frames through one node.
fn live(
    kernel: &mut Kernel,
    dice: &mut Dice,
    tally: &mut Tally,
    more: &impl Fn(&Tally) -> bool,
) -> Option<Finding> {
    let mut next = None;
    for n in 0..LIFE {
        if n % ROUND == 0 && !more(tally) {
            return None;
        }
        let mut input: Vec<u8> = next.take().unwrap_or_else(|| match dice.below(16) {
            0 => (0..dice.below(120)).map(|_| dice.next() as u8).collect(),
            _ => sound(kernel, dice),
        });
        if dice.one_in(2) {
            mutate(&mut input, dice);
        }
        match dice.below(64) {
            0 => kernel.now_s += dice.pick(&[1, 5, 61, 200, 9_000]),
            1 => {
                kernel.evict(dice);
                // A flow looks for its other entry once a second.
                kernel.now_s += 1;
            }
            2 if kernel.flags & config_flag::HOST_ROUTING != 0 => {
                kernel.door = if kernel.door.device == 0 { door(dice) } else { Door::zeroed() };
            }
            _ => {}
        }
        let side = dice.pick(&[Side::Ingress, Side::Ingress, Side::Ingress, Side::Egress]);
        let link = dice.pick(&[Link::Uplink, Link::Uplink, Link::Pod]);
        let segment_len = dice.pick(&[0, 0, 0, 1000]);
        let sent = tally.sent;
        match step(kernel, tally, &input, (side, link), segment_len) {
            // Another node's pod may as well be one of this node's.
            Ok(Some(output)) if tally.sent != sent => {
                next = match dice.below(2) {
                    0 => about_sent(&output, dice),
                    _ => Some(sent_on(&tunnel::without(&output), dice)),
                };
            }
            Ok(output) => next = output.and_then(|output| after(output, dice)),
            Err(finding) => return Some(finding),
        }
    }
    None
}

/// What may follow a translated packet: an error about it, an answer to it, or something else.
fn after(mut output: Vec<u8>, dice: &mut Dice) -> Option<Vec<u8>> {
    match dice.below(4) {
        0 => about(&output, dice),
        1 => {
            let view = oracle::frame(&output)?;
            turn_around(&mut output, &view);
            Some(output)
        }
        _ => None,
    }
}

/// One frame through one hook; gives what was translated.
fn step(
    kernel: &Kernel,
    tally: &mut Tally,
    input: &[u8],
    hook: (Side, Link),
    segment_len: u32,
) -> Result<Option<Vec<u8>>, Finding> {
    tally.frames += 1;
    let finding =
        |what: String, output: &[u8]| Finding { what, hook, input: input.to_vec(), output: output.to_vec() };
    let (verdict, packet) = through(kernel, input, hook, segment_len);
    let output = packet.bytes;
    if let Some(wrong) = packet.wrong.first() {
        return Err(finding(wrong.clone(), &output));
    }
    if packet.wrapped && !matches!(verdict, Verdict::Drop) {
        tunnel::sent(input, &output).map_err(|what| finding(what, &output))?;
        tally.sent += 1;
        return Ok(Some(output));
    }
    if packet.unwrapped && matches!(verdict, Verdict::Redirect) && is_told(input) {
        tunnel::told(input, &output).map_err(|what| finding(what, &output))?;
        tally.told += 1;
        return Ok(None);
    }
    let before = if packet.unwrapped { &tunnel::without(input)[..] } else { input };
    match verdict {
        Verdict::Drop => return Ok(None),
        Verdict::Reply => {
            oracle::answered(before, &output).map_err(|what| finding(what, &output))?;
            tally.answered += 1;
            return Ok(None);
        }
        Verdict::Pass | Verdict::Redirect | Verdict::Enter => {
            oracle::translated(before, &output).map_err(|what| finding(what, &output))?;
        }
    }
    if before == output {
        let lost = packet.unwrapped && !to_itself(kernel);
        return if lost {
            Err(finding("taken out and not translated".to_owned(), &output))
        } else {
            Ok(None)
        };
    }
    tally.translated += 1;
    tally.received += u64::from(packet.unwrapped);
    tally.entered += u64::from(verdict == Verdict::Enter);
    if hook.0 == Side::Ingress
        && comes_back(kernel, before, &output, hook.1, (verdict, packet.unwrapped))
            .map_err(|what| finding(what, &output))?
    {
        tally.returned += 1;
    }
    Ok(Some(output))
}

fn through(kernel: &Kernel, input: &[u8], hook: (Side, Link), segment_len: u32) -> (Verdict, Buffer) {
    let mut packet = Buffer { segment_len, ..Buffer::new(input.to_vec()) };
    LAST.replace((hook.0, hook.1, input.to_vec()));
    let verdict = balance::run(&mut packet, kernel, &mut Work::new(), hook.0, hook.1);
    (verdict, packet)
}

/// The same by the program that takes a pod's answers alone.
fn from_pod(kernel: &Kernel, input: &[u8]) -> (Verdict, Buffer) {
    let mut packet = Buffer::new(input.to_vec());
    LAST.replace((Side::Ingress, Link::Pod, input.to_vec()));
    let verdict = balance::run_answer(&mut packet, kernel, &mut Work::new());
    (verdict, packet)
}

/// Sends the answer to a client's packet that was translated: it must come out as an answer to what the client sent.
/// False when the packet can't be answered.
fn comes_back(
    kernel: &Kernel,
    input: &[u8],
    output: &[u8],
    link: Link,
    (went, unwrapped): (Verdict, bool),
) -> Result<bool, String> {
    let (Some(old), Some(new)) = (oracle::frame(input), oracle::frame(output)) else { return Ok(false) };
    if old.fragment
        || !matches!(old.proto, TCP | UDP)
        || is_reply(kernel, &old, input)
        || is_opening(&old, input)
    {
        return Ok(false);
    }
    let mut answer = output.to_vec();
    turn_around(&mut answer, &new);
    let hops = new.ip + if new.v6 { 7 } else { 8 };
    // Plenty of hops, with a header checksum that need not be right: that is judged elsewhere.
    answer[hops] = 64;
    if is_anew(kernel, &new, &answer) {
        return Ok(false);
    }
    let past = !matches!(went, Verdict::Pass);
    let masqueraded = |flow: &Flow| flow.flags & flow_flag::SNAT != 0;
    let reply = held(kernel, &new, &answer);
    let by_door = past && !reply.as_ref().is_some_and(masqueraded);
    if reply.is_some_and(|flow| flow.door != 0 && kernel.door.device != 0) && !past && !unwrapped {
        return Err("it went through the stack, and its answer would not".to_owned());
    }
    let hook = match (past, by_door) {
        (true, true) => (Side::Ingress, Link::Pod),
        (true, false) => (Side::Ingress, Link::Uplink),
        _ => (Side::Egress, link),
    };
    // Which of the two programs that know answers is at the pod's device makes no difference.
    let (verdict, packet) = if by_door && kernel.now_s.is_multiple_of(2) {
        from_pod(kernel, &answer)
    } else {
        through(kernel, &answer, hook, 0)
    };
    let mut wanted = input.to_vec();
    turn_around(&mut wanted, &old);
    let Some(back) = oracle::frame(&packet.bytes) else {
        return Err("the answer is no packet any more".to_owned());
    };
    match verdict {
        Verdict::Pass if by_door => return Err("it went past the stack, and its answer would not".to_owned()),
        Verdict::Pass | Verdict::Redirect => {}
        // No route, or no room in a table.
        Verdict::Drop if past || kernel.refuses != 0 => return Ok(false),
        Verdict::Reply if past => return Ok(false),
        other => return Err(format!("the answer met {other:?}")),
    }
    let tuple = |bytes: &[u8], view: &oracle::View| {
        (view.src(bytes).to_vec(), view.dst(bytes).to_vec(), view.ports(bytes).map(<[u8]>::to_vec))
    };
    let (is, should) = (tuple(&packet.bytes, &back), tuple(&wanted, &old));
    if is != should {
        return Err(format!("the answer comes from {is:?}, the client waits for {should:?}"));
    }
    Ok(true)
}

/// Turning a packet that opens a connection around gives a packet that opens one from the backend.
fn is_opening(view: &oracle::View, bytes: &[u8]) -> bool {
    view.proto == TCP && bytes.get(view.l4 + 13).is_some_and(|flags| flags & 0x04 != 0)
}

/// The entry of a packet's flow.
fn held(kernel: &Kernel, view: &oracle::View, bytes: &[u8]) -> Option<Flow> {
    let &[a, b, c, d] = view.ports(bytes)? else { return None };
    let key = FlowKey {
        src: address(ip_of(view.src(bytes))?),
        dst: address(ip_of(view.dst(bytes))?),
        sport: u16::from_ne_bytes([a, b]),
        dport: u16::from_ne_bytes([c, d]),
        proto: view.proto,
        pad: [0; 3],
    };
    kernel.flows.borrow().get(&key).copied()
}

/// Whether a flow's translation changes nothing, as of a node's own port that it is the endpoint of.
fn to_itself(kernel: &Kernel) -> bool {
    kernel.flows.borrow().iter().any(|(key, flow)| key.dst == flow.dst && key.dport == flow.dport)
}

/// Whether the packet belonged to the answering side of its flow.
fn is_reply(kernel: &Kernel, view: &oracle::View, bytes: &[u8]) -> bool {
    held(kernel, view, bytes).is_none_or(|flow| flow.flags & flow_flag::REPLY != 0)
}

/// Whether the answer begins a connection that is none of the service's: its flow has ended.
fn is_anew(kernel: &Kernel, view: &oracle::View, bytes: &[u8]) -> bool {
    const BOTH: u16 = flow_flag::FIN_CLIENT | flow_flag::FIN_BACKEND;
    let ended = |flags: u16| flags & flow_flag::RESET != 0 || flags & BOTH == BOTH;
    view.proto == TCP
        && bytes.get(view.l4 + 13).is_some_and(|flags| flags & 0x02 != 0)
        && held(kernel, view, bytes).is_some_and(|flow| ended(flow.flags))
}

/// Swaps source and destination; sums don't change by that.
fn turn_around(bytes: &mut [u8], view: &oracle::View) {
    let (at, len) = if view.v6 { (view.ip + 8, 16) } else { (view.ip + 12, 4) };
    for n in 0..len {
        bytes.swap(at + n, at + len + n);
    }
    if bytes.len() >= view.l4 + 4 {
        bytes.swap(view.l4, view.l4 + 2);
        bytes.swap(view.l4 + 1, view.l4 + 3);
    }
}
