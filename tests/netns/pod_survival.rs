//! kill -9 of the daemon: what runs goes on, with its pids, its counts and its readiness.

use std::collections::BTreeMap;

use sheave_harness::{require_root, wait_for};

use crate::pod_bed::Bed;

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: ready}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: a
    image: localhost/echo:1
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 1, failureThreshold: 1}
    livenessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1, failureThreshold: 1}
  - {name: b, image: "localhost/busybox:1", command: [sleep, "1000"]}
---
apiVersion: v1
kind: Pod
metadata: {name: crash}
spec:
  containers: [{name: c, image: "localhost/busybox:1", command: [sh, -c, "exit 3"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: done}
spec:
  restartPolicy: Never
  containers: [{name: c, image: "localhost/busybox:1", command: [sh, -c, "echo once"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: late}
spec:
  restartPolicy: Never
  containers: [{name: c, image: "localhost/busybox:1", command: [sh, -c, "cat /v/go; exit 7"], volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, hostPath: {path: PLACE, type: DirectoryOrCreate}}]
"#;

/// What must not change: ids, counts and times of every container, and the pod's conditions.
fn facts(bed: &Bed, pods: &[&str]) -> BTreeMap<String, String> {
    let paths = [
        "{.status.containerStatuses[*].containerID}",
        "{.status.containerStatuses[*].restartCount}",
        "{.status.containerStatuses[*].state.running.startedAt}",
        "{.status.conditions[*].lastTransitionTime}",
        "{.status.podIPs}",
        "{.status.phase}",
    ];
    let path = format!("jsonpath={}", paths.join("|"));
    pods.iter().map(|pod| ((*pod).to_owned(), bed.node.kubectl(&["get", "pod", pod, "-o", &path]))).collect()
}

/// The processes of the pods that stay, holders of sandboxes included.
const STEADY: [&str; 7] = ["cat", "echo", "sh", "sheave-pause", "sheave-pause", "sheave-pause", "sleep"];

/// The name of a process, empty where it has ended.
fn name_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
fn nothing_that_runs_notices_that_the_daemon_was_killed() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(&[]);
    let place = bed.node.dir().join("late");
    // Reading a pipe waits without a process of its own that would come and go.
    std::fs::create_dir(&place).expect("make the place");
    nix::unistd::mkfifo(&place.join("go"), nix::sys::stat::Mode::S_IRWXU).expect("make a pipe");
    bed.apply(&PODS.replace("PLACE", &place.display().to_string()));
    bed.wait_ready("ready");
    bed.wait_ready("late");
    bed.wait_pod("done", ".status.phase", "Succeeded");
    bed.wait_pod("crash", ".status.containerStatuses[0].state.waiting.reason", "CrashLoopBackOff");
    // A pod is reported before the last of its processes has come (the shell's child) or gone (a sandbox's holder).
    wait_for("what runs to be what is to run", || {
        let mut names: Vec<String> = bed.pids().into_iter().map(name_of).collect();
        names.sort_unstable();
        if names == STEADY { Ok(()) } else { Err(format!("{names:?}")) }
    });
    let settled = ["ready", "done", "late"];
    let before = facts(&bed, &settled);
    let pids = bed.pids();
    let restarts = bed.pod("crash", ".status.containerStatuses[0].restartCount");
    for round in 0..3 {
        bed.node.kill9();
        assert_eq!(bed.pids(), pids, "round {round}: while nobody watches");
        bed.node.restart();
        bed.node.wait_ready();
        wait_for("the pods to be adopted", || {
            let text = std::fs::read_to_string(bed.node.dir().join("sheave.log")).unwrap_or_default();
            let adopted =
                text.lines().filter(|line| line.contains("default/ready") && line.contains("adopted=true"));
            if adopted.count() > round { Ok(()) } else { Err("not yet") }
        });
        // A probe of the new agent has been answered: what it makes of that would be visible.
        let seen = bed.pod("ready", ".status.conditions[?(@.type==\"Ready\")].status");
        assert_eq!(seen, "True");
        assert_eq!(facts(&bed, &settled), before, "round {round}");
        assert_eq!(bed.pids(), pids, "round {round}: adopted");
    }
    let now: u32 = bed.pod("crash", ".status.containerStatuses[0].restartCount").parse().expect("a count");
    let then: u32 = restarts.parse().expect("a count");
    assert!((then..=then + 2).contains(&now), "the back-off goes on: {then} then {now}");
    bed.node.kill9();
    std::fs::write(place.join("go"), "").expect("let it end");
    wait_for("the end of what waits", || if bed.pids().len() < pids.len() { Ok(()) } else { Err("it runs") });
    bed.node.restart();
    bed.node.wait_ready();
    bed.wait_pod("late", ".status.containerStatuses[0].state.terminated.exitCode", "7");
    bed.wait_pod("late", ".status.phase", "Failed");
    bed.node.kubectl(&["delete", "pod", "--all", "--timeout=30s"]);
}

const SLOW: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: slow}
spec:
  terminationGracePeriodSeconds: 3
  containers:
  - {name: c, image: "localhost/busybox:1", command: [sh, -c, "trap '' TERM; while :; do sleep 0.05; done"]}
"#;

#[test]
fn a_pod_being_stopped_is_stopped_by_the_next_daemon() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(&[]);
    bed.apply(SLOW);
    bed.wait_ready("slow");
    let uid = bed.pod("slow", ".metadata.uid");
    bed.node.kubectl(&["delete", "pod", "slow", "--wait=false"]);
    bed.node.kill9();
    assert!(!bed.pids().is_empty());
    bed.node.restart();
    bed.node.wait_ready();
    bed.wait_gone("slow");
    assert_eq!(bed.pids(), [] as [u32; 0]);
    bed.assert_no_trace(&uid);
}

#[test]
fn a_pod_that_the_api_lost_is_ended_by_the_next_daemon() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(&[]);
    bed.apply(SLOW);
    bed.wait_ready("slow");
    let uid = bed.pod("slow", ".metadata.uid");
    bed.node.kubectl(&["delete", "pod", "slow", "--force", "--grace-period=0"]);
    bed.node.kill9();
    bed.node.restart();
    bed.node.wait_ready();
    wait_for("the end of its processes", || {
        let pids = bed.pids();
        if pids.is_empty() { Ok(()) } else { Err(format!("{pids:?}; {}", bed.node.log_tail())) }
    });
    bed.assert_no_trace(&uid);
}
