//! Ring host: whole-program rules that need no privilege. One file a subject.
#![expect(clippy::unwrap_used, reason = "a test that can't go on panics")]

mod api_crash;
mod api_logs;
mod api_reflector;
mod api_requests;
mod api_server;
mod api_watch;
mod controllers;
mod controllers_rollout;
#[expect(dead_code, reason = "shared with the soak, which uses all of it")]
#[path = "../bench/src/fuzz/mod.rs"]
mod fuzz;
mod fuzz_core;
