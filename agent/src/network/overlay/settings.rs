//! What an operator says about the overlay. Plain data; nothing here reads the host.

use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// How packets get to the pods of a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A plain route where the peer is a neighbour on an uplink, VXLAN where it is not.
    #[default]
    Auto,
    /// VXLAN to every peer.
    Vxlan,
    /// Plain routes only; peers behind a router are refused.
    Direct,
    /// Nothing: something else routes between the nodes.
    None,
}

impl Mode {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Vxlan => "vxlan",
            Mode::Direct => "direct",
            Mode::None => "none",
        }
    }
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Mode::Auto, Mode::Vxlan, Mode::Direct, Mode::None]
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| format!("{name:?}: there are auto, vxlan, direct and none"))
    }
}

/// Settings of the overlay. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OverlaySettings {
    /// How peers are reached.
    pub mode: Mode,
    /// Peers come from this file instead of from the API's Nodes, and so do this node's own ranges unless they are
    /// given. The file is read again when it changes.
    pub peers_file: Option<PathBuf>,
    /// VXLAN network identifier (1 to 16,777,215); the same on all nodes.
    pub vni: u32,
    /// UDP port of VXLAN; the same on all nodes.
    pub port: u16,
    /// Whether the VXLAN device leaves checksums to the uplink. Off helps with network cards that compute them wrongly
    /// for packets in packets.
    pub tx_checksum: bool,
    /// Whether what pods send out of the pod ranges gets the node's address.
    pub masquerade: bool,
    /// Destinations beside the pod ranges that see the pods' own addresses.
    pub masquerade_exceptions: Vec<IpNetwork>,
    /// Where a sysctl file is kept with what the overlay sets (such as `/run/sysctl.d`), for hosts whose tools set
    /// it otherwise later. `None` keeps none.
    pub sysctl_dir: Option<PathBuf>,
}

/// Largest VXLAN network identifier: 24 bits.
pub const VNI_MAX: u32 = (1 << 24) - 1;

impl Default for OverlaySettings {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            peers_file: None,
            // Neither 1, which flannel takes, nor 4096, which Calico takes: beside them nothing collides.
            vni: 84,
            port: 4789,
            tx_checksum: true,
            masquerade: true,
            masquerade_exceptions: Vec::new(),
            sysctl_dir: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_called_what_they_are_called() {
        for mode in [Mode::Auto, Mode::Vxlan, Mode::Direct, Mode::None] {
            assert_eq!(mode.name().parse(), Ok(mode));
        }
        assert!("geneve".parse::<Mode>().unwrap_err().contains("vxlan"));
    }
}
