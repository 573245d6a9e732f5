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
    /// A packet for a service was sent to a backend.
    Forwarded = 9, "forwarded", false;
    /// A backend's answer got the service's address and port.
    Replied = 10, "replied", false;
    /// A packet for a service without endpoints was answered with a refusal.
    Rejected = 11, "rejected_no_endpoints", true;
    /// A packet for a service that may use endpoints of this node only, and has none here, was dropped.
    NoLocalEndpoints = 12, "no_local_endpoints", true;
    /// A flow entry could not be stored.
    FlowFull = 13, "flow_full", true;
    /// An entry of a connection that still counted made room for another one's: the connection table is too small.
    FlowEvicted = 14, "flow_evicted", false;
    /// A packet's headers were cut short or malformed; it was left to the stack.
    BadHeader = 15, "bad_header", false;
    /// A fragment came before the first one of its packet, which tells the ports; it was left to the stack.
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
    /// A new connection, or the first datagram of a flow, was given a backend.
    Opened = 30, "flow_opened", false;
    /// The client's address is in none of the service's source ranges.
    SourceRefused = 31, "source_range_refused", true;
    /// The node has no address of the family that a packet must be masqueraded with.
    NoNodeAddress = 32, "no_node_address", true;
    /// All tried ports for masquerading are in use towards the backend.
    PortsExhausted = 33, "snat_ports_exhausted", true;
    /// There is no route to the backend or back to the client, or this node forwards nothing.
    NoRoute = 34, "no_route", true;
    /// A translated packet is larger than its way allows; the sender was told.
    TooBig = 35, "packet_too_big", true;
    /// A packet's last hop was this one; the sender was told.
    Expired = 36, "hop_limit_expired", true;
    /// An ICMP error about a translated packet was translated.
    IcmpTranslated = 37, "icmp_error_translated", false;
    /// A refusal could not be made out of a packet, so it was dropped silently.
    AnswerFailed = 38, "answer_failed", true;
    /// A program that a packet continues in is missing; the packet was dropped.
    CallMissing = 39, "program_missing", true;
    /// A packet was dropped silently that would have been answered, for many were answered this second.
    AnswerLimited = 41, "answer_limited", true;
    /// A packet went to its backend's node whole, in a header of its own, for the backend to answer the client itself.
    TunnelSent = 50, "tunnel_sent", false;
    /// A packet that came so was taken out of its header.
    TunnelReceived = 51, "tunnel_received", false;
    /// A packet that came so is from this node's own address, or has lost its flow on the way: it was dropped.
    TunnelRefused = 52, "tunnel_refused", true;
    /// A translated packet left by XDP, past the stack.
    XdpSent = 70, "xdp_sent", false;
}
