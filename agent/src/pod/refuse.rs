//! What a pod may ask for that this agent has no code for yet. Nothing is left out silently: such a pod
//! stays Pending and says why.

use super::model::{MountPropagation, PodSpec, VolumeSource};

/// Why a pod is not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Reason of the event.
    pub reason: &'static str,
    /// Names the field.
    pub message: String,
}

/// The first thing in `spec` that can't be done.
pub fn check(spec: &PodSpec) -> Option<Refusal> {
    let sandbox = [
        (spec.host_pid, "hostPID"),
        (spec.host_ipc, "hostIPC"),
        (spec.host_users == Some(false), "hostUsers: false"),
        (!spec.runtime_class_name.is_empty(), "runtimeClassName"),
        (!spec.resource_claims.is_empty(), "resourceClaims"),
    ];
    if let Some((_, field)) = sandbox.iter().find(|(asked, _)| *asked) {
        return Some(refusal("FailedCreatePodSandBox", format!("{field} is not supported yet")));
    }
    for volume in &spec.volumes {
        if let VolumeSource::Unsupported(kind) = &volume.source {
            let message = format!("volume {:?}: volume type not supported yet: {kind}", volume.name);
            return Some(refusal("FailedMount", message));
        }
    }
    for container in spec.init_containers.iter().chain(&spec.containers) {
        let of = |what: String| format!("container {:?}: {what} is not supported yet", container.name);
        if !container.volume_devices.is_empty() {
            return Some(refusal("FailedMount", of("volumeDevices".to_owned())));
        }
        for mount in &container.volume_mounts {
            if !spec.volumes.iter().any(|volume| volume.name == mount.name) {
                let message = format!("container {:?}: no volume {:?}", container.name, mount.name);
                return Some(refusal("FailedMount", message));
            }
            if mount.mount_propagation == MountPropagation::Bidirectional {
                return Some(refusal("FailedMount", of("mountPropagation: Bidirectional".to_owned())));
            }
        }
        let seccomp = [&container.security_context.seccomp_profile, &spec.security_context.seccomp_profile];
        if seccomp.iter().any(|p| p.as_ref().is_some_and(|p| p.kind == "Localhost")) {
            return Some(refusal("FailedCreatePodSandBox", of("a Localhost seccompProfile".to_owned())));
        }
        if container.security_context.proc_mount.as_deref().is_some_and(|kind| kind != "Default") {
            return Some(refusal("FailedCreatePodSandBox", of("procMount".to_owned())));
        }
    }
    None
}

fn refusal(reason: &'static str, message: String) -> Refusal {
    Refusal { reason, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(json: &str) -> Option<String> {
        let spec: PodSpec = serde_json::from_str(json).expect("a spec");
        check(&spec).map(|refusal| refusal.message)
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert_eq!(says(r#"{"containers":[{"name":"a"}]}"#), None);
        assert_eq!(says(r#"{"hostPID":true}"#).as_deref(), Some("hostPID is not supported yet"));
        assert_eq!(
            says(r#"{"volumes":[{"name":"d","downwardAPI":{"items":[]}}]}"#).as_deref(),
            Some("volume \"d\": volume type not supported yet: downwardAPI")
        );
        assert_eq!(says(r#"{"containers":[{"name":"a","ports":[{"containerPort":1,"hostPort":1}]}]}"#), None);
        assert!(
            says(r#"{"containers":[{"name":"a","volumeMounts":[{"name":"x"}]}]}"#)
                .is_some_and(|m| m.contains("no volume"))
        );
    }
}
