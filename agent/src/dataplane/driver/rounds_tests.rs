//! Rounds over a pretended kernel. Invariant under test: however many rounds a step takes, and whichever of them fails halfway,
//! the kernel ends as the events want it, and nothing of a later round is in it before an earlier one is.

use super::*;
use crate::dataplane::{Attached, Dataplane, Mode};
use crate::service::pretend::{CAPACITY, Kernel, steps};
use crate::service::{
    Abilities, Capacity, Endpoint, FrontendKey, Hint, Proto, Readiness, Service, ServicePort, Slice,
    SlicePort,
};
use std::net::Ipv4Addr;
use std::sync::Mutex;

const SERVICES: u8 = 9;
/// What they take with two in a round.
const ROUNDS: usize = 5;

#[derive(Default)]
struct Seen {
    kernel: Kernel,
    rounds: usize,
    /// The round, counted from 0, that is made by half and then fails.
    fails: Option<usize>,
}

struct Pretended(Arc<Mutex<Seen>>);

impl Dataplane for Pretended {
    fn mode(&self) -> Mode {
        Mode::Ebpf
    }

    fn capacity(&self) -> Capacity {
        CAPACITY
    }

    fn abilities(&self) -> Abilities {
        Abilities { services_per_round: 2, ..Abilities::ALL }
    }

    fn observe(&mut self) -> Result<Observed, DataplaneError> {
        Ok(self.0.lock().unwrap().kernel.observe())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), DataplaneError> {
        let mut seen = self.0.lock().unwrap();
        let fails = seen.fails == Some(seen.rounds);
        seen.rounds += 1;
        let steps = steps(changes);
        let made = if fails { steps.len() / 2 } else { steps.len() };
        steps.into_iter().take(made).for_each(|step| seen.kernel.apply(step));
        let source = || std::io::Error::other("pretended");
        if fails { Err(DataplaneError::Host { op: "write", source: source() }) } else { Ok(()) }
    }

    fn set_node_addresses(&mut self, _: &BTreeSet<IpAddr>) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn attach(&mut self) -> Result<Attached, DataplaneError> {
        Ok(Attached::Yes)
    }
}

/// A service of two endpoints, whose addresses the number and the generation tell.
fn service(number: u8, generation: u8) -> [Event; 2] {
    let key: ObjectKey = format!("default/{number}").into();
    let endpoint = |last| Endpoint {
        addr: Ipv4Addr::new(10, generation, number, last).into(),
        on_this_node: false,
        readiness: Readiness::Ready,
        hint: Hint::None,
    };
    let service = Service {
        key: key.clone(),
        cluster_ips: [frontend(number).addr].into(),
        ports: [ServicePort { name: "".into(), port: 80, node_port: 0, proto: Proto::Tcp }].into(),
        ..Service::default()
    };
    let slice = Slice {
        key: format!("default/{number}-slice").into(),
        service: key,
        ports: [SlicePort { name: "".into(), port: 80, proto: Proto::Tcp }].into(),
        endpoints: [endpoint(1), endpoint(2)].into(),
        weight: 1,
        problems: Box::default(),
    };
    [Event::Service(service), Event::Slice(slice)]
}

fn frontend(number: u8) -> FrontendKey {
    FrontendKey { addr: Ipv4Addr::new(10, 96, 0, number).into(), port: 80, proto: Proto::Tcp }
}

fn driver(fails: Option<usize>) -> (Driver, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Seen { fails, ..Seen::default() }));
    let mut driver = Driver::over(Box::new(Pretended(seen.clone())), StatsHandle::default()).unwrap();
    driver.handle([Event::ServicesSynced(BTreeSet::new()), Event::SlicesSynced(BTreeSet::new())]);
    (driver, seen)
}

fn tell(driver: &mut Driver, generation: u8) {
    (0..SERVICES).for_each(|number| driver.handle(service(number, generation)));
}

/// Every service shows its two endpoints of this generation, and nothing else is left in the kernel.
fn check(seen: &Mutex<Seen>, generation: u8) {
    let seen = seen.lock().unwrap();
    assert_eq!(seen.kernel.frontends.len(), usize::from(SERVICES));
    assert_eq!(seen.kernel.backends.len(), 2 * usize::from(SERVICES));
    for number in 0..SERVICES {
        let shown = seen.kernel.shown(&frontend(number)).expect("whole");
        let addresses: Vec<_> = shown.backends.iter().map(|backend| backend.addr).collect();
        assert_eq!(addresses, [1, 2].map(|last| IpAddr::from([10, generation, number, last])));
    }
}

#[test]
fn rounds_arrive_one_after_the_other() {
    let (mut driver, seen) = driver(None);
    // The kernel has room for two generations and no third: what a round frees is there for the next one.
    for generation in 0..8 {
        tell(&mut driver, generation);
        driver.step().unwrap();
        check(&seen, generation);
    }
    let rounds = seen.lock().unwrap().rounds;
    assert!(rounds >= 8 * ROUNDS, "{rounds}");
}

#[test]
fn a_round_that_fails_halfway_is_made_good_by_the_next_step() {
    for failing in 0..2 * ROUNDS {
        let (mut driver, seen) = driver(Some(failing));
        let mut failed = 0;
        for generation in 0..2 {
            tell(&mut driver, generation);
            failed += usize::from(driver.step().is_err());
        }
        assert_eq!(failed, 1, "round {failing}");
        driver.step().unwrap();
        check(&seen, 1);
    }
}
