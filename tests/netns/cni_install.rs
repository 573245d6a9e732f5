//! `sheave install cni`: what it installs works from where runtimes look for it, and a configuration is never there
//! without a plugin that answers.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use sheave_harness::require_root;

use crate::cni_bed::{Bed, Ctr, DEBIAN, Plugin, addresses, ips_of, our_binary, run, with, with_prev};

fn sheave(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sheave"));
    command.args(args).arg("--cni-bin-dir").arg(dir.join("bin")).arg("--cni-conf-dir").arg(dir.join("net.d"));
    command.output().expect("start sheave")
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode()
        & 0o7777
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn what_is_installed_connects_containers() {
    if !require_root() {
        return;
    }
    let bed = Bed::shared(Plugin::Ours);
    let dir = tempfile::tempdir().expect("a directory");
    let flags = bed.node.path_flags();
    let paths: Vec<&str> = flags.iter().map(String::as_str).take(4).collect();
    let chain: &[&str] = if Path::new(DEBIAN).join("tuning").exists() { &["tuning"] } else { &[] };
    std::fs::create_dir(dir.path().join("bin")).expect("a directory");
    for name in chain {
        std::os::unix::fs::symlink(Path::new(DEBIAN).join(name), dir.path().join("bin").join(name))
            .expect("a link");
    }
    let chained = chain.join(",");
    let mut args = vec!["install", "cni", "--name", "n-installed", "--ip-masq=false"];
    args.extend(&paths);
    if !chain.is_empty() {
        args.extend(["--chain", &chained]);
    }
    let units = dir.path().join("units").display().to_string();
    args.extend(["--systemd", &units]);
    // Twice: an upgrade is an installation over another.
    for _ in 0..2 {
        let output = sheave(dir.path(), &args);
        assert!(output.status.success(), "{output:?}");
    }
    let (bin, conf) = (dir.path().join("bin/sheave-cni"), dir.path().join("net.d/10-sheave.conflist"));
    assert_eq!((mode(&bin), mode(&conf)), (0o755, 0o644));
    assert_eq!(std::fs::read(&bin).expect("read"), std::fs::read(our_binary()).expect("read"));
    assert_eq!(names(&dir.path().join("net.d")), ["10-sheave.conflist"], "no draft stays");
    let unit = std::fs::read_to_string(dir.path().join("units/sheave-network.service")).expect("the unit");
    assert!(unit.contains("--components network"), "{unit}");

    let list: Value = serde_json::from_slice(&std::fs::read(&conf).expect("read")).expect("JSON");
    let ctr = Ctr::new();
    let call = |verb: &str, config: &Value| {
        let mut command = bed.command(&dir.path().join("bin").join(config["type"].as_str().expect("a type")));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &ctr.id).env("CNI_NETNS", ctr.path());
        command.env("CNI_IFNAME", "eth0").env("CNI_PATH", dir.path().join("bin"));
        run(command, config.to_string().as_bytes())
    };
    assert_eq!(list["cniVersions"].as_array().and_then(|all| all.last()), Some(&serde_json::json!("1.1.0")));
    let head = serde_json::json!({"cniVersion": list["cniVersion"], "name": list["name"]});
    let mut result: Option<Value> = None;
    for plugin in list["plugins"].as_array().expect("plugins") {
        result = Some(call("ADD", &with_prev(&with(plugin.clone(), head.clone()), result.as_ref())).result());
    }
    let result = result.expect("a result");
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
    for plugin in list["plugins"].as_array().expect("plugins").iter().rev() {
        call("DEL", &with_prev(&with(plugin.clone(), head.clone()), Some(&result))).silent();
    }

    for removed in [&["10-sheave.conflist", "sheave-cni", "sheave-network.service"][..], &[]] {
        let output = sheave(dir.path(), &["uninstall", "cni", "--systemd", &units]);
        assert!(output.status.success(), "{output:?}");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(told.lines().count(), removed.len(), "{told}");
        assert!(removed.iter().all(|name| told.contains(name)), "{told}");
    }
    assert_eq!(names(&dir.path().join("bin")), chain);
    assert!(names(&dir.path().join("net.d")).is_empty() && names(&dir.path().join("units")).is_empty());
}

#[test]
fn no_configuration_without_a_plugin_that_answers() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("write a file");
        path.display().to_string()
    };
    let (text, broken) = (file("text", b"#!/bin/sh\n"), file("broken", b"\x7fELF, but not really"));
    for (args, part) in [
        (vec!["--plugin", "/nonexistent"], "/nonexistent"),
        (vec!["--plugin", &text], "not a program"),
        (vec!["--plugin", &broken], "starting"),
        (vec!["--chain", "no-such-plugin"], "no-such-plugin"),
        (vec!["--name", "a/b"], "--name"),
        (vec!["--conf-name", "sheave.json"], "--conf-name"),
        (vec!["--mtu", "5"], "--mtu"),
    ] {
        let mut all = vec!["install", "cni"];
        let ours = our_binary().display().to_string();
        if args[0] != "--plugin" {
            all.extend(["--plugin", &ours]);
        }
        all.extend(&args);
        let output = sheave(dir.path(), &all);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(part), "{args:?}: {said}");
        assert!(names(&dir.path().join("net.d")).is_empty(), "{args:?}");
    }
    // A file in the way of a directory is named.
    std::fs::remove_dir_all(dir.path().join("bin")).expect("remove");
    file("bin", b"");
    let ours = our_binary().display().to_string();
    let output = sheave(dir.path(), &["install", "cni", "--plugin", &ours]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("bin"), "{said}");
}
