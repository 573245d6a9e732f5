//! Ring vm: the netns suite's `service_…`, `runtime_…`, `kernel_…` and `ipvs_…` tests on other kernels (the oldest that is
//! promised, and the newest that Debian has; pure cgroup v2). One boot a kernel; each test that ran in a guest is
//! reported here under `<kernel>::<its name>`, in the words of an ordinary test program, so that it is counted. The guests run
//! side by side.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};

const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Which tests of the netns suite say something about a kernel, and take no longer than a guest has time for: emulated
/// processors are some ten times slower. IPVS is to be had here only.
const SUBJECTS: [&str; 12] = [
    "ipvs_",
    "kernel_",
    "policy_life",
    "runtime_",
    "service_direct",
    "service_killed",
    "service_kinds",
    "service_nodeport",
    "service_packet",
    "service_past",
    "service_socket",
    "service_upgrade",
];

/// Where tests report that they skipped themselves.
const SKIP_FILE: &str = "SHEAVE_SKIP_FILE";

fn main() -> ExitCode {
    let mut filters = Vec::new();
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--list" => {
                KERNELS.iter().for_each(|kernel| println!("{kernel}: test"));
                return ExitCode::SUCCESS;
            }
            // Other flags of test programs make no difference here.
            flag if flag.starts_with('-') => {}
            filter => filters.push(filter.to_owned()),
        }
    }
    let kernels: Vec<_> =
        KERNELS.iter().filter_map(|kernel| wanted(kernel, &filters).map(|f| (*kernel, f))).collect();
    println!("\nrunning the netns suite in {} guests", kernels.len());
    prepare(kernels.iter().map(|(kernel, _)| *kernel));
    // A guest has one processor, which is all that an emulated one makes use of.
    let runs: Vec<Run> = std::thread::scope(|scope| {
        let started: Vec<_> =
            kernels.iter().map(|(kernel, filters)| scope.spawn(|| Run::of(kernel, filters))).collect();
        started.into_iter().map(|run| run.join().expect("a guest's run")).collect()
    });
    let count =
        |wanted: bool| runs.iter().flat_map(|run| run.verdicts.values()).filter(|ok| **ok == wanted).count();
    let (passed, failed) = (count(true), count(false));
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What to ask `kernel`'s guest for: a filter may name a kernel, a test, or `<kernel>::<test>`.
fn wanted(kernel: &str, filters: &[String]) -> Option<Vec<String>> {
    let all = || SUBJECTS.iter().map(|s| (*s).to_owned()).collect();
    if filters.is_empty() || filters.iter().any(|f| f == kernel) {
        return Some(all());
    }
    let of_kernel = |filter: &String| match filter.split_once("::") {
        Some((first, rest)) if first == kernel => Some(rest.to_owned()),
        Some((first, _)) if KERNELS.contains(&first) => None,
        _ => Some(filter.clone()).filter(|f| !KERNELS.contains(&f.as_str())),
    };
    let mine: Vec<_> = filters.iter().filter_map(of_kernel).collect();
    (!mine.is_empty()).then_some(mine)
}

/// `cargo xtask vm`.
fn vm() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["run", "--quiet", "--package", "xtask", "--", "vm"]).stdin(Stdio::null());
    // Meant for static programs; xtask itself is an ordinary one.
    command.env_remove("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS");
    command
}

/// Fetches the kernels, one after the other.
fn prepare<'a>(kernels: impl Iterator<Item = &'a str>) {
    let status = vm().arg("prepare").args(kernels).stdout(Stdio::null()).status().expect("start cargo");
    assert!(status.success(), "the kernels cannot be had: {status}");
}

/// What one guest said.
struct Run {
    verdicts: BTreeMap<String, bool>,
}

impl Run {
    fn of(kernel: &str, filters: &[String]) -> Run {
        let mut run = Run { verdicts: BTreeMap::new() };
        let mut command = vm();
        command.args(["suite", "--kernel", kernel, "--"]).args(filters).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start cargo");
        let output = child.stdout.take().expect("its output is a pipe");
        let mut all = String::new();
        for line in BufReader::new(output).lines() {
            let line =
                String::from_utf8_lossy(line.expect("read the guest's output").as_bytes()).into_owned();
            run.line(kernel, &line);
            all.push_str(&line);
            all.push('\n');
        }
        let status = child.wait().expect("wait for the guest");
        let bad = run.verdicts.values().any(|ok| !ok);
        // A guest that says nothing, or fails without naming a test, has failed itself.
        if run.verdicts.is_empty() || status.success() == bad || !all.contains("test result:") {
            run.verdict(kernel, "(the guest itself)", false);
        }
        if run.verdicts.values().any(|ok| !ok) {
            println!("\n---- {kernel}: {status} ----\n{}", sheave_harness::set_apart(all.as_bytes()));
        }
        run
    }

    fn line(&mut self, kernel: &str, line: &str) {
        if let Some((name, word)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) {
            // `should_panic` tests carry a remark.
            let name = name.split(" - ").next().unwrap_or(name);
            self.verdict(kernel, name, word == "ok");
        } else if let Some(skip) = line.strip_prefix("skip\t") {
            report_skip(kernel, skip);
        }
    }

    fn verdict(&mut self, kernel: &str, name: &str, ok: bool) {
        println!("test {kernel}::{name} ... {}", if ok { "ok" } else { "FAILED" });
        self.verdicts.insert(name.to_owned(), ok);
    }
}

fn report_skip(kernel: &str, skip: &str) {
    let Some(path) = std::env::var_os(SKIP_FILE) else { return };
    let mut file = std::fs::File::options().append(true).create(true).open(path).expect("open the skip file");
    file.write_all(format!("{kernel}::{skip}\n").as_bytes()).expect("write to the skip file");
}
