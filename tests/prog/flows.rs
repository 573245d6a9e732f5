//! The connection table under faults. Invariant under test: nobody's death holds up connections for long, and a set whose lock
//! is held harms those that want to be stored in it only.

use aya::maps::{Array, Map, MapData};
use sheave_agent::dataplane::ebpf::{monotonic_ns, versioned};
use sheave_ebpf_abi::{FLOW_LOCK_STALE_S, FlowHead, FlowSet, Plain as _, map};
use sheave_harness::require_root;

use crate::flood::{Connection, send};
use crate::golden::{PLACES, PORT_LOCAL, SYN};
use crate::packets::{Programs, on_roads, roads};

type Sets = Array<MapData, [u8; FlowSet::SIZE]>;

fn sets(programs: &Programs) -> Sets {
    let path = versioned(&programs.world.config.pin_dir).join(map::FLOWS);
    Map::from_map_data(MapData::from_pin(path).expect("a pinned map"))
        .expect("a map")
        .try_into()
        .expect("an array")
}

/// Has the locks of all sets say that they were taken in a second of the monotonic clock.
fn lock(sets: &mut Sets, second: u64) {
    for index in 1..sets.len() {
        let mut set = sets.get(&index, 0).expect("a set");
        set[..8].copy_from_slice(&(second + 1).to_ne_bytes());
        sets.set(index, set, 0).expect("write");
    }
}

#[test]
fn a_lock_that_somebody_died_with_is_taken_over() {
    on_roads(|programs| {
        let connection = Connection::begin(programs);
        let mut sets = sets(programs);
        let attempt = |programs: &mut Programs, port| {
            let service = (PLACES[0].node, PORT_LOCAL);
            let (_, output) = send(programs, (PLACES[0].client, port), service, SYN);
            output[30..34] != address_bytes(PLACES[0].node)
        };
        let now_s = monotonic_ns() / 1_000_000_000;
        assert!(now_s > FLOW_LOCK_STALE_S + 1, "the machine runs long enough for a lock to be stale");
        // As if it were taken in ten minutes, so that it is fresh however slow this is.
        lock(&mut sets, now_s + 600);
        let full = programs.world.counted("flow_full");
        assert!(!attempt(programs, 7_000), "nobody could store it");
        assert!(programs.world.counted("flow_full") > full, "and it is said");
        connection.goes_on(programs, "while locks are held");
        lock(&mut sets, now_s - FLOW_LOCK_STALE_S - 1);
        assert!(attempt(programs, 7_001), "a stale lock holds nobody up");
        assert!(attempt(programs, 7_001), "and is given back");
    });
}

fn address_bytes(text: &str) -> [u8; 4] {
    text.parse::<std::net::Ipv4Addr>().expect("an address").octets()
}

#[test]
fn every_table_has_a_secret_of_its_own() {
    if !require_root() {
        return;
    }
    let roads = roads();
    let _there = roads.enter();
    let heads = [(); 2].map(|()| {
        let programs = Programs::load();
        let table = sets(&programs);
        let head = FlowHead::from_bytes(&table.get(&0, 0).expect("the head")).expect("a whole head");
        assert_eq!(head.sets, table.len() - 1, "all sets are used");
        head
    });
    assert_ne!(heads[0].secret, heads[1].secret);
    assert!(heads.iter().all(|head| head.secret.iter().any(|word| *word != 0)));
}
