//! What is to be measured. Invariant: what passed [`Options::check`] can be built.

use crate::LoadError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Services at most: as many as there are addresses for them.
pub(crate) const SERVICES_MAX: u32 = 500_000;
/// Endpoints of one service at most.
const ENDPOINTS_MAX: u32 = 1_000;
/// Endpoints of all services together at most: as many as there are addresses for them.
const ENDPOINTS_TOTAL_MAX: u32 = 4_000_000;
const SAMPLES: (u32, u32) = (10, 10_000_000);
const CHANGES: (u32, u32) = (1, 1_000_000);
const CHURN_MAX: u32 = 100_000;

/// A way for traffic to reach a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Straight to the backend, with nothing loaded.
    Direct,
    /// Sheave's eBPF data plane.
    Ebpf,
    /// Sheave's nftables data plane.
    Nftables,
    /// Rules as kube-proxy lays them.
    Iptables,
    /// Sheave's IPVS data plane.
    Ipvs,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Direct, Self::Ebpf, Self::Nftables, Self::Iptables, Self::Ipvs];

    /// The name in flags and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }
}

/// Whether services share their endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backends {
    /// Each endpoint belongs to one service.
    Unique,
    /// All services have the same endpoints.
    Shared,
}

impl Backends {
    /// The name in flags and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unique => "unique",
            Self::Shared => "shared",
        }
    }
}

/// Which of the kernel's two implementations the iptables rules go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IptablesKind {
    /// `iptables-nft`.
    Nft,
    /// `iptables-legacy`.
    Legacy,
}

impl IptablesKind {
    /// The name in flags and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Tables for readers.
    Table,
    /// One JSON object a mode and number of services, a line each.
    Json,
}

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Numbers of services.
    pub counts: Vec<u32>,
    /// Endpoints of each.
    pub endpoints: u32,
    /// Whether services share them.
    pub backends: Backends,
    /// What to measure; direct always is.
    pub ways: Vec<Way>,
    /// Connects a target; requests of the other kinds are a part of it.
    pub samples: u32,
    /// Changes of an endpoint, one after the other, for the time that one takes.
    pub changes: u32,
    /// Changes of endpoints a second while traffic is measured; 0 for none.
    pub churn_per_s: u32,
    /// The iptables to use; `None` takes the host's choice.
    pub iptables: Option<IptablesKind>,
    /// Services above which iptables is left out.
    pub iptables_max: u32,
    /// Let eBPF balance packets of pods at their devices too, as where another runtime runs the pods.
    pub pod_packets: bool,
    /// Connections from outside go past the node's stack (mode ebpf).
    pub host_routing: bool,
    /// Leave traffic out: programming, changes and memory only.
    pub no_traffic: bool,
    /// How to print.
    pub output: Output,
    /// Where to write the report.
    pub report: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            counts: vec![10, 1_000, 10_000, 100_000],
            endpoints: 4,
            backends: Backends::Unique,
            ways: Way::ALL.to_vec(),
            samples: 10_000,
            changes: 500,
            churn_per_s: 0,
            iptables: None,
            iptables_max: 10_000,
            pod_packets: false,
            host_routing: false,
            no_traffic: false,
            output: Output::Table,
            report: None,
        }
    }
}

fn within(flag: &'static str, value: u32, (least, most): (u32, u32)) -> Result<(), LoadError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(LoadError::Flag { flag, problem: format!("{value} is not between {least} and {most}") })
}

impl Options {
    /// Refuses what can't be built, naming the flag.
    ///
    /// # Errors
    /// [`LoadError::Flag`].
    pub fn check(&self) -> Result<(), LoadError> {
        let flag = |flag, problem: &str| Err(LoadError::Flag { flag, problem: problem.to_owned() });
        if self.counts.is_empty() {
            return flag("count", "name at least one number of services");
        }
        if self.ways.is_empty() {
            return flag("modes", "name at least one mode");
        }
        within("endpoints", self.endpoints, (1, ENDPOINTS_MAX))?;
        for &count in &self.counts {
            within("count", count, (1, SERVICES_MAX))?;
            if self.backends == Backends::Unique && count.saturating_mul(self.endpoints) > ENDPOINTS_TOTAL_MAX
            {
                let text = format!(
                    "{count} services with {} endpoints of their own are more than {ENDPOINTS_TOTAL_MAX} \
                     addresses; take fewer, or --backends shared",
                    self.endpoints
                );
                return Err(LoadError::Flag { flag: "count", problem: text });
            }
        }
        within("samples", self.samples, SAMPLES)?;
        within("changes", self.changes, CHANGES)?;
        within("churn", self.churn_per_s, (0, CHURN_MAX))?;
        if let Some(path) = &self.report {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            if dir.is_some_and(|dir| !dir.is_dir()) {
                let text = format!("{} is in no directory that exists", path.display());
                return Err(LoadError::Flag { flag: "report", problem: text });
            }
            if path.is_dir() {
                return flag("report", "that is a directory; name a file");
            }
        }
        Ok(())
    }

    /// What is measured beside direct, each once, in the order of [`Way::ALL`].
    pub(crate) fn planes(&self) -> Vec<Way> {
        Way::ALL.into_iter().filter(|way| *way != Way::Direct && self.ways.contains(way)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(options: &Options) -> String {
        options.check().unwrap_err().to_string()
    }

    #[test]
    fn defaults_can_be_built() {
        Options::default().check().unwrap();
    }

    #[test]
    fn nonsense_is_refused_by_the_flags_name() {
        let with = |change: fn(&mut Options)| {
            let mut options = Options::default();
            change(&mut options);
            refused(&options)
        };
        assert!(with(|o| o.counts = vec![10, 0]).starts_with("--count: 0 is not between 1 and"));
        assert!(with(|o| o.counts.clear()).starts_with("--count"));
        assert!(with(|o| o.endpoints = 0).starts_with("--endpoints"));
        assert!(with(|o| o.samples = 3).starts_with("--samples"));
        assert!(with(|o| o.churn_per_s = 1_000_000).starts_with("--churn"));
        assert!(with(|o| o.report = Some("/no/such/dir/report.html".into())).contains("no directory"));
        assert!(with(|o| (o.counts, o.endpoints) = (vec![500_000], 100)).contains("--backends shared"));
    }

    #[test]
    fn shared_backends_need_no_room() {
        let options = Options {
            counts: vec![500_000],
            endpoints: 100,
            backends: Backends::Shared,
            ..Options::default()
        };
        options.check().unwrap();
    }

    #[test]
    fn planes_are_named_once_and_never_direct() {
        let options =
            Options { ways: vec![Way::Ipvs, Way::Direct, Way::Ebpf, Way::Ipvs], ..Options::default() };
        assert_eq!(options.planes(), [Way::Ebpf, Way::Ipvs]);
    }
}
