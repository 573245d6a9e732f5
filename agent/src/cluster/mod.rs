//! What the API says, as compact models, and what the agent tells it. No typed API object outlives the
//! function that decoded it.

pub mod client;
pub(crate) mod departure;
pub mod events;
pub mod lease;
pub mod node;
mod parse;
pub(crate) mod peers;
pub mod pods;
pub mod policies;
mod policies_wire;
pub(crate) mod ranges;
pub mod services;
mod wire;

pub use client::{ApiError, Client, chain};
