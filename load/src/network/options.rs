//! What is to be measured of the network. Invariant: what passed [`NetworkOptions::check`] can be built.

use crate::{LoadError, Output};
use std::path::PathBuf;

/// A way between two containers, or what it is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Road {
    /// Between two hosts.
    Host,
    /// Between two namespaces that a pair of links connects, and nothing else.
    Veth,
    /// Between two pods of one node.
    Pod,
    /// Between pods of two nodes, by plain routes.
    Direct,
    /// Between pods of two nodes, by VXLAN.
    Vxlan,
    /// VXLAN between bridges, laid by hand as flannel lays it.
    Flannel,
    /// As [`Road::Vxlan`], to the address of a service.
    Service,
}

impl Road {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Host, Self::Veth, Self::Pod, Self::Direct, Self::Vxlan, Self::Flannel, Self::Service];

    /// The name in flags and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Veth => "veth",
            Self::Pod => "pod",
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
            Self::Flannel => "flannel",
            Self::Service => "service",
        }
    }

    /// What it is, for readers.
    pub(crate) const fn about(self) -> &'static str {
        match self {
            Self::Host => "host to host",
            Self::Veth => "a plain pair of links",
            Self::Pod => "pod to pod, one node",
            Self::Direct => "pod to pod, plain routes",
            Self::Vxlan => "pod to pod, VXLAN",
            Self::Flannel => "VXLAN by hand, as flannel",
            Self::Service => "VXLAN, through a service",
        }
    }
}

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    /// What to measure; host to host always is.
    pub roads: Vec<Road>,
    /// Turns that each gets.
    pub rounds: u32,
    /// Milliseconds of one stream a turn.
    pub stream_ms: u32,
    /// Requests a turn.
    pub requests: u32,
    /// MTU between the hosts, bytes.
    pub mtu: u32,
    /// How to print.
    pub output: Output,
    /// Where to write the report.
    pub report: Option<PathBuf>,
}

impl Default for NetworkOptions {
    fn default() -> Self {
        Self {
            roads: Road::ALL.to_vec(),
            rounds: 10,
            stream_ms: 1_500,
            requests: 2_000,
            mtu: 1500,
            output: Output::Table,
            report: None,
        }
    }
}

impl NetworkOptions {
    /// Refuses what can't be built, naming the flag.
    ///
    /// # Errors
    /// [`LoadError::Flag`].
    pub fn check(&self) -> Result<(), LoadError> {
        let within = |flag, value: u32, least: u32, most: u32| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(LoadError::Flag { flag, problem: format!("{value} is not between {least} and {most}") })
        };
        within("rounds", self.rounds, 1, 10_000)?;
        within("stream-ms", self.stream_ms, 10, 60_000)?;
        within("requests", self.requests, 10, 1_000_000)?;
        within("mtu", self.mtu, 1280, 65_000)?;
        if self.roads.is_empty() {
            return Err(LoadError::Flag { flag: "paths", problem: "name at least one".to_owned() });
        }
        if let Some(path) = &self.report {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            if path.is_dir() || dir.is_some_and(|dir| !dir.is_dir()) {
                let problem = format!("{} is no file in a directory that exists", path.display());
                return Err(LoadError::Flag { flag: "report", problem });
            }
        }
        Ok(())
    }

    /// What is measured, each once, in the order of [`Road::ALL`].
    pub(crate) fn measured(&self) -> Vec<Road> {
        Road::ALL.into_iter().filter(|road| *road == Road::Host || self.roads.contains(road)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_by_the_flags_name() {
        NetworkOptions::default().check().unwrap();
        let with = |change: fn(&mut NetworkOptions)| {
            let mut options = NetworkOptions::default();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(with(|o| o.rounds = 0).starts_with("--rounds: 0 is not between"));
        assert!(with(|o| o.mtu = 100).starts_with("--mtu"));
        assert!(with(|o| o.roads.clear()).starts_with("--paths"));
        assert!(with(|o| o.report = Some("/no/such/dir/x.html".into())).starts_with("--report"));
    }

    #[test]
    fn host_to_host_is_always_measured() {
        let options = NetworkOptions { roads: vec![Road::Vxlan, Road::Vxlan], ..NetworkOptions::default() };
        assert_eq!(options.measured(), [Road::Host, Road::Vxlan]);
    }
}
