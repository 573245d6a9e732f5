//! Conformance cases C01 to C20: what goes in by environment and standard input, and what comes out by standard output
//! and exit status. Each is told apart from the others by what it asserts, not by what it calls.

use std::process::Stdio;

use serde_json::{Value, json};
use sheave_harness::wait_for;

use crate::cni_bed::{Bed, Ctr, DEBIAN, Plugin, addresses, ips_of, links_of, run, with};

pub(crate) fn exit_status(bed: &Bed) {
    let (mut ctr, config) = (Ctr::new(), bed.config("n-exit"));
    assert_eq!(bed.call("ADD", &ctr, &config).status, Some(0));
    assert_eq!(bed.call("DEL", &ctr, &config).status, Some(0));
    ctr.lose_netns();
    let failed = bed.call("ADD", &ctr, &config);
    assert!(failed.status.is_some_and(|status| status != 0), "{failed:?}");
}

/// Failures of every kind that a caller can bring about.
fn failures(bed: &Bed) -> Vec<crate::cni_bed::Outcome> {
    let config = bed.config("n-fail");
    let mut odd = Ctr::new();
    odd.ifname = "a/b".to_owned();
    let mut gone = Ctr::new();
    gone.lose_netns();
    vec![
        bed.call("ADD", &odd, &config),
        bed.call("ADD", &gone, &config),
        bed.call("CHECK", &Ctr::new(), &config),
        bed.call("NONSENSE", &Ctr::new(), &config),
        bed.call("ADD", &Ctr::new(), &with(config.clone(), json!({"cniVersion": "9.9.9"}))),
        run(bed.prepared("ADD", &Ctr::new(), &config), b"{"),
    ]
}

pub(crate) fn error_object(bed: &Bed) {
    for failure in failures(bed) {
        let refusal = failure.refusal();
        assert!(refusal.object["cniVersion"].is_string(), "{failure:?}");
        assert!(refusal.object["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{failure:?}");
        let known = ["cniVersion", "code", "msg", "details"];
        let object = refusal.object.as_object().expect("an object");
        assert!(object.keys().all(|key| known.contains(&key.as_str())), "{failure:?}");
    }
}

pub(crate) fn only_json_on_stdout(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-json"));
    let mut outputs = vec![bed.call("ADD", &ctr, &config), bed.verb("VERSION", &config)];
    bed.del(&ctr, &config);
    outputs.extend(failures(bed));
    for output in outputs {
        serde_json::from_str::<Value>(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    }
}

pub(crate) fn silent_verbs(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), with(bed.config("n-silent"), json!({"cniVersion": bed.newest()})));
    if bed.plugin == Plugin::Ours {
        bed.verb("STATUS", &config).silent();
    }
    let result = bed.add(&ctr, &config);
    bed.call("CHECK", &ctr, &with(config.clone(), json!({"prevResult": result}))).silent();
    if bed.plugin == Plugin::Ours {
        let valid = json!([{"containerID": ctr.id, "ifname": ctr.ifname}]);
        bed.verb("GC", &with(config.clone(), json!({"cni.dev/valid-attachments": valid}))).silent();
    }
    bed.call("DEL", &ctr, &config).silent();
}

pub(crate) fn missing_environment(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-env"));
    let stdin = config.to_string();
    for (verb, needed) in [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ] {
        let mut bare = bed.command(&bed.program(&config));
        bare.env("CNI_COMMAND", verb);
        let told = run(bare, stdin.as_bytes()).code(4);
        for name in needed {
            assert!(told.contains(name), "{verb} lacks {name}: {told}");
            let mut one = bed.prepared(verb, &ctr, &config);
            one.env_remove(name);
            let told = run(one, stdin.as_bytes()).code(4);
            assert!(told.contains(name), "{verb} lacks {name}: {told}");
        }
    }
}

pub(crate) fn about(bed: &Bed) {
    let mut command = bed.command(&bed.program(&bed.config("n-about")));
    command.env("CNI_PATH", DEBIAN);
    let outcome = run(command, b"");
    outcome.silent();
    assert!(outcome.stderr.to_lowercase().contains("cni"), "{outcome:?}");
}

pub(crate) fn unknown_command(bed: &Bed) {
    let told = bed.call("REPLACE", &Ctr::new(), &bed.config("n-unknown")).code(4);
    assert!(told.contains("CNI_COMMAND"), "{told}");
}

pub(crate) fn container_id_rules(bed: &Bed) {
    for id in ["", "-begins-with-a-dash", "a b", "a/b", "ä", ".dot"] {
        let mut ctr = Ctr::new();
        ctr.id = id.to_owned();
        for verb in ["ADD", "DEL", "CHECK"] {
            let told = bed.call(verb, &ctr, &bed.config("n-id")).code(4);
            assert!(
                told.contains("CNI_CONTAINERID") || told.contains("containerID"),
                "{verb} {id:?}: {told}"
            );
        }
        assert!(!links_of(ctr.netns()).contains("eth0"), "{id:?}");
    }
}

pub(crate) fn ifname_rules(bed: &Bed) {
    let config = bed.config("n-ifname");
    for name in ["sixteen-letters-", ".", "..", "a/b", "a:b", "a b"] {
        let mut ctr = Ctr::new();
        ctr.ifname = name.to_owned();
        bed.call("ADD", &ctr, &config).code(4);
        assert_eq!(links_of(ctr.netns()).len(), 1, "{name:?}: only lo");
    }
    let mut ctr = Ctr::new();
    ctr.ifname = "fifteen-letters".to_owned();
    bed.add(&ctr, &config);
    assert!(links_of(ctr.netns()).contains("fifteen-letters"));
    bed.del(&ctr, &config);
}

pub(crate) fn network_name_rules(bed: &Bed) {
    for name in [json!(null), json!(""), json!("a b"), json!("a/b"), json!("-a"), json!(5)] {
        let ctr = Ctr::new();
        let config = with(bed.config("n-name"), json!({"name": name}));
        let refusal = bed.call("ADD", &ctr, &config).refusal();
        // A name that is no text can't be decoded at all.
        let codes = if name.is_number() { &[6, 7][..] } else { &[7] };
        assert!(codes.contains(&refusal.code), "{name}: {refusal:?}");
        assert!(!links_of(ctr.netns()).contains("eth0"), "{name}");
    }
}

pub(crate) fn unreadable_configuration(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-stdin"));
    for text in ["", "{", "[]", "\"text\"", "{\"cniVersion\": \"1.0.0\"} and more"] {
        run(bed.prepared("ADD", &ctr, &config), text.as_bytes()).code(6);
    }
    let mut command = bed.prepared("ADD", &ctr, &config);
    // Reading a directory fails, whoever reads it.
    command.stdin(Stdio::from(std::fs::File::open("/").expect("open a directory")));
    let output = command.output().expect("start a plugin");
    let object: Value = serde_json::from_slice(&output.stdout).expect("an error object");
    assert_eq!(object["code"], 5, "{object}");
}

pub(crate) fn version_unsupported(bed: &Bed) {
    for version in ["9.9.9", "0.0.9", "1.2.0", "2.0.0"] {
        let ctr = Ctr::new();
        let config = with(bed.config("n-version"), json!({"cniVersion": version}));
        let told = bed.call("ADD", &ctr, &config).code(1);
        assert!(told.contains(version), "{told}");
    }
}

pub(crate) fn check_needs_0_4(bed: &Bed) {
    for version in ["0.3.0", "0.3.1"] {
        let config = with(bed.config("n-old-check"), json!({"cniVersion": version}));
        let ctr = Ctr::new();
        let result = bed.add(&ctr, &config);
        bed.call("CHECK", &ctr, &with(config.clone(), json!({"prevResult": result}))).code(1);
        bed.del(&ctr, &config);
    }
}

pub(crate) fn gc_and_status_need_1_1(bed: &Bed) {
    for version in ["0.4.0", "1.0.0"] {
        let config =
            with(bed.config("n-old-gc"), json!({"cniVersion": version, "cni.dev/valid-attachments": []}));
        bed.verb("GC", &config).code(1);
        bed.verb("STATUS", &config).code(1);
    }
}

pub(crate) fn result_in_the_version_asked_for(bed: &Bed) {
    let versions = bed.verb("VERSION", &bed.config("n-results")).result();
    let versions: Vec<String> = serde_json::from_value(versions["supportedVersions"].clone()).expect("texts");
    let required = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", bed.newest()];
    for version in required {
        assert!(versions.iter().any(|known| known == version), "{version} is not in {versions:?}");
    }
    // What is advertised is served.
    for version in &versions {
        let config = with(bed.config("n-results"), json!({"cniVersion": version}));
        let ctr = Ctr::new();
        let result = bed.add(&ctr, &config);
        assert_eq!(result["cniVersion"], version.as_str(), "{result}");
        if version.starts_with("0.1") || version.starts_with("0.2") {
            assert!(result["ip4"]["ip"].is_string() && result["ips"].is_null(), "{result}");
        } else {
            let tagged = result["ips"][0]["version"] == "4";
            assert_eq!(tagged, version.starts_with("0."), "{result}");
            assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result), "{result}");
        }
        let new = ["mtu", "socketPath", "pciID"];
        let told_new = result["interfaces"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|row| new.iter().any(|key| !row[*key].is_null()));
        assert!(!told_new || version == "1.1.0", "keys of 1.1.0 in {result}");
        bed.del(&ctr, &config);
    }
}

pub(crate) fn version_needs_nothing(bed: &Bed) {
    let config = bed.config("n-asked");
    for stdin in ["", r#"{"cniVersion": "0.4.0"}"#] {
        let mut command = bed.command(&bed.program(&config));
        command.env("CNI_COMMAND", "VERSION");
        let result = run(command, stdin.as_bytes()).result();
        assert!(result["cniVersion"].is_string(), "{result}");
        let versions = result["supportedVersions"].as_array().expect("a list");
        assert!(versions.contains(&json!("0.4.0")) && versions.contains(&json!("1.0.0")), "{result}");
    }
}

pub(crate) fn unknown_keys_are_harmless(bed: &Bed) {
    let (ctr, plain) = (Ctr::new(), bed.config("n-keys"));
    let odd = json!({"example.org/key": {"deep": [1, 2]}, "unheard-of": true, "cni.dev/other": null,
                     "args": {"cni": {"labels": [{"key": "a", "value": "b"}]}, "example.org": 1},
                     "runtimeConfig": {"unheard-of": {"a": 1}}});
    let result = bed.add(&ctr, &with(plain.clone(), odd.clone()));
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
    let config = with(with(plain, odd), json!({"prevResult": result}));
    bed.call("CHECK", &ctr, &config).silent();
    bed.del(&ctr, &config);
}

pub(crate) fn refused_fields_are_named(bed: &Bed) {
    let mapping = json!([{"hostPort": 10018, "containerPort": 80, "protocol": "ipx"}]);
    let (ctr, list) = (Ctr::new(), bed.list("n-refused", json!({"portMappings": mapping})));
    let told = bed.add_list(&ctr, &list).expect_err("a protocol that nobody maps").code(2);
    assert!(told.contains("protocol") && told.contains("ipx"), "{told}");
}

pub(crate) fn own_namespace_is_refused(bed: &Bed) {
    let mut ctr = Ctr::new();
    ctr.netns_path = Some(bed.node.netns.path());
    ctr.ifname = "own0".to_owned();
    let config = bed.config("n-own");
    bed.call("ADD", &ctr, &config).code(8);
    assert!(!links_of(&bed.node.netns).contains("own0"), "nothing is made before it is refused");
}

pub(crate) fn own_namespace_by_override(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let config = bed.config("n-override");
    for value in ["1", "TRUE"] {
        let mut ctr = Ctr::new();
        ctr.ifname = "own1".to_owned();
        let mut results = Vec::new();
        for verb in ["ADD", "DEL"] {
            let mut command = bed.prepared(verb, &ctr, &config);
            // A runtime that lives in the container's namespace itself.
            ctr.netns().apply(&mut command);
            command.env("CNI_NETNS_OVERRIDE", value);
            results.push(run(command, config.to_string().as_bytes()));
            assert_eq!(results[results.len() - 1].status, Some(0), "{verb}: {results:?}");
            // DEL does not wait for the link to go.
            wait_for(&format!("what {verb} does to own1"), || {
                let links = links_of(ctr.netns());
                if links.contains("own1") == (verb == "ADD") { Ok(()) } else { Err(format!("{links:?}")) }
            });
        }
        assert!(!ips_of(&results[0].result()).is_empty(), "{results:?}");
    }
}
