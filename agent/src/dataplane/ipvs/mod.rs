//! The IPVS data plane: virtual services by generic netlink, and nftables for what IPVS cannot do. Invariant: a service is changed by
//! differences, so that what is established goes on.

use super::{Dataplane, DataplaneConfig, DataplaneError};

/// Opens the data plane; what the kernel holds is made equal to the first round.
pub(super) fn open(_config: &DataplaneConfig) -> Result<Box<dyn Dataplane>, DataplaneError> {
    Err(DataplaneError::Missing { what: "the IPVS data plane", hint: "not in this build".to_owned() })
}

/// Removes all that it made; what does not exist is fine.
pub(super) fn uninstall(_config: &DataplaneConfig) -> Vec<DataplaneError> {
    Vec::new()
}
