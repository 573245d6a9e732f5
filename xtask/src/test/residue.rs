//! What a ring leaves on the host: everything of ours that is there after it and was not before. Names that carry the
//! id of a process which still runs belong to somebody else's test, not to this ring.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long things that end by themselves (a killed process being reaped, a lazily unmounted mount) may take.
const SETTLE: Duration = Duration::from_secs(5);

/// Marks every process that a ring starts, by its environment.
pub(super) const RUN_VARIABLE: &str = "SHEAVE_TEST_RUN";

/// Everything of ours on this host, as lines such as `cgroup /sys/fs/cgroup/memory/sheave-test-1-0`.
pub(super) fn scan() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in names("/sys/class/net").into_iter().chain(names("/run/netns")) {
        add(&mut found, "link or namespace", &entry, &entry);
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
        for part in point.split('/') {
            add(&mut found, "mount", part, point);
        }
    }
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let Some(point) = line.split(' ').nth(4) else { continue };
        for name in names(point) {
            add(&mut found, "cgroup", &name, &format!("{point}/{name}"));
        }
    }
    for dir in ["/sys/fs/bpf", "/run", "/tmp", "/var/lib", "/var/log/pods"] {
        for name in names(dir) {
            add(&mut found, "file", &name, &format!("{dir}/{name}"));
        }
    }
    found
}

/// What is there now and was not `before`, and processes of `run` that still live; waits a little for both to end.
pub(super) fn left(before: &BTreeSet<String>, run: &str) -> Vec<String> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let mut left: Vec<String> = scan().difference(before).cloned().collect();
        left.extend(processes(run));
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn add(found: &mut BTreeSet<String>, kind: &str, name: &str, place: &str) {
    if is_ours(name) && !owner_runs(name) {
        found.insert(format!("{kind} {place}"));
    }
}

fn is_ours(name: &str) -> bool {
    ["sheave", "shv"].iter().any(|start| name.starts_with(start)) || name == "kubepods"
}

/// True if `name` is `…-<pid>-<n>` or `…-<pid>` and that process runs.
fn owner_runs(name: &str) -> bool {
    let pids = name.rsplit('-').take(2).filter_map(|part| part.parse::<u32>().ok());
    pids.into_iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists())
}

/// Processes whose environment says that `run` started them.
fn processes(run: &str) -> Vec<String> {
    let mark = format!("{RUN_VARIABLE}={run}");
    let marked = |pid: &String| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
    };
    let describe = |pid: String| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        format!("process {pid} {}", String::from_utf8_lossy(&words).replace('\0', " ").trim())
    };
    let pids = names("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.filter(marked).map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_and_nobodys_is_left() {
        let name = "sheave-residue-test-without-owner";
        let dir = std::env::temp_dir().join(name);
        let before = scan();
        if dir.parent() == Some(Path::new("/tmp")) {
            fs::create_dir(&dir).expect("make a directory");
            let after = scan();
            fs::remove_dir(&dir).expect("remove the directory");
            assert!(after.difference(&before).any(|line| line.ends_with(name)), "{after:?}");
        }
        assert!(is_ours("shv1234") && !is_ours("eth0"));
        assert!(owner_runs(&format!("sheave-test-{}-0", std::process::id())));
        assert!(!owner_runs("sheave-test-0-0"));
    }
}
