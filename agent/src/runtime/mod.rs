//! Containers of this node. Invariant: pods belong to their shims, never to the agent: dropping a
//! [`Runtime`], or killing its process, changes nothing that runs, and `open` finds everything again.

pub mod image;
pub mod shim;

mod adopt;
mod capability;
mod cgroup;
mod error;
mod launch;
mod layout;
mod plan;
mod pod;
mod protocol;
mod record;
mod seccomp;
mod spec;
mod sys;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use self::layout::Layout;
use self::pod::Pod;
use self::protocol::{Answer, Request};
use crate::limits::{CONTAINER_START_TIMEOUT_MS, POD_KILL_TIMEOUT_MS, SHIM_ANSWER_TIMEOUT_MS};
pub use error::{Result, RuntimeError};
pub use record::{ContainerRecord, ExecOutput, Exit, PodRecord, PodState, RuntimeEvent, SandboxInfo};
pub use spec::{
    ContainerSpec, Dns, ExecSpec, ImageRef, Mount, Propagation, Qos, Resources, SandboxSpec, Seccomp,
};

/// Names one run of a container: 64 hexadecimal digits.
fn container_id(uid: &str, name: &str, attempt: u32) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(format!("{uid}/{name}/{attempt}"));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

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
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Arc<Layout>,
    pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    /// Starting and stopping one pod exclude each other.
    busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    events: mpsc::UnboundedSender<RuntimeEvent>,
    /// Locked as long as this agent works with the run directory.
    _lock: nix::fcntl::Flock<std::fs::File>,
}

impl Runtime {
    /// Adopts every live pod, clears away half-made ones, and reports pods whose shim died
    /// ([`RuntimeEvent::SandboxDied`]; they are listed until `stop_sandbox`).
    pub async fn open(config: RuntimeConfig) -> Result<(Runtime, mpsc::UnboundedReceiver<RuntimeEvent>)> {
        let (layout, lock) = blocking(move || adopt::prepare(config)).await?;
        let layout = Arc::new(layout);
        let (events, receiver) = mpsc::unbounded_channel();
        let pods = adopt::adopt(&layout, &events).await?;
        let busy = Mutex::new(HashMap::new());
        let inner = Inner { layout, pods: Mutex::new(pods), busy, events, _lock: lock };
        Ok((Runtime { inner: Arc::new(inner) }, receiver))
    }

    fn lock_pods(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pod>>> {
        // Single insertions and removals only: whole after a panic elsewhere.
        self.inner.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, uid: &str) -> Result<Arc<Pod>> {
        self.lock_pods().get(uid).cloned().ok_or_else(|| RuntimeError::NoSuchPod { uid: uid.to_owned() })
    }

    async fn exclusive(&self, uid: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.inner.busy.lock().unwrap_or_else(PoisonError::into_inner);
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            busy.entry(uid.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Every pod, live or dead, ordered by uid.
    pub async fn pods(&self) -> Vec<PodRecord> {
        self.lock_pods().values().map(|pod| pod.lock().clone()).collect()
    }

    /// One pod.
    pub async fn pod(&self, uid: &str) -> Option<PodRecord> {
        self.lock_pods().get(uid).map(|pod| pod.lock().clone())
    }

    /// Starts a pod's shim and makes its namespaces and cgroups. [`RuntimeError::Exists`] if there is one.
    pub async fn start_sandbox(&self, spec: SandboxSpec) -> Result<SandboxInfo> {
        let uid = spec.uid.clone();
        let invalid = |what| RuntimeError::Invalid { uid: uid.clone(), what };
        layout::check_sandbox(&spec).map_err(invalid)?;
        let _exclusive = self.exclusive(&uid).await;
        if self.lock_pods().contains_key(&uid) {
            return Err(RuntimeError::Exists { uid, what: "the sandbox".to_owned() });
        }
        let layout = self.inner.layout.clone();
        let qos = spec.qos;
        let init_pid = blocking(move || launch::start_sandbox(&layout, &spec)).await?;
        match Pod::connect(self.inner.layout.clone(), &uid, self.inner.events.clone()).await {
            Ok(pod) => drop(self.lock_pods().insert(uid, pod)),
            Err(error) => {
                let layout = self.inner.layout.clone();
                blocking(move || launch::clear(&layout, &uid)).await?;
                return Err(error);
            }
        }
        self.weigh(qos).await;
        Ok(SandboxInfo { netns: PathBuf::from(format!("/proc/{init_pid}/ns/net")), init_pid })
    }

    /// Writes the pod's own addresses to its `/etc/hosts`; call it between `start_sandbox` and the first
    /// `start_container`.
    pub async fn set_pod_ips(&self, uid: &str, ips: &[IpAddr]) -> Result<()> {
        let (spec, ips, layout) = (self.find(uid)?.spec(), ips.to_vec(), self.inner.layout.clone());
        blocking(move || launch::write_hosts(&layout, &spec, &ips)).await
    }

    /// Starts a container; returns after its program was executed. The earlier run of the same name must
    /// have ended and have a lower `attempt`. The event of a short run's end may arrive before this
    /// returns.
    pub async fn start_container(&self, uid: &str, spec: ContainerSpec) -> Result<ContainerRecord> {
        layout::check_container(&spec).map_err(|what| RuntimeError::Invalid { uid: uid.to_owned(), what })?;
        let pod = self.find(uid)?;
        let (name, attempt) = (spec.name.clone(), spec.attempt);
        // The shim gives up by itself at the shorter time.
        let timeout_ms = CONTAINER_START_TIMEOUT_MS + SHIM_ANSWER_TIMEOUT_MS;
        let request = Request::StartContainer(Box::new(spec));
        let answer = pod.call(uid, "starting a container", timeout_ms, request).await?;
        let Answer::Container(record) = answer else { return Err(unexpected(uid, &answer)) };
        if attempt > 0 {
            let (layout, pod) = (self.inner.layout.clone(), uid.to_owned());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = launch::remove_earlier_layers(&layout, &pod, &name, attempt) {
                    tracing::warn!(pod, container = name, %error, "removing the layer of an earlier run");
                }
            });
        }
        Ok(record)
    }

    /// Sends a signal to a container's first process.
    pub async fn signal(&self, uid: &str, container: &str, signal: i32) -> Result<()> {
        let request = Request::Signal { container: container.to_owned(), signal };
        self.find(uid)?.call(uid, "signalling", SHIM_ANSWER_TIMEOUT_MS, request).await.map(drop)
    }

    /// Kills every process of a container at once.
    pub async fn kill_container(&self, uid: &str, container: &str) -> Result<()> {
        let request = Request::Kill { container: container.to_owned() };
        self.find(uid)?.call(uid, "killing a container", SHIM_ANSWER_TIMEOUT_MS, request).await.map(drop)
    }

    /// Runs a command in a container and waits for it; it and what it started are killed after
    /// `timeout_ms`. [`RuntimeError::Start`] if it could not be executed.
    pub async fn exec(&self, uid: &str, container: &str, spec: ExecSpec) -> Result<ExecOutput> {
        if spec.command.is_empty() {
            return Err(RuntimeError::Invalid { uid: uid.to_owned(), what: "exec without a command".into() });
        }
        let timeout_ms = spec.timeout_ms.saturating_add(SHIM_ANSWER_TIMEOUT_MS);
        let request = Request::Exec { container: container.to_owned(), spec };
        match self.find(uid)?.call(uid, "a command", timeout_ms, request).await? {
            Answer::Exec(output) => Ok(output),
            other => Err(unexpected(uid, &other)),
        }
    }

    /// Kills what is left of a pod and removes everything but its logs. Idempotent; goes on past errors
    /// and returns the first.
    pub async fn stop_sandbox(&self, uid: &str) -> Result<()> {
        if !layout::is_plain(uid, 128) {
            return Ok(());
        }
        let _exclusive = self.exclusive(uid).await;
        let pod = self.find(uid).ok();
        if let Some(pod) = &pod {
            // From here on the shim's end is nobody's surprise.
            let alive = std::mem::replace(&mut pod.lock().state, PodState::Dead) == PodState::Ready;
            let timeout_ms = POD_KILL_TIMEOUT_MS + SHIM_ANSWER_TIMEOUT_MS;
            let stopped = pod.call(uid, "stopping", timeout_ms, Request::Stop).await;
            if let (true, Err(error)) = (alive, stopped) {
                tracing::warn!(pod = uid, %error, "the shim did not stop the pod; it is killed");
            }
        }
        let (layout, owned) = (self.inner.layout.clone(), uid.to_owned());
        blocking(move || launch::clear(&layout, &owned)).await?;
        let removed = self.lock_pods().remove(uid);
        if let Some(pod) = removed {
            self.weigh(pod.spec().qos).await;
        }
        Ok(())
    }

    /// Removes the cgroups that pods and shims live in, once every pod was stopped. Idempotent.
    pub async fn remove_cgroups(&self) -> Result<()> {
        let layout = self.inner.layout.clone();
        blocking(move || Ok(layout.hierarchies.remove_all()?)).await
    }

    /// Keeps the weight of the burstable class in step with its pods. Not worth failing a pod for.
    async fn weigh(&self, changed: Qos) {
        if changed != Qos::Burstable {
            return;
        }
        let request = |pod: &Arc<Pod>| {
            let record = pod.lock();
            let burstable = record.spec.qos == Qos::Burstable && record.state == PodState::Ready;
            record.spec.resources.cpu_request_milli.filter(|_| burstable).unwrap_or(0)
        };
        let sum = self.lock_pods().values().map(request).fold(0, u64::saturating_add);
        let layout = self.inner.layout.clone();
        if let Err(error) = blocking(move || launch::weigh_burstable(&layout, sum)).await {
            tracing::warn!(%error, "weighing the burstable pods");
        }
    }

    /// Removes the logs of a pod that was stopped. Idempotent.
    pub async fn remove_logs(&self, namespace: &str, name: &str, uid: &str) -> Result<()> {
        if ![namespace, name, uid].iter().all(|part| layout::is_plain(part, 253)) {
            return Ok(());
        }
        let dir = self.inner.layout.pod_logs(namespace, name, uid);
        blocking(move || launch::remove_all(&dir)).await
    }

    /// True if a directory is a layer of a container that exists: the image store asks before removing.
    pub async fn uses_layer(&self, layer: &Path) -> bool {
        let uses = |pod: &Arc<Pod>| pod.lock().containers.iter().any(|c| c.layers.iter().any(|l| l == layer));
        self.lock_pods().values().any(uses)
    }
}

fn unexpected(uid: &str, answer: &Answer) -> RuntimeError {
    RuntimeError::Protocol { uid: uid.to_owned(), what: format!("unexpected answer {answer:?}") }
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(RuntimeError::Node { what: format!("a worker thread ended early: {error}") }),
    }
}
