//! Tests that need a process of their own: inside a private cgroup (a socket belongs to the cgroup of the process
//! that made it) and a private network namespace. The test starts itself again there and passes the verdict on.

use std::process::Command;

use crate::{Cgroup, NetNs, set_apart};

/// Set in the inner process to the name of the one test that runs there.
const INSIDE: &str = "SHEAVE_ISOLATED";
/// Set in the inner process to its cgroup in the v2 hierarchy.
const CGROUP: &str = "SHEAVE_ISOLATED_CGROUP";

/// The test that this process was started again for, if it was.
pub(crate) fn running() -> Option<String> {
    std::env::var(INSIDE).ok()
}

/// Runs `body` in a process of its own, inside a fresh network namespace (`lo` up) and a fresh cgroup, whose path in
/// the v2 hierarchy it is given.
///
/// `module` is `module_path!()` and `test` the name of the calling test function:
/// `isolated(module_path!(), "connects", |cgroup| …)`.
#[track_caller]
pub fn isolated(module: &str, test: &str, body: impl FnOnce(&std::path::Path)) {
    let name = match module.split_once("::") {
        Some((_, rest)) => format!("{rest}::{test}"),
        None => test.to_owned(),
    };
    if running().as_deref() == Some(&name) {
        let cgroup = std::env::var_os(CGROUP).expect("the isolated process is told its cgroup");
        return body(std::path::Path::new(&cgroup));
    }
    if !crate::require_root() {
        return;
    }
    let (netns, cgroup) = (NetNs::new(), Cgroup::new("test"));
    let mut command = Command::new(std::env::current_exe().expect("the test program's own path"));
    command.args([&name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(INSIDE, &name).env(CGROUP, cgroup.path());
    netns.apply(&mut command);
    cgroup.apply(&mut command);
    let output = command.output().expect("start the test again");
    let (out, err) = (set_apart(&output.stdout), set_apart(&output.stderr));
    assert!(output.status.success(), "isolated {name}: {}\n{out}\n{err}", output.status);
    // A wrong name would run nothing and "pass".
    assert!(out.contains("1 passed"), "isolated {name} ran no test:\n{out}\n{err}");
    print!("{out}");
    eprint!("{err}");
}
