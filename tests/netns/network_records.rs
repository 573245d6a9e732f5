//! What the agent keeps of what runtimes connected: damaged records come back from the kernel, and interfaces beside
//! each other do not get into each other's way.

use std::net::IpAddr;

use serde_json::{Value, json};
use sheave_harness::{require_root, wait_for};

use crate::cni_bed::{Bed, Ctr, Plugin, addresses, ips_of, with};
use crate::cni_extras::reaches_host_port;
use crate::network_pods::talk;

/// The files of the leases, by what is in them.
fn records(bed: &Bed) -> Vec<(std::path::PathBuf, String)> {
    let dir = std::fs::read_dir(bed.network_dir().join("leases")).expect("list the leases");
    let paths = dir.map(|entry| entry.expect("an entry").path());
    paths.map(|path| (path.clone(), std::fs::read_to_string(path).expect("read a lease"))).collect()
}

#[test]
fn damaged_records_come_back_from_the_kernel() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(Plugin::Ours);
    let ports = json!({"portMappings": [{"hostPort": 10088, "containerPort": 80, "protocol": "tcp"}]});
    let (list, plain) = (bed.list("n-kept", ports), bed.config("n-kept"));
    let (mapped, cut, whole) = (Ctr::new(), Ctr::new(), Ctr::new());
    let first = bed.add_list(&mapped, &list).expect("an ADD with a host port");
    let second = bed.add(&cut, &plain);
    let third = bed.add(&whole, &plain);
    bed.kill_agent();
    for (path, text) in records(&bed) {
        if text.contains(&mapped.id) {
            std::fs::write(&path, &text[..text.len() / 2]).expect("cut a lease off");
        } else if text.contains(&cut.id) {
            std::fs::write(&path, [0xff_u8; 64]).expect("overwrite a lease");
        }
    }
    bed.start();
    let log = bed.log();
    for said in ["not readable", "from the kernel"] {
        assert!(log.contains(said), "{said:?} is not in the log:\n{log}");
    }
    let old: Vec<IpAddr> = [&first, &second, &third].into_iter().flat_map(ips_of).collect();
    let new = Ctr::new();
    let fourth = bed.add(&new, &plain);
    assert!(ips_of(&fourth).iter().all(|ip| !old.contains(ip)), "{fourth} after {old:?}");
    // They are as good as before: looked after, kept apart, and taken away whole.
    bed.check_list(&mapped, &list, &first).expect("CHECK");
    bed.check_list(&cut, std::slice::from_ref(&plain), &second).expect("CHECK");
    reaches_host_port(&bed, &mapped, 10088, 80);
    assert_eq!(bed.call("ADD", &cut, &plain).status, Some(1), "it is connected already");
    bed.del_list(&mapped, &list, Some(&first));
    for (ctr, result) in [(&cut, &second), (&whole, &third), (&new, &fourth)] {
        bed.del(ctr, &plain);
        bed.assert_gone(result);
    }
    bed.assert_gone(&first);
    assert!(records(&bed).is_empty(), "{:?}", records(&bed));
}

#[test]
fn interfaces_beside_each_other_answer_by_their_own_way() {
    if !require_root() {
        return;
    }
    let bed = Bed::shared(Plugin::Ours);
    let mut ctr = Ctr::new();
    let first = bed.add(&ctr, &bed.config("n-first"));
    ctr.ifname = "net1".to_owned();
    let config = with(bed.config("n-second"), json!({"cniVersion": "1.1.0"}));
    let second = bed.add(&ctr, &config);
    let tables: Vec<&Value> =
        second["routes"].as_array().expect("routes").iter().map(|route| &route["table"]).collect();
    assert!(!tables.is_empty() && tables.iter().all(|table| table.is_u64()), "{second}");
    for ip in ips_of(&first).into_iter().chain(ips_of(&second)) {
        talk(&bed.node.netns, ctr.netns(), ip);
    }
    bed.del(&ctr, &config);
    wait_for("the rules of the second to be gone", || {
        let rules = ctr.netns().ip(&["rule", "show"]);
        if rules.lines().count() == 3 { Ok(()) } else { Err(rules) }
    });
    ctr.ifname = "eth0".to_owned();
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&first));
    talk(ctr.netns(), &bed.node.netns, "192.0.2.10".parse().expect("an address"));
    bed.del(&ctr, &bed.config("n-first"));
    bed.assert_gone(&first);
}
