//! Ring prog: the eBPF programs, loaded and run on made-up packets by BPF_PROG_TEST_RUN. One file a subject.

mod flood;
mod flows;
#[expect(unreachable_pub, reason = "shared with the core's tests, which use all of it")]
#[path = "../../ebpf/core/src/golden.rs"]
mod golden;
mod packets;
#[expect(dead_code, reason = "shared with the netns suite, which uses all of it")]
#[path = "../netns/service_world.rs"]
mod service_world;
mod xdp;
