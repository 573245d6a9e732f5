//! The table against a pretended kernel. Invariant under test: whatever the kernel held and whenever the agent died,
//! the changes lead to what is desired, and every single step in between shows whole sets of backends.

use super::pretend::{CAPACITY, Kernel, Step, steps};
use super::*;
use std::net::Ipv4Addr;

fn backend(n: u8) -> BackendAddr {
    BackendAddr { addr: Ipv4Addr::new(10, 244, 0, n).into(), port: 8080, proto: Proto::Tcp }
}

fn frontend(n: u8) -> FrontendKey {
    FrontendKey { addr: Ipv4Addr::new(10, 96, 0, n).into(), port: 80, proto: Proto::Tcp }
}

fn port(frontends: &[u8], ready: &[u8], terminating: &[u8]) -> DesiredPort {
    DesiredPort {
        frontends: frontends.iter().map(|n| (frontend(*n), FrontendPolicy::default())).collect(),
        backends: ready.iter().chain(terminating).map(|n| backend(*n)).collect(),
        counts: Counts {
            local_ready: ready.len(),
            local_terminating: terminating.len(),
            ..Counts::default()
        },
        ..DesiredPort::default()
    }
}

fn key(n: u8) -> ObjectKey {
    format!("default/s{n}").into()
}

/// Sets one service and runs the changes against the kernel.
fn set(
    table: &mut Table,
    kernel: &mut Kernel,
    n: u8,
    ports: &[DesiredPort],
) -> Result<Vec<Refusal>, Refusal> {
    let mut changes = Changes::default();
    let result = table.set(&key(n), ports, &mut changes);
    kernel.apply_all(&changes);
    table.settle();
    result
}

fn empty() -> (Table, Kernel) {
    (Table::adopt(CAPACITY, &Observed::default()), Kernel::default())
}

#[test]
fn an_unchanged_service_costs_nothing_also_after_a_restart() {
    let (mut table, mut kernel) = empty();
    let wanted = [port(&[1, 2], &[1, 2], &[3])];
    set(&mut table, &mut kernel, 1, &wanted).unwrap();
    let before = kernel.frontends.clone();
    for mut table in [table, Table::adopt(CAPACITY, &kernel.observe())] {
        let mut changes = Changes::default();
        table.set(&key(1), &wanted, &mut changes).unwrap();
        table.sweep(&mut changes);
        assert!(changes.is_empty(), "{changes:?}");
    }
    assert_eq!(before, kernel.frontends);
}

#[test]
fn one_endpoint_more_is_one_backend_one_run_and_a_flip_a_frontend() {
    let (mut table, mut kernel) = empty();
    set(&mut table, &mut kernel, 1, &[port(&[1, 2], &[1, 2], &[])]).unwrap();
    let id = kernel.frontends[&frontend(1)].service;
    let mut changes = Changes::default();
    table.set(&key(1), &[port(&[1, 2], &[1, 2, 3], &[])], &mut changes).unwrap();
    assert_eq!(changes.put_backends.len(), 1);
    assert_eq!(changes.put_slots.len(), 3);
    assert_eq!(changes.put_frontends.len(), 2);
    assert!(changes.delete_frontends.is_empty() && changes.delete_backends.is_empty());
    assert_eq!(changes.put_frontends[&frontend(1)].service, id, "ids stay");
}

#[test]
fn a_backend_shared_by_two_services_lives_until_the_last_one_goes() {
    let (mut table, mut kernel) = empty();
    set(&mut table, &mut kernel, 1, &[port(&[1], &[7], &[])]).unwrap();
    set(&mut table, &mut kernel, 2, &[port(&[2], &[7], &[])]).unwrap();
    assert_eq!(kernel.backends.len(), 1);
    set(&mut table, &mut kernel, 1, &[]).unwrap();
    assert_eq!(kernel.shown(&frontend(2)).unwrap().backends, [backend(7)]);
    set(&mut table, &mut kernel, 2, &[]).unwrap();
    assert!(kernel.backends.is_empty() && kernel.frontends.is_empty());
    assert_eq!(table.usage().slots, 0);
}

#[test]
fn a_taken_frontend_is_refused_and_the_rest_goes_in() {
    let (mut table, mut kernel) = empty();
    set(&mut table, &mut kernel, 1, &[port(&[1], &[1], &[])]).unwrap();
    let refusals = set(&mut table, &mut kernel, 2, &[port(&[1, 2], &[2], &[])]).unwrap();
    assert_eq!(refusals, [Refusal::Taken { frontend: frontend(1), owner: key(1) }]);
    assert_eq!(kernel.shown(&frontend(1)).unwrap().backends, [backend(1)]);
    assert_eq!(kernel.shown(&frontend(2)).unwrap().backends, [backend(2)]);
}

#[test]
fn full_tables_refuse_and_leave_what_was_there() {
    let (mut table, mut kernel) = empty();
    let many: Vec<u8> = (1..=30).collect();
    set(&mut table, &mut kernel, 1, &[port(&[1], &many, &[])]).unwrap();
    let slots = set(&mut table, &mut kernel, 2, &[port(&[2], &many[..11], &[])]).unwrap_err();
    assert_eq!(slots, Refusal::Full { what: "slots", capacity: 40 });
    let more: Vec<u8> = (101..=111).collect();
    let backends = set(&mut table, &mut kernel, 2, &[port(&[2], &more, &[])]).unwrap_err();
    assert_eq!(backends, Refusal::Full { what: "backends", capacity: 40 });
    let frontends: Vec<u8> = (2..=25).collect();
    let full = set(&mut table, &mut kernel, 2, &[port(&frontends, &[1], &[])]).unwrap_err();
    assert_eq!(full, Refusal::Full { what: "frontends", capacity: 24 });
    assert_eq!(kernel.frontends.len(), 1);
    set(&mut table, &mut kernel, 2, &[port(&[2], &many[..10], &[])]).unwrap();
}

#[test]
fn a_run_is_not_written_over_before_the_flip_is_in_the_kernel() {
    let (mut table, mut kernel) = empty();
    let many: Vec<u8> = (1..=20).collect();
    set(&mut table, &mut kernel, 1, &[port(&[1], &many, &[])]).unwrap();
    let mut changes = Changes::default();
    table.set(&key(1), &[port(&[1], &many[1..], &[])], &mut changes).unwrap();
    let refused = table.set(&key(2), &[port(&[2], &many[..3], &[])], &mut changes);
    assert_eq!(refused, Err(Refusal::Full { what: "slots", capacity: 40 }));
    kernel.apply_all(&changes);
    table.settle();
    set(&mut table, &mut kernel, 2, &[port(&[2], &many[..3], &[])]).unwrap();
}

#[test]
fn ids_survive_a_restart_also_when_the_agent_died_between_two_flips() {
    let (mut table, mut kernel) = empty();
    let old = [port(&[1, 2], &[1, 2], &[])];
    let new = [port(&[1, 2], &[1, 3], &[])];
    set(&mut table, &mut kernel, 1, &old).unwrap();
    let id = kernel.frontends[&frontend(1)].service;
    let mut changes = Changes::default();
    table.set(&key(1), &new, &mut changes).unwrap();
    for step in steps(&changes) {
        let second = matches!(&step, Step::PutFrontend(key, _) if *key == frontend(2));
        if second {
            break;
        }
        kernel.apply(step);
    }
    let mut table = Table::adopt(CAPACITY, &kernel.observe());
    set(&mut table, &mut kernel, 1, &new).unwrap();
    for n in [1, 2] {
        assert_eq!(kernel.shown(&frontend(n)).unwrap().backends, [backend(1), backend(3)]);
        assert_eq!(kernel.frontends[&frontend(n)].service, id);
    }
    let mut changes = Changes::default();
    table.sweep(&mut changes);
    kernel.apply_all(&changes);
    table.settle();
    assert_eq!(table.usage().slots, 2);
    assert_eq!(kernel.backends.len(), 2);
}
