//! What the plane does to the host: the kernel's IPVS table, rules by nft, settings in `/proc/sys`. Invariant: nothing
//! here decides; every error names what it was about.

use super::super::DataplaneError;
use super::message::{self, Shown, command};
use super::model::{Destination, Op, Service, ServiceKey, Settings};
use crate::network::{Attributes, Generic};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

/// The kernel's table of virtual services in one network namespace.
#[derive(Debug)]
pub(super) struct Ipvs {
    socket: Generic,
}

impl Ipvs {
    /// Opens the table of the calling thread's network namespace; the module is loaded if need be.
    pub(super) fn open() -> Result<Self, DataplaneError> {
        let opened = Generic::open(message::FAMILY).map_err(|source| host("ask for IPVS", source))?;
        let Some(socket) = opened else {
            return Err(DataplaneError::Missing {
                what: "IPVS",
                hint: "its kernel module ip_vs is neither built in nor can it be loaded".to_owned(),
            });
        };
        let mut table = Self { socket };
        table
            .socket
            .ask(command::GET_INFO, &Attributes::default())
            .map_err(|source| host("ask IPVS what it is", source))?;
        Ok(table)
    }

    /// All virtual services, whosever they are.
    pub(super) fn services(&mut self) -> Result<BTreeMap<ServiceKey, Settings>, DataplaneError> {
        let answers = self
            .socket
            .dump(command::GET_SERVICE, &Attributes::default())
            .map_err(|source| host("list the virtual services", source))?;
        Ok(answers.iter().filter_map(|answer| message::service(answer)).collect())
    }

    /// A service's destinations; none where the service is gone.
    pub(super) fn destinations(&mut self, key: &ServiceKey) -> Result<Vec<Shown>, DataplaneError> {
        match self.socket.dump(command::GET_DEST, &message::named(key)) {
            Ok(answers) => Ok(answers.iter().filter_map(|answer| message::shown(key, answer)).collect()),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(Vec::new()),
            Err(source) => Err(about("list the destinations", key, &source)),
        }
    }

    /// A service with what it is set to and its destinations.
    pub(super) fn whole(&mut self, key: &ServiceKey, settings: Settings) -> Result<Service, DataplaneError> {
        let shown = self.destinations(key)?;
        let destinations = shown.into_iter().map(|shown| (shown.destination, shown.weight)).collect();
        Ok(Service { settings, destinations })
    }

    /// Makes one change. What is to go and is gone already is fine.
    pub(super) fn change(&mut self, key: &ServiceKey, op: &Op) -> io::Result<()> {
        let (command, attributes) = match op {
            Op::AddService(settings) => (command::NEW_SERVICE, message::with_settings(key, settings)),
            Op::EditService(settings) => (command::SET_SERVICE, message::with_settings(key, settings)),
            Op::DeleteService => (command::DEL_SERVICE, message::named(key)),
            Op::AddDestination(at, weight) => (command::NEW_DEST, destination(key, *at, Some(*weight))),
            Op::EditDestination(at, weight) => (command::SET_DEST, destination(key, *at, Some(*weight))),
            Op::DeleteDestination(at) => (command::DEL_DEST, destination(key, *at, None)),
        };
        let gone = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT));
        match self.socket.change(command, &attributes) {
            Err(error) if matches!(op, Op::DeleteService | Op::DeleteDestination(_)) && gone(&error) => {
                Ok(())
            }
            done => done,
        }
    }
}

fn destination(key: &ServiceKey, at: Destination, weight: Option<u32>) -> Attributes {
    message::with_destination(key, at, weight)
}

pub(super) fn host(op: &'static str, source: io::Error) -> DataplaneError {
    DataplaneError::Host { op, source }
}

/// An error that says which service it was about.
pub(super) fn about(op: &'static str, key: &ServiceKey, source: &io::Error) -> DataplaneError {
    host(op, io::Error::new(source.kind(), format!("virtual service {key}: {source}")))
}

/// Runs a script of nft in this thread's network namespace, as one transaction.
pub(super) fn nft(script: &str) -> Result<(), DataplaneError> {
    if script.is_empty() {
        return Ok(());
    }
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DataplaneError::Missing {
            what: "the program nft",
            hint: "IPVS needs rules of nftables beside it; install the package nftables".to_owned(),
        },
        _ => host("start nft", source),
    })?;
    // It reads all of its input before it complains, and ends early only where the pipe breaks: its words count then.
    let written = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(script.as_bytes()),
        None => Ok(()),
    };
    let output = child.wait_with_output().map_err(|source| host("wait for nft", source))?;
    if output.status.success() {
        return written.map_err(|source| host("give nft its rules", source));
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let first: Vec<&str> = words.lines().take(3).map(str::trim).collect();
    Err(host("change the rules of nftables", io::Error::other(first.join("; "))))
}

/// Whether a chain exists.
pub(super) fn has_chain(table: &str, chain: &str) -> bool {
    let mut command = Command::new("nft");
    command.args(["-t", "list", "chain", "inet", table, chain]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Settings of the network namespace and why.
const SETTINGS: [(&str, &str); 4] = [
    // Without it nothing that IPVS sends can be masqueraded.
    ("ipv4/vs/conntrack", "1"),
    // A client that uses its port again is a new client. Kernels before 5.9 made it wait a second for that; those that
    // are supported do not.
    ("ipv4/vs/conn_reuse_mode", "1"),
    // Datagrams to a destination that is gone go to another one.
    ("ipv4/vs/expire_nodest_conn", "1"),
    // Clients leave destinations that only finish what they have.
    ("ipv4/vs/expire_quiescent_template", "1"),
];

/// Settings of the device with the addresses: it answers for itself alone.
const DEVICE_SETTINGS: [(&str, &str); 2] = [("arp_ignore", "1"), ("arp_announce", "2")];

/// Makes the namespace's settings what the plane needs. What can't be set is said in the log, once a call.
pub(super) fn set_up(device: &str) {
    let of_device =
        DEVICE_SETTINGS.map(|(name, value)| (format!("ipv4/conf/{device}/{name}"), value.to_owned()));
    let all = SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().chain(of_device);
    for (name, value) in all {
        let path = format!("/proc/sys/net/{name}");
        if fs::read_to_string(&path).is_ok_and(|held| held.trim() == value) {
            continue;
        }
        if let Err(error) = fs::write(&path, &value) {
            tracing::warn!(setting = path, value, %error, "cannot be set; IPVS will not do all that services ask");
        }
    }
}
