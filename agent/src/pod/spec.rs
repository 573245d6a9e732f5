//! From what the API asks for to what the runtime is told. Everything that the runtime needs is in its
//! answer; nothing is read or made here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::env;
use super::model::{Container, DnsPolicy, MountPropagation, Pod, RestartPolicy, VolumeSource};
use super::resources::{self, Allocatable, Amounts, QosClass};
use crate::network::PortMapping;
use crate::runtime::{
    ContainerSpec, Dns, ImageRef, Mount, Propagation, Qos, Resources, SandboxSpec, Seccomp,
};

/// Key of the pod itself among a sandbox's annotations: enough to stop it without the API.
pub const POD_ANNOTATION: &str = "sheave/pod";

/// What a node adds to a pod.
#[derive(Debug, Clone, Default)]
pub struct NodeSettings {
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// What it can give to pods.
    pub allocatable: Allocatable,
    /// Nameservers of the cluster.
    pub cluster_dns: Vec<IpAddr>,
    /// Suffix of the cluster's names.
    pub cluster_domain: String,
    /// The node's own resolver settings.
    pub resolver: Dns,
}

/// The node's ports that lead to the pod, from its containers and sidecars; on the host's network there are none.
pub fn host_ports(pod: &Pod) -> Result<Vec<PortMapping>, String> {
    let sidecars =
        pod.spec.init_containers.iter().filter(|c| c.restart_policy == Some(RestartPolicy::Always));
    let mut found = Vec::new();
    for container in sidecars.chain(&pod.spec.containers) {
        for port in container.ports.iter().filter(|port| port.host_port != 0 && !pod.spec.host_network) {
            let wrong = |field: &str, what: &dyn std::fmt::Display| {
                format!("container {}: ports: {field} {what}", container.name)
            };
            let number = |field, value: i32| {
                u16::try_from(value)
                    .map_err(|_| wrong(field, &format_args!("{value} is not from 1 to 65535")))
            };
            let host_ip = match port.host_ip.as_str() {
                "" => None,
                text => {
                    Some(text.parse().map_err(|_| wrong("hostIP", &format_args!("{text:?} is no address")))?)
                }
            };
            found.push(PortMapping {
                host_port: number("hostPort", port.host_port)?,
                container_port: number("containerPort", port.container_port)?,
                protocol: port.protocol.parse().map_err(|error: String| wrong("protocol", &error))?,
                host_ip,
            });
        }
    }
    Ok(found)
}

/// What `start_sandbox` is told.
pub fn sandbox(pod: &Pod, node: &NodeSettings) -> SandboxSpec {
    let spec = &pod.spec;
    let mut annotations = BTreeMap::new();
    if let Ok(json) = serde_json::to_string(pod) {
        annotations.insert(POD_ANNOTATION.to_owned(), json);
    }
    let aliases = spec.host_aliases.iter();
    SandboxSpec {
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        hostname: env::hostname(pod),
        dns: dns(pod, node),
        host_aliases: aliases
            .filter_map(|alias| Some((alias.ip.parse().ok()?, alias.hostnames.clone())))
            .collect(),
        host_network: spec.host_network,
        share_process_namespace: spec.share_process_namespace,
        qos: match resources::qos(spec) {
            QosClass::Guaranteed => Qos::Guaranteed,
            QosClass::Burstable => Qos::Burstable,
            QosClass::BestEffort => Qos::BestEffort,
        },
        resources: limits(resources::of_pod(spec)),
        sysctls: spec.security_context.sysctls.iter().map(|s| (s.name.clone(), s.value.clone())).collect(),
        annotations,
    }
}

fn dns(pod: &Pod, node: &NodeSettings) -> Dns {
    let spec = &pod.spec;
    let by_cluster = match spec.dns_policy {
        DnsPolicy::ClusterFirst | DnsPolicy::Unknown => !spec.host_network && !node.cluster_dns.is_empty(),
        DnsPolicy::ClusterFirstWithHostNet => !node.cluster_dns.is_empty(),
        DnsPolicy::Default | DnsPolicy::None => false,
    };
    let mut dns = if by_cluster {
        let domain = &node.cluster_domain;
        let mut searches =
            vec![format!("{}.svc.{domain}", pod.namespace), format!("svc.{domain}"), domain.clone()];
        searches.extend(node.resolver.searches.iter().cloned());
        Dns { nameservers: node.cluster_dns.clone(), searches, options: vec!["ndots:5".to_owned()] }
    } else if spec.dns_policy == DnsPolicy::None {
        Dns::default()
    } else {
        node.resolver.clone()
    };
    let config = &spec.dns_config;
    dns.nameservers.extend(config.nameservers.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()));
    dns.searches.extend(config.searches.iter().cloned());
    for option in &config.options {
        dns.options.retain(|known| known.split(':').next() != Some(&option.name));
        dns.options.push(match &option.value {
            Some(value) => format!("{}:{value}", option.name),
            None => option.name.clone(),
        });
    }
    dns
}

/// Reads an `/etc/resolv.conf`.
pub fn parse_resolver(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                dns.nameservers.extend(words.next().and_then(|ip| ip.parse::<IpAddr>().ok()))
            }
            Some("search") => dns.searches = words.map(str::to_owned).collect(),
            Some("options") => dns.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    dns
}

fn limits(amounts: Amounts) -> Resources {
    let unsigned = |value: Option<i64>| value.filter(|v| *v > 0).and_then(|v| u64::try_from(v).ok());
    Resources {
        cpu_request_milli: unsigned(amounts.cpu_request_milli),
        cpu_limit_milli: unsigned(amounts.cpu_limit_milli),
        memory_limit_bytes: unsigned(amounts.memory_limit_bytes),
        pids_max: None,
    }
}

/// One volume mount and the part of the volume that it shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPlan {
    /// Which volume; `source` of `mount` is its root.
    pub mount: Mount,
    /// Path below the volume's root; empty for all of it.
    pub sub_path: PathBuf,
}

/// What a container mounts. `roots` are the volumes' places on the node. Mounts of the volume with the
/// service account's token are left out: there are no tokens yet.
pub fn mounts(
    pod: &Pod,
    container: &Container,
    roots: &BTreeMap<String, PathBuf>,
    env: &[(String, String)],
) -> Result<Vec<MountPlan>, String> {
    let variables: BTreeMap<String, String> = env.iter().cloned().collect();
    let mut plans = Vec::new();
    for wanted in &container.volume_mounts {
        let volume = pod.spec.volumes.iter().find(|volume| volume.name == wanted.name);
        if volume.is_some_and(|volume| volume.source == VolumeSource::ServiceAccountToken) {
            continue;
        }
        let root = roots.get(&wanted.name).ok_or_else(|| format!("no volume {:?}", wanted.name))?;
        let sub_path = if wanted.sub_path_expr.is_empty() {
            wanted.sub_path.clone()
        } else {
            env::expand(&wanted.sub_path_expr, &variables)
        };
        if Path::new(&sub_path).components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(format!(
                "subPath {sub_path:?} of volume {:?} is not a plain relative path",
                wanted.name
            ));
        }
        plans.push(MountPlan {
            mount: Mount {
                source: root.clone(),
                target: PathBuf::from(&wanted.mount_path),
                read_only: wanted.read_only || volume.is_some_and(|v| is_read_only(&v.source)),
                propagation: match wanted.mount_propagation {
                    MountPropagation::HostToContainer => Propagation::HostToContainer,
                    _ => Propagation::None,
                },
            },
            sub_path: PathBuf::from(sub_path),
        });
    }
    Ok(plans)
}

fn is_read_only(source: &VolumeSource) -> bool {
    matches!(source, VolumeSource::ConfigMap(_) | VolumeSource::Secret(_))
}

/// What `start_container` is told. `mounts` are final: their sources exist.
pub fn container(
    pod: &Pod,
    container: &Container,
    attempt: u32,
    image: ImageRef,
    env: Vec<(String, String)>,
    mounts: Vec<Mount>,
    node: &NodeSettings,
) -> Result<ContainerSpec, String> {
    let variables: BTreeMap<String, String> = env.iter().cloned().collect();
    let expand = |words: &[String]| words.iter().map(|word| env::expand(word, &variables)).collect();
    let own = &container.security_context;
    let shared = &pod.spec.security_context;
    let id = |name: &str, value: Option<i64>| -> Result<Option<u32>, String> {
        value.map(|v| u32::try_from(v).map_err(|_| format!("{name} {v} is out of range"))).transpose()
    };
    let mut groups = Vec::new();
    for group in shared.supplemental_groups.iter().copied().chain(shared.fs_group) {
        groups.extend(id("group", Some(group))?);
    }
    let amounts = resources::of_container(container);
    let class = resources::qos(&pod.spec);
    let node_memory = node.allocatable.memory_bytes;
    let profile = own.seccomp_profile.as_ref().or(shared.seccomp_profile.as_ref());
    Ok(ContainerSpec {
        name: container.name.clone(),
        attempt,
        image,
        command: expand(&container.command),
        args: expand(&container.args),
        env,
        working_dir: container.working_dir.clone(),
        mounts,
        resources: limits(amounts),
        run_as_user: id("runAsUser", own.run_as_user.or(shared.run_as_user))?,
        run_as_group: id("runAsGroup", own.run_as_group.or(shared.run_as_group))?,
        run_as_non_root: own.run_as_non_root.or(shared.run_as_non_root).unwrap_or(false),
        supplemental_groups: groups,
        cap_add: own.capabilities.add.iter().map(|cap| bare_capability(cap)).collect(),
        cap_drop: own.capabilities.drop.iter().map(|cap| bare_capability(cap)).collect(),
        privileged: own.privileged.unwrap_or(false),
        read_only_root: own.read_only_root_filesystem.unwrap_or(false),
        allow_privilege_escalation: own.allow_privilege_escalation.unwrap_or(true),
        seccomp: match profile.map(|profile| profile.kind.as_str()) {
            Some("Unconfined") => Seccomp::Unconfined,
            _ => Seccomp::Default,
        },
        oom_score_adj: resources::oom_score_adj(class, amounts.memory_request_bytes, node_memory),
        termination_message_path: container.termination_message_path.clone().unwrap_or_default(),
    })
}

fn bare_capability(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: &str) -> Pod {
        serde_json::from_str(json).expect("a pod")
    }

    fn node() -> NodeSettings {
        NodeSettings {
            cluster_dns: vec!["10.96.0.10".parse().expect("ip")],
            cluster_domain: "cluster.local".into(),
            resolver: parse_resolver("# x\nnameserver 9.9.9.9\nsearch a b\noptions ndots:1 edns0\n"),
            ..NodeSettings::default()
        }
    }

    #[test]
    fn resolver_settings_by_policy() {
        let of =
            |spec: &str| dns(&pod(&format!(r#"{{"namespace":"ns","name":"p","spec":{spec}}}"#)), &node());
        let cluster = of("{}");
        assert_eq!(cluster.nameservers[0].to_string(), "10.96.0.10");
        assert_eq!(cluster.searches[..3], ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
        assert_eq!(cluster.options, ["ndots:5"]);
        assert_eq!(of(r#"{"dnsPolicy":"Default"}"#), node().resolver);
        assert_eq!(of(r#"{"hostNetwork":true}"#), node().resolver);
        assert_eq!(of(r#"{"hostNetwork":true,"dnsPolicy":"ClusterFirstWithHostNet"}"#).options, ["ndots:5"]);
        let none = of(
            r#"{"dnsPolicy":"None","dnsConfig":{"nameservers":["1.1.1.1"],"options":[{"name":"ndots","value":"2"}]}}"#,
        );
        assert_eq!((none.nameservers.len(), none.options), (1, vec!["ndots:2".to_owned()]));
        let more = of(r#"{"dnsConfig":{"options":[{"name":"ndots","value":"2"}],"searches":["x"]}}"#);
        assert_eq!(more.options, ["ndots:2"]);
        assert_eq!(more.searches.last().map(String::as_str), Some("x"));
    }

    #[test]
    fn host_ports_are_those_of_containers_that_run() {
        let ports = |json: &str| host_ports(&pod(json));
        let found = ports(
            r#"{"spec":{"initContainers":[{"name":"i","ports":[{"containerPort":1,"hostPort":1}]},
            {"name":"s","restartPolicy":"Always","ports":[{"containerPort":2,"hostPort":3,"protocol":"UDP"}]}],
            "containers":[{"name":"c","ports":[{"containerPort":80},
            {"containerPort":81,"hostPort":8081,"hostIP":"192.0.2.1","protocol":"TCP"}]}]}}"#,
        )
        .expect("host ports");
        let words: Vec<_> =
            found.iter().map(|p| (p.host_port, p.container_port, p.host_ip.is_some())).collect();
        assert_eq!(words, [(3, 2, false), (8081, 81, true)]);
        let on_host = ports(r#"{"spec":{"hostNetwork":true,"containers":[{"ports":[{"hostPort":80}]}]}}"#);
        assert_eq!(on_host, Ok(vec![]));
        let bad = r#"{"spec":{"containers":[{"name":"c","ports":[{"hostPort":80,"containerPort":80,"hostIP":"x"}]}]}}"#;
        assert_eq!(ports(bad).expect_err("refused"), "container c: ports: hostIP \"x\" is no address");
    }

    #[test]
    fn a_sandbox_carries_the_pod_it_was_made_for() {
        let pod = pod(r#"{"namespace":"ns","name":"p","uid":"u","spec":{"terminationGracePeriodSeconds":7,
            "containers":[{"name":"c","resources":{"limits":{"cpu":"1","memory":"1Mi"}}}]}}"#);
        let spec = sandbox(&pod, &node());
        let back: Pod = serde_json::from_str(&spec.annotations[POD_ANNOTATION]).expect("the pod");
        assert_eq!(back, pod);
        assert_eq!((spec.qos, spec.resources.memory_limit_bytes), (Qos::Guaranteed, Some(1 << 20)));
    }

    #[test]
    fn security_settings_of_the_container_win() {
        let pod = pod(r#"{"spec":{"securityContext":{"runAsUser":1,"fsGroup":5,"supplementalGroups":[6]},
            "containers":[{"name":"c","command":["$(A)"],"securityContext":{"runAsUser":2,"runAsGroup":3,
            "capabilities":{"add":["net_admin"],"drop":["CAP_CHOWN"]},"allowPrivilegeEscalation":false}},
            {"name":"d","securityContext":{"runAsUser":-1}}]}}"#);
        let env = vec![("A".to_owned(), "x".to_owned())];
        let build = |i: usize| {
            container(&pod, &pod.spec.containers[i], 3, ImageRef::default(), env.clone(), vec![], &node())
        };
        let spec = build(0).expect("a spec");
        assert_eq!((spec.run_as_user, spec.run_as_group, spec.attempt), (Some(2), Some(3), 3));
        assert_eq!(spec.supplemental_groups, [6, 5]);
        assert_eq!((spec.cap_add, spec.cap_drop), (vec!["NET_ADMIN".to_owned()], vec!["CHOWN".to_owned()]));
        assert!(!spec.allow_privilege_escalation);
        assert_eq!(spec.command, ["x"]);
        assert_eq!(spec.oom_score_adj, 1000);
        assert_eq!(build(1).expect_err("refused"), "runAsUser -1 is out of range");
    }

    #[test]
    fn mounts_are_resolved_and_odd_paths_refused() {
        let pod = pod(r#"{"spec":{"volumes":[{"name":"e"},{"name":"c","configMap":{"name":"x"}},
            {"name":"kube-api-access-1","projected":{}}],"containers":[
            {"volumeMounts":[{"name":"e","mountPath":"/e","subPathExpr":"$(A)/y"},{"name":"c","mountPath":"/c"},
              {"name":"kube-api-access-1","mountPath":"/t"}]},
            {"volumeMounts":[{"name":"e","mountPath":"/e","subPath":"../x"}]},
            {"volumeMounts":[{"name":"e","mountPath":"/e","subPath":"/x"}]}]}}"#);
        let roots = BTreeMap::from([
            ("e".to_owned(), PathBuf::from("/v/e")),
            ("c".to_owned(), PathBuf::from("/v/c")),
        ]);
        let env = [("A".to_owned(), "sub".to_owned())];
        let plans = mounts(&pod, &pod.spec.containers[0], &roots, &env).expect("plans");
        assert_eq!(plans.len(), 2);
        assert_eq!(plans[0].sub_path, Path::new("sub/y"));
        assert!(plans[1].mount.read_only && !plans[0].mount.read_only);
        assert!(mounts(&pod, &pod.spec.containers[1], &roots, &env).is_err());
        assert!(mounts(&pod, &pod.spec.containers[2], &roots, &env).is_err());
    }
}
