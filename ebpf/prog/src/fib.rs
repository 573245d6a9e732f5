//! Asking the kernel where a packet goes. Invariant: the layout is the kernel's.

use aya_ebpf::helpers::generated::bpf_fib_lookup;
use core::ffi::c_void;

/// BPF_FIB_LKUP_RET_* (uapi/linux/bpf.h).
pub const FIB_SUCCESS: i64 = 0;
pub const FIB_NO_NEIGH: i64 = 7;
pub const FIB_FRAG_NEEDED: i64 = 8;
/// BPF_FIB_LOOKUP_SKIP_NEIGH (uapi/linux/bpf.h, Linux 6.3).
const SKIP_NEIGH: u32 = 1 << 2;
/// EINVAL (asm-generic/errno-base.h): so answers a kernel that does not know a flag.
const UNKNOWN_FLAG: i64 = -22;
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

impl FibLookup {
    /// Asks where the packet of `ctx`, a context that bpf_fib_lookup takes, goes by these words, which have the answer then.
    /// Without `link` the link-layer addresses are not looked for, where the kernel can leave that out.
    ///
    /// # Safety
    /// `ctx` is the context that the program was called with.
    #[inline(always)]
    pub unsafe fn ask(&mut self, ctx: *mut c_void, link: bool) -> i64 {
        let size = size_of::<Self>() as i32;
        let params = core::ptr::from_mut(self).cast();
        // SAFETY: the words have the layout and the size of what the helper reads and writes; the context is the caller's word.
        unsafe {
            let answer = bpf_fib_lookup(ctx, params, size, if link { 0 } else { SKIP_NEIGH });
            if !link && answer == UNKNOWN_FLAG { bpf_fib_lookup(ctx, params, size, 0) } else { answer }
        }
    }
}
