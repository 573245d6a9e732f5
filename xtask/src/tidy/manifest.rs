//! Who may depend on whom, and that every member inherits the workspace's lints and versions.

use super::Violation;

/// The arrows of the house, by package: what it may link of ours. Suites (`tests/`) may link everything.
const ARROWS: &[(&str, &[&str])] = &[
    ("sheave", &["sheave-agent", "sheave-control", "sheave-cni", "sheave-load"]),
    ("sheave-agent", &["sheave-ebpf-abi", "sheave-ebpf-object", "sheave-cni"]),
    ("sheave-control", &[]),
    ("sheave-load", &["sheave-agent", "sheave-cni"]),
    ("sheave-cni", &[]),
    ("sheave-ebpf-abi", &[]),
    ("sheave-ebpf-core", &["sheave-ebpf-abi"]),
    ("sheave-ebpf-prog", &["sheave-ebpf-abi", "sheave-ebpf-core"]),
    ("sheave-ebpf-object", &[]),
    ("sheave-echo", &[]),
    ("xtask", &[]),
];

/// A `Cargo.toml`, read as far as the checks need: every entry under a section, with its line.
pub(crate) struct Manifest {
    file: String,
    package: String,
    entries: Vec<Entry>,
}

struct Entry {
    section: String,
    key: String,
    value: String,
    line: usize,
}

impl Manifest {
    pub(crate) fn parse(file: &str, text: &str) -> Manifest {
        let (mut section, mut entries) = (String::new(), Vec::new());
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if let Some(header) = line.strip_prefix('[') {
                section = header.trim_matches(['[', ']']).to_owned();
            } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
                let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
                entries.push(Entry { section: section.clone(), key, value, line: number + 1 });
            }
        }
        let mut manifest = Manifest { file: file.to_owned(), package: String::new(), entries };
        manifest.package = manifest.get("package", "name").unwrap_or_default().trim_matches('"').to_owned();
        manifest
    }

    fn get(&self, section: &str, key: &str) -> Option<&str> {
        self.entries.iter().find(|e| e.section == section && e.key == key).map(|e| e.value.as_str())
    }

    /// Entries of every dependency table, with whether the table is for development only.
    fn dependencies(&self) -> impl Iterator<Item = (&Entry, bool)> {
        self.entries.iter().filter_map(|entry| {
            let table = entry.section.rsplit('.').next()?;
            let workspace = entry.section.starts_with("workspace");
            match table {
                "dependencies" | "build-dependencies" if !workspace => Some((entry, false)),
                "dev-dependencies" => Some((entry, true)),
                _ => None,
            }
        })
    }
}

pub(crate) fn check(manifests: &[Manifest]) -> Vec<Violation> {
    let ours: Vec<&str> = manifests.iter().map(|m| m.package.as_str()).collect();
    let mut found = Vec::new();
    for manifest in manifests.iter().filter(|m| !m.package.is_empty()) {
        // A workspace of its own, built by another compiler, cannot inherit.
        let member = manifest.file == "Cargo.toml" || manifest.get("workspace", "members").is_none();
        let excluded = manifest.entries.iter().any(|e| e.section == "workspace")
            && manifest.file != "Cargo.toml"
            || manifest.package == "sheave-ebpf-prog";
        if member && !excluded {
            inherits(manifest, &mut found);
        }
        arrows(manifest, &ours, &mut found);
    }
    found
}

fn inherits(manifest: &Manifest, found: &mut Vec<Violation>) {
    if manifest.get("lints", "workspace") != Some("true") {
        let text = "lints are not inherited; add `[lints] workspace = true`";
        found.push(Violation::new(&manifest.file, 1, text));
    }
    for (entry, _) in manifest.dependencies() {
        let dotted = entry.key.ends_with(".workspace") && entry.value == "true";
        if !dotted && !entry.value.replace(' ', "").contains("workspace=true") {
            let text =
                format!("`{}` has a version of its own; declare it in [workspace.dependencies]", entry.key);
            found.push(Violation::new(&manifest.file, entry.line, text));
        }
    }
}

fn arrows(manifest: &Manifest, ours: &[&str], found: &mut Vec<Violation>) {
    if manifest.file.starts_with("tests/") {
        return;
    }
    let Some((_, allowed)) = ARROWS.iter().find(|(package, _)| *package == manifest.package) else {
        let text = format!("`{}` has no arrows; add it to xtask/src/tidy/manifest.rs", manifest.package);
        found.push(Violation::new(&manifest.file, 1, text));
        return;
    };
    for (entry, dev) in manifest.dependencies() {
        let name = entry.key.split('.').next().unwrap_or(&entry.key);
        // The root package's development tables belong to the suites.
        let suite = dev && manifest.package == "sheave";
        if ours.contains(&name) && !allowed.contains(&name) && !suite {
            let text =
                format!("{} may not depend on {name}; see the arrows in ARCHITECTURE.md", manifest.package);
            found.push(Violation::new(&manifest.file, entry.line, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(manifests: &[(&str, &str)]) -> Vec<String> {
        let parsed: Vec<_> = manifests.iter().map(|(file, text)| Manifest::parse(file, text)).collect();
        check(&parsed).iter().map(ToString::to_string).collect()
    }

    const AGENT: &str = "[package]\nname = \"sheave-agent\"\n[lints]\nworkspace = true\n";

    #[test]
    fn agent_and_control_never_meet() {
        let control = "[package]\nname = \"sheave-control\"\n[dependencies]\nsheave-agent.workspace = true\n\
            [lints]\nworkspace = true\n";
        let found = lines(&[("agent/Cargo.toml", AGENT), ("control/Cargo.toml", control)]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("control/Cargo.toml:4: sheave-control may not depend on sheave-agent"));
    }

    #[test]
    fn members_inherit() {
        let bad = "[package]\nname = \"sheave-agent\"\n[dependencies]\nserde = \"1\"\n";
        assert_eq!(lines(&[("agent/Cargo.toml", AGENT)]), [""; 0]);
        assert_eq!(lines(&[("agent/Cargo.toml", bad)]).len(), 2);
    }

    #[test]
    fn new_packages_need_arrows() {
        let new = AGENT.replace("sheave-agent", "sheave-new");
        assert!(lines(&[("new/Cargo.toml", &new)])[0].contains("no arrows"));
    }
}
