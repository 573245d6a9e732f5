//! What runtimes connect and disconnect by the container network interface. Invariant: connecting either succeeds
//! whole or leaves nothing, never touches what is there already, and disconnecting needs nothing but the key.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::act::{NodeRows, Sides, on_own_thread};
use super::asked::{Asked, Demand};
use super::error::NetworkError;
use super::leases::{Lease, Netns};
use super::nat::{Frontend, Target, owner};
use super::netlink::{Connection, Mac};
use super::plan::{Act, Observed, Side, Step, is_cni, macs, node_link_name, own_table, steps};
use super::ports::{Held, PortMapping, PortsOf, Protocol};
use super::reconcile::{Decision, decide_cni};
use super::{Facts, Inner, Report, bandwidth, in_full, look_failed, open_sides, want};

/// A container's interface to be connected.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) asked: Asked,
    pub(super) demand: Demand,
    /// What the runtime calls the namespace, and the namespace.
    pub(super) path: PathBuf,
    pub(super) netns: OwnedFd,
}

/// What was connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) host_link: String,
    pub(super) host_mac: Mac,
    pub(super) mac: Mac,
    pub(super) mtu: u32,
    /// The table that its routes are in, where not the main one.
    pub(super) table: Option<u32>,
    pub(super) ips: Vec<IpAddr>,
}

/// What can be told of a runtime's request from its key alone; `None` for pods.
fn asked_of(uid: &str) -> Option<Asked> {
    let mut parts = uid.splitn(3, '/').map(str::to_owned);
    let (network, container_id, ifname) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Asked { network, container_id, ifname, ..Asked::default() })
}

impl Inner {
    /// Connects what is not connected; undoes all of it where any of it fails.
    pub(super) fn add(&self, ask: Ask) -> Result<Added, NetworkError> {
        let uid = ask.asked.key();
        let _working = self.begin(&uid);
        self.must_be_new(&uid)?;
        on_own_thread(|| self.add_new(uid, ask))
    }

    fn add_new(&self, uid: String, ask: Ask) -> Result<Added, NetworkError> {
        let Ask { mut asked, demand, path, netns } = ask;
        let file = File::from(netns);
        let gone = |source| NetworkError::Netns { uid: uid.clone(), path: path.clone(), source };
        let netns = Netns::of(&file, &path).map_err(gone)?;
        let mut sides = open_sides(&uid, file, &path)?;
        let (mut pod, cookie) = sides.look_inside(&asked.ifname, &[]).map_err(look_failed(&uid))?;
        // What is in the way may be about to go.
        if (pod.link.is_some() || pod.other_way_out) && self.doom.flush() {
            pod = sides.look_inside(&asked.ifname, &[]).map_err(look_failed(&uid))?.0;
        }
        if self.state().facts.sources.len() < self.config.node_ips.len() {
            // An address of the node was not usable yet when it was last looked at.
            self.prepare()?;
        }
        asked.cookie = cookie;
        asked.table = pod.other_way_out.then(|| own_table(&asked.ifname));
        let (lease, facts) = {
            let mut state = self.state();
            (state.leases.make(&uid, &demand, &netns, Some(asked))?, state.facts.clone())
        };
        match self.connect_all(&lease, facts, &mut sides, &pod) {
            Ok(added) => {
                self.state().connected.insert(uid);
                Ok(added)
            }
            Err(error) => {
                drop(sides);
                self.undo(&uid, &error);
                Err(error)
            }
        }
    }

    fn connect_all(
        &self,
        lease: &Lease,
        facts: Facts,
        sides: &mut Sides,
        pod: &Observed,
    ) -> Result<Added, NetworkError> {
        let mut want = want(lease, facts);
        // What is there now is nobody's of ours, whatever it looks like.
        want.theirs = false;
        if pod.link.is_some() {
            return Err(NetworkError::PodLinkTaken { uid: want.key, ifname: want.ifname });
        }
        self.lead(sides, &want, pod, None)?;
        bandwidth::keep(lease, sides.netns())?;
        self.masquerade_asked()?;
        let host_link = node_link_name(&lease.uid);
        let mappings = lease.asked.as_ref().map(|asked| asked.ports.as_slice()).unwrap_or_default();
        let ips = &lease.ips;
        self.ports.set(&PortsOf { id: &lease.uid, host_link: &host_link, ips, mappings })?;
        let (host_mac, own) = macs(&lease.uid);
        let mac = want.mac.unwrap_or(own);
        Ok(Added { host_link, host_mac, mac, mtu: want.mtu, table: want.table, ips: lease.ips.clone() })
    }

    /// Fails where the attachment is there. A lease without a link is what an agent that was killed left behind.
    pub(super) fn must_be_new(&self, uid: &str) -> Result<(), NetworkError> {
        let mut state = self.state();
        if state.leases.get(uid).is_none() {
            return Ok(());
        }
        if state.connected.contains(uid) || has_link(uid)? {
            return Err(NetworkError::Connected { key: uid.to_owned() });
        }
        state.leases.release(uid).map(drop)
    }

    /// Takes back what a failed ADD made. What can't be taken back stays leased, so that nobody else gets it, until
    /// a later look at it succeeds.
    fn undo(&self, uid: &str, why: &NetworkError) {
        // The link of that name belongs to somebody else.
        let foreign = matches!(why, NetworkError::NodeLinkTaken { .. });
        self.clear_rules(uid);
        let undone = self
            .ports
            .clear(uid)
            .and_then(|()| if foreign { Ok(false) } else { self.doom.remove(&node_link_name(uid)) })
            .and_then(|_| self.state().leases.cancel(uid));
        if let Err(error) = undone {
            tracing::warn!(uid, error = in_full(&error), "what a failed ADD made is still there");
        }
    }

    /// Whether the attachment is as it was made: its lease, its way through the node, and its host ports. What is
    /// missing comes back in words.
    pub(super) fn check_attachment(&self, uid: &str, netns: OwnedFd) -> Result<Checked, NetworkError> {
        let _working = self.begin(uid);
        let (lease, facts) = {
            let state = self.state();
            (state.leases.get(uid).cloned(), state.facts.clone())
        };
        let Some(lease) = lease else {
            return Ok(Checked {
                missing: vec!["the agent has no record of it".to_owned()],
                ..Checked::default()
            });
        };
        let want = want(&lease, facts);
        let (pod, node, unlimited) = on_own_thread(|| {
            let mut sides = open_sides(uid, File::from(netns), Path::new("CNI_NETNS"))?;
            let (pod, _) = sides.look_inside(&want.ifname, &want.ips).map_err(look_failed(uid))?;
            let node = sides.look_at_node(&want, None).map_err(look_failed(uid))?;
            Ok((pod, node, bandwidth::lacks(&lease, sides.netns())))
        })?;
        let mut missing: Vec<String> = match steps(&want, &node, &pod) {
            Ok(steps) => steps.iter().filter(|step| is_lack(step)).map(|step| format!("to {step}")).collect(),
            Err(_) => vec![format!("{} is another link now", want.ifname)],
        };
        let mappings = lease.asked.as_ref().map(|asked| asked.ports.as_slice()).unwrap_or_default();
        let host_link = node_link_name(uid);
        let ports = PortsOf { id: uid, host_link: &host_link, ips: &lease.ips, mappings };
        if let Err(error) = self.ports.check(&ports) {
            missing.push(in_full(&error));
        }
        match unlimited {
            Ok(lacks) => missing.extend(lacks),
            Err(error) => missing.push(in_full(&error)),
        }
        Ok(Checked { missing, pod, ips: lease.ips })
    }

    /// Disconnects what runtimes connected to `network` and is not in `valid`; `None` disconnects nothing that
    /// lives. Then looks at all that runtimes connected.
    pub(super) fn collect(
        &self,
        network: &str,
        valid: Option<&BTreeSet<String>>,
    ) -> Result<Report, NetworkError> {
        let mut report = Report::default();
        if let Some(valid) = valid {
            let leases = self.state().leases.all();
            let of_network = |lease: &Lease| {
                lease.asked.as_ref().is_some_and(|asked| asked.network == network)
                    && !valid.contains(&lease.uid)
            };
            for lease in leases.iter().filter(|lease| of_network(lease)) {
                match self.detach(&lease.uid) {
                    Ok(()) => report.removed.push(format!("attachment {}", lease.uid)),
                    Err(error) => report.failed.push(in_full(&error)),
                }
            }
        }
        let rest = self.reconcile_attachments()?;
        report.removed.extend(rest.removed);
        report.repaired.extend(rest.repaired);
        report.failed.extend(rest.failed);
        Ok(report)
    }

    /// Releases what runtimes connected and has neither a link nor a namespace any more, and puts back what is missing
    /// of the rest.
    pub(super) fn reconcile_attachments(&self) -> Result<Report, NetworkError> {
        let mut report = Report::default();
        let leases: Vec<Lease> = {
            let state = self.state();
            state.leases.all().into_iter().filter(|lease| is_cni(&lease.uid)).collect()
        };
        let there = |lease: &Lease| {
            let known = lease.netns.as_ref();
            known.is_some_and(|known| Netns::open(&known.path).is_ok_and(|(now, _)| now == *known))
        };
        let leases: BTreeMap<String, bool> =
            leases.iter().map(|lease| (lease.uid.clone(), there(lease))).collect();
        let links = self.our_links()?;
        if !leases.is_empty() || !links.is_empty() {
            let (busy, ended) = {
                let state = self.state();
                (state.busy.clone(), state.leases.ended())
            };
            self.carry_out_all(&decide_cni(&links, &leases, &ended, &busy), &mut report)?;
        }
        if report.failed.is_empty() {
            self.state().leases.forget_ended();
        }
        // Last: what was adopted has its ports from the table.
        report.repaired.extend(self.restore_ports()?);
        Ok(report)
    }

    fn carry_out_all(&self, decisions: &[Decision], report: &mut Report) -> Result<(), NetworkError> {
        let rows = NodeRows::take().map_err(|source| NetworkError::Netlink {
            op: "list routes and neighbours".to_owned(),
            source,
        })?;
        for decision in decisions {
            let done = match decision {
                Decision::Release { uid } => self.release_dead(uid, report),
                other => self.carry_out(other, &rows, report),
            };
            let done = match (done, decision) {
                // What was there is gone, and its place has been taken.
                (Err(NetworkError::OtherNetns { .. }), Decision::Check { uid }) => {
                    self.release_dead(uid, report)
                }
                (done, _) => done,
            };
            if let Err(error) = done {
                report.failed.push(in_full(&error));
            }
        }
        Ok(())
    }

    /// Takes back the rules of an interface beside others, which don't go with it. Where the namespace is gone they are
    /// too; and what stays leads to an address that nobody has.
    pub(super) fn clear_rules(&self, uid: &str) {
        let lease = self.state().leases.get(uid).cloned();
        let Some((lease, table)) = lease.and_then(|lease| {
            let table = lease.asked.as_ref()?.table?;
            Some((lease, table))
        }) else {
            return;
        };
        let Some(Ok((now, file))) = lease.netns.as_ref().map(|known| Netns::open(&known.path)) else {
            return;
        };
        if Some(&now) != lease.netns.as_ref() {
            return;
        }
        let step = |ip: &IpAddr| Step { side: Side::Pod, act: Act::DeleteRule { ip: *ip, table } };
        let steps: Vec<Step> = lease.ips.iter().map(step).collect();
        let done = on_own_thread(|| open_sides(uid, file, &now.path).map(|mut sides| sides.apply(&steps)));
        if let Ok(Err((step, error))) = done {
            tracing::debug!(uid, %step, %error, "left in the namespace");
        }
    }

    /// Once more under the attachment's own lock: a namespace may have been connected meanwhile.
    fn release_dead(&self, uid: &str, report: &mut Report) -> Result<(), NetworkError> {
        let _working = self.begin(uid);
        if has_link(uid)? {
            return Ok(());
        }
        self.ports.clear(uid)?;
        let mut state = self.state();
        state.connected.remove(uid);
        if state.leases.release(uid)? {
            report.removed.push(format!("lease of {uid}: its namespace is gone"));
        }
        Ok(())
    }

    /// Lets the ranges of all networks that ask for it leave with the node's address, and no others. Ranges stay for as
    /// long as anybody is connected to the network.
    pub(super) fn masquerade_asked(&self) -> Result<(), NetworkError> {
        let (wanted, spared) = self.state().leases.masquerade();
        if self.nat.read(|desired| desired.asked == wanted && desired.spared == spared)? {
            return Ok(());
        }
        self.nat.change(|desired| {
            (desired.asked, desired.spared) = (wanted, spared);
            Ok(())
        })
    }

    /// What a runtime asked for, as far as the attachment's name and the table of host ports tell; `None` for pods.
    pub(super) fn recover(&self, uid: &str) -> Result<Option<Asked>, NetworkError> {
        let Some(mut asked) = asked_of(uid) else { return Ok(None) };
        let owner = owner(uid);
        asked.ports = self.nat.read(|desired| {
            let of_it = desired.ports.iter().filter(|(_, target)| target.owner == owner);
            let mapping = |(frontend, target): (&Frontend, &Target)| {
                Some(PortMapping {
                    host_port: frontend.port,
                    container_port: target.port,
                    protocol: Protocol::of_number(frontend.protocol)?,
                    host_ip: Some(frontend.ip),
                })
            };
            of_it.filter_map(mapping).collect()
        })?;
        Ok(Some(asked))
    }

    /// Leads the node's ports to what runtimes connected, as their leases say: what is in the kernel is of an agent
    /// before this one.
    pub(super) fn restore_ports(&self) -> Result<Vec<String>, NetworkError> {
        self.masquerade_asked()?;
        let look = || {
            let state = self.state();
            let held = |lease: &Lease| Held {
                id: lease.uid.clone(),
                host_link: node_link_name(&lease.uid),
                ips: lease.ips.clone(),
                mappings: lease.asked.as_ref().map(|asked| asked.ports.clone()).unwrap_or_default(),
            };
            let leases = state.leases.all();
            let idle = leases.iter().filter(|lease| is_cni(&lease.uid) && !state.busy.contains(&lease.uid));
            (idle.map(held).collect(), state.busy.clone())
        };
        self.ports.reconcile(is_cni, look)
    }
}

/// What CHECK sees.
#[derive(Debug, Clone, Default)]
pub(super) struct Checked {
    pub(super) missing: Vec<String>,
    /// Inside.
    pub(super) pod: Observed,
    pub(super) ips: Vec<IpAddr>,
}

/// Settings may be tuned by others; links, addresses and routes may not go.
fn is_lack(step: &Step) -> bool {
    match &step.act {
        Act::Sysctl { .. } | Act::AwaitRunning { .. } | Act::AwaitLocal { .. } => false,
        Act::SetLink { name, .. } => step.side == Side::Node && name != "lo",
        _ => true,
    }
}

fn has_link(uid: &str) -> Result<bool, NetworkError> {
    let name = node_link_name(uid);
    let link = Connection::open().and_then(|mut connection| connection.link(&name));
    let link =
        link.map_err(|source| NetworkError::Netlink { op: format!("look for link {name}"), source })?;
    Ok(link.is_some())
}
