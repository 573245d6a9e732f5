//! The single door for developers.
fn main() {}
