//! One container's start beside runc's: the same root file system and program, by turns in one run. Ours is timed from
//! the agent's request until the program was executed; runc's `run --detach` returns at the same point.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sheave_agent::runtime::{ContainerSpec, ImageRef, Qos, Resources, Runtime, RuntimeConfig, SandboxSpec};
use sheave_harness::{Cgroup, unique};

use crate::latency::Latencies;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const ROUNDS: usize = 60;
const UID: &str = "bench-container-start";

pub(crate) fn run(report: &mut Report) -> Result<()> {
    let bar = spinner(format!("a container's start beside runc's, {ROUNDS} rounds"));
    let dir = tempfile::Builder::new().prefix("bench-run-").tempdir_in(std::env::current_dir()?)?;
    let bundle = dir.path().join("bundle");
    root_file_system(&bundle.join("rootfs"))?;
    runc_bundle(&bundle)?;
    let cgroup = Cgroup::new("bench");
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (ours, theirs) = tokio.block_on(by_turns(dir.path(), &bundle, &cgroup))?;
    bar.finish_and_clear();
    let params = [("rounds", json!(ROUNDS))];
    report.add("container_start_p50", ours.ms(0.5), "ms", Bar::None, &params);
    report.add("runc_run_p50", theirs.ms(0.5), "ms", Bar::None, &params);
    report.add("container_start_to_runc_run", ours.ms(0.5) / theirs.ms(0.5), "x", Bar::AtMost(0.4), &params);
    Ok(())
}

async fn by_turns(dir: &Path, bundle: &Path, cgroup: &Cgroup) -> Result<(Latencies, Latencies)> {
    let (runtime, _events) = Runtime::open(RuntimeConfig {
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        log_dir: dir.join("log"),
        cgroup_path: Some(cgroup.path().to_owned()),
        shim_exe: Some(crate::sheave()?),
    })
    .await?;
    runtime.start_sandbox(sandbox()).await?;
    let (mut ours, mut theirs) = (Latencies::new(), Latencies::new());
    let result = async {
        for attempt in 0..ROUNDS as u32 {
            ours.record(start_ours(&runtime, &bundle.join("rootfs"), attempt).await?);
            theirs.record(start_runc(bundle)?);
        }
        anyhow::Ok(())
    }
    .await;
    runtime.stop_sandbox(UID).await?;
    result?;
    Ok((ours, theirs))
}

async fn start_ours(runtime: &Runtime, layer: &Path, attempt: u32) -> Result<Duration> {
    let spec = ContainerSpec {
        name: "sleeper".to_owned(),
        attempt,
        image: ImageRef {
            id: "sha256:bench".to_owned(),
            layers: vec![layer.to_owned()],
            ..ImageRef::default()
        },
        command: vec!["/bin/sleep".to_owned()],
        args: vec!["1000".to_owned()],
        ..ContainerSpec::default()
    };
    let start = Instant::now();
    runtime.start_container(UID, spec).await.context("starting our container")?;
    let took = start.elapsed();
    runtime.kill_container(UID, "sleeper").await?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while runtime.pod(UID).await.is_some_and(|pod| pod.containers.iter().any(|c| c.exit.is_none())) {
        ensure!(Instant::now() < deadline, "the container did not end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(took)
}

fn start_runc(bundle: &Path) -> Result<Duration> {
    let id = unique("sheave-bench");
    let start = Instant::now();
    let status = Command::new("runc")
        .args(["run", "--detach", "--bundle"])
        .arg(bundle)
        .arg(&id)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("starting runc (Debian's runc; `cargo xtask setup` installs it)")?;
    let took = start.elapsed();
    ensure!(status.success(), "runc run: {status}");
    let status = Command::new("runc").args(["delete", "--force", &id]).status()?;
    ensure!(status.success(), "runc delete: {status}");
    Ok(took)
}

fn sandbox() -> SandboxSpec {
    SandboxSpec {
        uid: UID.to_owned(),
        namespace: "default".to_owned(),
        name: "bench".to_owned(),
        hostname: "bench".to_owned(),
        qos: Qos::BestEffort,
        resources: Resources::default(),
        ..SandboxSpec::default()
    }
}

/// A static busybox is a whole root file system.
fn root_file_system(root: &Path) -> Result<()> {
    let bin = root.join("bin");
    std::fs::create_dir_all(&bin)?;
    std::fs::copy("/bin/busybox", bin.join("busybox"))
        .context("copying /bin/busybox (Debian's busybox-static)")?;
    std::os::unix::fs::symlink("busybox", bin.join("sleep"))?;
    for name in ["proc", "sys", "dev", "etc", "tmp"] {
        std::fs::create_dir(root.join(name))?;
    }
    Ok(())
}

/// runc's own default bundle, with our program and without a terminal.
fn runc_bundle(bundle: &Path) -> Result<()> {
    let status =
        Command::new("runc").arg("spec").current_dir(bundle).status().context("starting runc spec")?;
    ensure!(status.success(), "runc spec: {status}");
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["/bin/sleep", "1000"]);
    // Raising limits needs a capability that root may lack; both sides leave them alone.
    config["process"]["rlimits"] = json!([]);
    std::fs::write(&path, config.to_string())?;
    Ok(())
}
