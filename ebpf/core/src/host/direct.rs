//! Direct return at both of its nodes: what the golden frames can't tell, since it takes time or a change.

use super::packets::{Bytes, golden_kernel, run, send};
use super::{Kernel, address};
use crate::golden::{self, ACK, FIN_ACK, Frame, Hook, L4, Out, PLACES, Place, RST, SYN};
use crate::packet::Kind;
use sheave_ebpf_abi::*;
use std::vec::Vec;

const V4: &Place = &PLACES[0];

fn ask(kernel: &Kernel, l4: L4) -> Out {
    send(kernel, (V4.client, 7), (V4.node, golden::PORT_DIRECT), l4)
}

/// Where a frame is sent on to; `None` when it is not.
fn sent_to(out: &Out) -> Option<Address> {
    let Out::Redirect(bytes) = out else { return None };
    let mut headers = crate::packet::NOTHING;
    (crate::packet::parse(&Bytes(bytes.clone()), &mut headers) == Kind::Tunnel).then_some(headers.dst)
}

/// A frame within a header, as `kernel`'s node would send it on.
fn from_other(frame: Frame, dst: &str) -> Vec<u8> {
    golden::direct::wrapped(&frame.bytes(), V4.other_node, dst)
}

#[test]
fn only_the_clients_side_is_kept_and_time_goes_by_it() {
    let kernel = golden_kernel();
    let lives = |expected: u32| {
        let flows = kernel.flows.borrow();
        assert_eq!(flows.len(), 1, "one entry");
        let (key, flow) = flows.iter().next().unwrap();
        let gone = |s: u32| crate::flow::is_expired(flow, key.proto, kernel.now_s.get() + s);
        assert!(!gone(expected) && gone(expected + 1), "{expected}: {flow:?}");
    };
    let go = |l4| assert_eq!(sent_to(&ask(&kernel, l4)), Some(address(V4.remote)));
    go(L4::Tcp(SYN));
    lives(flow_timeout_s::TCP_OPENING);
    go(L4::Tcp(ACK));
    lives(flow_timeout_s::TCP_ESTABLISHED);
    go(L4::Tcp(FIN_ACK));
    // The backend may have much to say yet.
    lives(flow_timeout_s::TCP_ESTABLISHED);
    go(L4::Tcp(RST));
    lives(flow_timeout_s::TCP_CLOSING);
    kernel.flows.borrow_mut().clear();
    go(L4::Udp);
    lives(flow_timeout_s::DATAGRAM_REPLIED);
}

#[test]
fn a_connection_stays_with_its_backend_and_the_next_one_is_picked_anew() {
    let mut kernel = golden_kernel();
    let moved = "10.244.9.77";
    for l4 in [L4::Tcp(SYN), L4::Udp] {
        assert_eq!(sent_to(&ask(&kernel, l4)), Some(address(V4.remote)));
    }
    let ids: Vec<u32> =
        kernel.backends.values().filter(|b| b.addr == address(V4.remote)).map(|b| b.id).collect();
    for id in ids {
        let held = kernel.backends.remove(&id).unwrap();
        kernel.backends.insert(1000 + id, Backend { addr: address(moved), id: 1000 + id, ..held });
        kernel.slots.iter_mut().filter(|s| s.backend == id).for_each(|s| s.backend = 1000 + id);
    }
    for flags in [ACK, FIN_ACK] {
        assert_eq!(sent_to(&ask(&kernel, L4::Tcp(flags))), Some(address(V4.remote)));
    }
    for l4 in [L4::Udp, L4::Tcp(SYN), L4::Tcp(ACK)] {
        assert_eq!(sent_to(&ask(&kernel, l4)), Some(address(moved)));
    }
}

#[test]
fn a_service_that_is_direct_no_more_keeps_its_connections_alone() {
    let mut kernel = golden_kernel();
    for l4 in [L4::Tcp(SYN), L4::Udp] {
        assert!(sent_to(&ask(&kernel, l4)).is_some());
    }
    for frontend in kernel.frontends4.values_mut() {
        frontend.flags &= !frontend_flag::DSR;
    }
    assert!(sent_to(&ask(&kernel, L4::Tcp(ACK))).is_some());
    for l4 in [L4::Udp, L4::Tcp(SYN)] {
        let out = ask(&kernel, l4);
        assert!(matches!(out, Out::Redirect(_)) && sent_to(&out).is_none(), "{out:?}");
    }
}

#[test]
fn what_is_masqueraded_everywhere_is_never_direct() {
    let kernel = golden_kernel();
    kernel.config_flags.set(config_flag::MASQUERADE_ALL);
    let out = ask(&kernel, L4::Udp);
    assert!(matches!(out, Out::Redirect(_)) && sent_to(&out).is_none(), "{out:?}");
}

#[test]
fn the_other_nodes_pick_holds_at_the_backend() {
    let mut kernel = golden_kernel();
    // A load balancer's address, by which this node picks another node's endpoint.
    let flags = frontend_flag::LOAD_BALANCER | frontend_flag::DSR;
    kernel.add(900, &[("192.0.2.99", 80)], PROTO_UDP, flags, &[(V4.pod, true), (V4.remote, false)]);
    let of = |port| Frame::new((V4.client, port), ("192.0.2.99", 80), L4::Udp);
    let port = (1..100)
        .find(|port| sent_to(&run(&kernel, Hook::Ingress, &of(*port).bytes())) == Some(address(V4.remote)));
    let port = port.expect("a client that gets the endpoint elsewhere");
    // The network has sent the same client to another node, which picked ours. It is not sent back.
    let here = Frame::new((V4.client, port), (V4.pod, golden::PORT_POD), L4::Udp).bytes();
    let out = run(&kernel, Hook::Ingress, &from_other(of(port), V4.pod));
    assert_eq!(out, Out::Pass(here));
}

#[test]
fn as_many_endpoints_of_a_node_are_found_as_are_looked_through() {
    let mut kernel = golden_kernel();
    let addresses: Vec<_> =
        (0..300).map(|n| std::format!("10.244.{}.{}", 1 + n / 100, 1 + n % 100)).collect();
    let endpoints: Vec<_> = addresses.iter().map(|addr| (addr.as_str(), true)).collect();
    let flags = frontend_flag::LOAD_BALANCER | frontend_flag::DSR;
    kernel.add(900, &[("192.0.2.99", 80)], PROTO_UDP, flags, &endpoints);
    for (number, addr) in addresses.iter().enumerate() {
        let client = (V4.client, number as u16 + 1);
        let there = from_other(Frame::new(client, ("192.0.2.99", 80), L4::Udp), addr);
        let here = Frame::new(client, (addr, golden::PORT_POD), L4::Udp).bytes();
        let wanted = if number < 256 { here } else { there.clone() };
        assert_eq!(run(&kernel, Hook::Ingress, &there), Out::Pass(wanted), "{number}");
    }
}

#[test]
fn endpoints_that_terminate_are_named_too_and_flows_outlive_the_annotation() {
    let mut kernel = golden_kernel();
    let key = Frontend4Key { addr: 0, port: golden::PORT_DIRECT_LOCAL.to_be(), proto: PROTO_TCP, pad: 0 };
    let frontend = kernel.frontends4.get_mut(&key).unwrap();
    (frontend.local_ready, frontend.local_terminating) = (0, 1);
    let there = |port, flags| {
        let frame = Frame::new((V4.client, port), (V4.other_node, golden::PORT_DIRECT_LOCAL), L4::Tcp(flags));
        from_other(frame, V4.pod)
    };
    let here = |port, flags| {
        Out::Pass(Frame::new((V4.client, port), (V4.pod, golden::PORT_POD), L4::Tcp(flags)).bytes())
    };
    assert_eq!(run(&kernel, Hook::Ingress, &there(1, SYN)), here(1, SYN));
    kernel.frontends4.get_mut(&key).unwrap().flags &= !frontend_flag::DSR;
    assert_eq!(run(&kernel, Hook::Ingress, &there(1, ACK)), here(1, ACK));
    assert_eq!(run(&kernel, Hook::Ingress, &there(2, SYN)), Out::Pass(there(2, SYN)));
    // Nor does anybody else's header lead to it.
    let stranger = Frame::new((V4.client, 1), (V4.other_node, golden::PORT_DIRECT_LOCAL), L4::Tcp(ACK));
    let elsewhere = from_other(stranger, V4.other_pod);
    assert_eq!(run(&kernel, Hook::Ingress, &elsewhere), Out::Pass(elsewhere.clone()));
}

#[test]
fn the_class_goes_with_the_packet_and_congestion_marks_do_not() {
    let kernel = golden_kernel();
    for place in &PLACES {
        let mut input =
            Frame::new((place.client, 7), (place.node, golden::PORT_DIRECT), L4::Tcp(SYN)).bytes();
        // Class 46, able to mark congestion, and a flow label.
        let (class, at) = if place.v4() { ([0x45, 0xba], 14) } else { ([0x6b, 0xa1], 14) };
        input[at..at + 2].copy_from_slice(&class);
        let Out::Redirect(out) = run(&kernel, Hook::Ingress, &input) else { panic!("not sent on") };
        let wanted = if place.v4() { [0x45, 0xb8] } else { [0x6b, 0x81] };
        let inner = at + if place.v4() { 20 } else { 40 };
        assert_eq!((&out[at..at + 2], &out[inner..inner + 2]), (&wanted[..], &class[..]));
    }
}
