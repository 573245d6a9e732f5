//! What a pod and a container are asked to be. Plain data, complete: whoever starts a container needs
//! nothing else, and what is stored beside a pod is enough to stop it after every other record is gone.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::image::ImageConfig;

/// A pod's place in the cgroup tree (`kubepods`, `kubepods/burstable`, `kubepods/besteffort`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Qos {
    /// Every container has limits equal to its requests.
    Guaranteed,
    /// Some request or limit is set.
    Burstable,
    /// Nothing is set.
    #[default]
    BestEffort,
}

/// Resolver settings that become the pod's `/etc/resolv.conf`. All empty: the node's file is copied.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of nameservers, in order.
    pub nameservers: Vec<IpAddr>,
    /// Search list.
    pub searches: Vec<String>,
    /// Options as written in the file (`ndots:5`).
    pub options: Vec<String>,
}

/// Limits of a pod or a container. `None` means unlimited (or the kernel's default share).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Thousandths of a CPU that scheduling weight is derived from.
    pub cpu_request_milli: Option<u64>,
    /// Thousandths of a CPU that may be used per period of 100 ms.
    pub cpu_limit_milli: Option<u64>,
    /// Bytes of memory; swap is not given on top.
    pub memory_limit_bytes: Option<u64>,
    /// Processes and threads.
    pub pids_max: Option<u64>,
}

/// What all containers of a pod share.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxSpec {
    /// `metadata.uid`; names the pod everywhere in this module. 1 to 128 of `[0-9a-zA-Z._-]`, not
    /// beginning with a dot.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Host name inside the pod (at most 64 bytes); not used with `host_network`.
    pub hostname: String,
    /// Resolver settings.
    pub dns: Dns,
    /// Lines of `/etc/hosts` beside those for localhost and the pod itself: address and its names.
    pub host_aliases: Vec<(IpAddr, Vec<String>)>,
    /// The pod uses the node's network and host name.
    pub host_network: bool,
    /// All containers see one another's processes.
    pub share_process_namespace: bool,
    /// Place in the cgroup tree.
    pub qos: Qos,
    /// Limits of the pod as a whole.
    pub resources: Resources,
    /// Namespaced sysctls, `net.core.somaxconn` form; written after the defaults.
    pub sysctls: BTreeMap<String, String>,
    /// Opaque to the runtime, kept as long as the pod and given back on adoption.
    pub annotations: BTreeMap<String, String>,
}

/// An image as a container needs it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageRef {
    /// As the pod names it; for records only.
    pub reference: String,
    /// Digest of its configuration.
    pub id: String,
    /// Unpacked layers, the lowest first, the top-most last.
    pub layers: Vec<PathBuf>,
    /// Entrypoint, environment, user and working directory.
    pub config: ImageConfig,
}

impl From<(&str, &super::image::Image)> for ImageRef {
    fn from((reference, image): (&str, &super::image::Image)) -> Self {
        ImageRef {
            reference: reference.to_owned(),
            id: image.id.clone(),
            layers: image.layers.clone(),
            config: image.config.clone(),
        }
    }
}

/// Which later mounts are seen on the other side of a volume mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Propagation {
    /// None, in either direction.
    #[default]
    None,
    /// The node's show up in the container.
    HostToContainer,
}

/// A file or directory of the node that shows up in a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Existing absolute path on the node.
    pub source: PathBuf,
    /// Absolute path in the container; made if missing. Links in it never lead out of the container.
    pub target: PathBuf,
    /// Recursively read-only.
    pub read_only: bool,
    /// See [`Propagation`].
    pub propagation: Propagation,
}

/// Which system calls a container may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Seccomp {
    /// The built-in allow-list.
    #[default]
    Default,
    /// All.
    Unconfined,
}

/// One run of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    /// `spec.containers[].name`: unique in its pod, 1 to 63 of `[a-z0-9-]`.
    pub name: String,
    /// Counts the runs of this container in this pod, from 0. Names the log file.
    pub attempt: u32,
    /// What it runs.
    pub image: ImageRef,
    /// Replaces the image's entrypoint (and drops its arguments) where not empty.
    pub command: Vec<String>,
    /// Replaces the image's arguments where not empty.
    pub args: Vec<String>,
    /// Added to the image's environment; replaces variables of the same name.
    pub env: Vec<(String, String)>,
    /// Absolute path in the container; made if missing. Empty means the image's.
    pub working_dir: String,
    /// Volumes, mounted in the order of their targets' depth.
    pub mounts: Vec<Mount>,
    /// Limits of this container.
    pub resources: Resources,
    /// Replaces the image's user.
    pub run_as_user: Option<u32>,
    /// Replaces the image's or user's group; without it a `run_as_user` unknown to the image gets 0.
    pub run_as_group: Option<u32>,
    /// Refuse to start as user 0.
    pub run_as_non_root: bool,
    /// Added to the groups that the image's `/etc/group` has for the user.
    pub supplemental_groups: Vec<u32>,
    /// Capabilities over the default ones, `NET_ADMIN` form; `ALL` is understood.
    pub cap_add: Vec<String>,
    /// Capabilities of the default ones to go without; `ALL` is understood and comes before `cap_add`.
    pub cap_drop: Vec<String>,
    /// All capabilities, all devices, nothing masked, no system call filter.
    pub privileged: bool,
    /// The root filesystem is mounted read-only.
    pub read_only_root: bool,
    /// False sets `no_new_privs`. True is Kubernetes' default.
    pub allow_privilege_escalation: bool,
    /// System call filter.
    pub seccomp: Seccomp,
    /// Written to `oom_score_adj` where the node's own rights allow it (-1000 to 1000).
    pub oom_score_adj: i32,
    /// Where the container may leave a message; empty means `/dev/termination-log`.
    pub termination_message_path: String,
}

impl Default for ContainerSpec {
    fn default() -> Self {
        ContainerSpec {
            name: String::new(),
            attempt: 0,
            image: ImageRef::default(),
            command: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            working_dir: String::new(),
            mounts: Vec::new(),
            resources: Resources::default(),
            run_as_user: None,
            run_as_group: None,
            run_as_non_root: false,
            supplemental_groups: Vec::new(),
            cap_add: Vec::new(),
            cap_drop: Vec::new(),
            privileged: false,
            read_only_root: false,
            allow_privilege_escalation: true,
            seccomp: Seccomp::Default,
            oom_score_adj: 0,
            termination_message_path: String::new(),
        }
    }
}

/// A command to run beside a container's own process, with its rights and limits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecSpec {
    /// Program and arguments; no shell is put around them.
    pub command: Vec<String>,
    /// After this long everything that the command started is killed.
    pub timeout_ms: u64,
}
