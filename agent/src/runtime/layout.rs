//! Where a runtime keeps what. Pure. Invariant: every path below these directories is made of checked
//! names, so no pod can name another's.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::cgroup::Hierarchies;
use super::spec::{ContainerSpec, SandboxSpec};

/// The program that shims are started from.
#[derive(Debug)]
pub(super) struct ShimProgram {
    /// What to execute.
    pub(super) path: PathBuf,
    /// Keeps `path` valid where it leads through a descriptor of this process.
    pub(super) _mount: Option<OwnedFd>,
}

/// Paths of one node's runtime.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) run_dir: PathBuf,
    pub(super) state_dir: PathBuf,
    pub(super) log_dir: PathBuf,
    pub(super) shim: ShimProgram,
    pub(super) hierarchies: Hierarchies,
}

impl Layout {
    /// Parent of the pods' run directories.
    pub(super) fn pods(&self) -> PathBuf {
        self.run_dir.join("pods")
    }

    /// Run directory of a pod.
    pub(super) fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// Parent of the pods' writable layers.
    pub(super) fn layers(&self) -> PathBuf {
        self.state_dir.join("rootfs")
    }

    /// Writable layers of a pod's containers.
    pub(super) fn pod_layers(&self, uid: &str) -> PathBuf {
        self.layers().join(uid)
    }

    /// Logs of a pod.
    pub(super) fn pod_logs(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.log_dir.join(format!("{namespace}_{name}_{uid}"))
    }
}

/// A name that is one harmless part of a path.
pub(super) fn is_plain(name: &str, length_max: usize) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.is_empty() && name.len() <= length_max && !name.starts_with('.') && name.chars().all(plain)
}

fn is_clean_absolute(path: &Path) -> bool {
    use std::path::Component;
    path.is_absolute() && path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
}

/// What is wrong with a pod's specification.
pub(super) fn check_sandbox(spec: &SandboxSpec) -> Result<(), String> {
    for (what, name) in [("uid", &spec.uid), ("namespace", &spec.namespace), ("name", &spec.name)] {
        if !is_plain(name, 253) {
            return Err(format!("{what} {name:?} is not a usable name"));
        }
    }
    if spec.uid.len() > 128 {
        return Err("uid is longer than 128 bytes".to_owned());
    }
    if !spec.host_network && !is_plain(&spec.hostname, 64) {
        return Err(format!("hostname {:?} is not a usable name of at most 64 bytes", spec.hostname));
    }
    let odd = |key: &str| key.split(['.', '/']).any(|p| p.is_empty()) || key.contains("..");
    match spec.sysctls.keys().find(|key| odd(key)) {
        Some(key) => Err(format!("sysctl {key:?} is not a usable name")),
        None => Ok(()),
    }
}

/// What is wrong with a container's specification.
pub(super) fn check_container(spec: &ContainerSpec) -> Result<(), String> {
    if !is_plain(&spec.name, 63) {
        return Err(format!("container name {:?} is not a usable name", spec.name));
    }
    let working_dir = super::plan::working_dir(spec);
    if !is_clean_absolute(Path::new(working_dir)) {
        return Err(format!("working directory {working_dir:?} is not an absolute path without `..`"));
    }
    for mount in &spec.mounts {
        if !mount.source.is_absolute() {
            return Err(format!("volume {} is not an absolute path", mount.source.display()));
        }
        if !is_clean_absolute(&mount.target) || mount.target == Path::new("/") {
            return Err(format!("mount path {} is not usable", mount.target.display()));
        }
    }
    let message = spec.termination_message_path.as_str();
    if !message.is_empty() && !is_clean_absolute(Path::new(message)) {
        return Err(format!("termination message path {message:?} is not an absolute path without `..`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::spec::Mount;

    fn sandbox(uid: &str) -> SandboxSpec {
        SandboxSpec {
            uid: uid.into(),
            namespace: "default".into(),
            name: "web".into(),
            hostname: "web".into(),
            ..SandboxSpec::default()
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        assert!(check_sandbox(&sandbox("6ba7b810-9dad-11d1-80b4-00c04fd430c8")).is_ok());
        for uid in ["", "..", ".x", "a/b", "a b", "ä"] {
            assert!(check_sandbox(&sandbox(uid)).is_err(), "{uid:?}");
        }
        let mut spec = sandbox("a");
        spec.sysctls.insert("net/../../kernel.core_pattern".into(), "x".into());
        assert!(check_sandbox(&spec).is_err());
    }

    #[test]
    fn container_paths_are_absolute_and_clean() {
        let mut spec = ContainerSpec { name: "a".into(), ..ContainerSpec::default() };
        assert!(check_container(&spec).is_ok());
        spec.mounts = vec![Mount { source: "/x".into(), target: "/a/../../b".into(), ..Mount::default() }];
        assert!(check_container(&spec).unwrap_err().contains("/a/../../b"));
        spec.mounts.clear();
        spec.working_dir = "tmp".into();
        assert!(check_container(&spec).is_err());
    }
}
