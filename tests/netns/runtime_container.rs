//! Containers: how they start, what they see, how they end.

use std::fs;
use std::os::unix::fs::MetadataExt;

use sheave_agent::runtime::{Dns, Mount, Propagation, Qos, RuntimeError, Seccomp};
use sheave_harness::require_root;

use crate::runtime_bed::{Bed, log_text, sandbox, shell};

fn start_error(error: &RuntimeError) -> (&str, &str, i32) {
    match error {
        RuntimeError::Start { stage, message, errno, .. } => (stage, message, *errno),
        other => panic!("expected a failed start, got {other:?}"),
    }
}

#[test]
fn a_container_runs_and_its_exit_and_output_are_kept() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    node.start_pod(sandbox("a"));
    let script = "echo out; echo err >&2; printf tail; echo bye > /dev/termination-log; exit 7";
    let record = node.start("a", shell(&bed, "main", script));
    assert!(record.started.is_some() && record.exit.is_none() && record.pid > 0);
    let exit = node.next_exit("main");
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (7, None, false));
    assert_eq!(exit.message, "bye\n");
    let log = fs::read_to_string(bed.log("a", "main", 0)).unwrap();
    let mut lines: Vec<_> = log.lines().map(|l| l.split_once(' ').unwrap().1).collect();
    lines.sort();
    assert_eq!(lines, ["stderr F err", "stdout F out", "stdout P tail"]);
    let pods = bed.wait(node.runtime.pods());
    assert_eq!(pods[0].containers[0].exit.as_ref(), Some(&exit));
    node.stop("a");
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn a_start_that_fails_names_what_failed_and_leaves_nothing() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    let with = |command: &[&str]| {
        let mut spec = shell(&bed, "main", "");
        spec.command = command.iter().map(|c| (*c).to_owned()).collect();
        spec
    };
    let cases = [
        (with(&["/bin/x"]), ("exec", "/bin/x: command not found", libc::ENOENT)),
        (with(&["nothing"]), ("exec", "nothing: command not found", libc::ENOENT)),
        (with(&["/etc/passwd"]), ("exec", "/etc/passwd: permission denied", libc::EACCES)),
        (with(&["/bin/lost"]), ("exec", "/bin/lost: its interpreter was not found", libc::ENOENT)),
        (with(&["lost"]), ("exec", "lost: its interpreter was not found", libc::ENOENT)),
    ];
    for (spec, expected) in cases {
        let error = node.try_start("a", spec).unwrap_err();
        assert_eq!(start_error(&error), expected);
    }
    let mut user = shell(&bed, "main", "");
    user.image.config.user = "nobody".into();
    let error = node.try_start("a", user).unwrap_err();
    assert!(error.to_string().contains("user nobody"), "{error}");
    let mut non_root = shell(&bed, "main", "");
    non_root.run_as_non_root = true;
    assert!(node.try_start("a", non_root).unwrap_err().to_string().contains("runAsNonRoot"));
    let mut volume = shell(&bed, "main", "");
    volume.mounts = vec![Mount { source: "/no/such".into(), target: "/v".into(), ..Mount::default() }];
    let error = node.try_start("a", volume).unwrap_err();
    assert_eq!(start_error(&error).0, "volume /no/such");
    let mut capability = shell(&bed, "main", "");
    capability.cap_add = vec!["FLY".into()];
    assert!(matches!(node.try_start("a", capability), Err(RuntimeError::Invalid { .. })));
    let error = bed.wait(node.runtime.start_container("b", shell(&bed, "main", ""))).unwrap_err();
    assert!(matches!(error, RuntimeError::NoSuchPod { .. }), "{error}");

    assert_eq!(bed.wait(node.runtime.pod("a")).unwrap().containers, []);
    let record = node.start("a", shell(&bed, "main", "sleep 1000"));
    let again = node.try_start("a", shell(&bed, "main", "")).unwrap_err();
    assert!(matches!(again, RuntimeError::Exists { .. }), "{again}");
    assert!(record.pid > 0);
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn layers_are_stacked_in_order_and_stay_untouched() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let mut spec =
        shell(&bed, "main", "cat /tmp/who /tmp/low; echo mine > /tmp/low; cat /tmp/low; stat -c %a /");
    for (i, layer) in ["one", "two", "three"].iter().enumerate() {
        let dir = bed.dir.path().join(layer);
        fs::create_dir_all(dir.join("tmp")).unwrap();
        fs::write(dir.join("tmp/who"), format!("{layer}\n")).unwrap();
        if i == 0 {
            fs::write(dir.join("tmp/low"), "low\n").unwrap();
        }
        spec.image.layers.push(dir);
    }
    let (exit, text) = node.run("a", spec);
    assert_eq!((exit.code, text.as_str()), (0, "three\nlow\nmine\n755\n"));
    assert_eq!(fs::read_to_string(bed.dir.path().join("one/tmp/low")).unwrap(), "low\n");
}

#[test]
fn images_with_many_layers_start() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let mut spec = shell(&bed, "main", "cat /tmp/100");
    for i in 0..=100 {
        let dir = bed.dir.path().join(format!("{i:064}"));
        fs::create_dir_all(dir.join("tmp")).unwrap();
        fs::write(dir.join(format!("tmp/{i}")), format!("{i}\n")).unwrap();
        spec.image.layers.push(dir);
    }
    assert_eq!(node.run("a", spec).1, "100\n");
}

#[test]
fn the_filesystem_is_what_containers_expect() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let script = "
        for d in null zero full random urandom tty; do test -c /dev/$d || echo missing $d; stat -c %a /dev/$d; done | sort -u
        for l in fd stdin stdout stderr ptmx; do test -L /dev/$l || echo missing $l; done
        echo x > /dev/null; echo y > /dev/stdout; echo z > /proc/self/fd/1
        df -m /dev/shm | tail -1 | { read a b c; echo shm $b; }
        grep -c . /proc/self/mountinfo > /dev/null || echo no mountinfo
        (echo q > /proc/sys/kernel/panic) 2>/dev/null && echo writable proc sys
        (echo q > /sys/kernel/profiling) 2>/dev/null && echo writable sys
        test -s /proc/keys && echo keys
        ls /sys/firmware
        cat /proc/1/comm; ls / | grep old
        grep -c memory /proc/self/cgroup > /dev/null; ls /sys/fs/cgroup | grep -q . || echo no cgroups
        touch /sys/fs/cgroup/x 2>/dev/null && echo writable cgroups
        hostname; cat /etc/hostname; pwd; echo $HOSTNAME $HOME $A $B; umask; grep SigBlk /proc/self/status
        grep SigIgn /proc/self/status; ls /proc/self/fd
    ";
    let mut spec = shell(&bed, "main", script);
    spec.image.config.env = vec![("A".into(), "image".into()), ("B".into(), "image".into())];
    spec.env = vec![("B".into(), "pod".into())];
    spec.working_dir = "/work/made".into();
    let (exit, text) = node.run("a", spec);
    let expected = "666\ny\nz\nshm 64\nsh\na\na\n/work/made\na /root image pod\n0022\n\
        SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n0\n1\n2\n3\n";
    assert_eq!((text.as_str(), exit.code), (expected, 0));
}

#[test]
fn volumes_are_mounted_where_and_how_they_are_asked_for() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let (rw, ro) = (bed.dir.path().join("rw"), bed.dir.path().join("ro"));
    fs::create_dir_all(rw.join("sub")).unwrap();
    fs::create_dir_all(&ro).unwrap();
    fs::write(ro.join("file"), "content\n").unwrap();
    let mount = |source: &std::path::Path, target: &str, read_only| Mount {
        source: source.to_owned(),
        target: target.into(),
        read_only,
        propagation: Propagation::None,
    };
    let script = "
        echo w > /data/sub/w; cat /data/ro/file /one; echo w > /data/ro/file; echo w > /one
        echo w > /etc/new; echo w > /tmp/x && echo tmp; cat /etc/hosts | head -1
    ";
    let mut spec = shell(&bed, "main", &script.replace("| head -1", "> /data/hosts"));
    spec.mounts =
        vec![mount(&ro, "/data/ro", true), mount(&rw, "/data", false), mount(&ro.join("file"), "/one", true)];
    spec.mounts.push(mount(&rw.join("sub"), "/tmp", false));
    spec.read_only_root = true;
    let (_, text) = node.run("a", spec);
    assert_eq!(text.lines().filter(|l| *l == "content").count(), 2, "{text}");
    assert_eq!(text.matches("Read-only file system").count(), 3, "{text}");
    assert!(text.contains("tmp\n"), "{text}");
    assert_eq!(fs::read_to_string(rw.join("sub/w")).unwrap(), "w\n");
    assert!(fs::read_to_string(rw.join("hosts")).unwrap().starts_with("127.0.0.1\tlocalhost\n"));
}

#[test]
fn later_mounts_of_the_node_show_up_only_where_asked_for() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let point = bed.dir.path().join("volume");
    fs::create_dir_all(point.join("sub")).unwrap();
    let mount = |args: &[&str]| {
        let done = std::process::Command::new("mount").args(args).status().unwrap();
        assert!(done.success(), "mount {args:?}");
    };
    let path = point.display().to_string();
    mount(&["--bind", &path, &path]);
    mount(&["--make-shared", &path]);
    struct Unmount(String);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let done = std::process::Command::new("umount").args(["-R", &self.0]).status();
            assert!(done.is_ok_and(|s| s.success()), "umount {}", self.0);
        }
    }
    let unmount = Unmount(path.clone());
    let node = bed.open();
    node.start_pod(sandbox("a"));
    let volume = |target: &str, propagation| Mount {
        source: point.clone(),
        target: target.into(),
        read_only: false,
        propagation,
    };
    let mut spec = shell(&bed, "main", "sleep 1000");
    spec.mounts = vec![volume("/none", Propagation::None), volume("/later", Propagation::HostToContainer)];
    node.start("a", spec);
    mount(&["-t", "tmpfs", "x", &format!("{path}/sub")]);
    fs::write(point.join("sub/file"), "").unwrap();
    assert_eq!(node.exec("a", "main", &["ls", "/later/sub"]).output, "file\n");
    assert_eq!(node.exec("a", "main", &["ls", "/none/sub"]).output, "");
    node.stop("a");
    drop(unmount);
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn links_in_an_image_do_not_lead_to_the_node() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    let (victim, volume) = (bed.dir.path().join("victim"), bed.dir.path().join("volume"));
    fs::create_dir_all(&victim).unwrap();
    fs::create_dir_all(&volume).unwrap();
    let layer = bed.dir.path().join("evil");
    fs::create_dir_all(&layer).unwrap();
    std::os::unix::fs::symlink(&victim, layer.join("escape")).unwrap();
    let up = format!("../../../../../../../..{}", victim.display());
    std::os::unix::fs::symlink(up, layer.join("dots")).unwrap();
    let mut spec =
        shell(&bed, "main", "echo x > /escape/a; echo x > /dots/a; echo x > /dots/b/c; sleep 1000");
    spec.image.layers.push(layer.clone());
    let mount = |target: &str| Mount { source: volume.clone(), target: target.into(), ..Mount::default() };
    spec.mounts = vec![mount("/dots/b")];
    match node.try_start("a", spec) {
        Ok(_) => {}
        Err(error) => assert!(start_error(&error).0.starts_with("mount"), "{error}"),
    }
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "the node's directory was written to");

    std::os::unix::fs::symlink(&victim, layer.join("proc")).unwrap();
    let mut spec = shell(&bed, "linked", "true");
    fs::remove_dir(bed.dir.path().join("image/proc")).unwrap();
    spec.image.layers.push(layer);
    let error = node.try_start("a", spec).unwrap_err();
    assert_eq!(start_error(&error).0, "mount /proc");
    node.stop("a");
}

#[test]
fn users_are_found_in_the_image() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let mut spec = shell(&bed, "main", "id -u; id -g; id -G; echo $HOME; echo again > /dev/stdout; touch /x");
    spec.image.config.user = "web".into();
    spec.supplemental_groups = vec![77];
    let (exit, text) = node.run("a", spec);
    assert_ne!(exit.code, 0, "an ordinary user writes no root directory");
    assert!(text.starts_with("1000\n1001\n1001 50 77\n/var\nagain\n"), "{text}");
}

#[test]
fn containers_of_a_pod_share_what_pods_share() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    let mut pod = sandbox("a");
    pod.dns = Dns { nameservers: vec!["10.96.0.10".parse().unwrap()], ..Dns::default() };
    pod.qos = Qos::Burstable;
    pod.sysctls.insert("net.core.somaxconn".into(), "77".into());
    let info = node.start_pod(pod);
    bed.wait(node.runtime.set_pod_ips("a", &["10.244.0.9".parse().unwrap()])).unwrap();
    let one = node.start("a", shell(&bed, "one", "sleep 1000"));
    node.start("a", shell(&bed, "two", "sleep 1000"));
    node.exec("a", "one", &["sh", "-c", "echo shared > /dev/shm/x"]);
    assert_eq!(node.exec("a", "two", &["cat", "/dev/shm/x"]).output, "shared\n");
    assert_eq!(node.exec("a", "two", &["cat", "/etc/resolv.conf"]).output, "nameserver 10.96.0.10\n");
    assert!(node.exec("a", "two", &["cat", "/etc/hosts"]).output.ends_with("10.244.0.9\ta\n"));
    assert_eq!(node.exec("a", "two", &["cat", "/proc/sys/net/core/somaxconn"]).output, "77\n");
    assert_eq!(
        node.exec("a", "one", &["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"]).output,
        "0\n"
    );
    assert!(node.exec("a", "one", &["ip", "addr"]).output.contains("LOOPBACK,UP"));
    let processes = node.exec("a", "one", &["ps", "-o", "args"]).output;
    assert_eq!(processes.matches("sleep").count(), 1, "{processes}");
    let net = |path: String| fs::metadata(path).unwrap().ino();
    assert_eq!(net(format!("/proc/{}/ns/net", one.pid)), net(info.netns.display().to_string()));
    assert_ne!(net("/proc/self/ns/net".into()), net(info.netns.display().to_string()));
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn pods_may_share_processes_or_the_nodes_network() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let mut pod = sandbox("a");
    pod.share_process_namespace = true;
    pod.host_network = true;
    node.start_pod(pod);
    node.start("a", shell(&bed, "one", "sleep 1000 & exec sleep 2000"));
    node.start("a", shell(&bed, "two", "sleep 3000"));
    let processes = node.exec("a", "two", &["ps", "-o", "comm,args"]).output;
    assert!(processes.contains("sleep 1000") && processes.contains("sleep 2000"), "{processes}");
    assert!(processes.contains("sheave-pause"), "{processes}");
    let own = fs::read_link("/proc/self/ns/net").unwrap().display().to_string();
    assert_eq!(node.exec("a", "two", &["readlink", "/proc/self/ns/net"]).output.trim(), own);
    node.exec("a", "two", &["sh", "-c", "(sleep 0.01 &) ; sleep 0.1"]);
    sheave_harness::wait_for("orphans to be reaped", || {
        let processes = node.exec("a", "two", &["ps", "-o", "stat,args"]).output;
        if processes.lines().any(|l| l.starts_with('Z')) { Err(processes) } else { Ok(()) }
    });
    // What a container leaves behind goes with it, although its process namespace stays.
    bed.wait(node.runtime.signal("a", "one", libc::SIGTERM)).unwrap();
    assert_eq!(node.next_exit("one").signal, Some(libc::SIGTERM));
    let processes = node.exec("a", "two", &["ps", "-o", "args"]).output;
    assert!(!processes.contains("sleep 1000"), "{processes}");
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn signals_and_restarts() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    node.start_pod(sandbox("a"));
    node.start(
        "a",
        shell(&bed, "main", "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.1; done"),
    );
    let up = || match fs::read_to_string(bed.log("a", "main", 0)) {
        Ok(text) if text.contains("up") => Ok(()),
        other => Err(format!("{other:?}")),
    };
    sheave_harness::wait_for("the trap", up);
    bed.wait(node.runtime.signal("a", "main", libc::SIGTERM)).unwrap();
    let exit = node.next_exit("main");
    assert_eq!((exit.code, exit.signal), (3, None));
    let late = bed.wait(node.runtime.signal("a", "main", libc::SIGTERM)).unwrap_err();
    assert!(matches!(late, RuntimeError::NotRunning { .. }), "{late}");

    let mut next = shell(&bed, "main", "echo second; sleep 1000");
    next.attempt = 1;
    let record = node.start("a", next);
    assert_eq!(record.attempt, 1);
    let second = || match log_text(&bed.log("a", "main", 1)) {
        text if text == "second\n" => Ok(()),
        other => Err(other),
    };
    sheave_harness::wait_for("the second run's output", second);
    bed.wait(node.runtime.kill_container("a", "main")).unwrap();
    let exit = node.next_exit("main");
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, Some(9), false));
    assert_eq!(log_text(&bed.log("a", "main", 0)), "up\nterm\n");
    assert_eq!(bed.wait(node.runtime.pod("a")).unwrap().containers.len(), 1);
    node.stop("a");
    bed.wait(node.runtime.remove_logs("default", "a", "a")).unwrap();
    assert!(!bed.log("a", "main", 0).exists());
}

#[test]
fn unconfined_and_privileged_containers_are_what_they_say() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let mut spec =
        shell(&bed, "main", "grep Seccomp: /proc/self/status; mount -t tmpfs x /tmp && echo mounted");
    spec.privileged = true;
    let (_, text) = node.run("a", spec);
    assert_eq!(text, "Seccomp:\t0\nmounted\n");
    let mut spec =
        shell(&bed, "main", "grep Seccomp: /proc/self/status; mount -t tmpfs x /tmp && echo mounted");
    spec.seccomp = Seccomp::Unconfined;
    let (_, text) = node.run("b", spec);
    assert!(text.starts_with("Seccomp:\t0\n") && !text.contains("mounted"), "{text}");
}
