//! `sheave service`: what the kernel's maps hold, with or without a running agent.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::{Value, json};
use sheave_agent::dataplane::{self, ServiceRow};

use super::table::Table;
use crate::cli::{BaseFlags, Output};

pub(super) fn list(base: &BaseFlags, output: Output) -> Result<()> {
    let rows = dataplane::list(&super::paths(base)?.pin_dir)?;
    let mut out = std::io::stdout();
    match output {
        Output::Json => writeln!(out, "{}", rows.iter().map(as_json).collect::<Value>())?,
        Output::Table => {
            let mut table = Table::new(&["FRONTEND", "PROTOCOL", "KIND", "POLICY", "ID", "BACKENDS"]);
            for row in &rows {
                table.row([
                    SocketAddr::new(row.address, row.port).to_string(),
                    row.proto.name().to_owned(),
                    row.kind.to_owned(),
                    row.traffic_policy.to_owned(),
                    row.service_id.to_string(),
                    backends(row),
                ]);
            }
            table.print(&mut out)?;
        }
    }
    Ok(())
}

fn addresses(endpoints: &[(IpAddr, u16)]) -> Vec<String> {
    endpoints.iter().map(|(ip, port)| SocketAddr::new(*ip, *port).to_string()).collect()
}

fn backends(row: &ServiceRow) -> String {
    let mut text = match addresses(&row.ready) {
        ready if ready.is_empty() => "<none>".to_owned(),
        ready => ready.join(","),
    };
    if !row.terminating.is_empty() {
        text.push_str(&format!(" (terminating: {})", addresses(&row.terminating).join(",")));
    }
    if row.inconsistent {
        text.push_str(" (being changed)");
    }
    text
}

fn as_json(row: &ServiceRow) -> Value {
    json!({
        "address": row.address, "port": row.port, "protocol": row.proto.name(), "kind": row.kind,
        "trafficPolicy": row.traffic_policy, "id": row.service_id, "ready": addresses(&row.ready),
        "readyLocal": row.ready_local, "terminating": addresses(&row.terminating),
        "consistent": !row.inconsistent,
    })
}
