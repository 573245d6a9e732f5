//! Settings: the TOML file sets what the flags set, under the same names, and a flag wins over the file. Unknown keys
//! are refused, so that a typing error is never silently a default.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::Table;

/// Where the file is looked for when `--config` does not name one. It may be absent there.
pub(crate) const DEFAULT_PATH: &str = "/etc/sheave/config.toml";

/// The settings file as it was read: one table a section (`[paths]`, `[control]`, `[agent]`, `[network]`,
/// `[services]`, `[log]`).
#[derive(Debug, Default)]
pub(crate) struct File {
    path: PathBuf,
    tables: Table,
}

const SECTIONS: [&str; 6] = ["paths", "log", "control", "agent", "network", "services"];

impl File {
    /// Reads `path`, or the default place when none is given.
    pub(crate) fn read(path: Option<&Path>) -> Result<Self> {
        let (path, must_exist) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("reading the settings file {}", path.display()));
            }
        };
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let tables: Table =
            text.parse().with_context(|| format!("parsing the settings file {}", path.display()))?;
        for (name, value) in &tables {
            if !SECTIONS.contains(&name.as_str()) {
                bail!("{}: unknown section `{name}`; there are {}", path.display(), SECTIONS.join(", "));
            }
            if !value.is_table() {
                bail!("{}: `{name}` must be a section: write [{name}]", path.display());
            }
        }
        Ok(Self { path: path.to_owned(), tables })
    }

    /// The settings of one section: what the file says, overlaid with the flags that were given.
    pub(crate) fn merge<T: Serialize + DeserializeOwned>(&self, section: &str, flags: &T) -> Result<T> {
        let mut merged = match self.tables.get(section) {
            Some(toml::Value::Table(table)) => table.clone(),
            _ => Table::new(),
        };
        let given = Table::try_from(flags).context("encoding the flags")?;
        merged.extend(given);
        merged.try_into().with_context(|| format!("{}: section [{section}]", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::AgentFlags;

    fn file(text: &str) -> Result<File> {
        File::parse(Path::new("c.toml"), text)
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = file("[agent]\nnode-name = \"from-file\"\nmax-pods = 7\n").unwrap();
        let flags = AgentFlags { node_name: Some("from-flag".into()), ..AgentFlags::default() };
        let merged = file.merge("agent", &flags).unwrap();
        assert_eq!(merged.node_name.as_deref(), Some("from-flag"));
        assert_eq!(merged.max_pods, Some(7));
        assert_eq!(merged.kubeconfig, None);
    }

    #[test]
    fn a_misspelt_key_is_named_with_its_section() {
        let error =
            file("[agent]\nnode-nam = \"x\"\n").unwrap().merge("agent", &AgentFlags::default()).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("[agent]") && text.contains("node-nam"), "{text}");
    }

    #[test]
    fn an_unknown_section_and_a_bare_key_are_refused() {
        assert!(format!("{:#}", file("[agnet]\n").unwrap_err()).contains("unknown section `agnet`"));
        assert!(format!("{:#}", file("agent = 1\n").unwrap_err()).contains("must be a section"));
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = File::read(Some(Path::new("/nonexistent/sheave.toml"))).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/sheave.toml"));
    }
}
