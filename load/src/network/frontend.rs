//! One service in front of one address, in the eBPF data plane. Invariant: what is in the kernel is there when the
//! process says so, and goes with its pins.

use crate::LoadError;
use crate::error::{Doing as _, chain};
use crate::wire;
use serde::{Deserialize, Serialize};
use sheave_agent::dataplane::{DataplaneConfig, Driver, Mode};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where it is reached.
pub(crate) const AT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 7, 7)), 80);
const KEY: &str = "load/road";

/// What to put in.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Frontend {
    /// Where the service leads.
    pub(crate) to: SocketAddr,
    /// Whose sockets it is for.
    pub(crate) cgroup: PathBuf,
    /// Where pins go.
    pub(crate) pin_dir: PathBuf,
    /// The node's way out.
    pub(crate) uplink: String,
}

/// Puts it in, says `null`, or why not, and waits for the end of standard input.
pub(crate) fn run(frontend: &Frontend) -> Result<(), LoadError> {
    let (driver, told) = match fill(frontend) {
        Ok(driver) => (Some(driver), None),
        Err(error) => (None, Some(chain(&*error))),
    };
    wire::write(&mut std::io::stdout(), &told).doing("answer")?;
    std::io::stdin().read_to_end(&mut Vec::new()).doing("wait for the end of the run")?;
    drop(driver);
    Ok(())
}

fn fill(frontend: &Frontend) -> Result<Driver, Box<dyn std::error::Error>> {
    let config = DataplaneConfig {
        mode: Some(Mode::Ebpf),
        pin_dir: frontend.pin_dir.clone(),
        cgroup_path: Some(frontend.cgroup.clone()),
        uplinks: vec![frontend.uplink.clone()],
        pod_links: vec!["shv".to_owned()],
        node_name: "load".to_owned(),
        ..DataplaneConfig::default()
    };
    let port = ServicePort { name: "tcp".into(), port: AT.port(), node_port: 0, proto: Proto::Tcp };
    let service = Service {
        key: KEY.into(),
        cluster_ips: [AT.ip()].into(),
        ports: [port].into(),
        ..Service::default()
    };
    let endpoint = Endpoint {
        addr: frontend.to.ip(),
        on_this_node: false,
        readiness: Readiness::Ready,
        hint: Hint::None,
    };
    let slice = Slice {
        key: format!("{KEY}-x").into(),
        service: KEY.into(),
        ports: [SlicePort { name: "tcp".into(), port: frontend.to.port(), proto: Proto::Tcp }].into(),
        endpoints: [endpoint].into(),
        weight: 1,
        problems: Box::default(),
    };
    let synced = [
        Event::ServicesSynced(BTreeSet::from([service.key.clone()])),
        Event::SlicesSynced(BTreeSet::from([slice.key.clone()])),
    ];
    let mut driver = Driver::open(&config)?;
    driver.handle([Event::Service(service), Event::Slice(slice)]);
    driver.handle(synced);
    driver.step()?;
    if let Some((_, reasons)) = driver.refused().first_key_value() {
        let why: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        return Err(why.join("; ").into());
    }
    Ok(driver)
}
