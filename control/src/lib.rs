//! The control plane.
pub mod resource;
