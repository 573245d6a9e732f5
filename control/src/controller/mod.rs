//! The controllers: each turns what it observes into actions, and the driver carries them out. Invariant: a
//! controller's file is pure (observed state in, plain-data actions out); only the driver touches the registry.

mod action;
mod claim;
mod deployment;
mod endpoint_slice;
mod garbage;
mod model;
mod namespace;
mod node;
mod pod_gc;
mod replica_set;
#[cfg(test)]
mod world;
