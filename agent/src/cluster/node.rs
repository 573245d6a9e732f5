//! This node's Node object: registered at start and again whenever it is deleted, its status told at
//! every change and at least every `limits::NODE_STATUS_PERIOD_S`. Labels and taints of others are kept.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;
use ipnetwork::IpNetwork;
use k8s_openapi::ClusterResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::client::{ApiError, Client, chain};
use super::pods::Reconnect;
use crate::limits;
use crate::pod::model::Millis;
use crate::pod::resources::Allocatable;
use crate::pod::status::rfc3339;

/// What does not change while the agent runs.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Name of the Node.
    pub name: String,
    /// Its addresses, at most one a family.
    pub ips: Vec<IpAddr>,
    /// Ranges of its pods.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Labels beside the well-known ones.
    pub labels: BTreeMap<String, String>,
    /// Port of the https listener.
    pub port: u16,
    /// Logical CPUs.
    pub cpus: i64,
    /// Bytes of memory.
    pub memory_bytes: i64,
    /// Bytes of the file system that pods write to.
    pub storage_bytes: i64,
    /// Pods that it may run.
    pub max_pods: u32,
    /// `status.nodeInfo`, without what is constant.
    pub info: Info,
}

/// Facts about the host for `status.nodeInfo`.
#[derive(Debug, Clone, Default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct Info {
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel_version: String,
    pub os_image: String,
}

/// Shortages that the node reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Less than `limits::NODE_MEMORY_AVAILABLE_BYTES_MIN` are available.
    pub memory: bool,
    /// Less than a tenth of the bytes and less than `limits::NODE_DISK_AVAILABLE_BYTES_MIN` are free, or less
    /// than a twentieth of the inodes.
    pub disk: bool,
    /// More than nine tenths of the process ids are taken.
    pub pids: bool,
}

impl Facts {
    /// What pods can have: the capacity less what keeps the node itself alive.
    pub fn allocatable(&self) -> Allocatable {
        Allocatable {
            cpu_milli: self.cpus * 1000,
            memory_bytes: (self.memory_bytes - limits::NODE_MEMORY_AVAILABLE_BYTES_MIN).max(0),
            pods: usize::try_from(self.max_pods).unwrap_or(usize::MAX),
        }
    }

    fn labels_wanted(&self) -> BTreeMap<String, String> {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let mut labels = self.labels.clone();
        for (key, value) in [("hostname", self.name.as_str()), ("os", "linux"), ("arch", arch)] {
            labels.insert(format!("kubernetes.io/{key}"), value.to_owned());
        }
        labels
    }

    fn spec(&self) -> Value {
        match self.pod_cidrs.first() {
            None => json!({}),
            Some(first) => json!({"podCIDR": first.to_string(),
                "podCIDRs": self.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>()}),
        }
    }

    fn addresses(&self) -> Value {
        let mut addresses: Vec<Value> =
            self.ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
        addresses.push(json!({"type": "Hostname", "address": self.name}));
        Value::Array(addresses)
    }

    /// The object to create.
    pub fn object(&self, pressure: Pressure, now: Millis) -> Value {
        json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name, "labels": self.labels_wanted()},
            "spec": self.spec(), "status": self.status(pressure, &[], now)})
    }

    /// The object to create before anything else is known than that the node exists.
    pub(crate) fn bare_object(&self) -> Value {
        json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name, "labels": self.labels_wanted()}, "spec": self.spec()})
    }

    /// The status. `prior` holds the conditions that were reported before (type, status, since).
    pub fn status(&self, pressure: Pressure, prior: &[(String, String, String)], now: Millis) -> Value {
        let allocatable = self.allocatable();
        let amounts = |memory: i64, storage: i64| {
            json!({"cpu": self.cpus.to_string(), "memory": format!("{}Ki", memory / 1024),
                "ephemeral-storage": storage.to_string(), "pods": self.max_pods.to_string()})
        };
        json!({
            "capacity": amounts(self.memory_bytes, self.storage_bytes),
            "allocatable": amounts(allocatable.memory_bytes, self.storage_bytes / 10 * 9),
            "addresses": self.addresses(),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.port}},
            "nodeInfo": {
                "machineID": self.info.machine_id, "systemUUID": self.info.system_uuid,
                "bootID": self.info.boot_id, "kernelVersion": self.info.kernel_version,
                "osImage": self.info.os_image, "operatingSystem": "linux",
                "architecture": self.labels_wanted().get("kubernetes.io/arch"),
                "containerRuntimeVersion": format!("sheave://{}", env!("CARGO_PKG_VERSION")),
                "kubeletVersion": format!("v1.33.0-sheave{}", env!("CARGO_PKG_VERSION")),
                "kubeProxyVersion": "",
            },
            "conditions": conditions(pressure, prior, now),
        })
    }
}

fn conditions(pressure: Pressure, prior: &[(String, String, String)], now: Millis) -> Value {
    let all = [
        ("MemoryPressure", pressure.memory, "KubeletHasInsufficientMemory", "KubeletHasSufficientMemory"),
        ("DiskPressure", pressure.disk, "KubeletHasDiskPressure", "KubeletHasNoDiskPressure"),
        ("PIDPressure", pressure.pids, "KubeletHasInsufficientPID", "KubeletHasSufficientPID"),
        ("Ready", true, "KubeletReady", ""),
    ];
    let one = |(kind, holds, yes, no): (&str, bool, &str, &str)| {
        let status = if holds { "True" } else { "False" };
        let since =
            prior.iter().find(|(k, s, _)| k == kind && s == status).map(|(_, _, since)| since.clone());
        let message = if kind == "Ready" { "the agent takes pods" } else { "" };
        json!({"type": kind, "status": status, "reason": if holds { yes } else { no }, "message": message,
            "lastHeartbeatTime": rfc3339(now),
            "lastTransitionTime": since.unwrap_or_else(|| rfc3339(now))})
    };
    Value::Array(all.into_iter().map(one).collect())
}

/// Reads the facts of this host. `storage` is a path on the file system that pods write to.
pub fn read_info() -> Info {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let os_image = read("/etc/os-release")
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .unwrap_or_else(|| "Linux".to_owned());
    let machine_id = read("/etc/machine-id");
    let system_uuid = match read("/sys/class/dmi/id/product_uuid") {
        uuid if uuid.is_empty() => machine_id.clone(),
        uuid => uuid,
    };
    Info {
        system_uuid,
        machine_id,
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        os_image,
    }
}

/// Bytes of memory of this host, and how many are available.
pub fn read_memory() -> (i64, i64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| -> i64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next());
        kib.and_then(|kib| kib.parse::<i64>().ok()).unwrap_or(0) * 1024
    };
    (field("MemTotal"), field("MemAvailable"))
}

/// Bytes of the file system below `path`.
pub fn read_storage(path: &Path) -> i64 {
    nix::sys::statvfs::statvfs(path)
        .map(|fs| i64::try_from(fs.blocks() * fs.fragment_size()).unwrap_or(i64::MAX))
        .unwrap_or(0)
}

/// Looks at what the node runs short of.
pub fn read_pressure(storage: &Path) -> Pressure {
    let (total, available) = read_memory();
    let disk = nix::sys::statvfs::statvfs(storage).is_ok_and(|fs| {
        let scarce = fs.blocks_available() < fs.blocks() / 10;
        let free_bytes = fs.blocks_available().saturating_mul(fs.fragment_size());
        let few_inodes = fs.files() > 0 && fs.files_available() < fs.files() / 20;
        scarce && free_bytes < limits::NODE_DISK_AVAILABLE_BYTES_MIN || few_inodes
    });
    let number = |path: &str, pick: fn(&str) -> Option<&str>| -> u64 {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        pick(text.trim()).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let tasks = number("/proc/loadavg", |text| text.split_whitespace().nth(3)?.split('/').nth(1));
    let pids_max = number("/proc/sys/kernel/pid_max", |text| Some(text));
    Pressure {
        memory: total > 0 && available < limits::NODE_MEMORY_AVAILABLE_BYTES_MIN,
        disk,
        pids: pids_max > 0 && tasks > pids_max / 10 * 9,
    }
}

/// A Node on the wire; only what is looked at.
#[derive(Debug, Clone, Deserialize)]
pub struct WireNode {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: WireSpec,
    #[serde(default)]
    status: WireStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct WireSpec {
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    #[serde(rename = "podCIDR")]
    pod_cidr: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct WireStatus {
    addresses: Value,
    conditions: Vec<WireCondition>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct WireCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    last_transition_time: Option<String>,
}

impl WireNode {
    /// Ranges of the node's pods that can be read, in the API's order.
    pub(crate) fn pod_cidrs(&self) -> Vec<IpNetwork> {
        let one = std::slice::from_ref(&self.spec.pod_cidr);
        let all = if self.spec.pod_cidrs.is_empty() { one } else { self.spec.pod_cidrs.as_slice() };
        all.iter().filter_map(|range| range.parse().ok()).collect()
    }

    /// Its InternalIPs, in the API's order.
    pub(crate) fn internal_ips(&self) -> Vec<IpAddr> {
        let all = self.status.addresses.as_array().map(Vec::as_slice).unwrap_or_default();
        let internal = all.iter().filter(|address| address["type"] == "InternalIP");
        internal.filter_map(|address| address["address"].as_str()?.parse().ok()).collect()
    }
}

impl kube::Resource for WireNode {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> std::borrow::Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> std::borrow::Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Keeps the Node registered and its status told, until `shutdown`.
pub struct Keeper {
    /// The API.
    pub client: Client,
    /// What is told.
    pub facts: Facts,
    /// A path on the file system that pods write to.
    pub storage: std::path::PathBuf,
    /// Told whenever the Node gets another uid.
    pub uid: tokio::sync::watch::Sender<String>,
    /// Notified when the API answers again.
    pub revived: Arc<tokio::sync::Notify>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("node", &self.facts.name).finish_non_exhaustive()
    }
}

impl Keeper {
    /// See the type.
    pub async fn keep(self, shutdown: CancellationToken) {
        let api: kube::Api<WireNode> = kube::Api::all(self.client.kube());
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.facts.name));
        let mut watch = std::pin::pin!(watcher(api, config).backoff(Reconnect::default()));
        let mut pressure = read_pressure(&self.storage);
        let mut told = self.persist(pressure, &shutdown).await;
        let mut look = tokio::time::interval(limits::secs(limits::NODE_PRESSURE_PERIOD_S));
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut seen = true;
        loop {
            let mut tell = false;
            tokio::select! {
                event = watch.next() => match event {
                    Some(Ok(watcher::Event::Init)) => seen = false,
                    Some(Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node))) => {
                        seen = true;
                        tell = !node.status.conditions.iter().any(|c| c.kind == "Ready" && c.status == "True");
                    }
                    Some(Ok(watcher::Event::Delete(_))) => tell = true,
                    Some(Ok(watcher::Event::InitDone)) => tell = !seen,
                    Some(Err(error)) => tracing::debug!(error = chain(&error), "node watch interrupted"),
                    None => return,
                },
                _ = look.tick() => {
                    let now = read_pressure(&self.storage);
                    tell = now != pressure || told.elapsed() >= limits::secs(limits::NODE_STATUS_PERIOD_S);
                    pressure = now;
                }
                () = self.revived.notified() => tell = true,
                () = shutdown.cancelled() => return,
            }
            if tell {
                told = self.persist(pressure, &shutdown).await;
            }
        }
    }

    /// Registers and tells until it works.
    async fn persist(&self, pressure: Pressure, shutdown: &CancellationToken) -> tokio::time::Instant {
        let mut pauses = Reconnect::default();
        loop {
            let error = match self.tell(pressure).await {
                Ok(()) => return tokio::time::Instant::now(),
                Err(error) => error,
            };
            let pause = pauses.next().unwrap_or(limits::secs(limits::WATCH_RETRY_MAX_S));
            if pause.as_millis() > u128::from(limits::API_RETRY_FIRST_MS) * 4 {
                tracing::warn!(error = chain(&error), "registering the node");
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return tokio::time::Instant::now(),
            }
        }
    }

    async fn tell(&self, pressure: Pressure) -> Result<(), ApiError> {
        let path = format!("/api/v1/nodes/{}", self.facts.name);
        let now = jiff::Timestamp::now().as_millisecond();
        let node: WireNode = match self.client.get(&path).await {
            Ok(node) => node,
            Err(error) if error.code() == Some(404) => {
                self.client.create("/api/v1/nodes", &self.facts.object(pressure, now)).await?;
                tracing::info!(node = self.facts.name, "node registered");
                self.client.get(&path).await?
            }
            Err(error) => return Err(error),
        };
        let uid = node.metadata.uid.clone().unwrap_or_default();
        self.uid.send_if_modified(|known| {
            let changed = *known != uid;
            *known = uid;
            changed
        });
        self.complete(&path, &node).await?;
        let prior: Vec<(String, String, String)> = node
            .status
            .conditions
            .into_iter()
            .filter_map(|c| Some((c.kind, c.status, c.last_transition_time?)))
            .collect();
        let path = format!("{path}/status");
        let mut status = self.facts.status(pressure, &prior, now);
        // Merged by type, two addresses of one type would become one.
        let addresses = status["addresses"].take();
        if node.status.addresses != addresses {
            self.client.merge(&path, &json!({"status": {"addresses": addresses}})).await?;
        }
        if let Some(status) = status.as_object_mut() {
            status.remove("addresses");
        }
        self.client.strategic(&path, &json!({"status": status})).await?;
        Ok(())
    }

    /// Adds labels and ranges that the Node lacks.
    async fn complete(&self, path: &str, node: &WireNode) -> Result<(), ApiError> {
        let known = node.metadata.labels.clone().unwrap_or_default();
        let missing: BTreeMap<String, String> = self
            .facts
            .labels_wanted()
            .into_iter()
            .filter(|(key, value)| known.get(key) != Some(value))
            .collect();
        let mut patch = json!({});
        if !missing.is_empty() {
            patch["metadata"] = json!({"labels": missing});
        }
        if node.spec.pod_cidrs.is_empty() && node.spec.pod_cidr.is_empty() && !self.facts.pod_cidrs.is_empty()
        {
            patch["spec"] = self.facts.spec();
        }
        if patch != json!({}) {
            self.client.merge(path, &patch).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            name: "n1".into(),
            ips: vec!["192.0.2.7".parse().expect("ip"), "2001:db8::7".parse().expect("ip")],
            pod_cidrs: vec!["10.244.0.0/24".parse().expect("range")],
            cpus: 2,
            memory_bytes: 4 << 30,
            storage_bytes: 100,
            max_pods: 110,
            port: 4711,
            ..Facts::default()
        }
    }

    #[test]
    fn the_object_has_what_schedulers_and_people_need() {
        let node = facts().object(Pressure::default(), 1_700_000_000_000);
        assert_eq!(node["metadata"]["labels"]["kubernetes.io/hostname"], "n1");
        assert_eq!(node["status"]["capacity"]["cpu"], "2");
        assert_eq!(node["status"]["allocatable"]["memory"], format!("{}Ki", (4_i64 << 20) - 100 * 1024));
        assert_eq!(node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"], 4711);
        assert_eq!(node["spec"]["podCIDRs"][0], "10.244.0.0/24");
        let addresses = node["status"]["addresses"].as_array().expect("addresses");
        assert_eq!(addresses.len(), 3);
        assert_eq!(addresses[2]["type"], "Hostname");
    }

    #[test]
    fn a_condition_keeps_its_time_while_it_holds() {
        let prior = [("Ready".to_owned(), "True".to_owned(), "2020-01-01T00:00:00Z".to_owned())];
        let status =
            facts().status(Pressure { disk: true, ..Pressure::default() }, &prior, 1_700_000_000_000);
        let find = |kind: &str| {
            status["conditions"].as_array().expect("list").iter().find(|c| c["type"] == kind).cloned()
        };
        let ready = find("Ready").expect("Ready");
        assert_eq!(ready["lastTransitionTime"], "2020-01-01T00:00:00Z");
        assert_eq!(ready["lastHeartbeatTime"], "2023-11-14T22:13:20Z");
        let disk = find("DiskPressure").expect("DiskPressure");
        assert_eq!(
            (disk["status"].as_str(), disk["reason"].as_str()),
            (Some("True"), Some("KubeletHasDiskPressure"))
        );
    }

    #[test]
    fn this_host_has_facts() {
        let (total, available) = read_memory();
        assert!(total > 0 && available > 0 && available <= total);
        assert!(!read_info().kernel_version.is_empty());
        assert!(read_storage(Path::new("/")) > 0);
    }
}
