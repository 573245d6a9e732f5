//! The control plane of Sheave: what is in the store was durable before anybody saw it, and
//! everything that reads or writes an object goes through the registry.
//!
//! `resource` holds the pure rules, `store` the bytes, `registry` puts the two together, `api` is
//! the only room that knows HTTP, `controller` and `schedule` act through the registry.

pub mod api;
pub mod controller;
pub mod limits;
pub mod pki;
pub mod registry;
pub mod resource;
mod run;
pub mod schedule;
pub mod store;

pub use run::{ControlConfig, ControlError, Ready, run, run_with};
