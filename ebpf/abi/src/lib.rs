//! Byte layouts shared by programs and loader.
#![no_std]
