//! Commands in containers: output, status, time limit; and that nothing of them stays.

use std::time::Instant;

use sheave_agent::runtime::{ExecSpec, RuntimeError};
use sheave_harness::{require_root, wait_for};

use crate::runtime_bed::{Bed, command, sandbox, shell};

#[test]
fn commands_give_their_output_and_status() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    let mut spec = shell(&bed, "main", "sleep 1000");
    spec.env = vec![("A".into(), "b".into())];
    spec.working_dir = "/var".into();
    spec.image.config.user = "web".into();
    node.start("a", spec);
    let output = node.exec("a", "main", &["sh", "-c", "pwd; echo $A >&2; id -u; id -G; exit 5"]);
    assert_eq!((output.code, output.timed_out, output.truncated), (5, false, false));
    assert_eq!(output.output, "/var\nb\n1000\n1001 50\n");
    assert_eq!(node.exec("a", "main", &["sh", "-c", "kill -9 $$"]).code, 137);
    let big = node.exec("a", "main", &["sh", "-c", "yes | dd bs=1k count=200 2>/dev/null"]);
    assert_eq!((big.output.len(), big.truncated), (64 * 1024, true));

    let missing = bed.wait(node.runtime.exec("a", "main", command(&["/bin/x"]))).unwrap_err();
    assert!(missing.to_string().ends_with("/bin/x: command not found"), "{missing}");
    let other = bed.wait(node.runtime.exec("a", "other", command(&["true"]))).unwrap_err();
    assert!(matches!(other, RuntimeError::NotRunning { .. }), "{other}");
    let none = bed.wait(node.runtime.exec("a", "main", command(&[]))).unwrap_err();
    assert!(matches!(none, RuntimeError::Invalid { .. }), "{none}");
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn a_time_limit_ends_the_whole_tree() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    node.start("a", shell(&bed, "main", "sleep 1000"));
    let script = "trap '' TERM; (sleep 2001 & sleep 2002) & echo up; sleep 2003";
    let spec = ExecSpec { timeout_ms: 200, ..command(&["sh", "-c", script]) };
    let begin = Instant::now();
    let output = bed.wait(node.runtime.exec("a", "main", spec)).unwrap();
    assert!(output.timed_out && output.code == 137 && output.output == "up\n", "{output:?}");
    assert!(begin.elapsed().as_millis() >= 200);
    let left = || {
        let processes = node.exec("a", "main", &["ps", "-o", "args"]).output;
        if processes.contains("sleep 200") { Err(processes) } else { Ok(()) }
    };
    wait_for("the end of the tree", left);
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}

#[test]
fn what_a_command_leaves_running_ends_with_it() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let node = bed.open();
    node.start_pod(sandbox("a"));
    node.start("a", shell(&bed, "main", "sleep 1000"));
    let output = node.exec("a", "main", &["sh", "-c", "sleep 2001 & echo started"]);
    assert_eq!((output.code, output.output.as_str()), (0, "started\n"));
    assert!(!node.exec("a", "main", &["ps", "-o", "args"]).output.contains("sleep 2001"));
    node.stop("a");
}

#[test]
fn many_commands_at_once_get_their_own_answers() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    node.start_pod(sandbox("a"));
    node.start("a", shell(&bed, "main", "sleep 1000"));
    let handles: Vec<_> = (0..40)
        .map(|i| {
            let runtime = node.runtime.clone();
            let spec = command(&["sh", "-c", &format!("echo {i}; exit {i}")]);
            bed.spawn(async move { runtime.exec("a", "main", spec).await })
        })
        .collect();
    for (i, handle) in handles.into_iter().enumerate() {
        let output = bed.wait(handle).unwrap().unwrap();
        assert_eq!((output.code, output.output), (i32::try_from(i).unwrap(), format!("{i}\n")));
    }
    // A container that ends takes its commands along.
    let runtime = node.runtime.clone();
    let exec = bed.spawn(async move { runtime.exec("a", "main", command(&["sleep", "99"])).await });
    wait_for("the command", || {
        let processes = node.exec("a", "main", &["ps", "-o", "args"]).output;
        if processes.contains("sleep 99") { Ok(()) } else { Err(processes) }
    });
    bed.wait(node.runtime.kill_container("a", "main")).unwrap();
    assert_eq!(bed.wait(exec).unwrap().unwrap().code, 137);
    assert_eq!(node.next_exit("main").code, 137);
    node.stop("a");
    assert_eq!(bed.residue(), Vec::<String>::new());
}
