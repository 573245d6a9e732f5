//! Carrying out what the machine asks for. Nothing is decided here: every action is tried once and
//! answered with what became of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::env::{self, Facts, Sources};
use super::machine::{Action, Exit, Hook, Note, Outcome, StartFailure, Started};
use super::model::{Container, Millis, Pod, PullPolicy, TerminationMessagePolicy};
use super::probe::ProbeResult;
use super::prober::{Place, Prober};
use super::spec::{self, NodeSettings};
use super::{machine, volumes};
use crate::cluster::{Client, chain};
use crate::limits;
use crate::network::Network;
use crate::runtime::image::{Image, ImageStore};
use crate::runtime::{self, ContainerRecord, ImageRef, Mount, Runtime, RuntimeError};

/// What acting needs; one for all pods.
#[derive(Debug)]
pub struct Means {
    /// Containers.
    pub runtime: Runtime,
    /// Images.
    pub images: ImageStore,
    /// Pod network.
    pub network: Network,
    /// The API.
    pub api: Client,
    /// Probes and hooks.
    pub prober: Prober,
    /// What the node adds to pods.
    pub node: NodeSettings,
    /// Volumes are below `pods/` here.
    pub state_dir: PathBuf,
    /// Container logs.
    pub log_dir: PathBuf,
    /// How many sandboxes may be in the making.
    pub starts: tokio::sync::Semaphore,
}

/// What acting on one pod remembers between actions.
#[derive(Debug, Default)]
pub struct Made {
    volumes: Mutex<BTreeMap<String, PathBuf>>,
}

impl Means {
    fn pod_dir(&self, pod: &Pod) -> PathBuf {
        self.state_dir.join("pods").join(&pod.uid)
    }

    /// Tries one action. `Terminate`, `Kill` and `Note` have no outcome.
    pub async fn act(
        self: Arc<Self>,
        pod: Arc<Pod>,
        ips: Vec<std::net::IpAddr>,
        made: Arc<Made>,
        action: Action,
    ) -> Option<Outcome> {
        match action {
            Action::StartSandbox => Some(Outcome::SandboxStarted(self.start_sandbox(&pod).await)),
            Action::Attach => Some(Outcome::Attached(self.attach(&pod).await)),
            Action::SetUpVolumes => Some(Outcome::VolumesReady(self.set_up_volumes(&pod, &made).await)),
            Action::Start { container, attempt } => {
                let mut notes = Vec::new();
                let result = self.start(&pod, &ips, &made, &container, attempt, &mut notes).await;
                Some(Outcome::Started { container, result, notes })
            }
            Action::RunHook { container, attempt, hook, timeout_ms } => {
                let result = self.run_hook(&pod, &ips, &container, hook, timeout_ms).await;
                Some(Outcome::HookDone { container, attempt, hook, result })
            }
            Action::Terminate { container } => {
                self.terminate(&pod, &container).await;
                None
            }
            Action::Kill { container } => {
                if let Err(error) = self.runtime.kill_container(&pod.uid, &container).await {
                    tracing::debug!(pod = pod.key(), container, error = chain(&error), "kill");
                }
                None
            }
            Action::RemoveSandbox => Some(Outcome::SandboxRemoved(
                self.remove_sandbox(&pod).await.map_err(|errors| errors.join("; ")),
            )),
            Action::TearDown => Some(Outcome::TornDown(self.tear_down(&pod).await)),
            Action::DeleteObject => Some(Outcome::ObjectDeleted(self.delete_object(&pod).await)),
            Action::Note(_) => None,
        }
    }

    async fn start_sandbox(&self, pod: &Pod) -> Result<(), String> {
        let _slot = self.starts.acquire().await.map_err(|e| e.to_string())?;
        let started = match self.runtime.start_sandbox(spec::sandbox(pod, &self.node)).await {
            Err(RuntimeError::Exists { .. }) => {
                self.runtime.stop_sandbox(&pod.uid).await.map_err(|e| chain(&e))?;
                self.runtime.start_sandbox(spec::sandbox(pod, &self.node)).await
            }
            other => other,
        };
        started.map_err(|e| chain(&e))?;
        if pod.spec.host_network {
            return self.runtime.set_pod_ips(&pod.uid, &self.node.ips).await.map_err(|e| chain(&e));
        }
        Ok(())
    }

    async fn attach(&self, pod: &Pod) -> Result<Vec<std::net::IpAddr>, String> {
        let record = self.runtime.pod(&pod.uid).await.ok_or("its sandbox is gone")?;
        let netns = PathBuf::from(format!("/proc/{}/ns/net", record.init_pid));
        let attachment = self.network.attach(&pod.uid, &netns).await.map_err(|e| chain(&e))?;
        let ports = spec::host_ports(pod)?;
        self.network.set_ports(&pod.uid, &ports).await.map_err(|e| chain(&e))?;
        self.runtime.set_pod_ips(&pod.uid, &attachment.ips).await.map_err(|e| chain(&e))?;
        Ok(attachment.ips)
    }

    async fn sources(&self, pod: &Pod, config_maps: &[&str], secrets: &[&str]) -> Result<Sources, String> {
        let mut sources = Sources::default();
        for name in config_maps {
            if !sources.config_maps.contains_key(*name) {
                let data = self.api.config_map(&pod.namespace, name).await.map_err(|e| chain(&e))?;
                sources.config_maps.insert((*name).to_owned(), data);
            }
        }
        for name in secrets {
            if !sources.secrets.contains_key(*name) {
                let data = self.api.secret(&pod.namespace, name).await.map_err(|e| chain(&e))?;
                sources.secrets.insert((*name).to_owned(), data);
            }
        }
        Ok(sources)
    }

    /// Makes the volumes, or brings the files of those from the API up to date.
    pub async fn set_up_volumes(&self, pod: &Arc<Pod>, made: &Made) -> Result<(), String> {
        if pod.spec.volumes.is_empty() {
            return Ok(());
        }
        let (config_maps, secrets) = volumes::needed(pod);
        let sources = self.sources(pod, &config_maps, &secrets).await?;
        let (dir, pod) = (self.pod_dir(pod).join("volumes"), pod.clone());
        let roots =
            blocking(move || volumes::set_up(&dir, &pod, &sources).map_err(|e| e.to_string())).await?;
        if let Ok(mut known) = made.volumes.lock() {
            *known = roots;
        }
        Ok(())
    }

    async fn start(
        &self,
        pod: &Arc<Pod>,
        ips: &[std::net::IpAddr],
        made: &Made,
        name: &str,
        attempt: u32,
        notes: &mut Vec<Note>,
    ) -> Result<(Started, Option<Exit>), StartFailure> {
        let config = |why: String| StartFailure::Config(format!("Error: {why}"));
        let container = machine::find(pod, name).ok_or_else(|| config(format!("no container {name:?}")))?;
        let image = self.image(container).await?;
        let (config_maps, secrets) = env::needed(container);
        let sources = self.sources(pod, &config_maps, &secrets).await.map_err(config)?;
        let facts = Facts {
            pod_ips: if pod.spec.host_network { &self.node.ips } else { ips },
            node_ips: &self.node.ips,
            node: self.node.allocatable,
        };
        let env = env::build(pod, container, &sources, &facts).map_err(config)?;
        let roots = made.volumes.lock().map(|roots| roots.clone()).unwrap_or_default();
        let plans = spec::mounts(pod, container, &roots, &env).map_err(config)?;
        let dir = self.pod_dir(pod).join("subpaths").join(name);
        let mounts = blocking(move || bind_sub_paths(plans, &dir)).await.map_err(config)?;
        let reference = ImageRef::from((container.image.as_str(), &image));
        let spec =
            spec::container(pod, container, attempt, reference, env, mounts, &self.node).map_err(config)?;
        note(notes, name, "Pulled", pulled(container));
        let started = self.runtime.start_container(&pod.uid, spec).await;
        let record = started.map_err(|error| start_failure(&error))?;
        note(notes, name, "Created", format!("Created container {name}"));
        note(notes, name, "Started", format!("Started container {name}"));
        let run = self::started(&record);
        let exit = record.exit.as_ref().map(|exit| self.exit(pod, name, record.attempt, exit));
        Ok((run, exit))
    }

    async fn image(&self, container: &Container) -> Result<Image, StartFailure> {
        let (images, reference) = (self.images.clone(), container.image.clone());
        let found = blocking(move || images.resolve(&reference).map_err(|e| chain(&e))).await;
        match found {
            Ok(Some(image)) => Ok(image),
            Ok(None) => {
                let name = &container.image;
                let message = format!(
                    "image {name:?} is not on this node and there is no registry to pull from yet; \
                     bring it here with `sheave image import FILE`"
                );
                Err(StartFailure::NoImage {
                    never_pull: container.image_pull_policy == PullPolicy::Never,
                    message,
                })
            }
            Err(why) => Err(StartFailure::NoImage {
                never_pull: false,
                message: format!("looking for the image: {why}"),
            }),
        }
    }

    async fn run_hook(
        &self,
        pod: &Pod,
        ips: &[std::net::IpAddr],
        name: &str,
        hook: Hook,
        timeout_ms: Millis,
    ) -> Result<(), String> {
        let container = machine::find(pod, name).ok_or("the container is gone")?;
        let handler = match hook {
            Hook::PostStart => container.lifecycle.post_start.as_ref(),
            Hook::PreStop => container.lifecycle.pre_stop.as_ref(),
        };
        let Some(handler) = handler else { return Ok(()) };
        let place = self.place(pod, ips);
        let timeout = Duration::from_millis(u64::try_from(timeout_ms).unwrap_or(0));
        match self.prober.run(&place, container, handler, timeout).await {
            ProbeResult::Success => Ok(()),
            ProbeResult::Failure(why) | ProbeResult::Unknown(why) => Err(why),
        }
    }

    /// Where a pod's probes and hooks are carried out.
    pub fn place(&self, pod: &Pod, ips: &[std::net::IpAddr]) -> Place {
        let ips = if pod.spec.host_network { self.node.ips.as_slice() } else { ips };
        Place { uid: pod.uid.clone(), ip: ips.first().copied() }
    }

    /// Sends the signal that the container's image asks for.
    async fn terminate(&self, pod: &Pod, name: &str) {
        let record = self.runtime.pod(&pod.uid).await;
        let image =
            record.and_then(|pod| pod.containers.into_iter().find(|c| c.name == name)).map(|c| c.image_id);
        let images = self.images.clone();
        let stop_signal = match image {
            Some(id) => blocking(move || images.resolve(&id).map_err(|e| chain(&e))).await.ok().flatten(),
            None => None,
        };
        let signal =
            stop_signal.map(|image| signal_number(&image.config.stop_signal)).unwrap_or(libc::SIGTERM);
        if let Err(error) = self.runtime.signal(&pod.uid, name, signal).await {
            tracing::debug!(pod = pod.key(), container = name, error = chain(&error), "terminate");
        }
    }

    async fn remove_sandbox(&self, pod: &Pod) -> Result<(), Vec<String>> {
        let mut errors = Vec::new();
        if !pod.spec.host_network
            && let Err(error) = self.network.detach(&pod.uid).await
        {
            errors.push(chain(&error));
        }
        match self.runtime.stop_sandbox(&pod.uid).await {
            Err(RuntimeError::NoSuchPod { .. }) | Ok(()) => {}
            Err(error) => errors.push(chain(&error)),
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    async fn tear_down(&self, pod: &Pod) -> Result<(), String> {
        let mut errors = self.remove_sandbox(pod).await.err().unwrap_or_default();
        let dir = self.pod_dir(pod);
        if let Err(error) = blocking(move || volumes::tear_down(&dir)).await {
            errors.push(error);
        }
        if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
    }

    async fn delete_object(&self, pod: &Pod) -> Result<(), String> {
        match self.api.delete_pod(&pod.namespace, &pod.name, &pod.uid).await {
            Err(error) if error.is_gone() => Ok(()),
            Err(error) => {
                tracing::warn!(
                    pod = pod.key(),
                    error = chain(&error),
                    "deleting the pod's object; will try again"
                );
                Err(chain(&error))
            }
            Ok(()) => Ok(()),
        }
    }

    /// An end as the machine knows it, with the message that the container's policy asks for.
    pub fn exit(&self, pod: &Pod, name: &str, attempt: u32, exit: &runtime::Exit) -> Exit {
        let container = machine::find(pod, name);
        let fall_back = container
            .is_some_and(|c| c.termination_message_policy == TerminationMessagePolicy::FallbackToLogsOnError);
        let mut message = exit.message.clone();
        if message.is_empty() && exit.code != 0 && fall_back {
            let log = log_path(&self.log_dir, pod, name, attempt);
            message = crate::server::logs::tail_text(
                &log,
                limits::TERMINATION_LOG_LINES_MAX,
                limits::TERMINATION_LOG_BYTES_MAX,
            );
        }
        let reason = match exit {
            runtime::Exit { lost: true, .. } => "ContainerStatusUnknown",
            runtime::Exit { oom_killed: true, .. } => "OOMKilled",
            runtime::Exit { code: 0, .. } => "Completed",
            _ => "Error",
        };
        Exit {
            code: exit.code,
            signal: exit.signal,
            reason: reason.to_owned(),
            message,
            finished_at: exit.finished_at.as_millisecond(),
        }
    }

    /// What the runtime has of a pod, as the machine adopts it.
    pub fn adopted(&self, pod: &Pod, record: &runtime::PodRecord) -> machine::Adopted {
        let run = |record: &ContainerRecord| {
            record.started?;
            let exit = record.exit.as_ref().map(|exit| self.exit(pod, &record.name, record.attempt, exit));
            Some((record.name.clone(), machine::AdoptedRun { run: started(record), exit }))
        };
        machine::Adopted {
            alive: record.state == runtime::PodState::Ready,
            runs: record.containers.iter().filter_map(run).collect(),
        }
    }
}

/// File of a container's log.
pub fn log_path(log_dir: &std::path::Path, pod: &Pod, container: &str, attempt: u32) -> PathBuf {
    log_dir
        .join(format!("{}_{}_{}", pod.namespace, pod.name, pod.uid))
        .join(container)
        .join(format!("{attempt}.log"))
}

fn started(record: &ContainerRecord) -> Started {
    Started {
        attempt: record.attempt,
        id: record.id.clone(),
        image: record.image.clone(),
        image_id: record.image_id.clone(),
        started_at: record.started.unwrap_or(record.created).as_millisecond(),
    }
}

fn start_failure(error: &RuntimeError) -> StartFailure {
    match error {
        RuntimeError::Start { stage, message, .. } if stage.starts_with("exec") => {
            StartFailure::Exec(format!("{stage}: {message}"))
        }
        RuntimeError::Invalid { what, .. } => StartFailure::Config(format!("Error: {what}")),
        other => StartFailure::Create(format!("Error: {}", chain(other))),
    }
}

fn pulled(container: &Container) -> String {
    let image = &container.image;
    match container.image_pull_policy {
        PullPolicy::Always => format!(
            "Container image {image:?} is taken from this node: imagePullPolicy is Always, but there is no registry yet"
        ),
        _ => format!("Container image {image:?} already present on machine"),
    }
}

fn note(notes: &mut Vec<Note>, container: &str, reason: &'static str, message: String) {
    notes.push(Note { warning: false, reason, message, container: Some(container.to_owned()) });
}

/// Makes mounts of parts of volumes mountable: each is opened inside its volume and bound below `dir`, so
/// that nobody can put something else in its place before the container mounts it.
fn bind_sub_paths(plans: Vec<spec::MountPlan>, dir: &std::path::Path) -> Result<Vec<Mount>, String> {
    let mut mounts = Vec::new();
    for (i, mut plan) in plans.into_iter().enumerate() {
        if !plan.sub_path.as_os_str().is_empty() {
            let place = dir.join(i.to_string());
            volumes::bind_sub_path(&plan.mount.source, &plan.sub_path, &place)?;
            plan.mount.source = place;
        }
        mounts.push(plan.mount);
    }
    Ok(mounts)
}

/// A signal by name (`SIGQUIT`, `QUIT`) or number; TERM for what is neither.
fn signal_number(text: &str) -> i32 {
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { number } else { libc::SIGTERM };
    }
    let name = if text.starts_with("SIG") { text.to_owned() } else { format!("SIG{text}") };
    if let Some(offset) = name.strip_prefix("SIGRTMIN+").and_then(|n| n.parse::<i32>().ok()) {
        return (34 + offset).min(64);
    }
    name.parse::<nix::sys::signal::Signal>().map_or(libc::SIGTERM, |signal| signal as i32)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_signals() {
        for (text, number) in [
            ("SIGQUIT", 3),
            ("QUIT", 3),
            ("15", 15),
            ("", 15),
            ("SIGNOPE", 15),
            ("99", 15),
            ("SIGRTMIN+3", 37),
        ] {
            assert_eq!(signal_number(text), number, "{text:?}");
        }
    }

    #[test]
    fn only_a_program_that_could_not_be_run_uses_up_a_run() {
        let start = |stage: &str| RuntimeError::Start {
            uid: "u".into(),
            stage: stage.into(),
            message: "m".into(),
            errno: 2,
        };
        assert_eq!(start_failure(&start("exec")), StartFailure::Exec("exec: m".into()));
        assert!(matches!(start_failure(&start("mount /proc")), StartFailure::Create(_)));
    }
}
