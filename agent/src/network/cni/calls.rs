//! One call of a runtime, answered. Invariant: names and configuration are judged again, whatever the plugin has
//! judged: it may be older, or not ours.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde_json::Value;
use sheave_cni::call::{check_container, check_ifname};
use sheave_cni::result::Outcome;
use sheave_cni::wire::{Reply, Request};
use sheave_cni::{Command, Config, Error, code};

use super::translate;
use super::verify::verify;
use crate::network::asked::key;
use crate::network::attachment::Ask;
use crate::network::{Inner, Network, NetworkError};

/// The attachment that a call is about.
pub(super) fn key_of(request: &Request) -> String {
    let name = request.config.get("name").and_then(Value::as_str).unwrap_or_default();
    key(name, &request.container_id, &request.ifname)
}

/// Does what is asked for.
pub(super) fn answer(network: &Network, request: &Request, netns: Option<OwnedFd>) -> Reply {
    let inner = &network.inner;
    let config = Config::read(&request.config, &request.args)?;
    if request.command == "PROBE" {
        names(request)?;
        return inner.must_be_new(&key_of(request)).map(|()| None).map_err(|e| translate::error(&e));
    }
    let command = Command::parse(&request.command).ok_or_else(|| {
        let message = format!("command {:?} is not known to this agent", request.command);
        Error::new(code::BAD_ENVIRONMENT, message)
    })?;
    if command.has_container() {
        names(request)?;
    }
    match command {
        Command::Add => add(inner, request, &config, needed(request, netns)?).map(Some),
        Command::Del => {
            inner.detach(&key_of(request)).map(|()| None).map_err(|error| translate::error(&error))
        }
        Command::Check => check(inner, request, &config, needed(request, netns)?).map(|()| None),
        Command::Status => status(inner, &config).map(|()| None),
        Command::Gc => gc(inner, &config).map(|()| None),
        Command::Version => Ok(None),
    }
}

fn names(request: &Request) -> Result<(), Error> {
    check_container(&request.container_id)?;
    check_ifname(&request.ifname)
}

fn needed(request: &Request, netns: Option<OwnedFd>) -> Result<OwnedFd, Error> {
    netns.ok_or_else(|| {
        let message = format!("CNI_NETNS {}: its descriptor did not come along", request.netns);
        Error::new(code::BAD_NETNS, message)
    })
}

fn given(request: &Request) -> Result<Option<Outcome>, Error> {
    request.ipam.as_ref().map(|ipam| Outcome::read(ipam, "ipam")).transpose()
}

fn add(inner: &Inner, request: &Request, config: &Config, netns: OwnedFd) -> Result<Value, Error> {
    let given = given(request)?;
    let ranges = &inner.config.pod_cidrs;
    let ask = Ask {
        asked: translate::asked(config, given.as_ref(), ranges, &request.container_id, &request.ifname),
        demand: translate::demand(config, given.as_ref(), ranges)?,
        path: PathBuf::from(&request.netns),
        netns,
    };
    let added = inner.add(ask).map_err(|error| {
        if let NetworkError::RangeExhausted { .. } = &error {
            tracing::warn!(%error, "no address for a container");
            inner.exhausted.send_replace(error.to_string());
        }
        translate::error(&error)
    })?;
    let outcome = translate::outcome(config, given.as_ref(), &request.netns, &request.ifname, &added);
    Ok(outcome.to_value(config.head.version))
}

fn check(inner: &Inner, request: &Request, config: &Config, netns: OwnedFd) -> Result<(), Error> {
    let prev = config.prev.as_ref().ok_or_else(|| {
        let message = "prevResult is missing: CHECK compares with what ADD answered";
        Error::new(code::BAD_CONFIG, message)
    })?;
    let uid = key_of(request);
    let checked = inner.check_attachment(&uid, netns).map_err(|error| translate::error(&error))?;
    let found = verify(prev, &request.netns, &request.ifname, &checked);
    if found.is_empty() {
        return Ok(());
    }
    Err(Error::new(code::BROKEN, format!("{uid} is not as it was made")).with(found.join("; ")))
}

fn status(inner: &Inner, config: &Config) -> Result<(), Error> {
    let unavailable = |error: NetworkError| Error::new(code::NOT_AVAILABLE, translate::error(&error).message);
    if config.head.ipam.is_none() {
        let demand = translate::demand(config, None, &inner.config.pod_cidrs)?;
        inner.state().leases.could_meet(&demand).map_err(unavailable)?;
    }
    match &inner.state().impaired {
        Some(why) => Err(Error::new(code::LIMITED, format!("containers can't reach all others: {why}"))),
        None => Ok(()),
    }
}

fn gc(inner: &Inner, config: &Config) -> Result<(), Error> {
    let name = &config.head.name;
    let valid: Option<BTreeSet<String>> = config
        .valid
        .as_ref()
        .map(|valid| valid.iter().map(|(container, ifname)| key(name, container, ifname)).collect());
    let report = inner.collect(name, valid.as_ref()).map_err(|error| translate::error(&error))?;
    for removed in &report.removed {
        tracing::info!(removed, network = name, "collected");
    }
    if report.failed.is_empty() {
        return Ok(());
    }
    let message = format!("{} of network {name} could not be collected", report.failed.len());
    Err(Error::new(code::KERNEL, message).with(report.failed.join("; ")))
}
