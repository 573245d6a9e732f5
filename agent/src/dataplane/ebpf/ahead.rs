//! Programs that the kernel verifies while the maps are filled: on a node with many services either takes seconds.
//! Invariant: who asks for the object gets it with every program loaded that is to be attached, or the first error.

use super::load;
use crate::dataplane::DataplaneError;
use aya::Ebpf;
use std::io;
use std::thread::JoinHandle;

/// An object whose programs are being loaded.
#[derive(Debug)]
pub(super) struct Ahead(JoinHandle<Result<Ebpf, DataplaneError>>);

impl Ahead {
    /// Begins to load these programs of the object.
    pub(super) fn start(mut object: Ebpf, names: Vec<&'static str>) -> Result<Self, DataplaneError> {
        let thread = std::thread::Builder::new().name("verify".to_owned());
        let spawned = thread.spawn(move || {
            for name in names {
                load::program(&mut object, name)?;
            }
            Ok(object)
        });
        let failed = |source| DataplaneError::Host { op: "start a thread that loads programs", source };
        spawned.map(Self).map_err(failed)
    }

    /// Waits for the rest of them.
    pub(super) fn finish(self) -> Result<Ebpf, DataplaneError> {
        let panicked = |_| DataplaneError::Host {
            op: "load programs",
            source: io::Error::other("the thread that does it panicked"),
        };
        self.0.join().map_err(panicked)?
    }
}
