//! Whatever happens to links and tables of a node, what its pods had is back, and connections live.

use std::net::IpAddr;

use sheave_harness::{require_root, wait_for};

use sheave_harness::overlay::{Bed, Host, Ips, Pod, Stream, all_pairs, wait_talk};

fn tables(host: &Host) -> String {
    let mut text = String::new();
    for rows in [
        host.netns.ip(&["-4", "route", "show"]),
        host.netns.ip(&["-6", "route", "show", "table", "main"]),
        host.netns.ip(&["neigh", "show", "nud", "permanent", "dev", "sheave-vx4"]),
        sheave_harness::netns::checked(host.netns.command("bridge").args([
            "fdb",
            "show",
            "dev",
            "sheave-vx4",
        ])),
        host.netns.ip(&["-o", "addr", "show", "dev", "sheave-vx4", "scope", "global"]),
    ] {
        // Indexes and lifetimes change with a device that is made anew.
        let mut rows: Vec<&str> = rows
            .lines()
            .filter(|row| row.contains("10.244.") || row.contains("fd00:244:") || row.contains("dst"))
            // What the kernel makes beside an address goes and comes with it, or not.
            .filter(|row| !row.contains("shv") && !row.contains("proto kernel"))
            .map(|row| row.split(": ").last().unwrap_or(row).trim())
            .collect();
        rows.sort_unstable();
        text.push_str(&rows.join("\n"));
        text.push('\n');
    }
    text
}

#[test]
fn what_is_removed_by_hand_is_back_and_connections_live() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    bed.control();
    let mut hosts: Vec<Host> = (0..2).map(|_| bed.join(Ips::Both, &["--overlay", "vxlan"])).collect();
    hosts.iter().for_each(|host| host.wait_ways(2));
    let pods: Vec<Pod> = hosts.iter().map(Host::pod).collect();
    all_pairs(&[&pods[0], &pods[1]]);
    let mut streams = [Stream::open(&pods[0], &pods[1], 0), Stream::open(&pods[0], &pods[1], 1)];
    let before = tables(&hosts[0]);
    let damage: [&[&str]; 9] = [
        &["link", "del", "sheave-vx4"],
        &["link", "set", "sheave-vx4", "down"],
        &["route", "flush", "dev", "sheave-vx4"],
        &["-6", "route", "flush", "dev", "sheave-vx4"],
        &["neigh", "flush", "dev", "sheave-vx4", "nud", "permanent"],
        &["addr", "flush", "dev", "sheave-vx4"],
        &["link", "set", "sheave-vx4", "mtu", "1300"],
        &["link", "set", "eth0", "down"],
        &["route", "del", "unreachable", "10.244.0.0/24"],
    ];
    for command in damage {
        hosts[0].netns.ip(command);
        if command.contains(&"eth0") {
            hosts[0].netns.ip(&["link", "set", "eth0", "up"]);
        }
        healed(&hosts[0], &before, &format!("{command:?}"));
        streams.iter_mut().for_each(Stream::beat);
    }
    let flush = || {
        let fdb = sheave_harness::netns::checked(hosts[0].netns.command("bridge").args([
            "fdb",
            "show",
            "dev",
            "sheave-vx4",
        ]));
        let mac = fdb.split_whitespace().next().expect("an entry").to_owned();
        let args = ["fdb", "del", &mac, "dev", "sheave-vx4", "dst", &hosts[1].ip4, "self"];
        sheave_harness::netns::checked(hosts[0].netns.command("bridge").args(args));
    };
    flush();
    healed(&hosts[0], &before, "forwarding entry");
    sheave_harness::netns::checked(hosts[0].netns.command("nft").args(["flush", "ruleset"]));
    let outside: IpAddr = hosts[1].ip4.parse().expect("an address");
    hosts[0].netns.ip(&["link", "set", "sheave-vx4", "down"]);
    wait_for("masquerading to be back", || {
        let seen = wait_talk(&pods[0].netns, &hosts[1].netns, outside).to_string();
        if seen == hosts[0].ip4 { Ok(()) } else { Err(seen) }
    });
    healed(&hosts[0], &before, "nftables");

    // The agent dies while something is missing, and again while all is well: nobody notices.
    for _ in 0..3 {
        hosts[0].kill9();
        streams.iter_mut().for_each(Stream::beat);
        hosts[0].netns.ip(&["route", "flush", "dev", "sheave-vx4"]);
        hosts[0].start();
        healed(&hosts[0], &before, "a new agent");
        streams.iter_mut().for_each(Stream::beat);
    }
    hosts[0].wait_serving();
    all_pairs(&[&pods[0], &pods[1]]);
}

#[track_caller]
fn healed(host: &Host, before: &str, what: &str) {
    wait_for(&format!("{} to be whole again after {what}", host.name), || {
        if !host.netns.ip(&["-o", "link"]).contains("sheave-vx4") {
            return Err(format!("no device\n{}", host.log()));
        }
        let link = host.netns.ip(&["-o", "link", "show", "sheave-vx4"]);
        let now = tables(host);
        let whole = now == before && link.contains(",UP") && link.contains("mtu 1450 ");
        if whole { Ok(()) } else { Err(format!("{link}\n{now}\nnot\n{before}\n{}", host.log())) }
    });
}
