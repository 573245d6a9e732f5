//! A flood of connection attempts from ever new addresses, many times what the flow table holds. Invariant under test:
//! a connection keeps its translation, used or quiet, whatever is forgotten for the flood.

use crate::golden::{ACK, Frame, Hook, L4, PLACES, PORT_LOCAL, PORT_POD, PORT_REMOTE, SYN};
use crate::packets::{Programs, on_roads};

/// Attempts unless `SHEAVE_FLOOD` says otherwise: three times the table.
const ATTEMPTS: u32 = 100_000;
/// Attempts between two packets of the connection that is in use.
const PAUSE: u32 = 500;
const CLIENT_PORT: u16 = 5_000;

/// A connection from outside to another node's pod, masqueraded with a port that nobody would find again who has forgotten it.
pub(crate) struct Connection {
    port: u16,
    asked: (u32, Vec<u8>),
    answered: (u32, Vec<u8>),
}

pub(crate) fn send(programs: &mut Programs, from: (&str, u16), to: (&str, u16), flags: u8) -> (u32, Vec<u8>) {
    let frame = Frame::new(from, to, L4::Tcp(flags)).bytes();
    programs.run(Hook::Ingress, &frame).expect("run")
}

impl Connection {
    pub(crate) fn begin(programs: &mut Programs) -> Self {
        let (place, service) = (&PLACES[0], (PLACES[0].node, PORT_REMOTE));
        // The first one takes the client's own port towards the backend, so that the second one is given another.
        send(programs, (place.stranger, CLIENT_PORT), service, SYN);
        let (_, opened) = send(programs, (place.client, CLIENT_PORT), service, SYN);
        let port = u16::from_be_bytes([opened[34], opened[35]]);
        assert_ne!(port, CLIENT_PORT, "the port is taken");
        send(programs, (place.remote, PORT_POD), (place.node, port), SYN | ACK);
        let asked = send(programs, (place.client, CLIENT_PORT), service, ACK);
        assert_eq!(asked.1[34..36], port.to_be_bytes());
        let answered = send(programs, (place.remote, PORT_POD), (place.node, port), ACK);
        Self { port, asked, answered }
    }

    pub(crate) fn goes_on(&self, programs: &mut Programs, when: &str) {
        let place = &PLACES[0];
        let asked = send(programs, (place.client, CLIENT_PORT), (place.node, PORT_REMOTE), ACK);
        assert!(asked == self.asked, "{when}");
        let answered = send(programs, (place.remote, PORT_POD), (place.node, self.port), ACK);
        assert!(answered == self.answered, "the answer {when}");
    }
}

fn attempts() -> u32 {
    std::env::var("SHEAVE_FLOOD").map_or(ATTEMPTS, |text| text.parse().expect("a number"))
}

/// As many attempts to connect, each from another source; `pause` is called now and then.
fn flood(programs: &mut Programs, attempts: u32, mut pause: impl FnMut(&mut Programs, u32)) {
    for attempt in 0..attempts {
        let [_, a, b, c] = attempt.to_be_bytes();
        let source = format!("11.{a}.{b}.{c}");
        send(programs, (&source, CLIENT_PORT), (PLACES[0].node, PORT_LOCAL), SYN);
        if attempt % PAUSE == 0 {
            pause(programs, attempt);
        }
    }
    assert!(programs.world.counted("forwarded") >= u64::from(attempts), "the flood went through the table");
}

#[test]
fn connections_in_use_outlive_a_flood_of_attempts() {
    on_roads(|programs| {
        let connection = Connection::begin(programs);
        flood(programs, attempts(), |programs, attempt| {
            connection.goes_on(programs, &format!("after {attempt} attempts"));
        });
    });
}

#[test]
fn connections_that_are_quiet_outlive_a_flood_of_attempts() {
    on_roads(|programs| {
        let connection = Connection::begin(programs);
        let before = programs.world.counted("flow_evicted");
        flood(programs, attempts(), |_, _| ());
        let evicted = programs.world.counted("flow_evicted") - before;
        assert!(evicted > u64::from(attempts()), "attempts drove out attempts, two entries each: {evicted}");
        connection.goes_on(programs, "after the flood");
    });
}
