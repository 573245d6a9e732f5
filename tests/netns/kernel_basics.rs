//! What every other test of this suite stands on; on a strange kernel these say first what is missing.

use std::fs;
use std::path::Path;

use sheave_harness::{Cgroup, NetNs, cgroup, isolated, require_root};

#[test]
fn the_v2_hierarchy_takes_private_cgroups() {
    if !require_root() {
        return;
    }
    let cgroup = Cgroup::new("kernel");
    assert!(cgroup.path().starts_with(cgroup::v2_root()));
    assert!(cgroup.path().join("cgroup.kill").exists(), "cgroup.kill needs Linux 5.14");
}

#[test]
fn namespaces_talk_over_veths() {
    if !require_root() {
        return;
    }
    let (a, b) = (NetNs::new(), NetNs::new());
    a.veth("a0", &b, "b0");
    a.ip(&["addr", "add", "192.0.2.1/24", "dev", "a0"]);
    b.ip(&["addr", "add", "192.0.2.2/24", "dev", "b0"]);
    let listener = b.run(|| std::net::TcpListener::bind("192.0.2.2:0")).expect("listen in b");
    let address = listener.local_addr().expect("an address");
    a.run(|| std::net::TcpStream::connect(address)).expect("connect from a to b");
}

#[test]
fn isolated_tests_see_their_namespace() {
    isolated(module_path!(), "isolated_tests_see_their_namespace", |_| {
        let links = fs::read_to_string("/proc/thread-self/net/dev").expect("read the links");
        assert_eq!(
            links.lines().skip(2).filter(|line| !line.trim_start().starts_with("lo:")).count(),
            0,
            "{links}"
        );
    });
}

#[test]
fn the_kernel_has_bpf_a_filesystem_for_it_and_its_own_types() {
    let filesystems = fs::read_to_string("/proc/filesystems").expect("read /proc/filesystems");
    assert!(filesystems.lines().any(|line| line.split('\t').nth(1) == Some("bpf")), "{filesystems}");
    assert!(Path::new("/sys/kernel/btf/vmlinux").exists());
}
