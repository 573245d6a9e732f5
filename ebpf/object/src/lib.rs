//! The compiled kernel programs. Invariant: either [`AVAILABLE`] is true and [`BYTES`] is the ELF object built from
//! `ebpf/prog` of this very tree, or it is false, the bytes are empty and [`WHY_NOT`] says what the build lacked.

use std::sync::LazyLock;

/// Gives the bytes the alignment that ELF parsers want.
#[repr(C, align(8))]
struct Aligned<B: ?Sized>(B);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/sheave-ebpf-prog.o")));

static NET_OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/sheave-ebpf-net.o")));

/// The object file of the service data plane; empty when it is not [`AVAILABLE`].
pub static BYTES: &[u8] = &OBJECT.0;

/// The object file of the network; empty when it is not [`AVAILABLE`].
pub static NET_BYTES: &[u8] = &NET_OBJECT.0;

/// Whether this build had a BPF toolchain.
pub const AVAILABLE: bool = matches!(env!("SHEAVE_EBPF_AVAILABLE").as_bytes(), b"1");

/// What was missing when the object is not [`AVAILABLE`]; empty otherwise.
pub const WHY_NOT: &str = env!("SHEAVE_EBPF_WHY_NOT");

/// A digest of [`BYTES`] that tells two builds of the programs apart (64-bit FNV-1a; not a defence against anybody).
pub fn digest() -> u64 {
    static DIGEST: LazyLock<u64> = LazyLock::new(|| fnv(BYTES));
    *DIGEST
}

/// The same of [`NET_BYTES`].
pub fn net_digest() -> u64 {
    static DIGEST: LazyLock<u64> = LazyLock::new(|| fnv(NET_BYTES));
    *DIGEST
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
