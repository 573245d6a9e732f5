//! Log files: form, rotation, a disk that is full.

use std::fs;
use std::process::Command;

use sheave_agent::runtime::RuntimeConfig;
use sheave_harness::{require_root, wait_for};

use crate::runtime_bed::{Bed, Node, log_text, sandbox, shell};

#[test]
fn long_lines_come_in_pieces_and_big_logs_are_rotated() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.open();
    node.start_pod(sandbox("a"));
    let script = "
        dd if=/dev/zero bs=20000 count=1 2>/dev/null; echo
        yes 0123456789012345678901234567890123456789 | dd bs=64k count=320 iflag=fullblock 2>/dev/null; echo end
    ";
    node.start("a", shell(&bed, "main", script));
    assert_eq!(node.next_exit("main").code, 0);
    let path = bed.log("a", "main", 0);
    let mut files: Vec<_> =
        fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 2 && files.len() <= 5, "{files:?}");
    assert_eq!(files[0], path);
    let rotated = files[1].file_name().unwrap().to_str().unwrap();
    assert_eq!(rotated.len(), "0.log.20060102-150405".len(), "{rotated}");
    assert!(log_text(&path).ends_with("end\n"));
    let first = fs::read_to_string(&files[1]).unwrap();
    let tags: Vec<_> = first.lines().take(3).map(|l| (l.split(' ').nth(2).unwrap(), l.len())).collect();
    assert_eq!((tags[0].0, tags[1].0, tags[2].0), ("P", "F", "F"));
    assert_eq!(tags[0].1 - tags[1].1, 16384 - (20000 - 16384));
    assert!(first.ends_with('\n'));
    node.stop("a");
}

#[test]
fn a_full_disk_costs_log_lines_and_nothing_else() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let logs = bed.dir.path().join("small");
    fs::create_dir(&logs).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=512k", "x"]).arg(&logs).status();
    assert!(mounted.unwrap().success());
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let unmounted = Command::new("umount").arg("-l").arg(&self.0).status();
            assert!(unmounted.is_ok_and(|s| s.success()), "umount {}", self.0.display());
        }
    }
    let _unmount = Unmount(logs.clone());
    let config = RuntimeConfig { log_dir: logs.clone(), ..bed.config() };
    let (runtime, events) = bed.wait(sheave_agent::runtime::Runtime::open(config)).unwrap();
    let mut node = Node { bed: &bed, runtime, events };
    node.start_pod(sandbox("a"));
    let script = "yes 0123456789 | dd bs=64k count=50 iflag=fullblock 2>/dev/null; \
        while ! test -e /dev/shm/go; do sleep 0.05; done; echo; echo after; exit 3";
    let record = node.start("a", shell(&bed, "main", script));
    wait_for("a full disk", || {
        let size = fs::metadata(&record.log).unwrap().len();
        if size > 300_000 { Ok(()) } else { Err(size) }
    });
    // The container is past its flood of output although nothing of it can be written anymore.
    wait_for("the container to go on", || {
        let processes = node.exec("a", "main", &["ps", "-o", "args"]).output;
        if processes.contains("\nsleep 0.05") { Ok(()) } else { Err(processes) }
    });
    let text = fs::read_to_string(&record.log).unwrap();
    assert!(text.ends_with('\n') && text.lines().all(|l| l.ends_with("F 0123456789")), "whole records only");
    let remounted = Command::new("mount").args(["-o", "remount,size=1m"]).arg(&logs).status();
    assert!(remounted.unwrap().success());
    node.exec("a", "main", &["touch", "/dev/shm/go"]);
    assert_eq!(node.next_exit("main").code, 3);
    assert!(log_text(&record.log).ends_with("\nafter\n"));
    node.stop("a");
}
