//! Which data plane is used, and why. Invariant: a mode is written down before it is put to work, and the one that it
//! replaces stays written down until it is off the host, so that a start after any crash knows what to remove.

use super::ebpf::EbpfDataplane;
use super::{Dataplane, DataplaneConfig, DataplaneError, Mode, ipvs, nftables};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Name of the record below the run directory.
const RECORD: &str = "data-plane.json";

/// What this node balances with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// The mode.
    pub mode: Mode,
    /// Why it and not another, in a sentence.
    pub why: String,
    /// Modes that it replaces and that are still to be removed.
    #[serde(default)]
    pub leaving: BTreeSet<Mode>,
}

fn record(run_dir: &Path) -> PathBuf {
    run_dir.join(RECORD)
}

/// What the last agent that ran over `run_dir` balanced with; `None` when none did.
///
/// # Errors
/// A record that can't be read.
pub fn active(run_dir: &Path) -> io::Result<Option<Active>> {
    match fs::read(record(run_dir)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remember(run_dir: &Path, active: &Active) -> Result<(), DataplaneError> {
    let failed = |source| DataplaneError::Host { op: "write down which data plane is active", source };
    let (path, fresh) = (record(run_dir), run_dir.join(format!("{RECORD}.new")));
    let bytes = serde_json::to_vec(active).map_err(|e| failed(e.into()))?;
    fs::write(&fresh, bytes).and_then(|()| fs::rename(&fresh, &path)).map_err(failed)
}

/// What `now` replaces, given what was written down before.
fn leaving(before: Option<&Active>, now: Mode) -> BTreeSet<Mode> {
    let held = before.into_iter().flat_map(|before| before.leaving.iter().copied().chain([before.mode]));
    held.filter(|mode| *mode != now).collect()
}

fn open_one(mode: Mode, config: &DataplaneConfig) -> Result<Box<dyn Dataplane>, DataplaneError> {
    match mode {
        Mode::Ebpf => {
            let plane = EbpfDataplane::open(config)?;
            config.stats.set_counters(plane.counters()?);
            Ok(Box::new(plane))
        }
        Mode::Nftables => nftables::open(config),
        Mode::Ipvs => ipvs::open(config),
    }
}

/// Whether the error says that this host can't have the mode, so that another is worth a try.
fn rules_out(error: &DataplaneError) -> bool {
    matches!(error, DataplaneError::Missing { .. } | DataplaneError::Load { .. })
}

/// Tries the modes in the order of [`Mode::ALL`]; what rules one out becomes part of the reason for the next.
fn first_possible<T>(
    mut open: impl FnMut(Mode) -> Result<T, DataplaneError>,
) -> Result<(Mode, T, String), DataplaneError> {
    let mut without = Vec::new();
    let mut last = None;
    for mode in Mode::ALL {
        match open(mode) {
            Ok(opened) => {
                let why = match without.as_slice() {
                    [] => format!("auto: the best mode, {}, works on this host", mode.name()),
                    some => format!("auto: {}; {} works", some.join("; "), mode.name()),
                };
                return Ok((mode, opened, why));
            }
            Err(error) if rules_out(&error) => {
                without.push(format!("no {}: {}", mode.name(), in_full(&error)));
                last = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(match last {
        Some(_) => DataplaneError::Missing { what: "every data plane", hint: without.join("; ") },
        None => DataplaneError::Missing { what: "every data plane", hint: "none is built in".to_owned() },
    })
}

/// An error with its causes.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    text
}

/// A data plane that was chosen, and what is to go when it works.
pub(super) struct Chosen {
    pub(super) plane: Box<dyn Dataplane>,
    pub(super) active: Active,
}

/// Opens what `config` asks for, or the best that works.
pub(super) fn open(config: &DataplaneConfig) -> Result<Chosen, DataplaneError> {
    let (mode, plane, why) = match config.mode {
        Some(mode) => (mode, open_one(mode, config)?, "asked for by --data-plane".to_owned()),
        None => first_possible(|mode| open_one(mode, config))?,
    };
    let before = match &config.run_dir {
        Some(run_dir) => active(run_dir).unwrap_or_else(|error| {
            tracing::warn!(%error, "which data plane was active before can't be read; nothing is removed");
            None
        }),
        None => None,
    };
    let active = Active { mode, why, leaving: leaving(before.as_ref(), mode) };
    tracing::info!(mode = mode.name(), why = active.why, "data plane");
    if let Some(run_dir) = &config.run_dir {
        remember(run_dir, &active)?;
    }
    Ok(Chosen { plane, active })
}

/// Removes what `active` replaces, now that it works. What can't be removed, or still has connections, stays written down
/// for the next attempt.
pub(super) fn leave(active: &mut Active, config: &DataplaneConfig) {
    for mode in active.leaving.clone() {
        match super::retire(mode, config) {
            Ok(true) => {
                let now = active.mode.name();
                tracing::info!(mode = mode.name(), now, "removed the data plane that was replaced");
                active.leaving.remove(&mode);
            }
            Ok(false) => {
                tracing::debug!(mode = mode.name(), "emptied; connections that it translated still live")
            }
            Err(errors) => {
                for error in &errors {
                    tracing::warn!(
                        mode = mode.name(),
                        error = error as &dyn std::error::Error,
                        "a data plane that was replaced is not wholly removed; trying again"
                    );
                }
            }
        }
    }
    if let Some(run_dir) = &config.run_dir
        && let Err(error) = remember(run_dir, active)
    {
        tracing::warn!(error = &error as &dyn std::error::Error, "data plane");
    }
}

/// Takes every mode off the host that may be there: the one that is written down and those it replaces or, where
/// nothing is, all of them. Goes on past errors.
pub fn remove_all(config: &DataplaneConfig) -> Vec<DataplaneError> {
    let written = config.run_dir.as_deref().map(active).and_then(Result::ok).flatten();
    let modes: BTreeSet<Mode> = match written {
        // Maps may have been made by an agent that did not write anything down.
        Some(active) => active.leaving.into_iter().chain([active.mode, Mode::Ebpf]).collect(),
        None => Mode::ALL.into_iter().collect(),
    };
    modes.into_iter().flat_map(|mode| super::remove(mode, config)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(what: &'static str) -> DataplaneError {
        DataplaneError::Missing { what, hint: "not here".to_owned() }
    }

    #[test]
    fn auto_takes_the_best_and_says_why_not_the_better_ones() {
        let (mode, (), why) = first_possible(|_| Ok(())).unwrap();
        assert_eq!(mode, Mode::Ebpf);
        assert!(why.contains("ebpf"), "{why}");
        let ipvs_only = |mode| if mode == Mode::Ipvs { Ok(()) } else { Err(missing("a thing")) };
        let (mode, (), why) = first_possible(ipvs_only).unwrap();
        assert_eq!(mode, Mode::Ipvs);
        assert!(why.contains("no ebpf: this host lacks a thing") && why.contains("no nftables"), "{why}");
        let error = first_possible(|_| -> Result<(), _> { Err(missing("a thing")) }).unwrap_err().to_string();
        assert!(error.contains("no ipvs: this host lacks a thing"), "{error}");
    }

    #[test]
    fn a_fault_of_the_best_mode_is_no_reason_for_another() {
        let fault = || DataplaneError::Host { op: "x", source: io::ErrorKind::OutOfMemory.into() };
        let opened = first_possible(|mode| if mode == Mode::Ebpf { Err(fault()) } else { Ok(()) });
        assert!(matches!(opened, Err(DataplaneError::Host { .. })));
    }

    #[test]
    fn what_is_replaced_stays_written_down_until_it_is_gone() {
        let active = |mode, leaving: &[Mode]| Active {
            mode,
            why: String::new(),
            leaving: leaving.iter().copied().collect(),
        };
        let set = |modes: &[Mode]| modes.iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(leaving(None, Mode::Ebpf), set(&[]));
        assert_eq!(leaving(Some(&active(Mode::Ebpf, &[])), Mode::Ebpf), set(&[]));
        assert_eq!(leaving(Some(&active(Mode::Ebpf, &[])), Mode::Nftables), set(&[Mode::Ebpf]));
        // Killed between putting nftables to work and removing eBPF, then told to use eBPF again.
        let between = active(Mode::Nftables, &[Mode::Ebpf]);
        assert_eq!(leaving(Some(&between), Mode::Ebpf), set(&[Mode::Nftables]));
        assert_eq!(leaving(Some(&between), Mode::Ipvs), set(&[Mode::Nftables, Mode::Ebpf]));
    }

    #[test]
    fn the_record_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(super::active(dir.path()).unwrap(), None);
        let held = Active { mode: Mode::Nftables, why: "because".to_owned(), leaving: [Mode::Ebpf].into() };
        remember(dir.path(), &held).unwrap();
        assert_eq!(super::active(dir.path()).unwrap(), Some(held));
        fs::write(record(dir.path()), "{").unwrap();
        assert!(super::active(dir.path()).is_err());
    }
}
