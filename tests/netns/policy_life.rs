//! A network policy from the API to a pod's link.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::json;
use sheave_harness::{require_root, wait_for};

use crate::policy_bed::Bed;

fn connects(bed: &Bed, from: usize, to: SocketAddr) -> bool {
    bed.pods[from].ns.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok())
}

#[test]
fn a_policy_isolates_and_its_end_frees() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(&[]);
    bed.add_namespace("x", json!({}));
    let a = bed.add_pod("x", "a", json!({"app": "a"}), json!([]));
    let b = bed.add_pod("x", "b", json!({"app": "b"}), json!([]));
    bed.wait_attached();
    let listeners: Vec<TcpListener> = bed.pods[b]
        .ips
        .iter()
        .map(|ip| bed.pods[b].ns.run(|| TcpListener::bind((*ip, 80)).expect("listen in a pod")))
        .collect();
    let [ip4, ip6] = bed.pods[b].ips.map(|ip| SocketAddr::new(ip, 80));
    let all = |wanted: bool| {
        wait_for(&format!("connections to be {wanted}"), || {
            let found = [connects(&bed, a, ip4), connects(&bed, a, ip6)];
            if found == [wanted; 2] { Ok(()) } else { Err(format!("{found:?}; {}", bed.log_tail())) }
        });
    };
    all(true);
    bed.put_policy("x", "deny", &json!({"podSelector": {"matchLabels": {"app": "b"}}}));
    all(false);
    bed.delete_policy("x", "deny");
    all(true);
    drop(listeners);
}
