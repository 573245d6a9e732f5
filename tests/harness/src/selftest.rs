//! The guards prove themselves: a guard that leaks or does not isolate would make every suite lie.

use std::net::TcpListener;
use std::process::Command;

use crate::{Cgroup, NetNs, isolated, require_root};

#[test]
fn a_namespace_has_a_loopback_of_its_own() {
    if !require_root() {
        return;
    }
    let (a, b) = (NetNs::new(), NetNs::new());
    let in_a = a.run(|| TcpListener::bind("127.0.0.1:18080").expect("lo is up"));
    let in_b = b.run(|| TcpListener::bind("127.0.0.1:18080").expect("the port is free in another namespace"));
    drop((in_a, in_b));
}

#[test]
fn commands_and_veths_reach_the_namespace() {
    if !require_root() {
        return;
    }
    let (a, b) = (NetNs::new(), NetNs::new());
    a.veth("left", &b, "right");
    assert!(a.ip(&["-brief", "link"]).contains("left"));
    assert!(b.ip(&["-brief", "link"]).contains("right"));
}

#[test]
fn a_cgroup_holds_its_processes_and_takes_them_with_it() {
    if !require_root() {
        return;
    }
    let cgroup = Cgroup::new("selftest");
    let mut command = Command::new("sleep");
    cgroup.apply(command.arg("1000"));
    let mut child = command.spawn().expect("start sleep");
    assert_eq!(cgroup.pids(), [child.id()]);
    std::fs::create_dir(cgroup.path().join("below")).expect("make a child cgroup");
    let path = cgroup.path().to_owned();
    let reaper = std::thread::spawn(move || child.wait().expect("wait for sleep"));
    drop(cgroup);
    assert!(!reaper.join().expect("reaper").success());
    assert!(!path.exists());
}

#[test]
fn isolated_bodies_run_in_the_cgroup_they_are_told() {
    isolated(module_path!(), "isolated_bodies_run_in_the_cgroup_they_are_told", |cgroup| {
        let own = std::fs::read_to_string("/proc/self/cgroup").expect("read own cgroup");
        let name = cgroup.file_name().expect("a name").to_str().expect("ASCII");
        assert!(own.contains(name), "{own}");
    });
}

#[test]
fn isolated_failures_come_out() {
    let run = || isolated(module_path!(), "isolated_failures_come_out", |_| panic!("from the inside"));
    if crate::isolate::running().is_some() {
        return run();
    }
    if !require_root() {
        return;
    }
    let failure = std::panic::catch_unwind(run).expect_err("the inner panic fails the outer test");
    let message = failure.downcast_ref::<String>().expect("a formatted message");
    assert!(message.contains("from the inside"), "{message}");
    assert!(
        !message.lines().any(|line| line.starts_with("test ")),
        "no verdict but the outer one: {message}"
    );
}
