//! Containers of this node.

pub mod image;
