//! `sheave load services`, the real program: a small run measures what it says and leaves nothing, however it ends.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sheave_harness::cgroup::v2_root;
use sheave_harness::{require_root, wait_for};

const SHEAVE: &str = env!("CARGO_BIN_EXE_sheave");
/// By which processes of a run are found.
const MARK: &str = "SHEAVE_LOAD_TEST";

/// Keys that every measured mode has.
const KEYS: [&str; 13] = [
    "mode",
    "services",
    "endpoints",
    "connect_p50_us",
    "connect_p99_us",
    "ratio_connect_p50_to_direct",
    "ratio_connect_p99_to_direct",
    "cps",
    "rtt_p50_us",
    "program_s",
    "update_p99_ms",
    "failed",
    "rss_mb",
];

/// A run of the program, and what of it would stay.
pub(crate) struct Load {
    child: Child,
    mark: String,
    mounts: String,
}

impl Load {
    fn start(args: &[&str]) -> Self {
        Self::of("services", args)
    }

    /// A run of `sheave load KIND`.
    pub(crate) fn of(kind: &str, args: &[&str]) -> Self {
        let mark = sheave_harness::unique("load");
        let mut command = Command::new(SHEAVE);
        command.args(["load", kind]).args(args).env(MARK, &mark);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.spawn().expect("start sheave load"), mark, mounts: mounts() }
    }

    fn cgroup(&self) -> PathBuf {
        v2_root().join(format!("sheave-load-{}", self.child.id()))
    }

    /// Processes of this run besides the one that was started.
    pub(crate) fn others(&self) -> Vec<u32> {
        let wanted = format!("{MARK}={}", self.mark);
        let pids = fs::read_dir("/proc").expect("read /proc").flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| *pid != self.child.id())
            .filter(|pid| {
                let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environ.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
            })
            .collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("signal the run");
    }

    /// Waits until clients of this mode are at work.
    fn wait_at_work(&mut self, mode: &str) {
        let procs = self.cgroup().join(mode).join("cgroup.procs");
        wait_for(&format!("clients of {mode}"), || {
            assert!(self.child.try_wait().expect("look at the run").is_none(), "the run ended early");
            let clients = fs::read_to_string(&procs).unwrap_or_default();
            if clients.lines().count() >= 2 { Ok(()) } else { Err(format!("only {clients:?}")) }
        });
    }

    /// Waits for its end. Namespaces without names, and all in them, are gone when no process is left.
    pub(crate) fn finish(self) -> Output {
        let (cgroup, mark, mounts_before, pid) =
            (self.cgroup(), self.mark.clone(), self.mounts.clone(), self.child.id());
        let output = self.child.wait_with_output().expect("wait for sheave load");
        let gone =
            Load { child: Command::new("true").spawn().expect("start true"), mark, mounts: String::new() };
        assert_eq!(gone.others(), Vec::<u32>::new(), "processes of run {pid}");
        let mut child = gone.child;
        child.wait().expect("wait for true");
        assert!(!cgroup.exists(), "{} is still there", cgroup.display());
        assert_eq!(mounts(), mounts_before, "mounts of the host");
        output
    }
}

/// What is mounted where the program mounts things of its own, but for /sys/fs/bpf: other tests that run meanwhile have the host's
/// mounted there, and what gets out of the program's namespace gets out at all three places.
fn mounts() -> String {
    let info = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
    let at = |line: &&str| line.split(' ').nth(4).is_some_and(|point| ["/run", "/mnt"].contains(&point));
    info.lines().filter(at).collect::<Vec<_>>().join("\n")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn load_services_measures_every_mode_that_the_host_has() {
    if !require_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("make a directory");
    let report = dir.path().join("report.html");
    let path = report.display().to_string();
    let modes = "direct,ebpf,nftables,iptables";
    let args = ["--count", "10", "--modes", modes, "--samples", "200", "--changes", "20", "--output", "json"];
    let output =
        Load::start(&[&args[..], &["--churn", "20/s", "--host-routing", "--report", &path]].concat())
            .finish();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect();
    let names: Vec<&str> = rows.iter().filter_map(|row| row["mode"].as_str()).collect();
    assert_eq!(names, ["direct", "ebpf", "nftables", "iptables"]);
    for row in &rows {
        assert_eq!(row["services"], 10);
        if let Some(why) = row["unavailable"].as_str() {
            assert!(
                !why.is_empty() && !["direct", "ebpf"].contains(&row["mode"].as_str().unwrap_or("")),
                "{row}"
            );
            continue;
        }
        KEYS.iter().for_each(|key| assert!(row.get(*key).is_some(), "{key} is missing in {row}"));
        assert_eq!(row["failed"], 0, "{row}");
        assert!(row["cps"].as_f64().is_some_and(|cps| cps > 0.0), "{row}");
        assert!(row["connect_p50_us"].as_f64() <= row["connect_p99_us"].as_f64(), "{row}");
        let loaded = row["mode"] != "direct";
        assert_eq!(row["program_s"].is_f64(), loaded, "{row}");
        assert_eq!(row["updates"].as_u64() == Some(20), loaded, "{row}");
        assert_eq!(row["churned"].as_u64().is_some_and(|changes| changes > 0), loaded, "{row}");
        // Nine kinds of traffic, directly and through three services.
        assert_eq!(row["paths"].as_array().map(Vec::len), Some(if loaded { 36 } else { 9 }), "{row}");
    }
    let page = fs::read_to_string(&report).expect("the report");
    assert!(page.contains("<svg") && page.contains("var(--ebpf)"), "{page}");
}

#[test]
fn load_services_prints_a_table_and_names_what_is_missing() {
    if !require_root() {
        return;
    }
    let args = ["--count", "3,1", "--modes", "iptables,ebpf", "--pod-packets", "--iptables-max", "2"];
    let few = ["--samples", "20", "--changes", "2", "--backends", "shared"];
    let output = Load::start(&[&args[..], &few].concat()).finish();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(said.contains("\n3 services with 4 endpoints that all share\n"), "{said}");
    assert!(said.contains("iptables  unavailable: left out above 2 services"), "{said}");
    assert!(said.contains("\nebpf      first"), "{said}");
}

#[test]
fn load_services_leaves_nothing_when_interrupted() {
    if !require_root() {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut run = Load::start(&["--count", "100", "--modes", "ebpf", "--samples", "1000000"]);
        run.wait_at_work("ebpf");
        run.signal(signal);
        let output = run.finish();
        assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
    }
}

#[test]
fn load_services_says_which_of_its_processes_was_killed() {
    if !require_root() {
        return;
    }
    let mut run = Load::start(&["--count", "100", "--modes", "ebpf", "--samples", "1000000"]);
    run.wait_at_work("ebpf");
    let procs = fs::read_to_string(run.cgroup().join("ebpf/cgroup.procs")).expect("the clients");
    let client = procs.lines().next().and_then(|pid| pid.parse().ok()).expect("a client");
    kill(Pid::from_raw(client), Signal::SIGKILL).expect("kill a client");
    // It is missed as soon as its turn comes, perhaps late in the run.
    wait_for("the pod's client to be missed", || {
        run.child.try_wait().expect("look at the run").ok_or("the run goes on")
    });
    let output = run.finish();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the client (ebpf, pod) process ended before its work was done"), "{said}");
}

#[test]
fn load_services_killed_leaves_only_a_cgroup_that_the_next_run_removes() {
    if !require_root() {
        return;
    }
    let mut run = Load::start(&["--count", "100", "--modes", "ebpf", "--samples", "1000000"]);
    run.wait_at_work("ebpf");
    run.signal(Signal::SIGKILL);
    run.child.wait().expect("wait for the killed run");
    wait_for("its processes to be gone", || match run.others() {
        others if others.is_empty() => Ok(()),
        others => Err(format!("{others:?} live")),
    });
    let left = run.cgroup();
    assert!(left.exists(), "a cgroup can't remove itself");
    let output = Load::start(&["--count", "1", "--modes", "direct", "--samples", "10"]).finish();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!left.exists());
    assert!(text(&output.stderr).contains("which a killed run left"), "{}", text(&output.stderr));
}

#[test]
fn load_services_refuses_nonsense() {
    for (args, said) in [
        (&["--count", "0"][..], "--count: 0 is not between 1 and"),
        (&["--count", "many"], "invalid value 'many' for '--count <N>'"),
        (&["--modes", "fast"], "invalid value 'fast' for '--modes <MODE>'"),
        (&["--endpoints", "0"], "--endpoints: 0 is not between 1 and"),
        (&["--samples", "1"], "--samples: 1 is not between"),
        (&["--churn", "often"], "often is not a number of changes a second"),
        (
            &["--report", "/no/such/directory/report.html"],
            "--report: /no/such/directory/report.html is in no directory",
        ),
    ] {
        let output = Load::start(args).finish();
        assert!(!output.status.success(), "{args:?}");
        assert!(text(&output.stderr).contains(said), "{args:?}: {}", text(&output.stderr));
    }
}
