//! The program at uplinks in XDP. Invariant: it is an optional fast way for what traffic control does as well, so a device
//! that can't have it is told in the log and balanced without it; what is attached is replaced in one step.

use super::link::{self, LINKS, State, Target};
use super::{load, sys, uplink};
use crate::dataplane::DataplaneError;
use aya::Ebpf;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// The program.
const PROGRAM: &str = "shv_xdp";
/// BPF_XDP (uapi/linux/bpf.h).
const ATTACH_TYPE: u32 = 37;
/// Beginning of the names of its pins.
const PREFIX: &str = "xdp_";

/// How the kernel runs an XDP program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// In the driver, before there is a socket buffer.
    Native,
    /// In the stack, where the driver has no support.
    Generic,
}

impl Mode {
    /// `XDP_FLAGS_DRV_MODE` and `XDP_FLAGS_SKB_MODE` (uapi/linux/if_link.h).
    pub(super) const fn flags(self) -> u32 {
        match self {
            Self::Native => 1 << 2,
            Self::Generic => 1 << 1,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

fn pin(dir: &Path, index: u32) -> PathBuf {
    dir.join(LINKS).join(format!("{PREFIX}{index}"))
}

/// The pin that says that the device can't have it, so that it is tried anew only with new programs.
fn refused_pin(dir: &Path, index: u32) -> PathBuf {
    dir.join(LINKS).join(format!("{PREFIX}{index}_refused"))
}

/// Whether the uplink is as `wanted`: with the program, unless it can't have it, or without.
pub(super) fn is_settled(dir: &Path, name: &str, wanted: bool) -> Result<bool, DataplaneError> {
    let index = uplink::index(name)?;
    let state = link::state(&pin(dir, index), &Target::Xdp(index, Mode::Native))?;
    Ok(match state {
        State::Attached => wanted,
        State::Elsewhere => false,
        State::Absent => !wanted || refused_pin(dir, index).exists(),
    })
}

/// Puts the program at the uplink, in the driver where that has it. A device without it is no error.
pub(super) fn attach(dir: &Path, ebpf: &mut Ebpf, name: &str) -> Result<(), DataplaneError> {
    let index = uplink::index(name)?;
    let program = load::program(ebpf, PROGRAM)?;
    let path = pin(dir, index);
    let hook = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let inherited = link::inherited(dir, &hook);
    link::unlink(&refused_pin(dir, index))?;
    let held = link::state(&path, &Target::Xdp(index, Mode::Native))? == State::Attached;
    let mut refusal = None;
    for mode in modes(name) {
        match link::attach(&path, &Target::Xdp(index, *mode), ATTACH_TYPE, program.as_fd(), &inherited) {
            // In the mode that it was in.
            Ok(()) if held => return Ok(()),
            Ok(()) => {
                let native = refusal.map(|error: DataplaneError| chain(&error)).unwrap_or_default();
                tracing::info!(device = name, mode = mode.name(), native, "balancing in XDP");
                return Ok(());
            }
            Err(error @ DataplaneError::Attach { .. }) => refusal = Some(error),
            Err(error) => return Err(error),
        }
    }
    if let Some(error) = refusal {
        tracing::warn!(
            device = name,
            error = chain(&error),
            "no XDP here, balancing in traffic control only"
        );
    }
    let mark = refused_pin(dir, index);
    sys::obj_pin(program.as_fd(), &mark).map_err(|source| DataplaneError::Pin {
        op: "make",
        path: mark,
        source,
    })
}

/// A veth device runs XDP natively, but what it sends arrives only where its peer, perhaps in another namespace, has a
/// program or GRO of its own, which nobody can see from here: there the generic mode is the safe one.
fn modes(name: &str) -> &'static [Mode] {
    match sys::driver(name) {
        Ok(driver) if driver == "veth" => &[Mode::Generic],
        _ => &[Mode::Native, Mode::Generic],
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    text
}

/// Takes the program off every device that is not among `keep`.
pub(super) fn detach_others(dir: &Path, keep: &[u32]) -> Result<(), DataplaneError> {
    for entry in fs::read_dir(dir.join(LINKS)).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let Some(index) = file.strip_prefix(PREFIX).and_then(|rest| rest.split('_').next()) else { continue };
        if index.parse().is_ok_and(|index: u32| keep.contains(&index)) {
            continue;
        }
        if let Ok(link) = sys::obj_get(&entry.path())
            && let Err(error) = sys::link_detach(link.as_fd())
            && error.kind() != io::ErrorKind::InvalidInput
        {
            // Severed already, or gone with its last pin.
            tracing::debug!(pin = file, %error, "not severed");
        }
        link::unlink(&entry.path())?;
    }
    Ok(())
}
