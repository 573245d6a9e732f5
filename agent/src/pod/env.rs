//! What a pod adds to the environment of a container's image: every source of `envFrom`, then `env` in
//! order, each later one winning. References to earlier variables are expanded; nothing is read here.
//! Not there yet: variables for the services of the namespace (`enableServiceLinks`).

use std::collections::BTreeMap;

use super::model::{Container, EnvSource, KeyRef, Pod, ResourceFieldRef};
use super::quantity;
use super::resources::{self, Allocatable};

/// The data of the ConfigMaps and Secrets that a pod names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// By name; `None` for one that does not exist.
    pub config_maps: BTreeMap<String, Option<BTreeMap<String, Vec<u8>>>>,
    /// By name; `None` for one that does not exist.
    pub secrets: BTreeMap<String, Option<BTreeMap<String, Vec<u8>>>>,
}

/// Facts that `fieldRef` can ask for beside the pod itself.
#[derive(Debug, Clone, Default)]
pub struct Facts<'a> {
    /// The pod's addresses.
    pub pod_ips: &'a [std::net::IpAddr],
    /// The node's addresses.
    pub node_ips: &'a [std::net::IpAddr],
    /// What a `resourceFieldRef` without a limit means.
    pub node: Allocatable,
}

/// Names of ConfigMaps and Secrets that a container's environment needs.
pub fn needed(container: &Container) -> (Vec<&str>, Vec<&str>) {
    let mut config_maps = Vec::new();
    let mut secrets = Vec::new();
    for from in &container.env_from {
        config_maps.extend(from.config_map_ref.as_ref().map(|r| r.name.as_str()));
        secrets.extend(from.secret_ref.as_ref().map(|r| r.name.as_str()));
    }
    for source in container.env.iter().filter_map(|var| var.value_from.as_ref()) {
        config_maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.as_str()));
        secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.as_str()));
    }
    (config_maps, secrets)
}

/// Builds the environment. An error says which variable can't be had and why.
pub fn build(
    pod: &Pod,
    container: &Container,
    sources: &Sources,
    facts: &Facts<'_>,
) -> Result<Vec<(String, String)>, String> {
    let mut env = Env::default();
    env.set("HOSTNAME", hostname(pod));
    for from in &container.env_from {
        let (kind, reference, map) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(reference), _) => ("ConfigMap", reference, &sources.config_maps),
            (None, Some(reference)) => ("Secret", reference, &sources.secrets),
            (None, None) => continue,
        };
        match map.get(&reference.name).and_then(Option::as_ref) {
            Some(data) => {
                for (key, value) in data {
                    let name = format!("{}{key}", from.prefix);
                    if is_variable_name(&name) {
                        env.set(&name, String::from_utf8_lossy(value).into_owned());
                    }
                }
            }
            None if reference.optional => {}
            None => return Err(format!("{kind} {:?} of envFrom not found", reference.name)),
        }
    }
    let mut declared = env.clone_values();
    for var in &container.env {
        let value = match &var.value_from {
            None => Some(expand(&var.value, &declared)),
            Some(source) => from_source(pod, container, source, sources, facts)
                .map_err(|why| format!("env {}: {why}", var.name))?,
        };
        if let Some(value) = value {
            declared.insert(var.name.clone(), value.clone());
            env.set(&var.name, value);
        }
    }
    Ok(env.list)
}

/// The name that the pod's containers see as theirs.
pub fn hostname(pod: &Pod) -> String {
    let name = if pod.spec.hostname.is_empty() { &pod.name } else { &pod.spec.hostname };
    name.chars().take(63).collect::<String>().trim_end_matches(['-', '.']).to_owned()
}

/// Replaces `$(NAME)` by the variable's value; `$$` is a literal `$`, and references to unknown
/// variables stay as they are.
pub fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[derive(Default)]
struct Env {
    list: Vec<(String, String)>,
}

impl Env {
    fn set(&mut self, name: &str, value: String) {
        match self.list.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.list.push((name.to_owned(), value)),
        }
    }

    fn clone_values(&self) -> BTreeMap<String, String> {
        self.list.iter().cloned().collect()
    }
}

fn is_variable_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

fn from_source(
    pod: &Pod,
    container: &Container,
    source: &EnvSource,
    sources: &Sources,
    facts: &Facts<'_>,
) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return from_field(pod, &field.field_path, facts).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        return from_resource(pod, container, resource, facts).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        return from_key("ConfigMap", key, &sources.config_maps);
    }
    if let Some(key) = &source.secret_key_ref {
        return from_key("Secret", key, &sources.secrets);
    }
    Err("valueFrom names no source that is known here".to_owned())
}

fn from_key(
    kind: &str,
    reference: &KeyRef,
    known: &BTreeMap<String, Option<BTreeMap<String, Vec<u8>>>>,
) -> Result<Option<String>, String> {
    match known.get(&reference.name).and_then(Option::as_ref) {
        Some(data) => match data.get(&reference.key) {
            Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
            None if reference.optional => Ok(None),
            None => Err(format!("{kind} {:?} has no key {:?}", reference.name, reference.key)),
        },
        None if reference.optional => Ok(None),
        None => Err(format!("{kind} {:?} not found", reference.name)),
    }
}

/// The value of a `fieldPath`.
pub fn from_field(pod: &Pod, path: &str, facts: &Facts<'_>) -> Result<String, String> {
    let join = |ips: &[std::net::IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let first = |ips: &[std::net::IpAddr]| ips.first().map(ToString::to_string).unwrap_or_default();
    if let Some((map, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) {
        let map = match map {
            "metadata.labels" => &pod.labels,
            "metadata.annotations" => &pod.annotations,
            _ => return Err(format!("field {path:?} is not supported")),
        };
        return Ok(map.get(key).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => pod.name.clone(),
        "metadata.namespace" => pod.namespace.clone(),
        "metadata.uid" => pod.uid.clone(),
        "spec.nodeName" => pod.spec.node_name.clone(),
        "spec.serviceAccountName" => pod.spec.service_account_name.clone(),
        "status.podIP" => first(facts.pod_ips),
        "status.podIPs" => join(facts.pod_ips),
        "status.hostIP" => first(facts.node_ips),
        "status.hostIPs" => join(facts.node_ips),
        _ => return Err(format!("field {path:?} is not supported")),
    })
}

fn from_resource(
    pod: &Pod,
    own: &Container,
    reference: &ResourceFieldRef,
    facts: &Facts<'_>,
) -> Result<String, String> {
    let container = if reference.container_name.is_empty() {
        own
    } else {
        let mut all = pod.spec.containers.iter().chain(&pod.spec.init_containers);
        all.find(|c| c.name == reference.container_name)
            .ok_or_else(|| format!("no container {:?}", reference.container_name))?
    };
    let amounts = resources::of_container(container);
    let node = &facts.node;
    let milli = |bytes: i64| bytes.saturating_mul(1000);
    let value_milli = match reference.resource.as_str() {
        "limits.cpu" => amounts.cpu_limit_milli.unwrap_or(node.cpu_milli),
        "requests.cpu" => amounts.cpu_request_milli.unwrap_or(0),
        "limits.memory" => milli(amounts.memory_limit_bytes.unwrap_or(node.memory_bytes)),
        "requests.memory" => milli(amounts.memory_request_bytes.unwrap_or(0)),
        other => return Err(format!("resource {other:?} is not supported")),
    };
    let divisor = match &reference.divisor {
        None => 1000,
        Some(text) => match quantity::milli(&text.0) {
            Some(0) => 1000,
            Some(divisor) => divisor,
            None => return Err(format!("divisor {:?} is no quantity", text.0)),
        },
    };
    Ok((value_milli / divisor + i64::from(value_milli % divisor > 0)).to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pod(json: &str) -> Pod {
        serde_json::from_str(json).expect("a pod")
    }

    fn data(pairs: &[(&str, &str)]) -> Option<BTreeMap<String, Vec<u8>>> {
        Some(pairs.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect())
    }

    fn value<'a>(env: &'a [(String, String)], name: &str) -> Option<&'a str> {
        env.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    #[test]
    fn every_source_and_their_order() {
        let pod = pod(
            r#"{"namespace":"ns","name":"web-1","uid":"u","labels":{"app":"x"},"spec":{"nodeName":"n1","containers":[
            {"name":"c","resources":{"limits":{"memory":"64Mi","cpu":"1500m"}},
             "envFrom":[{"prefix":"P_","configMapRef":{"name":"cm"}},{"secretRef":{"name":"gone","optional":true}}],
             "env":[{"name":"A","value":"1"},{"name":"B","value":"$(A)-$(P_k)-$(NOPE)-$$(A)"},{"name":"A","value":"2"},
              {"name":"NAME","valueFrom":{"fieldRef":{"fieldPath":"metadata.name"}}},
              {"name":"IP","valueFrom":{"fieldRef":{"fieldPath":"status.podIP"}}},
              {"name":"L","valueFrom":{"fieldRef":{"fieldPath":"metadata.labels['app']"}}},
              {"name":"M","valueFrom":{"resourceFieldRef":{"resource":"limits.memory","divisor":"1Mi"}}},
              {"name":"CPU","valueFrom":{"resourceFieldRef":{"resource":"limits.cpu"}}},
              {"name":"S","valueFrom":{"secretKeyRef":{"name":"s","key":"pw"}}},
              {"name":"O","valueFrom":{"configMapKeyRef":{"name":"cm","key":"no","optional":true}}}]}]}}"#,
        );
        let mut sources = Sources::default();
        sources.config_maps.insert("cm".into(), data(&[("k", "v"), ("bad key", "x")]));
        sources.secrets.insert("s".into(), data(&[("pw", "geheim")]));
        sources.secrets.insert("gone".into(), None);
        let ips = ["10.0.0.7".parse().expect("an address")];
        let facts = Facts { pod_ips: &ips, ..Facts::default() };
        let env = build(&pod, &pod.spec.containers[0], &sources, &facts).expect("an environment");
        let expected = [
            ("HOSTNAME", "web-1"),
            ("A", "2"),
            ("B", "1-v-$(NOPE)-$(A)"),
            ("P_k", "v"),
            ("NAME", "web-1"),
            ("IP", "10.0.0.7"),
            ("L", "x"),
            ("M", "64"),
            ("CPU", "2"),
            ("S", "geheim"),
        ];
        for (name, wanted) in expected {
            assert_eq!(value(&env, name), Some(wanted), "{name}");
        }
        assert_eq!(value(&env, "O"), None);
        assert_eq!(value(&env, "P_bad key"), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let pod = pod(r#"{"name":"p","spec":{"containers":[
            {"env":[{"name":"A","valueFrom":{"configMapKeyRef":{"name":"cm","key":"k"}}}]},
            {"envFrom":[{"secretRef":{"name":"s"}}]},
            {"env":[{"name":"A","valueFrom":{"fieldRef":{"fieldPath":"spec.nope"}}}]}]}}"#);
        let says = |i: usize, sources: &Sources| {
            build(&pod, &pod.spec.containers[i], sources, &Facts::default()).expect_err("an error")
        };
        let none = Sources::default();
        assert_eq!(says(0, &none), "env A: ConfigMap \"cm\" not found");
        let mut empty = Sources::default();
        empty.config_maps.insert("cm".into(), data(&[]));
        assert_eq!(says(0, &empty), "env A: ConfigMap \"cm\" has no key \"k\"");
        assert_eq!(says(1, &none), "Secret \"s\" of envFrom not found");
        assert!(says(2, &none).contains("spec.nope"));
        assert_eq!(needed(&pod.spec.containers[0]), (vec!["cm"], vec![]));
        assert_eq!(needed(&pod.spec.containers[1]), (vec![], vec!["s"]));
    }

    #[test]
    fn expansion_forms() {
        let variables = BTreeMap::from([("A".to_owned(), "$(A)".to_owned())]);
        for (text, wanted) in [
            ("$(A)", "$(A)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$$(A)"),
            ("$", "$"),
            ("a$(", "a$("),
            ("$()", "$()"),
            ("$x", "$x"),
        ] {
            assert_eq!(expand(text, &variables), wanted, "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_untouched(text in "[^$]{0,40}") {
            prop_assert_eq!(expand(&text, &BTreeMap::new()), text);
        }

        #[test]
        fn expansion_never_panics(text in r"[$()A\PC]{0,20}") {
            expand(&text, &BTreeMap::from([("A".to_owned(), "x".to_owned())]));
        }
    }
}
