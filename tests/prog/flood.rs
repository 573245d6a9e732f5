//! A flood of connection attempts from ever new addresses, many times what the flow table holds. Invariant under test:
//! a connection that is in use keeps its translation, whatever is forgotten for the flood.

use sheave_harness::require_root;

use crate::golden::{ACK, Frame, Hook, L4, PLACES, PORT_LOCAL, PORT_POD, PORT_REMOTE, SYN};
use crate::packets::{Programs, roads};

/// Attempts unless `SHEAVE_FLOOD` says otherwise: three times the table.
const ATTEMPTS: u32 = 100_000;
/// Attempts between two packets of the connection that is in use.
const PAUSE: u32 = 500;
const CLIENT_PORT: u16 = 5_000;

#[test]
fn connections_in_use_outlive_a_flood_of_attempts() {
    if !require_root() {
        return;
    }
    let attempts = std::env::var("SHEAVE_FLOOD").map_or(ATTEMPTS, |text| text.parse().expect("a number"));
    let roads = roads();
    let _there = roads.enter();
    let mut programs = Programs::load();
    let place = &PLACES[0];
    let send = |programs: &mut Programs, from: (&str, u16), to: (&str, u16), flags| {
        let frame = Frame::new(from, to, L4::Tcp(flags)).bytes();
        programs.run(Hook::Ingress, &frame).expect("run")
    };
    // The first one takes the client's own port towards the backend, so that the second one is given another, which
    // nobody would find again who has forgotten it.
    let service = (place.node, PORT_REMOTE);
    send(&mut programs, (place.stranger, CLIENT_PORT), service, SYN);
    let (_, opened) = send(&mut programs, (place.client, CLIENT_PORT), service, SYN);
    let port = u16::from_be_bytes([opened[34], opened[35]]);
    assert_ne!(port, CLIENT_PORT, "the port is taken");
    send(&mut programs, (place.remote, PORT_POD), (place.node, port), SYN | ACK);
    let (verdict, expected) = send(&mut programs, (place.client, CLIENT_PORT), service, ACK);
    assert_eq!(expected[34..36], port.to_be_bytes());
    let answered = send(&mut programs, (place.remote, PORT_POD), (place.node, port), ACK);
    for attempt in 0..attempts {
        let [_, a, b, c] = attempt.to_be_bytes();
        let source = format!("11.{a}.{b}.{c}");
        send(&mut programs, (&source, CLIENT_PORT), (place.node, PORT_LOCAL), SYN);
        if attempt % PAUSE == 0 {
            let asked = send(&mut programs, (place.client, CLIENT_PORT), service, ACK);
            assert!(asked == (verdict, expected.clone()), "after {attempt} attempts");
            let answer = send(&mut programs, (place.remote, PORT_POD), (place.node, port), ACK);
            assert!(answer == answered, "the answer after {attempt} attempts");
        }
    }
    assert!(programs.world.counted("forwarded") >= u64::from(attempts), "the flood went through the table");
}
