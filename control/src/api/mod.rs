//! The HTTP room: TLS, identity, paths, forms and streams. It decides nothing about objects; that
//! is the registry's.

mod auth;
mod handle;
mod list;
mod log;
mod metrics;
mod negotiate;
mod request;
mod respond;
mod server;
mod stall;
mod watch;

pub use auth::Identity;
pub use server::{Server, ServerError, ServerTls};
