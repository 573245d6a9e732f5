//! Packet and balancing logic.
#![no_std]
