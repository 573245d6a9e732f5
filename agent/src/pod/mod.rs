//! Pods: a pure core that decides from (desired pod, what runs, clock) what to do next, and one
//! driver that does it. The core does no I/O and reads no clock.

pub mod act;
pub mod backoff;
pub mod driver;
pub mod env;
pub mod machine;
pub mod model;
pub mod probe;
pub mod prober;
pub mod quantity;
pub mod refuse;
pub mod registry;
pub mod resources;
pub mod spec;
pub mod status;
pub mod volumes;
pub mod worker;
