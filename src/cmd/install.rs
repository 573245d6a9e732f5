//! `sheave install cni` and `sheave uninstall cni`: the plugin where runtimes look for it. Invariant: at every moment a
//! runtime finds either a whole plugin with a whole configuration or no configuration; files are replaced by rename, the
//! configuration comes last and goes first.

use std::fs::{File as Handle, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::cli::BaseFlags;

const PLUGIN: &str = "sheave-cni";
const UNIT: &str = "sheave-network.service";
const UNIT_TEXT: &str = include_str!("../../deploy/sheave-network.service");
/// Versions that the plugin speaks and runtimes may choose from; `cniVersion` is for those that know no choice.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const VERSION: &str = "1.0.0";

#[derive(Debug, Subcommand)]
pub(crate) enum InstallCommand {
    /// Install the network plugin for containerd, CRI-O and podman
    #[command(long_about = ABOUT)]
    Cni(InstallFlags),
}

#[derive(Debug, Subcommand)]
pub(crate) enum UninstallCommand {
    /// Remove the network plugin and its configuration; attached containers stay connected
    Cni(UninstallFlags),
}

const ABOUT: &str = "\
Install the network plugin for containerd, CRI-O and podman.

Copies sheave-cni to where runtimes look for plugins and then writes the network's configuration, which is what makes \
them use it. Both are replaced by rename: a runtime that starts the plugin meanwhile gets the old one or the new one. \
Run it again after an upgrade or to change the configuration. The plugin needs an agent that does the network: \
`sheave agent --components network`, as a systemd service with --systemd.

Plugins of others can come after ours with --chain; where portmap or bandwidth is among them, ours leaves that work to \
it.";

#[derive(Debug, Args)]
#[command(next_help_heading = "Places")]
pub(crate) struct Places {
    /// Where runtimes look for plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// Where runtimes look for configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Name of the configuration's file; runtimes take the first by its name
    #[arg(long, value_name = "NAME", default_value = "10-sheave.conflist")]
    conf_name: String,
    /// Install (or remove) the systemd unit sheave-network.service too, in this directory
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "/etc/systemd/system")]
    systemd: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct InstallFlags {
    #[command(flatten)]
    base: BaseFlags,
    #[command(flatten)]
    places: Places,
    /// The plugin to install [default: sheave-cni beside this program]
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    plugin: Option<PathBuf>,
    /// Name of the network
    #[arg(long, help_heading = "Network", value_name = "NAME", default_value = "sheave")]
    name: String,
    /// Plugins that come after ours, in this order; they must be in the plugins' directory
    #[arg(long, help_heading = "Network", value_name = "PLUGIN", value_delimiter = ',')]
    chain: Vec<String>,
    /// Whether what containers send out of the pod ranges gets the node's address [default: as the agent is set]
    #[arg(long, help_heading = "Network", num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    ip_masq: Option<bool>,
    /// MTU of containers' interfaces, bytes [default: what the way out carries]
    #[arg(long, help_heading = "Network", value_name = "BYTES", value_parser = clap::value_parser!(u32).range(576..=65535))]
    mtu: Option<u32>,
    /// Print the configuration and change nothing
    #[arg(long, help_heading = "Network")]
    print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UninstallFlags {
    #[command(flatten)]
    places: Places,
}

pub(super) fn install(InstallCommand::Cni(flags): &InstallCommand) -> Result<()> {
    let text = pretty(&conflist(flags)?)?;
    let mut out = std::io::stdout();
    if flags.print {
        return Ok(out.write_all(text.as_bytes())?);
    }
    let places = &flags.places;
    let conf = places.conf()?;
    let plugin = match &flags.plugin {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("finding this program")?.with_file_name(PLUGIN),
    };
    let bytes = std::fs::read(&plugin)
        .with_context(|| format!("reading the plugin {}; name another with --plugin", plugin.display()))?;
    ensure!(bytes.starts_with(b"\x7fELF"), "the plugin {} is not a program", plugin.display());
    for name in &flags.chain {
        let path = places.cni_bin_dir.join(name);
        ensure!(path.is_file(), "--chain {name}: there is no {}; install it first", path.display());
    }
    let target = places.cni_bin_dir.join(PLUGIN);
    place(&target, &bytes, 0o755)?;
    answers(&target)?;
    writeln!(out, "{}", target.display())?;
    if let Some(dir) = &places.systemd {
        let unit = dir.join(UNIT);
        place(&unit, UNIT_TEXT.as_bytes(), 0o644)?;
        writeln!(
            out,
            "{} (start it: systemctl daemon-reload && systemctl enable --now {UNIT})",
            unit.display()
        )?;
    }
    // From here on runtimes use the plugin.
    place(&conf, text.as_bytes(), 0o644)?;
    writeln!(out, "{}", conf.display())?;
    Ok(())
}

pub(super) fn uninstall(UninstallCommand::Cni(flags): &UninstallCommand) -> Result<()> {
    let places = &flags.places;
    let mut paths = vec![places.conf()?, places.cni_bin_dir.join(PLUGIN)];
    paths.extend(places.systemd.as_ref().map(|dir| dir.join(UNIT)));
    let (mut failures, mut out) = (Vec::new(), std::io::stdout());
    for path in paths {
        match std::fs::remove_file(&path) {
            Ok(()) => writeln!(out, "removed {}", path.display())?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => failures.push(format!("{}: {error}", path.display())),
        }
    }
    if !failures.is_empty() {
        bail!("not everything could be removed:\n  {}", failures.join("\n  "));
    }
    Ok(())
}

impl Places {
    fn conf(&self) -> Result<PathBuf> {
        let name = &self.conf_name;
        ensure!(
            !name.contains('/') && name.ends_with(".conflist") && !name.starts_with('.'),
            "--conf-name {name:?}: runtimes read files whose names end in .conflist, such as 10-sheave.conflist"
        );
        Ok(self.cni_conf_dir.join(name))
    }
}

/// What runtimes read.
fn conflist(flags: &InstallFlags) -> Result<Value> {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
    };
    ensure!(
        is_name(&flags.name),
        "--name {:?}: a network's name has letters, digits, '_', '.' and '-', and starts with one of the first two",
        flags.name
    );
    let mut ours = json!({"type": PLUGIN});
    let paths = super::paths(&flags.base)?;
    let default = sheave_agent::AgentConfig::default();
    if paths.run_dir != default.run_dir {
        ours["socket"] = json!(paths.run_dir.join("cni.sock"));
    }
    if paths.state_dir != default.state_dir {
        ours["spool"] = json!(paths.state_dir.join("network/spool"));
    }
    if let Some(masquerade) = flags.ip_masq {
        ours["ipMasq"] = json!(masquerade);
    }
    if let Some(mtu) = flags.mtu {
        ours["mtu"] = json!(mtu);
    }
    let mut plugins = Vec::new();
    let mut capabilities = json!({"ips": true, "mac": true, "dns": true, "ipRanges": true});
    for (capability, plugin) in [("portMappings", "portmap"), ("bandwidth", "bandwidth")] {
        if !flags.chain.iter().any(|name| name == plugin) {
            capabilities[capability] = json!(true);
        }
    }
    ours["capabilities"] = capabilities;
    plugins.push(ours);
    for (at, name) in flags.chain.iter().enumerate() {
        ensure!(is_name(name) && name != PLUGIN, "--chain {name:?}: not the name of another plugin");
        ensure!(!flags.chain[..at].contains(name), "--chain {name}: it is there twice");
        plugins.push(match name.as_str() {
            "portmap" => json!({"type": name, "capabilities": {"portMappings": true}}),
            "bandwidth" => json!({"type": name, "capabilities": {"bandwidth": true}}),
            _ => json!({"type": name}),
        });
    }
    Ok(json!({"cniVersion": VERSION, "cniVersions": VERSIONS, "name": flags.name, "plugins": plugins}))
}

fn pretty(value: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).context("encoding the configuration")? + "\n")
}

/// Puts a file in its place by rename, on disk before it is there.
fn place(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let dir = path.parent().context("a file has a directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("making directory {}", dir.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Hidden, and with an ending that no runtime reads.
    let draft = dir.join(format!(".{name}.{}.new", std::process::id()));
    let written = write(&draft, bytes, mode).and_then(|()| std::fs::rename(&draft, path));
    if let Err(error) = written {
        // Nothing more can be done about a draft that can't be removed either.
        std::fs::remove_file(&draft).unwrap_or_default();
        return Err(error).with_context(|| format!("writing {}", path.display()));
    }
    let sync = Handle::open(dir).and_then(|dir| dir.sync_all());
    sync.with_context(|| format!("writing directory {}", dir.display()))
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let mut file = Handle::options().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    // The mode that was asked for, whatever the umask.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// A plugin that can't run here must be found out before runtimes are told of it.
fn answers(plugin: &Path) -> Result<()> {
    let mut command = Command::new(plugin);
    command.env_clear().env("CNI_COMMAND", "VERSION").stdin(std::process::Stdio::null());
    let output = command.output().with_context(|| format!("starting {}", plugin.display()))?;
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let spoken = answer["supportedVersions"].as_array().cloned().unwrap_or_default();
    let missing: Vec<&str> =
        VERSIONS.into_iter().filter(|version| !spoken.contains(&json!(version))).collect();
    ensure!(
        output.status.success() && missing.is_empty(),
        "{} does not speak {}: {}{}",
        plugin.display(),
        missing.join(", "),
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn flags(args: &[&str]) -> InstallFlags {
        let cli = Cli::try_parse_from([&["sheave", "install", "cni"], args].concat()).unwrap();
        let Command::Install(InstallCommand::Cni(flags)) = cli.command else { panic!("not install cni") };
        flags
    }

    #[test]
    fn the_examples_are_what_is_installed() {
        let chained = ["--chain", "portmap,bandwidth,tuning,firewall"];
        for (args, example) in [
            (&[][..], include_str!("../../deploy/cni/10-sheave.conflist")),
            (&chained, include_str!("../../deploy/cni/10-sheave-chained.conflist")),
        ] {
            assert_eq!(pretty(&conflist(&flags(args)).unwrap()).unwrap(), example);
        }
    }

    #[test]
    fn settings_are_carried_and_work_is_given_away_once() {
        let all = flags(&[
            "--run-dir",
            "/r",
            "--state-dir",
            "/s",
            "--ip-masq",
            "false",
            "--mtu",
            "1400",
            "--chain",
            "portmap",
        ]);
        let list = conflist(&all).unwrap();
        let ours = &list["plugins"][0];
        assert_eq!((&ours["socket"], &ours["spool"]), (&json!("/r/cni.sock"), &json!("/s/network/spool")));
        assert_eq!((&ours["ipMasq"], &ours["mtu"]), (&json!(false), &json!(1400)));
        assert!(ours["capabilities"]["portMappings"].is_null() && ours["capabilities"]["bandwidth"] == true);
        assert_eq!(list["plugins"][1]["capabilities"]["portMappings"], true);
    }

    #[test]
    fn bad_names_are_refused_by_flag() {
        for (args, part) in [
            (["--name", "a b"], "--name"),
            (["--name", ""], "--name"),
            (["--chain", "a/b"], "--chain"),
            (["--chain", "portmap,portmap"], "twice"),
            (["--chain", "sheave-cni"], "another plugin"),
        ] {
            assert!(conflist(&flags(&args)).unwrap_err().to_string().contains(part), "{args:?}");
        }
        for name in ["x.conf", "a/b.conflist", ".conflist"] {
            assert!(flags(&["--conf-name", name]).places.conf().is_err(), "{name}");
        }
    }
}
