//! Host ports: ports of the node that lead to a pod's. Invariant: a host port belongs to at most one attachment, and
//! only that one gives it up: removing an attachment never touches what another one has, whatever addresses they had.
//!
//! Destinations are translated for what arrives, for what local programs send, and for pods, the one that is reached
//! included (which then sees the node as the client: its own address would be answered directly). Clients that come
//! by 127.0.0.1 are seen as the node, too; the pod's link is told to let such packets through, and the table drops
//! what pods send to loopback addresses themselves. `::1` leads nowhere else: the kernel has no such knob for IPv6.
//!
//! Translation is decided with a flow's first packet, so flows of UDP and SCTP that a change makes wrong are ended.

mod plan;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

pub use plan::{PortMapping, Protocol};

use super::NetworkError;
use super::nat::{Desired, Frontend, Nat, Target, owner};
use super::netlink::Connection;
use super::netlink::conntrack::Flow;
use super::node::{read_sysctl, write_sysctl};
use plan::wanted;

/// One attachment and its host ports.
#[derive(Debug, Clone, Copy)]
pub struct PortsOf<'a> {
    /// The attachment, by whatever name it is told apart from all others of the node.
    pub id: &'a str,
    /// The node's end of its link.
    pub host_link: &'a str,
    /// The addresses that its ports lead to, the first of each family.
    pub ips: &'a [IpAddr],
    /// Its ports. Empty is fine.
    pub mappings: &'a [PortMapping],
}

/// The same, owned.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// See [`PortsOf::id`].
    pub(crate) id: String,
    /// See [`PortsOf::host_link`].
    pub(crate) host_link: String,
    /// See [`PortsOf::ips`].
    pub(crate) ips: Vec<IpAddr>,
    /// See [`PortsOf::mappings`].
    pub(crate) mappings: Vec<PortMapping>,
}

/// Host ports of this node's attachments. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Ports {
    nat: Nat,
}

impl Ports {
    /// Host ports in this table.
    pub(crate) fn new(nat: Nat) -> Self {
        Self { nat }
    }

    /// Gives an attachment these host ports and no others. Fails without having changed anything where one of them is
    /// another attachment's.
    pub(crate) fn set(&self, of: &PortsOf<'_>) -> Result<(), NetworkError> {
        let wanted = wanted(of.id, of.ips, of.mappings)?;
        let label = owner(of.id);
        if wanted.is_empty() {
            return self.clear(of.id);
        }
        let changed = self.nat.change(|desired| {
            let old = plan::of(&desired.ports, &label);
            plan::replace(&mut desired.ports, of.id, &label, &wanted)?;
            Ok(plan::difference(&old, &plan::of(&desired.ports, &label)))
        })?;
        if plan::from_loopback(&wanted) {
            route_loopback(of.host_link)?;
        }
        self.end_wrong_flows(&changed);
        Ok(())
    }

    /// Takes an attachment's host ports away. Idempotent. Call it before the attachment's link goes.
    pub(crate) fn clear(&self, id: &str) -> Result<(), NetworkError> {
        let label = owner(id);
        if self.nat.read(|desired| !desired.ports.values().any(|target| target.owner == label))? {
            return Ok(());
        }
        let removed = self.nat.change(|desired| {
            let old = plan::of(&desired.ports, &label);
            desired.ports.retain(|_, target| target.owner != label);
            Ok(old.into_iter().collect::<Vec<_>>())
        })?;
        self.end_wrong_flows(&removed);
        Ok(())
    }

    /// Leads to exactly the ports that `look` tells, of the attachments that `concerned` knows by their ids, and puts
    /// the table back where somebody changed it. `look` runs while nobody else can change host ports; it also tells
    /// which attachments are being worked on: those keep what they have. Says what was repaired or removed, in words.
    /// An attachment whose port another one has, or whose mapping is wrong, is said too and has none.
    pub(crate) fn reconcile(
        &self,
        concerned: impl Fn(&str) -> bool,
        look: impl FnOnce() -> (Vec<Held>, BTreeSet<String>),
    ) -> Result<Vec<String>, NetworkError> {
        let mut said = Vec::new();
        let (changed, all) = self.nat.change(|desired| {
            let (all, busy) = look();
            let busy: BTreeSet<String> = busy.iter().map(|id| owner(id)).collect();
            let old = desired.ports.clone();
            desired.ports.retain(|_, target| !concerned(&target.owner) || busy.contains(&target.owner));
            for held in &all {
                let placed = wanted(&held.id, &held.ips, &held.mappings).and_then(|wanted| {
                    plan::replace(&mut desired.ports, &held.id, &owner(&held.id), &wanted)
                });
                if let Err(error) = placed {
                    said.push(error.to_string());
                }
            }
            let changed = plan::difference(&old, &desired.ports);
            said.extend(changed.iter().map(|(frontend, target)| {
                let gone = if desired.ports.get(frontend) == Some(target) { "put back" } else { "removed" };
                format!("host port {} of {}: {gone}", plan::words(frontend), target.owner)
            }));
            Ok((changed, all))
        })?;
        if self.nat.repair()? {
            said.push("the nftables table sheave-net, which somebody else had changed".to_owned());
        }
        for held in all.iter().filter(|held| !held.mappings.is_empty()) {
            let looped =
                wanted(&held.id, &held.ips, &held.mappings).is_ok_and(|all| plan::from_loopback(&all));
            match if looped { route_loopback(&held.host_link) } else { Ok(false) } {
                Ok(false) => {}
                Ok(true) => said.push(format!("{}: loopback addresses on {}", held.id, held.host_link)),
                // The link is gone, which is somebody else's to repair.
                Err(error) => tracing::debug!(%error, id = held.id, "host ports on loopback addresses"),
            }
        }
        self.end_wrong_flows(&changed);
        Ok(said)
    }

    /// Fails where the kernel does not hold the attachment's host ports.
    pub(crate) fn check(&self, of: &PortsOf<'_>) -> Result<(), NetworkError> {
        let wanted = wanted(of.id, of.ips, of.mappings)?;
        if wanted.is_empty() {
            return Ok(());
        }
        let label = owner(of.id);
        let missing = self.nat.read(|desired| missing(desired, &wanted, &label))?;
        let gone = |what: String| NetworkError::Gone { id: of.id.to_owned(), what };
        if let Some(frontend) = missing {
            return Err(gone(format!("host port {}", plan::words(&frontend))));
        }
        if !self.nat.is_whole()? {
            return Err(gone("the nftables table sheave-net, or a part of it,".to_owned()));
        }
        Ok(())
    }

    /// Ends flows that go by a port that changed hands, or past one that led nowhere when they began. What can't be
    /// ended ends by itself when its client pauses.
    fn end_wrong_flows(&self, changed: &[(Frontend, Target)]) {
        let kinds: BTreeSet<(bool, u8)> = changed
            .iter()
            .map(|(frontend, _)| (frontend.ip.is_ipv6(), frontend.protocol))
            .filter(|(_, protocol)| *protocol != Protocol::Tcp.number())
            .collect();
        if kinds.is_empty() {
            return;
        }
        let ended = local_addresses().and_then(|local| {
            let mut ended = 0;
            for (v6, protocol) in kinds {
                let of_kind = changed.iter().filter(|(f, _)| f.protocol == protocol && f.ip.is_ipv6() == v6);
                let changed: Vec<_> = of_kind.collect();
                let now = self.nat.read(|desired| desired.ports.clone()).map_err(io::Error::other)?;
                let wrong = |flow: &Flow| {
                    changed.iter().any(|(frontend, _)| {
                        let local = || local.contains(&flow.to.ip()) || flow.to.ip().is_loopback();
                        let by_it = flow.to.port() == frontend.port
                            && if frontend.ip.is_unspecified() {
                                local()
                            } else {
                                flow.to.ip() == frontend.ip
                            };
                        let right = now.get(frontend).map(|target| (target.ip, target.port));
                        by_it
                            && right != Some((flow.by.ip(), flow.by.port()))
                            && (flow.translated || right.is_some())
                    })
                };
                ended += self.nat.end_flows(v6, protocol, wrong)?;
            }
            Ok(ended)
        });
        match ended {
            Ok(0) => {}
            Ok(ended) => tracing::debug!(ended, "flows by host ports that changed"),
            Err(error) => tracing::warn!(
                %error,
                "cannot end flows by host ports that changed; the kernel needs CONFIG_NF_CT_NETLINK"
            ),
        }
    }
}

fn missing(desired: &Desired, wanted: &[(Frontend, (IpAddr, u16))], label: &str) -> Option<Frontend> {
    let held = |frontend: &Frontend, (ip, port): (IpAddr, u16)| {
        desired.ports.get(frontend).is_some_and(|t| t.owner == label && t.ip == ip && t.port == port)
    };
    wanted.iter().find(|(frontend, to)| !held(frontend, *to)).map(|(frontend, _)| *frontend)
}

fn local_addresses() -> io::Result<BTreeSet<IpAddr>> {
    Ok(Connection::open()?.addresses()?.into_iter().map(|address| address.ip).collect())
}

/// Lets packets with loopback addresses through a pod's link; false where it did so already.
fn route_loopback(host_link: &str) -> Result<bool, NetworkError> {
    let key = format!("net/ipv4/conf/{host_link}/route_localnet");
    if read_sysctl(&key)? == "1" { Ok(false) } else { write_sysctl(&key, "1").map(|()| true) }
}
