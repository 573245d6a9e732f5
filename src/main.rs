//! The `sheave` program: parses its arguments and dispatches; holds no logic of its own.
fn main() {}
