//! Private cgroups: what a test attaches or limits reaches only processes that the test put there. A guard removes
//! its cgroup from every hierarchy, with everything below it, killing what still runs inside.

#![expect(unsafe_code, reason = "pre_exec, to start a program inside a cgroup")]

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Every mounted cgroup hierarchy, v2 first: its mount point and whether it is v2.
fn hierarchies() -> Vec<(PathBuf, bool)> {
    let info = fs::read_to_string("/proc/self/mountinfo").expect("read /proc/self/mountinfo");
    let mut found = Vec::new();
    for line in info.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(root), Some(point)) = (left.split(' ').nth(3), left.split(' ').nth(4)) else { continue };
        match (right.split(' ').next(), root) {
            (Some("cgroup2"), "/") => found.insert(0, (PathBuf::from(point), true)),
            (Some("cgroup"), "/") => found.push((PathBuf::from(point), false)),
            _ => {}
        }
    }
    found
}

/// The mount point of the v2 hierarchy (`/sys/fs/cgroup`, or `…/unified` where v1 holds the controllers).
pub fn v2_root() -> PathBuf {
    let first = hierarchies().into_iter().next();
    first.filter(|(_, v2)| *v2).expect("a mounted cgroup2 hierarchy").0
}

/// A cgroup of its own below the root of the v2 hierarchy; v1 hierarchies are cleaned of the same relative path.
#[derive(Debug)]
pub struct Cgroup {
    name: String,
    path: PathBuf,
}

impl Cgroup {
    /// Makes `sheave-<label>-<pid>-<n>`.
    pub fn new(label: &str) -> Self {
        let name = crate::unique(&format!("sheave-{label}"));
        let path = v2_root().join(&name);
        fs::create_dir(&path).unwrap_or_else(|e| panic!("make cgroup {}: {e} (needs root)", path.display()));
        Cgroup { name, path }
    }

    /// Where it is in the v2 hierarchy: what `--cgroup-path` takes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path below a hierarchy's root, without a leading slash.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes `command` start inside (v2 only; v1 hierarchies are the program's own affair).
    pub fn apply(&self, command: &mut Command) {
        let procs =
            fs::File::options().write(true).open(self.path.join("cgroup.procs")).expect("open cgroup.procs");
        // SAFETY: between fork and exec only write(2) runs; "0" names the writing process.
        unsafe {
            command.pre_exec(move || (&procs).write_all(b"0"));
        }
    }

    /// Moves a running process inside.
    pub fn add(&self, pid: u32) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .unwrap_or_else(|e| panic!("move {pid} into {}: {e}", self.path.display()));
    }

    /// Every process inside or below.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for dir in subtree(&self.path) {
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        pids
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path.join("cgroup.kill"), "1") {
            eprintln!("kill cgroup {}: {error}", self.path.display());
        }
        let left: Vec<PathBuf> = hierarchies()
            .into_iter()
            .map(|(root, _)| root.join(&self.name))
            .filter(|top| !removed(top))
            .collect();
        // A second panic would abort the whole suite and hide the first.
        if std::thread::panicking() {
            left.iter().for_each(|top| eprintln!("left behind: cgroup {}", top.display()));
        } else {
            assert!(left.is_empty(), "cannot remove cgroups {left:?}");
        }
    }
}

/// Removes `top` and everything below it, giving killed processes ten seconds to be gone; false if that fails.
fn removed(top: &Path) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let gone = |dir: &PathBuf| match fs::remove_dir(dir) {
            Err(error) => error.kind() == ErrorKind::NotFound,
            Ok(()) => true,
        };
        // No short circuit: what can go in this round goes.
        if subtree(top).iter().filter(|dir| !gone(dir)).count() == 0 {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `top` and every cgroup below it, children before parents.
fn subtree(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(subtree(&entry.path()));
        }
    }
    found.push(top.to_owned());
    found
}
