//! The nftables data plane: maps and verdict maps in a table of its own. Invariant: the table is changed in
//! transactions, so that no packet meets a half-written service.

use super::{Dataplane, DataplaneConfig, DataplaneError};

/// Opens the data plane; what the table holds is replaced by the first round.
pub(super) fn open(_config: &DataplaneConfig) -> Result<Box<dyn Dataplane>, DataplaneError> {
    Err(DataplaneError::Missing { what: "the nftables data plane", hint: "not in this build".to_owned() })
}

/// Removes the table; one that does not exist is fine.
pub(super) fn uninstall(_config: &DataplaneConfig) -> Vec<DataplaneError> {
    Vec::new()
}
