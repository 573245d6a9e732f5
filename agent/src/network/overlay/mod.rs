//! The way to the pods of other nodes. Invariant: what the kernel holds for a peer is a function of the peers, the
//! settings and the node's own links; whoever removes some of it finds it back within a second.

mod peers;
mod settings;

pub use peers::{Peer, PeersError, PeersFile};
pub use settings::{Mode, OverlaySettings, VNI_MAX};
