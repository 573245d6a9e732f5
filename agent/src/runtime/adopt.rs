//! What a starting agent does about the pods of earlier ones. Invariant: nothing that runs is touched; a
//! pod without a shim is either listed as dead (it had been up) or cleared away (it never was).

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::mpsc;

use super::cgroup::{self, Hierarchies};
use super::error::{Result, RuntimeError};
use super::launch::{self, io_error};
use super::layout::{self, Layout, ShimProgram};
use super::pod::{self, Pod};
use super::record::{PodRecord, PodState, RuntimeEvent};
use super::{RuntimeConfig, blocking, sys};
use crate::limits::RUNTIME_LOCK_TIMEOUT_MS;

/// Makes the directories and takes the lock that keeps a second agent out.
pub(super) fn prepare(config: RuntimeConfig) -> Result<(Layout, Flock<fs::File>)> {
    let mountinfo = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(mountinfo).map_err(|e| io_error("read", mountinfo, e))?;
    let hierarchies: Hierarchies =
        cgroup::discover(&text, config.cgroup_path.as_deref()).map_err(|what| RuntimeError::Node { what })?;
    let root = hierarchies.unified_dir(Path::new(""));
    fs::create_dir_all(&root).map_err(|e| io_error("make", &root, e))?;
    let layout = Layout {
        run_dir: absolute(&config.run_dir)?,
        state_dir: absolute(&config.state_dir)?,
        log_dir: absolute(&config.log_dir)?,
        shim: shim_program(config.shim_exe),
        hierarchies,
    };
    for dir in [layout.pods(), layout.layers(), layout.log_dir.clone()] {
        fs::create_dir_all(&dir).map_err(|e| io_error("make", &dir, e))?;
    }
    let path = layout.run_dir.join("runtime.lock");
    Ok((layout, lock(path)?))
}

/// The program behind a read-only mount of its own: what runs in a container could otherwise get hold of
/// it through `/proc/self/exe` and write to it. The mount is attached nowhere and goes with its last user.
fn shim_program(given: Option<PathBuf>) -> ShimProgram {
    let path = given.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let protect = || {
        let mount = sys::open_tree(nix::fcntl::AT_FDCWD, &path, false)?;
        sys::mount_setattr(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, false)?;
        std::io::Result::Ok(mount)
    };
    match protect() {
        Ok(mount) => {
            let path = format!("/proc/{}/fd/{}", std::process::id(), mount.as_raw_fd()).into();
            ShimProgram { path, _mount: Some(mount) }
        }
        Err(error) => {
            tracing::warn!(%error, program = %path.display(), "shims run from a writable program");
            ShimProgram { path, _mount: None }
        }
    }
}

/// Waits a little: a killed agent's lock may live on in a program that it was about to start.
fn lock(path: PathBuf) -> Result<Flock<fs::File>> {
    let deadline = Instant::now() + Duration::from_millis(RUNTIME_LOCK_TIMEOUT_MS);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| io_error("open", &path, e))?;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => file,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(RuntimeError::InUse { path }),
            Err((_, error)) => return Err(io_error("lock", &path, error.into())),
        };
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| io_error("find", path, e))
}

/// Finds every pod of earlier agents.
pub(super) async fn adopt(
    layout: &Arc<Layout>,
    events: &mpsc::UnboundedSender<RuntimeEvent>,
) -> Result<BTreeMap<String, Arc<Pod>>> {
    let owned = layout.clone();
    let uids = blocking(move || launch::list_names(&owned.pods())).await?;
    let mut tasks = Vec::new();
    for uid in uids.into_iter().filter(|uid| layout::is_plain(uid, 128)) {
        let (layout, events) = (layout.clone(), events.clone());
        tasks.push(tokio::spawn(async move {
            let pod = adopt_one(&layout, &uid, &events).await;
            (uid, pod)
        }));
    }
    let mut pods = BTreeMap::new();
    for task in tasks {
        let (uid, pod) = task.await.map_err(|e| RuntimeError::Node { what: format!("adopting: {e}") })?;
        match pod {
            Ok(Some(pod)) => drop(pods.insert(uid, pod)),
            Ok(None) => {}
            Err(error) => tracing::error!(pod = uid, %error, "a pod can be neither adopted nor cleared"),
        }
    }
    let (owned, known) = (layout.clone(), pods.keys().cloned().collect::<Vec<_>>());
    blocking(move || remove_strays(&owned, &known)).await?;
    Ok(pods)
}

async fn adopt_one(
    layout: &Arc<Layout>,
    uid: &str,
    events: &mpsc::UnboundedSender<RuntimeEvent>,
) -> Result<Option<Arc<Pod>>> {
    if pod::wait_ready(layout, uid).await {
        match Pod::connect(layout.clone(), uid, events.clone()).await {
            Ok(pod) => {
                if pod.lock().state == PodState::Dead {
                    announce_death(events, uid);
                }
                return Ok(Some(pod));
            }
            Err(error) => tracing::warn!(pod = uid, %error, "its shim does not answer; it is taken for dead"),
        }
    }
    let (owned, name) = (layout.clone(), uid.to_owned());
    let found = blocking(move || {
        launch::kill_processes(&owned, &name)?;
        let found = launch::autopsy(&owned, &name)?;
        if found.is_none() {
            launch::clear(&owned, &name)?;
        }
        Ok(found)
    })
    .await?;
    let Some((spec, containers)) = found else {
        tracing::info!(pod = uid, "a half-made sandbox was cleared away");
        return Ok(None);
    };
    announce_death(events, uid);
    Ok(Some(Pod::dead(PodRecord { spec, init_pid: 0, state: PodState::Dead, containers })))
}

fn announce_death(events: &mpsc::UnboundedSender<RuntimeEvent>, uid: &str) {
    if events.send(RuntimeEvent::SandboxDied { uid: uid.to_owned() }).is_err() {
        tracing::debug!(pod = uid, "nobody listens to events");
    }
}

/// Removes what no run directory tells of (it went with a reboot): writable layers, and groups without
/// processes. Groups with processes may be somebody else's and are only mentioned.
fn remove_strays(layout: &Layout, known: &[String]) -> Result<()> {
    let stray = |uid: &String| !known.contains(uid) && !layout.pod(uid).exists();
    for uid in launch::list_names(&layout.layers())?.iter().filter(|u| stray(u)) {
        launch::remove_all(&layout.pod_layers(uid))?;
    }
    let node = |e: cgroup::CgroupError| RuntimeError::Node { what: format!("{e}: {}", e.source) };
    for (uid, group) in layout.hierarchies.pods().map_err(node)? {
        if !stray(&uid) {
            continue;
        }
        if layout.hierarchies.is_populated(&group).map_err(node)? {
            tracing::warn!(group = %group.display(), "processes of an unknown pod are left alone");
            continue;
        }
        for group in [group, cgroup::shim_path(&uid)] {
            if let Err(error) = layout.hierarchies.remove(&group) {
                tracing::warn!(%error, "removing a group that no pod has");
            }
        }
    }
    Ok(())
}
