//! Agents and shims that are killed, at chosen and at random moments: what runs goes on, what is known stays known,
//! what was half-made goes away.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sheave_agent::runtime::{PodState, Runtime, RuntimeError, RuntimeEvent};
use sheave_harness::{require_root, wait_for};

use crate::runtime_bed::{Bed, config, log_text, sandbox, shell};

/// Names a bed's directory and cgroup in a process that plays the agent.
const AGENT: &str = "SHEAVE_TEST_AGENT";

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
}

fn shim_pid(bed: &Bed, uid: &str) -> Option<i32> {
    let procs = bed.cgroup.path().join("shims").join(format!("pod{uid}")).join("cgroup.procs");
    fs::read_to_string(procs).ok()?.lines().next()?.parse().ok()
}

fn is_alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Starts the calling test again, as an agent on `bed`.
fn spawn_agent(bed: &Bed, test: &str) -> Child {
    let name = format!("{}::{test}", module_path!().split_once("::").expect("a module").1);
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args([&name, "--exact", "--nocapture", "--test-threads=1"]);
    let place = format!("{}:{}", bed.dir.path().display(), bed.cgroup.path().display());
    command.env(AGENT, place).stdout(Stdio::null()).stderr(Stdio::inherit());
    command.spawn().expect("start the agent")
}

/// In such a process: what it is to be an agent of. Its pods' image is made already.
fn agent_place() -> Option<(PathBuf, PathBuf)> {
    let place = std::env::var(AGENT).ok()?;
    let (dir, cgroup) = place.split_once(':')?;
    Some((dir.into(), cgroup.into()))
}

fn play_agent(dir: &Path, cgroup: &Path, life: impl AsyncFnOnce(Runtime)) {
    let tokio =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("tokio");
    tokio.block_on(async {
        let (runtime, _events) = Runtime::open(config(dir, cgroup)).await.expect("open");
        life(runtime).await;
    });
}

fn spec_in(dir: &Path, name: &str, script: &str) -> sheave_agent::runtime::ContainerSpec {
    crate::runtime_bed::shell_in(dir, name, script)
}

#[test]
fn pods_outlive_their_agent_and_exits_are_kept_meanwhile() {
    if let Some((dir, cgroup)) = agent_place() {
        return play_agent(&dir, &cgroup, async |runtime| {
            runtime.start_sandbox(sandbox("a")).await.unwrap();
            let script = "echo one; while ! test -e /dev/shm/go; do sleep 0.05; done; exit 9";
            runtime.start_container("a", spec_in(&dir, "short", script)).await.unwrap();
            let long = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
            runtime.start_container("a", spec_in(&dir, "long", long)).await.unwrap();
            fs::write(dir.join("ready"), "").unwrap();
            std::future::pending::<()>().await;
        });
    }
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut agent = spawn_agent(&bed, "pods_outlive_their_agent_and_exits_are_kept_meanwhile");
    wait_for("the agent", || bed.dir.path().join("ready").exists().then_some(()).ok_or("not ready"));
    agent.kill().unwrap();
    agent.wait().unwrap();
    let lines = || log_text(&bed.log("a", "long", 0)).lines().count();
    let before = lines();
    wait_for("more of the log", || if lines() > before + 2 { Ok(()) } else { Err("no more lines") });

    let node = bed.open();
    let adopted = bed.wait(node.runtime.pod("a")).expect("adopted");
    assert_eq!((adopted.state, &adopted.spec), (PodState::Ready, &sandbox("a")));
    let pids: BTreeMap<_, _> = adopted.containers.iter().map(|c| (c.name.clone(), c.pid)).collect();
    assert!(pids.values().all(|pid| is_alive(*pid)), "{pids:?}");
    let again = bed.wait(Runtime::open(bed.config())).map(drop).unwrap_err();
    assert!(matches!(again, RuntimeError::InUse { .. }), "{again}");
    node.exec("a", "long", &["touch", "/dev/shm/x"]);
    drop(node);

    // The end of a container while there is no agent.
    fs::File::create(format!("/proc/{}/root/dev/shm/go", pids["long"])).unwrap();
    wait_for("the exit", || if is_alive(pids["short"]) { Err("still runs") } else { Ok(()) });
    let node = bed.open();
    let records = bed.wait(node.runtime.pod("a")).unwrap().containers;
    assert_eq!(records[0].exit.as_ref().map(|e| (e.code, e.lost)), Some((9, false)));
    assert_eq!((records[1].pid, records[1].exit.is_none()), (pids["long"], true));
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

/// Whether nobody ever asks for the end of this pod: every second one. The end of the others may be under way, told to
/// their shim and not to be seen yet, at any moment after their agent was killed.
fn stays(uid: &str) -> bool {
    uid.rsplit('-').next().and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n % 2 == 1)
}

#[test]
fn an_agent_killed_at_random_moments_leaves_nothing_half_made() {
    if let Some((dir, cgroup)) = agent_place() {
        return play_agent(&dir, &cgroup, async |runtime| {
            let mut progress =
                fs::OpenOptions::new().create(true).append(true).open(dir.join("progress")).unwrap();
            let mut step = || progress.write_all(b".").unwrap();
            for i in 0.. {
                let uid = format!("pod-{}-{i}", std::process::id());
                runtime.start_sandbox(sandbox(&uid)).await.unwrap();
                step();
                let spec = spec_in(&dir, "main", "trap 'exit 0' TERM; while :; do sleep 0.1; done");
                runtime.start_container(&uid, spec).await.unwrap();
                step();
                if i % 2 == 0 {
                    runtime.stop_sandbox(&uid).await.unwrap();
                    step();
                }
            }
        });
    }
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut seen: BTreeMap<String, i32> = BTreeMap::new();
    for round in 0..20u64 {
        let mut agent = spawn_agent(&bed, "an_agent_killed_at_random_moments_leaves_nothing_half_made");
        let progress = bed.dir.path().join("progress");
        wait_for("the agent's progress", || {
            let steps = fs::metadata(&progress).map_or(0, |m| m.len());
            if steps >= round % 7 { Ok(()) } else { Err(steps) }
        });
        // Then some moment within the next step; no condition could name them all.
        std::thread::sleep(Duration::from_micros(round * 3700 % 30_000));
        agent.kill().unwrap();
        agent.wait().unwrap();
        fs::write(&progress, "").unwrap();
        let node = bed.open();
        let pods = bed.wait(node.runtime.pods());
        let ready = pods.iter().filter(|p| p.state == PodState::Ready);
        for pod in ready {
            // A stop that the killed agent had asked its shim for may be under way: then it is soon told.
            if !is_alive(pod.init_pid) || pod.containers.iter().any(|c| !is_alive(c.pid)) {
                wait_for("the end of a pod to be told", || {
                    let pods = bed.wait(node.runtime.pods());
                    let found = pods.iter().find(|p| p.spec.uid == pod.spec.uid);
                    match found.map(|p| p.state) {
                        Some(PodState::Ready) => {
                            Err(format!("{} is Ready without its processes", pod.spec.uid))
                        }
                        _ => Ok(()),
                    }
                });
                continue;
            }
            for container in pod.containers.iter().filter(|_| stays(&pod.spec.uid)) {
                let known = seen.entry(pod.spec.uid.clone()).or_insert(container.pid);
                assert_eq!(*known, container.pid, "{} was restarted", pod.spec.uid);
                assert!(is_alive(container.pid), "{} died", pod.spec.uid);
            }
        }
        for uid in seen.keys() {
            assert!(pods.iter().any(|p| p.spec.uid == *uid && p.state == PodState::Ready), "{uid} is lost");
        }
    }
    assert!(seen.len() >= 3, "the agents did too little: {seen:?}");
    let node = bed.open();
    for pod in bed.wait(node.runtime.pods()) {
        node.stop(&pod.spec.uid);
    }
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn a_dead_shim_is_noticed_and_its_pod_ends() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    node.start_pod(sandbox("a"));
    let gone = node.start("a", shell(&bed, "gone", "exit 4"));
    assert_eq!(node.next_exit("gone").code, 4);
    let main = node.start("a", shell(&bed, "main", "sleep 1000"));
    kill(shim_pid(&bed, "a").expect("a shim"));
    assert_eq!(node.next_event(), RuntimeEvent::SandboxDied { uid: "a".into() });
    wait_for("the container's end", || if is_alive(main.pid) { Err("still there") } else { Ok(()) });
    let record = bed.wait(node.runtime.pod("a")).unwrap();
    assert_eq!(record.state, PodState::Dead);
    let exits: Vec<_> = record.containers.iter().map(|c| c.exit.as_ref().map(|e| (e.code, e.lost))).collect();
    assert_eq!(exits, [Some((4, false)), Some((137, true))], "{gone:?}");
    let start = node.try_start("a", shell(&bed, "next", "true")).unwrap_err();
    assert!(matches!(start, RuntimeError::ShimGone { .. }), "{start}");
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());

    // The same without an agent.
    node.start_pod(sandbox("b"));
    node.start("b", shell(&bed, "main", "sleep 1000"));
    drop(node);
    kill(shim_pid(&bed, "b").expect("a shim"));
    let mut node = bed.open();
    assert_eq!(node.next_event(), RuntimeEvent::SandboxDied { uid: "b".into() });
    let record = bed.wait(node.runtime.pod("b")).unwrap();
    assert_eq!(
        (record.state, record.containers[0].exit.as_ref().map(|e| e.lost)),
        (PodState::Dead, Some(true))
    );
    node.stop("b");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn a_dead_holder_is_noticed() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    let info = node.start_pod(sandbox("a"));
    node.start("a", shell(&bed, "main", "sleep 1000"));
    kill(info.init_pid);
    let mut events = vec![node.next_event(), node.next_event()];
    events.sort_by_key(|e| matches!(e, RuntimeEvent::SandboxDied { .. }));
    assert!(
        matches!(&events[0], RuntimeEvent::ContainerExited { exit, .. } if exit.code == 137),
        "{events:?}"
    );
    assert!(matches!(&events[1], RuntimeEvent::SandboxDied { .. }), "{events:?}");
    assert_eq!(bed.wait(node.runtime.pod("a")).unwrap().state, PodState::Dead);
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn a_shim_killed_at_random_moments_leaves_nothing() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    let (mut failed, mut died) = (0, 0);
    for round in 0..30u64 {
        let uid = format!("pod{round}");
        let runtime = node.runtime.clone();
        let (name, dir) = (uid.clone(), bed.dir.path().to_owned());
        let start = bed.spawn(async move {
            runtime.start_sandbox(sandbox(&name)).await?;
            for i in 0..20 {
                runtime.start_container(&name, spec_in(&dir, &format!("c{i}"), "sleep 1000")).await?;
            }
            Ok::<_, RuntimeError>(())
        });
        let pid = wait_for("a shim", || shim_pid(&bed, &uid).ok_or("none"));
        std::thread::sleep(Duration::from_micros(round * 700));
        if is_alive(pid) {
            kill(pid);
            died += 1;
        }
        failed += i32::from(bed.wait(start).unwrap().is_err());
        node.stop(&uid);
        assert_eq!(bed.residue(), Vec::<String>::new(), "round {round}");
    }
    assert!(failed > 10 && died > 10, "{failed} starts failed, {died} shims died");
}
