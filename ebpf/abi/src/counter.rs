//! Reasons. Invariant: whatever a program decides other than "not ours" has exactly one reason here, and a reason's
//! number never changes within an ABI version.

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident = $number:literal, $text:literal, $drop:literal;)+) => {
        /// Why a program did what it did; index into the per-CPU counters map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Counter { $($(#[$meta])* $name = $number,)+ }

        /// Every counter in the order of its number.
        pub const COUNTERS: &[Counter] = &[$(Counter::$name,)+];

        impl Counter {
            /// The name that metrics and logs use.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$name => $text,)+ }
            }
            /// Whether the reason means that a packet or a call was refused.
            pub const fn is_drop(self) -> bool {
                match self { $(Counter::$name => $drop,)+ }
            }
        }
    };
}

counters! {
    /// A connect to a service was sent to a backend.
    Connect = 0, "connect_translated", false;
    /// A connect to a service without endpoints was refused.
    ConnectNoEndpoints = 1, "connect_no_endpoints", true;
    /// A datagram to a service was sent to a backend.
    Sendmsg = 2, "sendmsg_translated", false;
    /// A datagram to a service without endpoints was refused.
    SendmsgNoEndpoints = 3, "sendmsg_no_endpoints", true;
    /// A received datagram's source was shown as the service.
    Recvmsg = 4, "recvmsg_restored", false;
    /// A peer name was shown as the service.
    Getpeername = 5, "getpeername_restored", false;
    /// A lookup met an element that changed under it, twice; the call was refused.
    StaleSlot = 6, "stale_slot", true;
    /// A lookup met an element that changed under it and was repeated.
    SlotRetry = 7, "slot_retry", false;
    /// The reverse entry could not be stored; the call was refused because the program would see a stranger.
    ReverseFull = 8, "reverse_full", true;
    /// A packet for a NodePort was sent to a pod of this node.
    NodePortForward = 9, "node_port_forwarded", false;
    /// A pod's answer left with the node's address and port.
    NodePortReply = 10, "node_port_replied", false;
    /// A packet for a NodePort whose service has no endpoints was left to the node, which refuses it.
    NodePortNoEndpoints = 11, "node_port_no_endpoints", false;
    /// A packet for a NodePort whose service has endpoints on other nodes only was dropped.
    NodePortNoLocalEndpoints = 12, "node_port_no_local_endpoints", true;
    /// A flow entry could not be stored.
    FlowFull = 13, "flow_full", true;
    /// All tried backends already talk to the same client address and port through another NodePort.
    FlowCollision = 14, "flow_collision", true;
    /// A packet's headers were cut short or malformed; it was left to the stack.
    BadHeader = 15, "bad_header", false;
    /// A fragment was seen where ports are needed; it was left to the stack.
    Fragment = 16, "fragment", false;
    /// A rewrite failed half way, so the packet was dropped.
    RewriteFailed = 17, "rewrite_failed", true;
    /// A listener did not read fast enough, so an event was not written.
    EventLost = 18, "event_lost", false;
    /// A program's bind to a port or an address of a service was refused.
    BindRefused = 19, "bind_refused", true;
    /// A client could not be bound to its backend: the kernel had no memory for it.
    AffinityFull = 20, "affinity_full", false;
    /// An answer came through a service that is gone meanwhile; its sender was shown as it is.
    RecvmsgStale = 21, "recvmsg_stale", false;
}
