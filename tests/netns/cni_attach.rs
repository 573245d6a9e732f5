//! Conformance cases C21 to C40: ADD and DEL. What a result claims is compared with the kernel, and what is taken away
//! is looked for there.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};
use sheave_harness::{NetNs, wait_for};

use crate::cni_bed::{
    Bed, Ctr, Plugin, addresses, has_route_to, ip_json, ips_of, link, links_of, node_interfaces, with,
};
use crate::cni_fake::FakeIpam;
use crate::network_pods::talk;

pub(crate) fn makes_the_interface(bed: &Bed) {
    let (mut ctr, config) = (Ctr::new(), bed.config("n-make"));
    ctr.ifname = "net7".to_owned();
    let result = bed.add(&ctr, &config);
    let made = link(ctr.netns(), "net7").expect("the interface");
    assert!(made["flags"].as_array().is_some_and(|flags| flags.contains(&json!("UP"))), "{made}");
    assert_eq!(addresses(ctr.netns(), "net7"), ips_of(&result));
    talk(ctr.netns(), &bed.node.netns, sheave_harness::node::NODE_IP4.parse().expect("an address"));
    bed.del(&ctr, &config);
    assert!(!links_of(ctr.netns()).contains("net7"));
    // A name that is taken by nature.
    ctr.ifname = "lo".to_owned();
    bed.call("ADD", &ctr, &config).refusal();
}

pub(crate) fn existing_interface_is_an_error(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-exists"));
    ctr.netns().ip(&["link", "add", "eth0", "type", "bridge"]);
    let told = bed.call("ADD", &ctr, &config).refusal().text;
    assert!(told.contains("eth0"), "{told}");
    let there = link(ctr.netns(), "eth0").expect("the interface that was there");
    assert_eq!(there["linkinfo"]["info_kind"], "bridge", "{there}");
}

pub(crate) fn interfaces_of_the_result(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let (ctr, config) = (Ctr::new(), with(bed.config("n-result"), json!({"cniVersion": bed.newest()})));
    let before = links_of(&bed.node.netns);
    let result = bed.add(&ctr, &config);
    assert_eq!(result["cniVersion"], bed.newest());
    let made: Vec<String> = links_of(&bed.node.netns).difference(&before).cloned().collect();
    assert_eq!(node_interfaces(&result), made, "{result}");
    let sandbox = ctr.path().display().to_string();
    let inner: Vec<&Value> = result["interfaces"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|row| row["sandbox"] == sandbox.as_str())
        .collect();
    assert_eq!(inner.len(), 1, "{result}");
    assert_eq!(inner[0]["name"], "eth0");
    assert_eq!(result["interfaces"].as_array().map(Vec::len), Some(made.len() + 1), "{result}");
    for row in result["interfaces"].as_array().expect("a list") {
        let ns = if row["sandbox"] == sandbox.as_str() { ctr.netns() } else { &bed.node.netns };
        let name = row["name"].as_str().expect("a name");
        assert_eq!(row["mac"], link(ns, name).expect("the interface")["address"], "{name} of {result}");
    }
}

pub(crate) fn eth0_with_addresses(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-eth0"));
    let result = bed.add(&ctr, &config);
    let rows = result["ips"].as_array().expect("a list");
    assert!(!rows.is_empty());
    for row in rows {
        let index = row["interface"].as_u64().expect("an index");
        assert_eq!(result["interfaces"][usize::try_from(index).expect("small")]["name"], "eth0", "{result}");
        let text = row["address"].as_str().expect("an address");
        assert!(text.split_once('/').is_some_and(|(_, length)| length.parse::<u8>().is_ok()), "{text}");
    }
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
    bed.del(&ctr, &config);
}

/// A result of some plugin that made another interface.
fn foreign_result(ctr: &Ctr) -> Value {
    json!({"cniVersion": "1.0.0",
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": ctr.path()}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}], "routes": [{"dst": "198.51.100.0/24"}], "dns": {}})
}

/// Either the result is amended, or nothing was done.
pub(crate) fn prev_result_is_kept(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-prev"));
    let outcome = bed.call("ADD", &ctr, &with(config.clone(), json!({"prevResult": foreign_result(&ctr)})));
    if outcome.status == Some(0) {
        let result = outcome.result();
        let names: Vec<_> =
            result["interfaces"].as_array().into_iter().flatten().map(|row| &row["name"]).collect();
        assert!(names.contains(&&json!("lo")) && names.contains(&&json!("eth0")), "{result}");
        assert!(ips_of(&result).contains(&IpAddr::from([127, 0, 0, 1])), "{result}");
    } else {
        assert!(!links_of(ctr.netns()).contains("eth0"), "{outcome:?}");
    }
    bed.del(&ctr, &config);
    // What comes after it finds its result whole.
    let chain = vec![config, json!({"cniVersion": "1.0.0", "name": "n-prev", "type": "tuning"})];
    let result = bed.add_list(&ctr, &chain).expect("a chain");
    assert_eq!(ips_of(&result), addresses(ctr.netns(), "eth0"));
    bed.del_list(&ctr, &chain, Some(&result));
}

pub(crate) fn prev_result_it_cannot_chain(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-chain"));
    let outcome = bed.call("ADD", &ctr, &with(config.clone(), json!({"prevResult": foreign_result(&ctr)})));
    if outcome.status == Some(0) {
        let result = outcome.result();
        assert!(
            ips_of(&result).contains(&IpAddr::from([127, 0, 0, 1])),
            "it could not, and said nothing: {result}"
        );
        bed.del(&ctr, &config);
    } else {
        assert!(outcome.refusal().text.contains("prevResult"), "{outcome:?}");
        assert!(!links_of(ctr.netns()).contains("eth0"));
    }
    let nonsense = bed.call("ADD", &ctr, &with(config, json!({"prevResult": "nonsense"})));
    assert!([2, 6, 7].contains(&nonsense.refusal().code), "{nonsense:?}");
}

pub(crate) fn failed_ipam_is_cleaned_up(bed: &Bed) {
    let ipam = FakeIpam::new();
    ipam.fails("ADD", 11, "the pool is dry");
    let (ctr, config) = (Ctr::new(), ipam.config(bed, "n-ipam"));
    let outcome = ipam.call(bed, "ADD", &ctr, &config);
    let told = outcome.refusal();
    assert!(told.text.contains("the pool is dry"), "{told:?}");
    assert_eq!(ipam.calls(), ["ADD", "DEL"], "{outcome:?}");
    assert!(!links_of(ctr.netns()).contains("eth0"));
    // It gave addresses, and then something else failed.
    let ipam = FakeIpam::new();
    let config = ipam.config(bed, "n-ipam");
    ctr.netns().ip(&["link", "add", "eth0", "type", "bridge"]);
    ipam.call(bed, "ADD", &ctr, &config).refusal();
    let calls = ipam.calls();
    let (adds, dels) =
        (calls.iter().filter(|v| *v == "ADD").count(), calls.iter().filter(|v| *v == "DEL").count());
    assert!(adds <= dels, "each ADD is taken back: {calls:?}");
}

pub(crate) fn failures_leave_nothing(plugin: Plugin) {
    // Six addresses are usable: seven failures that each kept one would show.
    let bed = match plugin {
        Plugin::Ours => Bed::with_flags(plugin, &["--pod-cidr", "10.244.1.0/29"]),
        Plugin::Oracle => Bed::new(plugin),
    };
    let (ctr, good) = (Ctr::new(), bed.config("n-fails"));
    let mut config = good.clone();
    if plugin == Plugin::Oracle {
        config["ipam"]["ranges"] = json!([[{"subnet": "10.127.0.0/29"}]]);
    }
    ctr.netns().ip(&["link", "add", "eth0", "type", "bridge"]);
    let before = bed.at_rest();
    for n in 0..7 {
        bed.call("ADD", &ctr, &config).refusal();
        assert_eq!(bed.everything(), before, "failure {n}");
    }
    let mut gone = Ctr::new();
    gone.lose_netns();
    bed.call("ADD", &gone, &config).refusal();
    assert_eq!(bed.everything(), before);
    bed.add(&Ctr::new(), &config);
}

pub(crate) fn at_once(bed: &Bed) {
    let config = bed.config("n-many");
    let ctrs: Vec<Ctr> = (0..12).map(|_| Ctr::new()).collect();
    let results: Vec<Value> = std::thread::scope(|scope| {
        let threads: Vec<_> = ctrs.iter().map(|ctr| scope.spawn(|| bed.add(ctr, &config))).collect();
        threads.into_iter().map(|thread| thread.join().expect("an ADD")).collect()
    });
    let mut seen = BTreeSet::new();
    for (ctr, result) in ctrs.iter().zip(&results) {
        assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(result));
        assert!(ips_of(result).into_iter().all(|ip| seen.insert(ip)), "an address twice: {results:?}");
    }
    std::thread::scope(|scope| ctrs.iter().for_each(|ctr| drop(scope.spawn(|| bed.del(ctr, &config)))));
    results.iter().for_each(|result| bed.assert_gone(result));
}

pub(crate) fn add_twice(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-twice"));
    let result = bed.add(&ctr, &config);
    bed.call("ADD", &ctr, &config).refusal();
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
    for ip in ips_of(&result) {
        talk(&bed.node.netns, ctr.netns(), ip);
    }
    if bed.plugin == Plugin::Ours {
        bed.call("CHECK", &ctr, &with(config.clone(), json!({"prevResult": result}))).silent();
    }
    // Nobody else is given its address either.
    let other = Ctr::new();
    let second = bed.add(&other, &config);
    assert!(ips_of(&second).iter().all(|ip| !ips_of(&result).contains(ip)), "{result} {second}");
    bed.del(&other, &config);
    bed.del(&ctr, &config);
    bed.assert_gone(&result);
}

pub(crate) fn result_is_true(bed: &Bed) {
    let dns = json!({"nameservers": ["192.0.2.53"], "domain": "example.org", "search": ["a.example.org"],
                     "options": ["ndots:2"]});
    let extra = json!({"cniVersion": bed.newest(), "dns": dns, "mtu": 1380});
    let (ctr, config) = (Ctr::new(), with(bed.config("n-true"), extra));
    let result = bed.add(&ctr, &config);
    assert_eq!(result["dns"], dns);
    let inner = link(ctr.netns(), "eth0").expect("the interface");
    assert_eq!(inner["mtu"], 1380);
    for row in result["interfaces"].as_array().expect("a list") {
        let inside = !row["sandbox"].as_str().unwrap_or_default().is_empty();
        let ns = if inside { ctr.netns() } else { &bed.node.netns };
        let real = link(ns, row["name"].as_str().expect("a name")).expect("the interface");
        assert_eq!(row["mac"], real["address"]);
        if !row["mtu"].is_null() {
            assert_eq!(row["mtu"], real["mtu"], "{row}");
        }
    }
    for row in result["routes"].as_array().into_iter().flatten() {
        let dst = row["dst"].as_str().expect("a destination");
        let family = if dst.contains(':') { "-6" } else { "-4" };
        let rows = ip_json(ctr.netns(), &[family, "route", "show", "exact", dst]);
        let real = rows.as_array().and_then(|rows| rows.first()).unwrap_or_else(|| panic!("no route {row}"));
        if let Some(gateway) = row["gw"].as_str() {
            assert_eq!(real["gateway"], gateway, "{row} {real}");
        }
    }
    bed.del(&ctr, &config);
}

pub(crate) fn del_twice(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-again"));
    let result = bed.add(&ctr, &config);
    for _ in 0..3 {
        bed.del(&ctr, &config);
    }
    bed.assert_gone(&result);
    assert!(!links_of(ctr.netns()).contains("eth0"));
}

pub(crate) fn del_without_namespace(bed: &Bed) {
    for empty in [true, false] {
        let (mut ctr, config) = (Ctr::new(), bed.config("n-gone"));
        let result = bed.add(&ctr, &config);
        // Kept alive, so that its links do not vanish by themselves: only the plugin can take them.
        let kept = NetNs::open(ctr.path()).expect("open the namespace");
        ctr.lose_netns();
        if empty {
            ctr.netns_path = Some("".into());
        }
        bed.del(&ctr, &config);
        bed.assert_gone(&result);
        ips_of(&result).into_iter().filter(IpAddr::is_ipv4).for_each(|ip| bed.assert_free("n-gone", ip));
        drop(kept);
    }
}

pub(crate) fn del_without_interface(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-noif"));
    let result = bed.add(&ctr, &config);
    ctr.netns().ip(&["link", "del", "eth0"]);
    bed.del(&ctr, &config);
    bed.assert_gone(&result);
}

pub(crate) fn del_without_prev_result(bed: &Bed) {
    for prev in [None, Some(json!({})), Some(Value::Null)] {
        let (ctr, config) = (Ctr::new(), bed.config("n-noprev"));
        let result = bed.add(&ctr, &config);
        let config = prev.map_or(config.clone(), |prev| with(config, json!({"prevResult": prev})));
        bed.del(&ctr, &config);
        bed.assert_gone(&result);
    }
}

pub(crate) fn del_without_add(bed: &Bed) {
    bed.del(&Ctr::new(), &bed.config("n-never"));
}

pub(crate) fn del_after_failed_add(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let (ctr, config) = (Ctr::new(), bed.config("n-failed"));
    let before = bed.at_rest();
    ctr.netns().ip(&["link", "add", "eth0", "type", "bridge"]);
    bed.call("ADD", &ctr, &config).refusal();
    bed.del(&ctr, &config);
    assert_eq!(bed.everything(), before);
}

pub(crate) fn del_spares_who_has_the_address_now(bed: &Bed) {
    let ip = bed.static_ip("n-heir", 38);
    let mapped = json!({"ips": [bed.with_prefix(ip)],
        "portMappings": [{"hostPort": 10038, "containerPort": 80, "protocol": "tcp"}]});
    let list = bed.list("n-heir", mapped);
    let (a, b) = (Ctr::new(), Ctr::new());
    let first = bed.add_list(&a, &list).expect("the first ADD");
    bed.del_list(&a, &list, Some(&first));
    let second = wait_for("the address for the second", || bed.add_list(&b, &list));
    assert!(ips_of(&first).contains(&ip) && ips_of(&second).contains(&ip), "{first} {second}");
    bed.del_list(&a, &list, Some(&first));
    assert!(has_route_to(&bed.node.netns, ip));
    talk(&bed.node.netns, b.netns(), ip);
    // portmap's CHECK fails on containers without IPv6.
    let check = bed.check_list(&b, &list[..1], &second);
    assert!(check.is_ok(), "{check:?}");
    crate::cni_extras::reaches_host_port(bed, &b, 10038, 80);
    bed.del_list(&b, &list, Some(&second));
}

pub(crate) fn del_while_the_daemon_is_down(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let (ctr, other, config) = (Ctr::new(), Ctr::new(), bed.config("n-down"));
    let (result, kept) = (bed.add(&ctr, &config), bed.add(&other, &config));
    bed.kill_agent();
    bed.del(&ctr, &config);
    bed.del(&Ctr::new(), &config);
    bed.start();
    bed.assert_gone(&result);
    assert_eq!(addresses(other.netns(), "eth0"), ips_of(&kept));
    bed.del(&other, &config);
}

pub(crate) fn rules_go_before_the_interface(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let mapped = json!({"portMappings": [{"hostPort": 10040, "containerPort": 80, "protocol": "tcp"}]});
    let (ctr, list) = (Ctr::new(), bed.list("n-order", mapped));
    let result = bed.add_list(&ctr, &list).expect("an ADD");
    let watch = crate::cni_fake::Watch::start(&bed.node.netns);
    bed.del_list(&ctr, &list, Some(&result));
    bed.assert_gone(&result);
    let events = watch.end();
    let rules = events.iter().position(|event| *event == "rules").expect("rules were removed");
    let interface = events.iter().position(|event| *event == "interface").expect("the interface was removed");
    assert!(rules < interface, "{events:?}");
}
