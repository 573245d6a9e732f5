//! What a container may not do: use more than it was given, or do more than it was allowed.

use std::fs;
use std::process::Command;

use sheave_agent::runtime::{ContainerSpec, Qos, Resources};
use sheave_harness::{require_root, skip};

use crate::runtime_bed::{Bed, sandbox, shell};

fn limited(spec: ContainerSpec, resources: Resources) -> ContainerSpec {
    ContainerSpec { resources, ..spec }
}

#[test]
fn memory_beyond_the_limit_ends_the_container() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let resources = Resources { memory_limit_bytes: Some(16 << 20), ..Resources::default() };
    let script = "cat /dev/zero | tail > /dev/null; exit $?";
    let direct = |script: &str| {
        let mut spec = limited(shell(&bed, "main", ""), resources);
        spec.command = ["tail", script].map(str::to_owned).to_vec();
        spec
    };
    let (exit, _) = node.run("a", direct("/dev/zero"));
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, Some(9), true));
    let (exit, _) = node.run("b", limited(shell(&bed, "main", script), resources));
    assert!(exit.oom_killed && exit.code != 0, "a child is killed: {exit:?}");
    let (exit, _) = node.run("c", limited(shell(&bed, "main", "exit 137"), resources));
    assert_eq!((exit.code, exit.oom_killed), (137, false));
}

#[test]
fn processes_beyond_the_limit_are_refused() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let resources = Resources { pids_max: Some(5), ..Resources::default() };
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo all";
    let (exit, text) = node.run("a", limited(shell(&bed, "main", script), resources));
    assert_ne!(exit.code, 0);
    assert!(text.contains("can't fork") && !text.contains("all"), "{text}");
}

#[test]
fn shares_and_quota_reach_the_kernel() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    let resources = Resources {
        cpu_request_milli: Some(500),
        cpu_limit_milli: Some(250),
        memory_limit_bytes: Some(64 << 20),
        pids_max: Some(50),
    };
    node.start("a", limited(shell(&bed, "main", "sleep 1000"), resources));
    let unified = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").is_ok();
    let files = if unified {
        vec![
            ("", "cpu.max", "25000 100000"),
            ("", "cpu.weight", "59"),
            ("", "memory.max", "67108864"),
            ("", "pids.max", "50"),
        ]
    } else {
        vec![
            ("cpu/", "cpu.cfs_quota_us", "25000"),
            ("cpu/", "cpu.shares", "512"),
            ("memory/", "memory.limit_in_bytes", "67108864"),
            ("pids/", "pids.max", "50"),
        ]
    };
    for (dir, file, expected) in files {
        let path = format!("/sys/fs/cgroup/{dir}{file}");
        assert_eq!(node.exec("a", "main", &["cat", &path]).output.trim(), expected, "{path}");
    }
    let mut burstable = sandbox("b");
    burstable.qos = Qos::Burstable;
    burstable.resources.cpu_request_milli = Some(500);
    node.start_pod(burstable);
    let (dir, file, busy, idle) =
        if unified { ("", "cpu.weight", "59", "1") } else { ("cpu/", "cpu.shares", "512", "2") };
    let class = format!("/sys/fs/cgroup/{dir}{}/kubepods/burstable/{file}", bed.cgroup.name());
    assert_eq!(fs::read_to_string(&class).unwrap().trim(), busy);
    node.stop("b");
    assert_eq!(fs::read_to_string(&class).unwrap().trim(), idle);
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

const STATUS: &str = "grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups|Uid|Gid)' /proc/self/status";

#[test]
fn the_default_rights_are_the_well_known_ones_also_for_commands() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    let mut spec = shell(&bed, "main", "sleep 1000");
    spec.allow_privilege_escalation = false;
    spec.cap_drop = vec!["NET_RAW".into()];
    spec.run_as_group = Some(5);
    node.start("a", spec);
    node.start("a", shell(&bed, "plain", "sleep 1000"));
    let plain = node.exec("a", "plain", &["sh", "-c", STATUS]).output;
    let expected = "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t0 \nCapInh:\t0000000000000000\n\
        CapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t2\n";
    assert_eq!(plain, expected);
    let strict = node.exec("a", "main", &["sh", "-c", STATUS]).output;
    assert!(
        strict.contains("CapEff:\t00000000a80405fb\n") && strict.contains("Gid:\t5\t5\t5\t5\n"),
        "{strict}"
    );
    assert!(strict.contains("NoNewPrivs:\t1\n") && strict.contains("Seccomp:\t2\n"), "{strict}");
    let pid = bed.wait(node.runtime.pod("a")).unwrap().containers[0].pid;
    let own = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in strict.lines() {
        assert!(own.contains(line), "the container's first process lacks {line}");
    }
    node.stop("a");
}

#[test]
fn system_calls_and_devices_outside_the_lists_are_refused() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let script = "
        mount -t tmpfs x /tmp; unshare -U true; dmesg | head -1; hostname x
        mknod /tmp/mem c 1 1 && cat /tmp/mem; mknod /tmp/null c 1 3 && echo > /tmp/null && echo null
        cat /proc/kcore | wc -c; ls /proc/acpi /proc/scsi 2>/dev/null; echo 1 > /proc/sys/vm/drop_caches
        kill -0 1 && echo done
    ";
    let (_, text) = node.run("a", shell(&bed, "main", script));
    for refused in ["mount: permission denied", "unshare:", "dmesg:", "hostname:", "/tmp/mem", "drop_caches"]
    {
        assert!(text.contains(refused), "{refused}: {text}");
    }
    assert!(text.contains("\nnull\n") && text.contains("\n0\n") && text.contains("\ndone\n"), "{text}");
}

#[test]
fn containers_cannot_write_to_the_program_that_started_them() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    let info = node.start_pod(sandbox("a"));
    // Opening it for writing fails anyhow while it runs; the mount is what still protects it afterwards.
    let exe = format!("/proc/{}/exe", info.init_pid);
    let flags = nix::sys::statvfs::statvfs(exe.as_str()).unwrap().flags();
    assert!(flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY), "{flags:?}");
    let mut itself = shell(&bed, "main", "");
    itself.command = ["/proc/self/exe", "shim"].map(str::to_owned).to_vec();
    match node.try_start("a", itself) {
        // Its interpreter is not in the image; with a static program it runs, and then it is still read-only.
        Err(error) => assert!(error.to_string().contains("exec"), "{error}"),
        Ok(record) => assert!(record.started.is_some()),
    }
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

/// What runc, given the default settings of Kubernetes' runtimes in its own format, makes of the same process.
#[test]
fn the_process_is_what_runc_makes_of_it() {
    if !require_root() {
        return;
    }
    if Command::new("runc").arg("--version").output().is_err() {
        return skip("runc is not installed");
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let script =
        format!("{STATUS} | grep -v Seccomp; cat /proc/self/limits; ls /dev; cat /proc/self/oom_score_adj");
    let mut spec = shell(&bed, "main", &script);
    spec.allow_privilege_escalation = false;
    let (_, ours) = node.run("a", spec);
    let theirs = runc(&bed, &script);
    let same = |text: &str| {
        // Go programs raise their own limit of open files, and what they start inherits it.
        let odd = |l: &&str| {
            !["core", "console", "termination-log"].contains(l) && !l.starts_with("Max open files")
        };
        text.lines().filter(odd).map(|l| l.trim_end().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(same(&ours), same(&theirs));
}

fn runc(bed: &Bed, script: &str) -> String {
    let bundle = bed.dir.path().join("bundle");
    fs::create_dir(&bundle).expect("bundle");
    let caps = "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE \
        SYS_CHROOT KILL AUDIT_WRITE";
    let caps = caps.split_whitespace().map(|c| format!("\"CAP_{c}\"")).collect::<Vec<_>>().join(",");
    let quoted = script.replace('\\', "\\\\").replace('"', "\\\"");
    let mount = |target: &str, kind: &str, options: &str| {
        format!(r#"{{"destination":"{target}","type":"{kind}","source":"{kind}","options":[{options}]}}"#)
    };
    let mounts = [
        mount("/proc", "proc", ""),
        mount("/dev", "tmpfs", r#""nosuid","mode=755""#),
        mount("/dev/pts", "devpts", r#""newinstance","ptmxmode=0666","mode=0620","gid=5""#),
        mount("/dev/shm", "tmpfs", ""),
        mount("/dev/mqueue", "mqueue", ""),
    ]
    .join(",");
    let namespaces =
        ["pid", "mount", "ipc", "uts", "network"].map(|n| format!(r#"{{"type":"{n}"}}"#)).join(",");
    let config = format!(
        r#"{{"ociVersion":"1.0.2","process":{{"user":{{"uid":0,"gid":0,"additionalGids":[0]}},
        "args":["/bin/sh","-c","{quoted}"],"env":["PATH=/bin"],"cwd":"/","noNewPrivileges":true,
        "capabilities":{{"bounding":[{caps}],"effective":[{caps}],"permitted":[{caps}]}}}},
        "root":{{"path":"{}"}},"mounts":[{mounts}],
        "linux":{{"cgroupsPath":"/{}/runc","namespaces":[{namespaces}]}}}}"#,
        bed.dir.path().join("image").display(),
        bed.cgroup.name(),
    );
    fs::write(bundle.join("config.json"), config).expect("config.json");
    let root = bed.dir.path().join("runc");
    let output = Command::new("runc")
        .arg("--root")
        .arg(&root)
        .args(["run", "--bundle"])
        .arg(&bundle)
        .arg(sheave_harness::unique("runc"))
        .output()
        .expect("runc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
