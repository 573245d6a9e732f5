//! A disk that fills up under the control plane: writes are refused with the reason, reads go on,
//! and once there is space everything goes on, also after a kill.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, ResourceExt};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(30);

/// A small disk of its own.
struct Disk(PathBuf);

impl Disk {
    fn new(dir: &Path, megabytes: u32) -> Self {
        let disk = Self(dir.to_owned());
        disk.mount(megabytes, MsFlags::empty());
        disk
    }

    fn mount(&self, megabytes: u32, flags: MsFlags) {
        let size = format!("size={megabytes}m");
        mount(Some("sheave-test"), &self.0, Some("tmpfs"), flags, Some(size.as_str())).expect("mount");
    }

    fn grow(&self, megabytes: u32) {
        self.mount(megabytes, MsFlags::MS_REMOUNT);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).expect("unmount the small disk");
    }
}

struct Process(Child);

impl Process {
    fn kill(&mut self) {
        // Both fail only when it has ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn start(dir: &Path, log: &Path) -> (Process, Api<ConfigMap>) {
    let kubeconfig = dir.join("admin.kubeconfig");
    std::fs::remove_file(&kubeconfig).ok();
    let log = std::fs::File::create(log).expect("a log");
    let child = Command::new(env!("CARGO_BIN_EXE_sheave"))
        .args(["control", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("the log again"))
        .stderr(log)
        .spawn()
        .expect("start the control plane");
    let process = Process(child);
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Ok(file) = Kubeconfig::read_from(&kubeconfig) {
            let options = KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(file, &options).await.expect("a kubeconfig");
            let client = kube::Client::try_from(config).expect("a client");
            if client.apiserver_version().await.is_ok() {
                return (process, Api::default_namespaced(client));
            }
        }
        assert!(Instant::now() < deadline, "the control plane does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn map(name: &str, bytes: usize) -> ConfigMap {
    let map = json!({"metadata": {"name": name}, "data": {"k": "x".repeat(bytes)}});
    serde_json::from_value(map).expect("a ConfigMap")
}

async fn names(api: &Api<ConfigMap>) -> Vec<String> {
    let list = api.list(&ListParams::default().fields("metadata.name!=kube-root-ca.crt")).await;
    list.expect("a list").items.iter().map(ResourceExt::name_any).collect()
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_nothing_else() {
    if !sheave_harness::require_root() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("sheave-full-").tempdir().expect("a directory");
    let (state, log) = (dir.path().join("state"), dir.path().join("log"));
    std::fs::create_dir(&state).expect("the mount point");
    let disk = Disk::new(&state, 6);
    let (mut process, api) = start(&state, &log).await;
    let mut kept = Vec::new();
    let mut refusal = None;
    for n in 0..40 {
        let name = format!("m{n:02}");
        match api.create(&PostParams::default(), &map(&name, 400_000)).await {
            Ok(_) => kept.push(name),
            Err(error) => {
                refusal = Some(error);
                break;
            }
        }
    }
    let Some(kube::Error::Api(status)) = refusal else { panic!("never full: {refusal:?}") };
    assert_eq!((status.code, status.reason.as_str()), (500, "InternalError"));
    assert!(status.message.contains("No space left on device"), "{}", status.message);
    assert!(status.message.contains("store.redb"), "{}", status.message);
    assert_eq!(names(&api).await, kept, "what was refused is not there, the rest is");

    disk.grow(64);
    api.create(&PostParams::default(), &map("n", 400_000)).await.expect("a write once there is space");
    kept.push("n".to_owned());
    assert_eq!(names(&api).await, kept);
    process.kill();
    let (process, api) = start(&state, &log).await;
    assert_eq!(names(&api).await, kept, "what was acknowledged is on the disk");
    drop(process);
    drop(disk);
}
