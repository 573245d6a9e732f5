//! From the object to loaded programs and pinned maps. Invariant: a map that is pinned is used as it is or refused,
//! never replaced, so what the kernel balances now goes on.

use super::flows::FlowTable;
use super::grow;
use super::map::{self, SHAPES};
use crate::dataplane::{DataplaneError, MapSizes};
use aya::programs::{CgroupSock, CgroupSockAddr, Program, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use sheave_ebpf_abi::map as names;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Makes the maps that are not pinned yet in `dir`, as large as `sizes` say, and loads the object over all of them.
pub(super) fn load(dir: &Path, sizes: &MapSizes) -> Result<Ebpf, DataplaneError> {
    load_at(sizes, |name| dir.join(name))
}

/// [`load`], with the pins where `place` says.
pub(super) fn load_at(sizes: &MapSizes, place: impl Fn(&str) -> PathBuf) -> Result<Ebpf, DataplaneError> {
    let mut loader = EbpfLoader::new();
    for shape in SHAPES {
        let path = place(shape.name);
        if let Some(dir) = path.parent() {
            map::open_pinned(dir, shape)?;
        }
        loader.map_pin_path(shape.name, path);
        if let Some(entries) = grow::wanted(shape.name, sizes) {
            loader.map_max_entries(shape.name, entries);
        }
    }
    let object = loader.load(sheave_ebpf_object::BYTES).map_err(|e| classify(e.into(), "the maps"))?;
    if let Some(dir) = place(names::FLOWS).parent() {
        FlowTable::prepare(dir)?;
    }
    Ok(object)
}

/// Whether every map is pinned in `dir`, so that nothing has to be loaded to read or write them.
pub(super) fn all_pinned(dir: &Path) -> Result<bool, DataplaneError> {
    for shape in SHAPES {
        if map::open_pinned(dir, shape)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Loads one program and gives its descriptor.
pub(super) fn program(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, DataplaneError> {
    let unknown = || DataplaneError::Load { what: name.to_owned(), source: "not in the object".into() };
    let program = ebpf.program_mut(name).ok_or_else(unknown)?;
    if let Ok(fd) = program.fd() {
        return duplicate(fd.as_fd());
    }
    let loaded = match program {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::CgroupSock(program) => CgroupSock::load(program),
        Program::SchedClassifier(program) => SchedClassifier::load(program),
        Program::Xdp(program) => Xdp::load(program),
        _ => return Err(unknown()),
    };
    loaded.map_err(|e| classify(e.into(), name))?;
    let program = ebpf.program_mut(name).ok_or_else(unknown)?;
    let fd = program.fd().map_err(|e| classify(e.into(), name))?;
    duplicate(fd.as_fd())
}

fn duplicate(fd: std::os::fd::BorrowedFd<'_>) -> Result<OwnedFd, DataplaneError> {
    fd.try_clone_to_owned().map_err(|source| DataplaneError::Host { op: "duplicate a descriptor", source })
}

/// Says what the kernel lacks where its error tells, and passes on the verifier's words where it does not.
pub(super) fn classify(error: Box<dyn Error + Send + Sync>, what: &str) -> DataplaneError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error.as_ref());
    while let Some(at) = cause {
        let errno = at.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        let missing = match errno {
            Some(libc::ENOSYS) => "bpf(2) in the kernel (CONFIG_BPF_SYSCALL)",
            Some(libc::EPERM) => "the right to use bpf(2) (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN)",
            _ => {
                cause = at.source();
                continue;
            }
        };
        return DataplaneError::Missing { what: missing, hint: format!("{what}: {error}") };
    }
    DataplaneError::Load { what: what.to_owned(), source: error }
}
