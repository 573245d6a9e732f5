//! A pod as the agent keeps it: only the fields that are used, with the API's defaults filled in, so
//! that an object that nobody defaulted decodes to the same model as one that the API server did.
//!
//! Field names and meanings are those of the core/v1 API. Values that the API does not define decode to
//! `Unknown` instead of failing the whole watch; what acts on them refuses them by name.

mod prior;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

pub use prior::{PriorRunning, PriorState, PriorTerminated, PriorWaiting};

/// Milliseconds since the Unix epoch.
pub type Millis = i64;

/// One pod, desired and last reported.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pod {
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// The API's id of this very incarnation; the key of everything on the node.
    pub uid: String,
    /// `metadata.labels`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Those of `metadata.annotations` that a `fieldRef` of the pod names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Set once the API wants the pod gone.
    pub deletion: Option<Deletion>,
    /// What should run.
    pub spec: PodSpec,
    /// What was last reported; read when a pod is adopted, and for conditions that others own.
    #[serde(skip_serializing)]
    pub status: PriorStatus,
}

/// A pod that is to be terminated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// Seconds between TERM and KILL, `metadata.deletionGracePeriodSeconds`.
    pub grace_s: i64,
}

/// `spec` of a pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PodSpec {
    pub node_name: String,
    pub containers: Vec<Container>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub init_containers: Vec<Container>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    pub restart_policy: RestartPolicy,
    pub termination_grace_period_seconds: i64,
    pub active_deadline_seconds: Option<i64>,
    pub host_network: bool,
    #[serde(rename = "hostPID")]
    pub host_pid: bool,
    #[serde(rename = "hostIPC")]
    pub host_ipc: bool,
    pub host_users: Option<bool>,
    pub share_process_namespace: bool,
    pub hostname: String,
    pub subdomain: String,
    pub dns_policy: DnsPolicy,
    pub dns_config: DnsConfig,
    pub host_aliases: Vec<HostAlias>,
    pub security_context: PodSecurityContext,
    pub service_account_name: String,
    pub readiness_gates: Vec<ReadinessGate>,
    pub runtime_class_name: String,
    pub resource_claims: Vec<serde_json::Value>,
}

impl Default for PodSpec {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            containers: Vec::new(),
            init_containers: Vec::new(),
            volumes: Vec::new(),
            restart_policy: RestartPolicy::Always,
            termination_grace_period_seconds: 30,
            active_deadline_seconds: None,
            host_network: false,
            host_pid: false,
            host_ipc: false,
            host_users: None,
            share_process_namespace: false,
            hostname: String::new(),
            subdomain: String::new(),
            dns_policy: DnsPolicy::ClusterFirst,
            dns_config: DnsConfig::default(),
            host_aliases: Vec::new(),
            security_context: PodSecurityContext::default(),
            service_account_name: String::new(),
            readiness_gates: Vec::new(),
            runtime_class_name: String::new(),
            resource_claims: Vec::new(),
        }
    }
}

/// When a container that ended runs again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// Whatever its exit code was.
    #[default]
    Always,
    /// Only after a failure.
    OnFailure,
    /// Not at all.
    Never,
    /// Not defined by the API; treated as `Always`, its default.
    #[serde(other)]
    Unknown,
}

/// Where a pod's resolver settings come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DnsPolicy {
    /// The cluster's nameserver; for host-network pods the node's.
    #[default]
    ClusterFirst,
    /// The cluster's nameserver also for host-network pods.
    ClusterFirstWithHostNet,
    /// The node's own settings.
    Default,
    /// Only what `dnsConfig` says.
    None,
    /// Not defined by the API; treated as `ClusterFirst`.
    #[serde(other)]
    Unknown,
}

/// `spec.dnsConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct DnsConfig {
    pub nameservers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<DnsOption>,
}

/// One resolver option.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct DnsOption {
    pub name: String,
    pub value: Option<String>,
}

/// One extra line of `/etc/hosts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct HostAlias {
    pub ip: String,
    pub hostnames: Vec<String>,
}

/// A condition that must be `True` for the pod to be ready, beside the agent's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct ReadinessGate {
    pub condition_type: String,
}

/// `spec.securityContext`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PodSecurityContext {
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub run_as_non_root: Option<bool>,
    pub fs_group: Option<i64>,
    pub supplemental_groups: Vec<i64>,
    pub sysctls: Vec<NameValue>,
    pub seccomp_profile: Option<SeccompProfile>,
}

/// A name and its value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct NameValue {
    pub name: String,
    pub value: String,
}

/// Which system calls are allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct SeccompProfile {
    #[serde(rename = "type")]
    pub kind: String,
}

/// One container of a pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct Container {
    pub name: String,
    pub image: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    pub working_dir: String,
    pub ports: Vec<ContainerPort>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env_from: Vec<EnvFrom>,
    pub resources: ResourceNeeds,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volume_mounts: Vec<VolumeMount>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volume_devices: Vec<serde_json::Value>,
    pub liveness_probe: Option<Probe>,
    pub readiness_probe: Option<Probe>,
    pub startup_probe: Option<Probe>,
    pub lifecycle: Lifecycle,
    pub termination_message_path: Option<String>,
    pub termination_message_policy: TerminationMessagePolicy,
    pub image_pull_policy: PullPolicy,
    pub security_context: SecurityContext,
    pub tty: bool,
    pub stdin: bool,
    /// Only on init containers: `Always` makes it a sidecar.
    pub restart_policy: Option<RestartPolicy>,
}

/// Where a termination message comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TerminationMessagePolicy {
    /// Only the file at `terminationMessagePath`.
    #[default]
    File,
    /// The end of the log where that file is empty and the container failed.
    FallbackToLogsOnError,
    /// Not defined by the API; treated as `File`.
    #[serde(other)]
    Unknown,
}

/// `imagePullPolicy`. There is no registry yet: only `Never` changes what is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// Ask the registry at each start.
    Always,
    /// Ask the registry if the image is not there.
    #[default]
    IfNotPresent,
    /// Use what is there or fail.
    Never,
    /// Not defined by the API; treated as `IfNotPresent`.
    #[serde(other)]
    Unknown,
}

/// A port that a container listens on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct ContainerPort {
    pub name: String,
    pub container_port: i32,
    pub host_port: i32,
    #[serde(rename = "hostIP", skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub protocol: String,
}

/// One variable: a value, or where to take it from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct EnvVar {
    pub name: String,
    pub value: String,
    pub value_from: Option<EnvSource>,
}

/// `valueFrom`: exactly one is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct EnvSource {
    pub field_ref: Option<FieldRef>,
    pub resource_field_ref: Option<ResourceFieldRef>,
    pub config_map_key_ref: Option<KeyRef>,
    pub secret_key_ref: Option<KeyRef>,
}

/// A field of the pod itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct FieldRef {
    pub field_path: String,
}

/// A resource of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct ResourceFieldRef {
    pub container_name: String,
    pub resource: String,
    pub divisor: Option<Amount>,
}

/// A key of a ConfigMap or Secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct KeyRef {
    pub name: String,
    pub key: String,
    pub optional: bool,
}

/// Every key of a ConfigMap or Secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct EnvFrom {
    pub prefix: String,
    pub config_map_ref: Option<ObjectRef>,
    pub secret_ref: Option<ObjectRef>,
}

/// A ConfigMap or Secret by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct ObjectRef {
    pub name: String,
    pub optional: bool,
}

/// A quantity as it was written; JSON numbers are taken as well.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Amount(pub String);

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => Ok(Amount(text)),
            serde_json::Value::Number(number) => Ok(Amount(number.to_string())),
            other => Err(serde::de::Error::custom(format!("a quantity can't be {other}"))),
        }
    }
}

/// `resources` of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct ResourceNeeds {
    pub requests: BTreeMap<String, Amount>,
    pub limits: BTreeMap<String, Amount>,
}

/// Where a volume appears in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct VolumeMount {
    pub name: String,
    pub mount_path: String,
    pub read_only: bool,
    pub sub_path: String,
    pub sub_path_expr: String,
    pub mount_propagation: MountPropagation,
}

/// Whether mounts cross the edge of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountPropagation {
    /// Not at all.
    #[default]
    None,
    /// Those of the host appear in the container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
    /// Not defined by the API; treated as `None`.
    #[serde(other)]
    Unknown,
}

/// A volume of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WireVolume", into = "WireVolume")]
pub struct Volume {
    /// What mounts refer to.
    pub name: String,
    /// What is in it.
    pub source: VolumeSource,
}

/// What is in a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// Empty at first, gone with the pod.
    EmptyDir {
        /// On a tmpfs instead of the node's disk.
        memory: bool,
        /// As written; bounds a tmpfs.
        size_limit: Option<Amount>,
    },
    /// A path of the node.
    HostPath {
        /// The path.
        path: String,
        /// Empty, or what must be there or is made (`DirectoryOrCreate`, ...).
        kind: String,
    },
    /// Files from a ConfigMap.
    ConfigMap(KeyFiles),
    /// Files from a Secret.
    Secret(KeyFiles),
    /// The token volume that the ServiceAccount admission adds. Not mounted.
    ServiceAccountToken,
    /// A kind that this agent has no code for.
    Unsupported(String),
}

/// Which keys become which files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct KeyFiles {
    #[serde(alias = "secretName")]
    pub name: String,
    pub items: Vec<KeyItem>,
    pub default_mode: Option<u32>,
    pub optional: bool,
}

/// One key and its file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct KeyItem {
    pub key: String,
    pub path: String,
    pub mode: Option<u32>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireVolume {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    empty_dir: Option<WireEmptyDir>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_path: Option<WireHostPath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config_map: Option<KeyFiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<KeyFiles>,
    #[serde(flatten)]
    other: BTreeMap<String, serde_json::Value>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireEmptyDir {
    medium: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_limit: Option<Amount>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct WireHostPath {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl From<WireVolume> for Volume {
    fn from(wire: WireVolume) -> Self {
        let source = if let Some(dir) = wire.empty_dir {
            match dir.medium.as_str() {
                "" => VolumeSource::EmptyDir { memory: false, size_limit: dir.size_limit },
                "Memory" => VolumeSource::EmptyDir { memory: true, size_limit: dir.size_limit },
                medium => VolumeSource::Unsupported(format!("emptyDir on medium {medium}")),
            }
        } else if let Some(path) = wire.host_path {
            VolumeSource::HostPath { path: path.path, kind: path.kind }
        } else if let Some(files) = wire.config_map {
            VolumeSource::ConfigMap(files)
        } else if let Some(files) = wire.secret {
            VolumeSource::Secret(files)
        } else if let Some((kind, _)) = wire.other.into_iter().next() {
            if kind == "projected" && wire.name.starts_with("kube-api-access-") {
                VolumeSource::ServiceAccountToken
            } else {
                VolumeSource::Unsupported(kind)
            }
        } else {
            VolumeSource::EmptyDir { memory: false, size_limit: None }
        };
        Volume { name: wire.name, source }
    }
}

impl From<Volume> for WireVolume {
    fn from(volume: Volume) -> Self {
        let mut wire = WireVolume { name: volume.name, ..WireVolume::default() };
        match volume.source {
            VolumeSource::EmptyDir { memory, size_limit } => {
                let medium = if memory { "Memory".to_owned() } else { String::new() };
                wire.empty_dir = Some(WireEmptyDir { medium, size_limit });
            }
            VolumeSource::HostPath { path, kind } => wire.host_path = Some(WireHostPath { path, kind }),
            VolumeSource::ConfigMap(files) => wire.config_map = Some(files),
            VolumeSource::Secret(files) => wire.secret = Some(files),
            VolumeSource::ServiceAccountToken => {
                wire.other.insert("projected".to_owned(), serde_json::Value::Null);
            }
            VolumeSource::Unsupported(kind) => {
                wire.other.insert(kind, serde_json::Value::Null);
            }
        }
        wire
    }
}

/// How a container is asked whether it is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct Probe {
    #[serde(flatten)]
    pub handler: Handler,
    pub initial_delay_seconds: i64,
    pub timeout_seconds: i64,
    pub period_seconds: i64,
    pub success_threshold: i64,
    pub failure_threshold: i64,
    pub termination_grace_period_seconds: Option<i64>,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            handler: Handler::default(),
            initial_delay_seconds: 0,
            timeout_seconds: 1,
            period_seconds: 10,
            success_threshold: 1,
            failure_threshold: 3,
            termination_grace_period_seconds: None,
        }
    }
}

/// What a probe or hook does: exactly one is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct Handler {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecHandler>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpHandler>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpHandler>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcHandler>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sleep: Option<SleepHandler>,
}

/// A command in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct ExecHandler {
    pub command: Vec<String>,
}

/// A GET request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct HttpHandler {
    pub path: String,
    pub port: PortRef,
    pub host: String,
    pub scheme: String,
    pub http_headers: Vec<NameValue>,
}

/// A TCP connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct TcpHandler {
    pub port: PortRef,
    pub host: String,
}

/// A call of the gRPC health protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct GrpcHandler {
    pub port: i32,
    pub service: Option<String>,
}

/// A pause.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct SleepHandler {
    pub seconds: i64,
}

/// A port by number or by the name that the container gave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "the two forms of an IntOrString")]
pub enum PortRef {
    Number(i32),
    Name(String),
}

impl Default for PortRef {
    fn default() -> Self {
        PortRef::Number(0)
    }
}

/// What is done after a container started and before it is stopped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct Lifecycle {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub post_start: Option<Handler>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<Handler>,
}

/// `securityContext` of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct SecurityContext {
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub run_as_non_root: Option<bool>,
    pub privileged: Option<bool>,
    pub read_only_root_filesystem: Option<bool>,
    pub allow_privilege_escalation: Option<bool>,
    pub capabilities: Capabilities,
    pub seccomp_profile: Option<SeccompProfile>,
    pub proc_mount: Option<String>,
}

/// Capabilities beside the default set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct Capabilities {
    pub add: Vec<String>,
    pub drop: Vec<String>,
}

/// `status` as the API has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorStatus {
    pub phase: String,
    pub reason: String,
    pub message: String,
    pub start_time: Option<String>,
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PriorIp>,
    pub conditions: Vec<PriorCondition>,
    pub container_statuses: Vec<PriorContainer>,
    pub init_container_statuses: Vec<PriorContainer>,
}

/// One address of a reported pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorIp {
    pub ip: String,
}

/// One condition of a reported pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorCondition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    pub last_transition_time: Option<String>,
}

/// One container of a reported pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorContainer {
    pub name: String,
    pub ready: bool,
    pub started: Option<bool>,
    pub restart_count: u32,
    #[serde(rename = "containerID")]
    pub container_id: String,
    #[serde(rename = "imageID")]
    pub image_id: String,
    pub state: PriorState,
    pub last_state: PriorState,
}

impl Pod {
    /// `<namespace>/<name>`, as people write it.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Whether the reported phase is one that nothing reverts.
    pub fn was_terminal(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }
}

impl Container {
    /// Whether this init container keeps running beside the main ones.
    pub fn is_sidecar(&self) -> bool {
        self.restart_policy == Some(RestartPolicy::Always)
    }

    /// The number of a port; `None` for a name that no port of this container has, or out of range.
    pub fn port(&self, port: &PortRef) -> Option<u16> {
        let number = match port {
            PortRef::Number(number) => *number,
            PortRef::Name(name) => {
                self.ports.iter().find(|known| &known.name == name).map(|known| known.container_port)?
            }
        };
        u16::try_from(number).ok().filter(|number| *number != 0)
    }
}

#[cfg(test)]
mod tests;
