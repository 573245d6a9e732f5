//! Pods from their creation to their end, as kubectl sees them.

use sheave_harness::{require_root, wait_for};

use crate::pod_bed::Bed;

const VOLUMES: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: cm}
data: {key: from-the-map}
---
apiVersion: v1
kind: Secret
metadata: {name: s}
stringData: {pw: from-the-secret}
---
apiVersion: v1
kind: Pod
metadata: {name: volumes}
spec:
  restartPolicy: Never
  initContainers:
  - name: first
    image: localhost/busybox:1
    command: [sh, -c, "echo from-init > /v/f && mkdir /v/deep && echo deep > /v/deep/f"]
    volumeMounts: [{name: v, mountPath: /v}]
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sh, -c, "for f in /v/f /cm/key /s/pw /sub/f; do cat $f; echo; done; echo env=$A $(POD) $FROM_key; echo x > /m/x && echo memory-ok; (echo x > /cm/x) 2>/dev/null || echo map-is-read-only; printf bye > /dev/termination-log; exit 4"]
    env:
    - {name: A, valueFrom: {configMapKeyRef: {name: cm, key: key}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    envFrom: [{prefix: FROM_, configMapRef: {name: cm}}]
    volumeMounts:
    - {name: v, mountPath: /v}
    - {name: v, mountPath: /sub, subPath: deep}
    - {name: cm, mountPath: /cm}
    - {name: s, mountPath: /s}
    - {name: m, mountPath: /m}
  volumes:
  - {name: v, emptyDir: {}}
  - {name: m, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  - {name: cm, configMap: {name: cm}}
  - {name: s, secret: {secretName: s}}
"#;

#[test]
fn a_pod_with_every_kind_of_volume_runs_to_its_end_and_leaves_nothing() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(&[]);
    bed.apply(VOLUMES);
    bed.wait_pod("volumes", ".status.phase", "Failed");
    let log = bed.node.kubectl(&["logs", "volumes", "-c", "c"]);
    for line in [
        "from-init",
        "from-the-map",
        "from-the-secret",
        "deep",
        "env=from-the-map volumes from-the-map",
        "memory-ok",
        "map-is-read-only",
    ] {
        assert!(log.lines().any(|known| known == line), "{line:?} in {log}");
    }
    let state = ".status.containerStatuses[0].state.terminated";
    assert_eq!(bed.pod("volumes", &format!("{state}.exitCode")), "4");
    assert_eq!(bed.pod("volumes", &format!("{state}.message")), "bye");
    assert_eq!(bed.pod("volumes", ".status.initContainerStatuses[0].state.terminated.exitCode"), "0");
    assert_eq!(bed.node.kubectl(&["logs", "volumes", "-c", "c", "--tail=1"]).trim(), "map-is-read-only");
    let uid = bed.pod("volumes", ".metadata.uid");
    bed.node.kubectl(&["delete", "pod", "volumes"]);
    bed.assert_no_trace(&uid);
}

const BAD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: image}
spec: {containers: [{name: c, image: "nowhere/nothing:1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: never}
spec: {containers: [{name: c, image: "nowhere/nothing:1", imagePullPolicy: Never}]}
---
apiVersion: v1
kind: Pod
metadata: {name: command}
spec: {containers: [{name: c, image: "localhost/busybox:1", command: [/no/such/program]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: config}
spec: {containers: [{name: c, image: "localhost/busybox:1", env: [{name: A, valueFrom: {secretKeyRef: {name: missing, key: k}}}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: volume}
spec: {containers: [{name: c, image: "localhost/busybox:1"}], volumes: [{name: v, downwardAPI: {items: []}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: hostpath}
spec: {containers: [{name: c, image: "localhost/busybox:1"}], volumes: [{name: v, hostPath: {path: /no/such/dir, type: Directory}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: crash}
spec: {containers: [{name: c, image: "localhost/busybox:1", command: [sh, -c, "echo dying; exit 3"]}]}
"#;

#[test]
fn what_cannot_run_says_why_and_can_be_deleted() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(&[]);
    bed.apply(BAD);
    let waiting = ".status.containerStatuses[0].state.waiting";
    bed.wait_pod("image", &format!("{waiting}.reason"), "ImagePullBackOff");
    let message = bed.pod("image", &format!("{waiting}.message"));
    assert!(message.contains("nowhere/nothing:1") && message.contains("sheave image import"), "{message}");
    bed.wait_pod("never", &format!("{waiting}.reason"), "ErrImageNeverPull");
    bed.wait_pod("command", &format!("{waiting}.reason"), "RunContainerError");
    let message = bed.pod("command", &format!("{waiting}.message"));
    assert!(message.contains("/no/such/program"), "{message}");
    bed.wait_pod("config", &format!("{waiting}.reason"), "CreateContainerConfigError");
    assert!(bed.pod("config", &format!("{waiting}.message")).contains("missing"));
    bed.wait_event("volume", "FailedMount");
    assert_eq!(bed.pod("volume", ".status.phase"), "Pending");
    bed.wait_event("hostpath", "FailedMount");
    bed.wait_pod("crash", &format!("{waiting}.reason"), "CrashLoopBackOff");
    assert_eq!(bed.pod("crash", ".status.containerStatuses[0].lastState.terminated.exitCode"), "3");
    bed.wait_event("crash", "BackOff");
    assert_eq!(bed.node.kubectl(&["logs", "crash", "--previous"]).trim(), "dying");
    bed.node.kubectl(&["delete", "pod", "--all", "--timeout=30s"]);
    assert_eq!(bed.pids(), [] as [u32; 0], "processes are left");
}

const PROBED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: live}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sh, -c, "[ -e /v/second ] || { touch /v/second; sleep 1000; }; touch /tmp/ok; exec sleep 1000"]
    livenessProbe: {exec: {command: [test, -e, /tmp/ok]}, periodSeconds: 1, failureThreshold: 1}
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: gated}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sleep, "1000"]
    readinessProbe: {exec: {command: [test, -e, /v/ready]}, periodSeconds: 1, failureThreshold: 1}
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, hostPath: {path: PLACE, type: DirectoryOrCreate}}]
"#;

#[test]
fn probes_restart_what_hangs_and_gate_what_is_not_ready() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(&[]);
    let place = bed.node.dir().join("gate");
    bed.apply(&PROBED.replace("PLACE", &place.display().to_string()));
    bed.wait_pod("live", ".status.containerStatuses[0].restartCount", "1");
    bed.wait_ready("live");
    bed.wait_event("live", "Unhealthy");
    bed.wait_event("live", "Killing");
    let ready = r#".status.conditions[?(@.type=="Ready")].status"#;
    bed.wait_pod("gated", ".status.containerStatuses[0].started", "true");
    assert_eq!(bed.pod("gated", ready), "False");
    std::fs::write(place.join("ready"), "").expect("open the gate");
    bed.wait_ready("gated");
    std::fs::remove_file(place.join("ready")).expect("close the gate");
    bed.wait_pod("gated", ready, "False");
    assert_eq!(bed.pod("gated", ".status.containerStatuses[0].restartCount"), "0");
}

const STOPPED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: polite}
spec:
  terminationGracePeriodSeconds: 20
  containers:
  - name: c
    image: localhost/busybox:1
    command: [sh, -c, "trap 'echo term >> /v/order; exit 0' TERM; while :; do sleep 0.05; done"]
    lifecycle: {preStop: {exec: {command: [sh, -c, "echo hook >> /v/order"]}}}
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, hostPath: {path: PLACE, type: DirectoryOrCreate}}]
---
apiVersion: v1
kind: Pod
metadata: {name: stubborn}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - {name: c, image: "localhost/busybox:1", command: [sh, -c, "trap '' TERM; while :; do sleep 0.05; done"]}
"#;

#[test]
fn stopping_asks_first_and_kills_in_the_end() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(&[]);
    let place = bed.node.dir().join("order");
    bed.apply(&STOPPED.replace("PLACE", &place.display().to_string()));
    bed.wait_ready("polite");
    bed.wait_ready("stubborn");
    bed.node.kubectl(&["delete", "pod", "polite", "stubborn", "--timeout=30s"]);
    let order = std::fs::read_to_string(place.join("order")).expect("what happened");
    assert_eq!(order, "hook\nterm\n");
    bed.wait_event("stubborn", "Killing");
    wait_for("no processes", || {
        let pids = bed.pids();
        if pids.is_empty() { Ok(()) } else { Err(format!("{pids:?}")) }
    });
}

#[test]
fn a_deleted_node_object_comes_back() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(&["--node-label", "rack=r1"]);
    let of = |bed: &Bed, path: &str| {
        bed.node.kubectl(&["get", "node", "node-1", "-o", &format!("jsonpath={path}")])
    };
    let before = of(&bed, "{.metadata.uid}");
    assert_eq!(of(&bed, "{.metadata.labels.rack}"), "r1");
    assert_eq!(
        of(&bed, r#"{.status.addresses[?(@.type=="InternalIP")].address}"#),
        "192.0.2.10 2001:db8::10"
    );
    bed.node.kubectl(&["delete", "node", "node-1"]);
    wait_for("another Node", || {
        let output = bed
            .node
            .kubectl_command(&["get", "node", "node-1", "-o", "jsonpath={.metadata.uid}"])
            .output()
            .map_err(|error| error.to_string())?;
        let uid = String::from_utf8_lossy(&output.stdout).into_owned();
        if !uid.is_empty() && uid != before { Ok(()) } else { Err(format!("{uid:?}")) }
    });
    bed.node.wait_ready();
    let holder = ["get", "lease", "-n", "kube-node-lease", "node-1", "-o", "jsonpath={.spec.holderIdentity}"];
    wait_for("the Lease", || {
        let output = bed.node.kubectl_command(&holder).output().map_err(|error| error.to_string())?;
        match String::from_utf8_lossy(&output.stdout).as_ref() {
            "node-1" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}
