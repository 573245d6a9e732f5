//! What this host must have before anything is started. Every check names what is missing and what to do
//! about it; all of them are made, so that one run tells everything.

use std::path::PathBuf;

use crate::config::{AgentConfig, Component};

/// What the host lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The thing.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.what, self.hint)
    }
}

/// Facts of the host that the checks look at.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Effective user id.
    pub uid: u32,
    /// `/proc/filesystems`.
    pub filesystems: String,
    /// `/proc/self/mountinfo`.
    pub mounts: String,
    /// Namespaces below `/proc/self/ns`.
    pub namespaces: Vec<String>,
}

impl Host {
    /// Reads them.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let names = std::fs::read_dir("/proc/self/ns").map(|entries| {
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        });
        Host {
            uid: nix::unistd::geteuid().as_raw(),
            filesystems: read("/proc/filesystems"),
            mounts: read("/proc/self/mountinfo"),
            namespaces: names.unwrap_or_default(),
        }
    }

    fn has_filesystem(&self, name: &str) -> bool {
        self.filesystems.lines().any(|line| line.split_whitespace().last() == Some(name))
    }

    /// Root of the v2 hierarchy.
    pub fn cgroup2_root(&self) -> Option<PathBuf> {
        self.mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            (right.split(' ').next() == Some("cgroup2")).then(|| left.split(' ').nth(4).map(PathBuf::from))?
        })
    }
}

/// Everything that `host` lacks for `config`.
pub fn check(host: &Host, config: &AgentConfig) -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut lack = |what: &str, hint: &str| {
        missing.push(Missing { what: what.to_owned(), hint: hint.to_owned() });
    };
    if host.uid != 0 {
        lack("root privileges", "the agent makes namespaces, cgroups and BPF programs: run it as root");
    }
    let root = host.cgroup2_root();
    match (&root, &config.cgroup_path) {
        (None, _) if !config.does(Component::Pods) && !config.does(Component::Services) => {}
        (None, _) => lack("a cgroup v2 hierarchy", "mount -t cgroup2 none /sys/fs/cgroup/unified"),
        (Some(root), Some(path)) if !path.starts_with(root) => {
            lack(
                &format!("cgroup_path below {}", root.display()),
                &format!("{} is not in the v2 hierarchy", path.display()),
            );
        }
        _ => {}
    }
    if config.does(Component::Pods) {
        if !host.has_filesystem("overlay") {
            lack("overlayfs", "modprobe overlay");
        }
        for (name, option) in [("pid", "PID_NS"), ("net", "NET_NS"), ("ipc", "IPC_NS"), ("uts", "UTS_NS")] {
            if !host.namespaces.iter().any(|known| known == name) {
                lack(&format!("{name} namespaces"), &format!("a kernel with CONFIG_{option}"));
            }
        }
    }
    if config.does(Component::Services) && !host.has_filesystem("bpf") {
        lack("bpffs", "a kernel with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF");
    }
    missing
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn host() -> Host {
        Host {
            uid: 0,
            filesystems: "nodev\tbpf\nnodev\toverlay\n\text4\n".into(),
            mounts: "35 24 0:30 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n".into(),
            namespaces: ["pid", "net", "ipc", "uts", "mnt"].map(str::to_owned).to_vec(),
        }
    }

    #[test]
    fn a_good_host_lacks_nothing() {
        assert_eq!(host().cgroup2_root().as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(check(&host(), &AgentConfig::default()), []);
    }

    #[test]
    fn everything_that_is_missing_is_named_at_once() {
        let bare = Host { uid: 1000, ..Host::default() };
        let missing: Vec<String> =
            check(&bare, &AgentConfig::default()).iter().map(|m| m.what.clone()).collect();
        for what in ["root privileges", "a cgroup v2 hierarchy", "overlayfs", "net namespaces", "bpffs"] {
            assert!(missing.iter().any(|m| m == what), "{what} in {missing:?}");
        }
        let services = AgentConfig { components: vec![Component::Services], ..AgentConfig::default() };
        assert!(!check(&bare, &services).iter().any(|m| m.what == "overlayfs"));
        let odd = AgentConfig { cgroup_path: Some("/elsewhere".into()), ..AgentConfig::default() };
        assert!(check(&host(), &odd)[0].hint.contains("/elsewhere"));
    }
}
