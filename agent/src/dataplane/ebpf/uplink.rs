//! Programs on uplinks and pods' devices: by tcx links, or by filters of a clsact qdisc on kernels before 6.6. Invariant: as with
//! every link, what is attached is replaced in one step; the clsact qdisc itself is never removed, for others may use
//! it.

use super::link::{self, DeviceHook, LINKS, Order, Target};
use super::{load, sys};
use crate::dataplane::DataplaneError;
use crate::network::has_clsact_filter;
use aya::Ebpf;
use aya::programs::links::Link as _;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcHandle};
use aya::programs::{Program, SchedClassifier};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Priority of our filters among those of a clsact qdisc; ours and nobody else's by convention only.
fn priority(order: Order, direction: &str) -> u16 {
    match order {
        Order::Services => 0x5e,
        Order::Policies if order.is_first(direction) => 0x5d,
        Order::Policies => 0x5f,
    }
}

/// Handle of our filters.
const HANDLE: TcHandle = TcHandle::new(0, HANDLE_MINOR);
const HANDLE_MINOR: u16 = 1;

fn attach_type(direction: &str) -> TcAttachType {
    if direction == "ingress" { TcAttachType::Ingress } else { TcAttachType::Egress }
}

/// Index of a device, which pins are named by: bpffs takes no dots, interface names do.
pub(super) fn index(name: &str) -> Result<u32, DataplaneError> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|e| DataplaneError::Attach { hook: format!("device {name}"), source: e.into() })
}

const TCX: &str = "tcx";
const CLSACT: &str = "clsact";

fn tcx_pin(dir: &Path, index: u32, direction: &str) -> PathBuf {
    dir.join(LINKS).join(format!("{TCX}_{index}_{direction}"))
}

fn clsact_pin(dir: &Path, index: u32, direction: &str) -> PathBuf {
    dir.join(LINKS).join(format!("{CLSACT}_{index}_{direction}"))
}

/// What the name of a pin at a device says.
struct PinName {
    /// The kind of hook, of XDP too.
    kind: String,
    index: u32,
    /// Empty for XDP.
    direction: String,
}

impl PinName {
    /// `None` where it is no such pin.
    fn read(pin: &Path) -> Option<Self> {
        let file = pin.file_name()?.to_str()?;
        let mut parts = file.split('_');
        let (kind, index) = (parts.next()?, parts.next()?.parse().ok()?);
        let direction = parts.next().unwrap_or_default().to_owned();
        [TCX, CLSACT, "xdp"].contains(&kind).then(|| Self { kind: kind.to_owned(), index, direction })
    }
}

/// Every pin of a link or filter, with what its name says where it is at a device.
fn pins(dir: &Path) -> impl Iterator<Item = (PathBuf, PinName)> {
    let entries = fs::read_dir(dir.join(LINKS)).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter_map(|path| PinName::read(&path).map(|name| (path, name)))
}

/// Names of the devices that begin with one of `prefixes`.
pub(super) fn named(prefixes: &[String]) -> Result<Vec<String>, DataplaneError> {
    let all = nix::net::if_::if_nameindex()
        .map_err(|e| DataplaneError::Host { op: "list network devices", source: e.into() })?;
    let names = all.iter().filter_map(|device| device.name().to_str().ok());
    let mut found: Vec<_> = names
        .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())))
        .map(str::to_owned)
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// Whether both directions of the device have their tcx link or their clsact filter in place.
pub(super) fn is_attached(
    dir: &Path,
    name: &str,
    hooks: &[DeviceHook],
    order: Order,
) -> Result<bool, DataplaneError> {
    let index = index(name)?;
    for (_, direction, _) in hooks {
        let in_place = match link::state(&tcx_pin(dir, index, direction), &Target::Device(index))? {
            link::State::Attached => true,
            link::State::Elsewhere => false,
            link::State::Absent => {
                clsact_pin(dir, index, direction).exists()
                    && has_clsact_filter(
                        index,
                        *direction == "ingress",
                        priority(order, direction),
                        HANDLE_MINOR,
                    )
                    .map_err(|source| DataplaneError::Attach {
                        hook: format!("clsact {name} {direction}"),
                        source,
                    })?
            }
        };
        if !in_place {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes the pins of uplinks whose device is gone: their links are severed for good.
pub(super) fn forget_gone(dir: &Path) -> Result<(), DataplaneError> {
    for (path, _) in pins(dir).filter(|(_, name)| super::device_name(name.index).is_none()) {
        link::unlink(&path)?;
    }
    Ok(())
}

/// Puts the programs at the device.
pub(super) fn attach(
    dir: &Path,
    ebpf: &mut Ebpf,
    name: &str,
    hooks: &[DeviceHook],
    order: Order,
) -> Result<(), DataplaneError> {
    let index = index(name)?;
    for (program, direction, attach_type) in hooks {
        let fd = load::program(ebpf, program)?;
        let path = tcx_pin(dir, index, direction);
        let hook = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let inherited = link::inherited(dir, &hook);
        let target =
            if order.is_first(direction) { Target::DeviceFirst(index) } else { Target::Device(index) };
        match link::attach(&path, &target, *attach_type, fd.as_fd(), &inherited) {
            Ok(()) => {}
            // Kernels before 6.6 don't know the attach type.
            Err(DataplaneError::Attach { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                attach_clsact(ebpf, program, name, direction, order)?;
                let mark = clsact_pin(dir, index, direction);
                link::unlink(&mark)?;
                sys::obj_pin(fd.as_fd(), &mark).map_err(|source| DataplaneError::Pin {
                    op: "make",
                    path: mark,
                    source,
                })?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn attach_clsact(
    ebpf: &mut Ebpf,
    program: &str,
    name: &str,
    direction: &str,
    order: Order,
) -> Result<(), DataplaneError> {
    let failed =
        |source: io::Error| DataplaneError::Attach { hook: format!("clsact {name} {direction}"), source };
    let Some(Program::SchedClassifier(classifier)) = ebpf.program_mut(program) else {
        return Err(failed(io::ErrorKind::NotFound.into()));
    };
    match tc::qdisc_add_clsact(name) {
        Ok(()) | Err(tc::TcError::AlreadyAttached) => {}
        Err(e) if errno(&e) == Some(libc::EEXIST) => {}
        Err(e) => return Err(failed(io::Error::other(e))),
    }
    let place = attach_type(direction);
    let priority = priority(order, direction);
    let held = SchedClassifierLink::attached(name, place, priority, HANDLE, None).map_err(failed)?;
    let id = match classifier.attach_to_link(held) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority, handle: HANDLE, classid: None };
            classifier
                .attach_with_options(name, place, TcAttachOptions::Netlink(options))
                .map_err(|e| failed(io::Error::other(e)))?
        }
    };
    keep(classifier, id).map_err(failed)
}

fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(at) = cause {
        if let Some(errno) = at.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(errno);
        }
        cause = at.source();
    }
    None
}

/// Whether there is nothing to remove a filter from: the device, its qdisc or the filter is gone.
fn is_gone(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(errno(error), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

/// The filter stays when the agent goes: its guard must not run.
fn keep(classifier: &mut SchedClassifier, id: tc::SchedClassifierLinkId) -> io::Result<()> {
    let link = classifier.take_link(id).map_err(io::Error::other)?;
    std::mem::forget(link);
    Ok(())
}

/// Pins of programs at devices that are there, but not at one of these hooks.
pub(super) fn others(dir: &Path, devices: &[(String, &'static [DeviceHook])]) -> Vec<PathBuf> {
    let hooks = devices.iter().filter_map(|(name, hooks)| Some((index(name).ok()?, *hooks)));
    let wanted: BTreeSet<(u32, &str)> = hooks
        .flat_map(|(index, hooks)| hooks.iter().map(move |(_, direction, _)| (index, *direction)))
        .collect();
    let is_other = |name: &PinName| {
        name.kind != "xdp"
            && !wanted.contains(&(name.index, name.direction.as_str()))
            && super::device_name(name.index).is_some()
    };
    pins(dir).filter(|(_, name)| is_other(name)).map(|(path, _)| path).collect()
}

/// Takes the programs off hooks that are none of those of `devices`, as after a change of settings.
pub(super) fn detach_others(
    dir: &Path,
    devices: &[(String, &'static [DeviceHook])],
    order: Order,
) -> Result<(), DataplaneError> {
    for path in others(dir, devices) {
        // Does nothing where the pin is a link's.
        detach_filter(&path, order)?;
        if let Err(error) = sys::obj_get(&path).and_then(|link| sys::link_detach(link.as_fd())) {
            // A filter's mark is no link, and a link that can't be severed is gone with its pin.
            tracing::debug!(path = %path.display(), %error, "not severed");
        }
        link::unlink(&path)?;
    }
    Ok(())
}

/// Removes our clsact filters that pins in `dir` tell of. Devices that are gone took theirs with them.
pub(super) fn detach_clsact(dir: &Path, order: Order) -> Vec<DataplaneError> {
    pins(dir).filter_map(|(path, _)| detach_filter(&path, order).err()).collect()
}

/// Removes the clsact filter that a pin tells of, if it is one that does.
fn detach_filter(pin: &Path, order: Order) -> Result<(), DataplaneError> {
    let Some(PinName { kind, index, direction }) = PinName::read(pin) else { return Ok(()) };
    let Some(name) = super::device_name(index).filter(|_| kind == CLSACT) else { return Ok(()) };
    let priority = priority(order, &direction);
    let removed = SchedClassifierLink::attached(&name, attach_type(&direction), priority, HANDLE, None)
        .map_err(|source| (is_gone(&source), source))
        .and_then(|held| held.detach().map_err(|e| (is_gone(&e), io::Error::other(e))));
    match removed {
        Err((false, source)) => {
            let hook = format!("{CLSACT} {name} {direction}");
            Err(DataplaneError::Attach { hook, source })
        }
        _ => Ok(()),
    }
}
