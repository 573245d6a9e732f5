//! Asking the kernel where a packet goes. Invariant: the layout is the kernel's.

/// BPF_FIB_LKUP_RET_* (uapi/linux/bpf.h).
pub const FIB_SUCCESS: i64 = 0;
pub const FIB_NO_NEIGH: i64 = 7;
pub const FIB_FRAG_NEEDED: i64 = 8;
/// AF_INET and AF_INET6 (linux/socket.h).
pub const AF_INET: u8 = 2;
pub const AF_INET6: u8 = 10;

/// `struct bpf_fib_lookup` (uapi/linux/bpf.h), its unions as what is used of them here.
#[repr(C)]
pub struct FibLookup {
    pub family: u8,
    pub proto: u8,
    pub sport: u16,
    pub dport: u16,
    /// Length that is asked for, 0 for no question; the answer's MTU.
    pub len: u16,
    pub device: u32,
    pub flow_info: u32,
    pub src: [u32; 4],
    /// Destination; the answer's next hop.
    pub dst: [u32; 4],
    pub vlan: u32,
    pub smac: [u8; 6],
    pub dmac: [u8; 6],
}
