//! Another build of the programs takes over: links stay, programs change, nobody notices.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{Array, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use sheave_agent::dataplane::ebpf::versioned;
use sheave_agent::service::Proto;
use sheave_ebpf_abi::{Config, Plain as _};
use sheave_harness::isolated;

use crate::service_world::{World, ask, at, on_loopback, service, slice, tcp_server};

const POD: &str = "10.244.0.1";

/// The pinned links: name → (link id, program id).
fn links(dir: &Path) -> BTreeMap<String, (u32, u32)> {
    let entries = fs::read_dir(dir.join("links")).expect("the links").map(|entry| entry.expect("an entry"));
    // Where tcx is missing, a pin marks a filter and is no link.
    let links = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with("clsact"));
    let found = links.map(|entry| {
        let link = FdLink::from(PinnedLink::from_pin(entry.path()).expect("a pinned link"));
        let info = link.info().expect("what the kernel says");
        (entry.file_name().to_string_lossy().into_owned(), (info.id(), info.program_id()))
    });
    found.collect()
}

/// Makes the maps say that the attached programs are of another build.
fn age(dir: &Path) {
    let map =
        Map::from_map_data(MapData::from_pin(dir.join("shv_config")).expect("pinned")).expect("an array");
    const SIZE: usize = size_of::<Config>();
    let mut array: Array<_, [u8; SIZE]> = map.try_into().expect("of the size of the config");
    let config = Config::from_bytes(&array.get(&0, 0).expect("the element")).expect("of the config");
    let other = Config { object_digest: config.object_digest ^ 1, ..config };
    array.set(0, <[u8; SIZE]>::try_from(other.as_bytes()).expect("its size"), 0).expect("write it back");
}

/// Ends the client, also when the test panics: the scope would wait for it for ever.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn service_programs_are_upgraded_in_place() {
    isolated(module_path!(), "service_programs_are_upgraded_in_place", |cgroup| {
        on_loopback(&[POD]);
        tcp_server(at(POD, 8080));
        let world = World::new(cgroup, &["lo"]);
        let events = || {
            vec![service("web", &["10.96.0.10"], Proto::Tcp, 0), slice("web", Proto::Tcp, &[at(POD, 8080)])]
        };
        drop(world.driver(events()));
        let dir = versioned(&world.config.pin_dir);
        let first = links(&dir);
        assert!(first.len() >= 8, "{first:?}");

        // The same build adopts: not even a program is loaded.
        drop(world.driver(events()));
        assert_eq!(links(&dir), first);

        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ends = Ends(&done);
            let client = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(ask(at("10.96.0.10", 80)).expect("not one connection fails").0, POD);
                }
            });
            for _ in 0..5 {
                let before = links(&dir);
                age(&dir);
                drop(world.driver(events()));
                for (name, (link, program)) in links(&dir) {
                    let (old_link, old_program) = before[&name];
                    assert_eq!(link, old_link, "{name} keeps its link");
                    assert_ne!(program, old_program, "{name} has the new program");
                }
            }
            done.store(true, Ordering::Relaxed);
            client.join().expect("the client");
        });
    });
}
