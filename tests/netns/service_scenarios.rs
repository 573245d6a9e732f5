//! The table of scenarios, run on a mode. Invariant: every check is asked on every mode; what a mode does otherwise is
//! in the table and asserted as well.

use std::collections::BTreeSet;
use std::path::Path;

use sheave_agent::dataplane::{Driver, Mode};
use sheave_agent::service::{Event, Proto};
use sheave_harness::isolated;

use crate::service_bed::{Answer, Bed, NODE, NODE_LAN, Pod, Who};
use crate::service_table::{Check, Expect, Seen, Spec, table};
use crate::service_world::{chain, synced};

/// Questions before somebody who never answered counts as left out. Four endpoints miss one with a chance of 1e-8.
const TRIES: usize = 80;
/// Questions that show that an answer always comes from the same endpoint, or never.
const REPEATS: usize = 12;
/// Silence takes time.
const SILENT_REPEATS: usize = 2;

pub(crate) fn run(cgroup: &Path, mode: Mode) {
    let bed = Bed::new(cgroup, mode);
    let mut driver =
        Driver::open(&bed.config).unwrap_or_else(|e| panic!("open {}: {}", mode.name(), chain(&e)));
    driver.handle(synced(Vec::new()));
    driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
    let only = std::env::var("SHEAVE_SCENARIO").ok();
    let mut failures = Vec::new();
    for (number, scenario) in (1_u8..).zip(table()) {
        if only.as_ref().is_some_and(|part| !scenario.name.contains(part.as_str())) {
            continue;
        }
        let mut events: Vec<Event> = Vec::new();
        for (at, step) in scenario.steps.iter().enumerate() {
            events =
                [Proto::Tcp, Proto::Udp].iter().flat_map(|proto| step.spec.events(number, *proto)).collect();
            driver.handle(events.clone());
            if let Err(error) = driver.step() {
                failures.push(format!("{}, step {at}: {}", scenario.name, chain(&error)));
                continue;
            }
            for check in &step.checks {
                failures.extend(
                    broken(&bed, mode, &step.spec, number, check)
                        .into_iter()
                        .map(|text| format!("{}, step {at}: {text}", scenario.name)),
                );
            }
        }
        driver.handle(events.iter().filter_map(gone));
        driver.step().unwrap_or_else(|e| panic!("removing {}: {}", scenario.name, chain(&e)));
    }
    assert!(driver.refused().is_empty(), "{:?}", driver.refused());
    assert!(failures.is_empty(), "{} on {}:\n{}", failures.len(), mode.name(), failures.join("\n"));
}

fn gone(event: &Event) -> Option<Event> {
    match event {
        Event::Service(service) => Some(Event::ServiceGone(service.key.clone())),
        Event::Slice(slice) => Some(Event::SliceGone(slice.key.clone())),
        _ => None,
    }
}

/// What of a check does not hold, in words.
fn broken(bed: &Bed, mode: Mode, spec: &Spec, number: u8, check: &Check) -> Vec<String> {
    let expect =
        check.but.iter().find(|(at, ..)| *at == mode).map_or(&check.expect, |(_, instead, _)| instead);
    let mut failures = Vec::new();
    for proto in [Proto::Tcp, Proto::Udp] {
        for v6 in [false, true] {
            let target = spec.target(check.to, number, v6);
            let ask = |patient| bed.ask(check.who, target, proto, patient);
            if let Err(text) = holds(expect, check, ask) {
                let what = format!("{:?} asks {target} ({:?}) by {}", check.who, check.to, proto.name());
                failures.push(format!("{what}: {text}, expected {expect:?} seen as {:?}", check.seen));
            }
        }
    }
    failures
}

fn holds(expect: &Expect, check: &Check, ask: impl Fn(bool) -> Answer) -> Result<(), String> {
    match expect {
        Expect::Spread(pods) => {
            let (wanted, mut found) = (pods.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::new());
            for turn in 0..TRIES {
                found.insert(answered(&ask(true), &wanted, check)?);
                if turn >= REPEATS && found == wanted {
                    return Ok(());
                }
            }
            Err(format!("only {found:?} answered"))
        }
        Expect::Sticky(pods) => {
            let wanted = pods.iter().copied().collect();
            let first = answered(&ask(true), &wanted, check)?;
            for _ in 0..REPEATS {
                let next = answered(&ask(true), &wanted, check)?;
                if next != first {
                    return Err(format!("{first:?} answered, then {next:?}"));
                }
            }
            Ok(())
        }
        Expect::Refused | Expect::Silent | Expect::Nothing => (0..SILENT_REPEATS).try_for_each(|_| {
            let answer = ask(false);
            let right = match expect {
                Expect::Refused => answer == Answer::Refused,
                Expect::Silent => answer == Answer::Silent,
                _ => !matches!(answer, Answer::From { .. }),
            };
            if right { Ok(()) } else { Err(format!("{answer:?}")) }
        }),
    }
}

/// Who answered, if it is somebody who may, and has seen whom it must.
fn answered(answer: &Answer, may: &BTreeSet<Pod>, check: &Check) -> Result<Pod, String> {
    let Answer::From { server, peer } = answer else { return Err(format!("{answer:?}")) };
    let pod = Pod::at(server).filter(|pod| may.contains(pod)).ok_or_else(|| format!("{server} answered"))?;
    let own = check.who.addresses().contains(&peer.as_str());
    let node = || NODE.contains(&peer.as_str()) || NODE_LAN.contains(&peer.as_str());
    let right = match check.seen {
        Seen::Any => true,
        Seen::Own => own,
        Seen::MasqueradedIfRemote => pod.is_local() || (check.who == Who::Outside && node()),
    };
    if right { Ok(pod) } else { Err(format!("{pod:?} saw {peer}")) }
}

#[test]
fn service_scenarios_ebpf() {
    isolated(module_path!(), "service_scenarios_ebpf", |cgroup| run(cgroup, Mode::Ebpf));
}

#[test]
fn service_scenarios_nft() {
    isolated(module_path!(), "service_scenarios_nft", |cgroup| run(cgroup, Mode::Nftables));
}
