//! What the programs of both objects need of the kernel. Invariant: nothing here decides anything.
#![no_std]
#![feature(asm_experimental_arch)]
#![expect(unsafe_code, reason = "map values, context accesses and helpers are unsafe in a BPF program")]

pub mod fib;
pub mod frame;
pub mod value;
