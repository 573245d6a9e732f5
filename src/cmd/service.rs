//! `sheave service list` and `get`: what the kernel's maps hold, with or without a running agent.

use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sheave_agent::dataplane::ebpf::RowBackend;
use sheave_agent::dataplane::{self, Lookup, ServiceRow};
use sheave_agent::service::{FrontendKey, Proto};

use super::names;
use super::table::Table;
use crate::cli::{AgentFlags, BaseFlags, NetworkFlags, Output, ServiceFlags, ServiceGetFlags};
use crate::config::File;

pub(super) fn list(base: &BaseFlags, output: Output) -> Result<()> {
    let paths = super::paths(base)?;
    super::needs_ebpf(&paths)?;
    let rows = dataplane::list(&paths.pin_dir)?;
    let known = known(base);
    let name = |row: &ServiceRow| {
        known.get(&FrontendKey { addr: row.address, port: row.port, proto: row.proto }).map(String::as_str)
    };
    let mut out = std::io::stdout();
    match output {
        Output::Json => {
            let named = rows.iter().map(|row| {
                let mut object = as_json(row);
                object["service"] = json!(name(row));
                object
            });
            writeln!(out, "{}", named.collect::<Value>())?;
        }
        Output::Table => {
            let mut table =
                Table::new(&["SERVICE", "FRONTEND", "PROTOCOL", "KIND", "POLICY", "ID", "BACKENDS"]);
            for row in &rows {
                table.row([
                    name(row).unwrap_or("-").to_owned(),
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

/// Names of services, where the API server tells them: the kernel's maps have numbers only.
fn known(base: &BaseFlags) -> HashMap<FrontendKey, String> {
    let asked = super::kubeconfig(base, None).and_then(|path| super::runtime()?.block_on(names::all(&path)));
    asked.unwrap_or_default()
}

pub(super) fn get(flags: &ServiceGetFlags) -> Result<()> {
    let paths = super::paths(&flags.base)?;
    super::needs_ebpf(&paths)?;
    let (keys, refusals) = asked(flags)?;
    let maps = Lookup::open(&paths.pin_dir)?;
    let mut rows = Vec::new();
    let mut missing = Vec::new();
    for key in &keys {
        match maps.frontend(key)? {
            Some(row) => rows.push(row),
            None => missing.push(key),
        }
    }
    let mut out = std::io::stdout();
    if flags.output == Output::Json {
        let missing: Vec<String> = missing.iter().map(|key| named(key)).collect();
        let found: Value = rows.iter().map(as_json).collect();
        writeln!(out, "{}", json!({"frontends": found, "missing": missing, "refused": refusals}))?;
    } else {
        for row in &rows {
            describe(&mut out, row)?;
        }
        // An address that was asked for without a protocol need not be there for all of them.
        if flags.what.contains('/') {
            for key in &missing {
                writeln!(out, "{}   not in the kernel's maps", named(key))?;
            }
        }
        match &refusals {
            Some(reasons) if !reasons.is_empty() => {
                writeln!(out, "not wholly balanced:")?;
                for reason in reasons {
                    writeln!(out, "    {reason}")?;
                }
            }
            _ => {}
        }
    }
    if rows.is_empty() {
        bail!("the kernel's maps have no frontend of {}", flags.what);
    }
    Ok(())
}

fn named(key: &FrontendKey) -> String {
    format!("{} {}", SocketAddr::new(key.addr, key.port), key.proto.name())
}

/// The frontends that are asked for and, for a service, why it is not wholly balanced (`None` where nobody can tell).
fn asked(flags: &ServiceGetFlags) -> Result<(Vec<FrontendKey>, Option<Vec<String>>)> {
    if let Ok(at) = flags.what.parse::<SocketAddr>() {
        let all = [Proto::Tcp, Proto::Udp, Proto::Sctp];
        return Ok((all.map(|proto| FrontendKey { addr: at.ip(), port: at.port(), proto }).into(), None));
    }
    let Some((namespace, name)) = flags.what.split_once('/').filter(|(a, b)| !a.is_empty() && !b.is_empty())
    else {
        bail!("{:?} is neither NAMESPACE/NAME nor ADDR:PORT, as in default/web or 10.96.0.10:80", flags.what);
    };
    let kubeconfig = super::kubeconfig(&flags.base, flags.kubeconfig.as_deref())?;
    let found = super::runtime()?.block_on(names::service(&kubeconfig, namespace, name));
    let found = found.context("the API knows a service's addresses; without it ask for ADDR:PORT")?;
    let keys = names::frontends(&found);
    if keys.is_empty() {
        bail!("service {} has no address to balance (headless, or ExternalName)", flags.what);
    }
    Ok((keys, refusals(&flags.base, &flags.what)))
}

fn refusals(base: &BaseFlags, service: &str) -> Option<Vec<String>> {
    let file = File::read(base.config.as_deref()).ok()?;
    let agent = super::agent::config(
        &file,
        base,
        &AgentFlags::default(),
        &NetworkFlags::default(),
        &ServiceFlags::default(),
    )
    .ok()?;
    let told = names::of_agent(agent.health_listen, "/services").ok()?;
    let reasons = told["refused"].get(service).and_then(Value::as_array).cloned().unwrap_or_default();
    Some(reasons.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// All that is known of a frontend, one fact a line.
fn describe(out: &mut impl Write, row: &ServiceRow) -> Result<()> {
    let at = SocketAddr::new(row.address, row.port);
    writeln!(out, "{at} {}   {}, service id {}", row.proto.name(), row.kind, row.service_id)?;
    for (name, text) in facts(row) {
        writeln!(out, "    {name:<16} {text}")?;
    }
    let mut name = "backends";
    if row.backends.is_empty() {
        writeln!(out, "    {name:<16} none: {}", nobody(row))?;
    }
    for backend in &row.backends {
        writeln!(out, "    {name:<16} {}", described(backend, row))?;
        name = "";
    }
    Ok(())
}

fn facts(row: &ServiceRow) -> Vec<(&'static str, String)> {
    let policy = match (row.kind, row.internal_local, row.external_local) {
        ("ClusterIP", true, _) => "Local (internalTrafficPolicy)",
        (_, _, true) => {
            "Local for what arrives from outside (externalTrafficPolicy), Cluster for what starts here"
        }
        _ => "Cluster",
    };
    let affinity = match row.affinity_timeout_s {
        0 => "none".to_owned(),
        seconds => format!("ClientIP, {seconds} s after the last new connection"),
    };
    let mut facts = vec![("traffic policy", policy.to_owned()), ("affinity", affinity)];
    if row.has_source_ranges {
        let ranges: Vec<String> = row.source_ranges.iter().map(ToString::to_string).collect();
        facts.push(("source ranges", format!("{} (for what arrives from outside)", ranges.join(", "))));
    }
    let pick = match row.maglev {
        0 => "at random".to_owned(),
        table => format!("Maglev table {table} for what arrives from outside, at random for sockets"),
    };
    facts.push(("picks", pick));
    if row.dsr {
        facts.push(("forwarding", "backends on other nodes answer the client themselves (DSR)".to_owned()));
    }
    if row.inconsistent {
        facts.push(("being changed", "slots and frontend don't fit together now; ask again".to_owned()));
    }
    facts
}

fn nobody(row: &ServiceRow) -> &'static str {
    match row.kind {
        "ClusterIP" => "connects are refused",
        _ => "connects are refused, packets from outside are answered with a refusal",
    }
}

fn described(backend: &RowBackend, row: &ServiceRow) -> String {
    let at = SocketAddr::new(backend.address, backend.port).to_string();
    let place = if backend.local { "on this node" } else { "on another node" };
    let mut text = format!("{at:<24} ");
    let any_ready = row.backends.iter().any(|other| other.ready);
    text.push_str(match (backend.ready, any_ready) {
        (true, _) => "ready",
        (false, true) => "terminating, not used while others are ready",
        (false, false) => "terminating, used as none is ready",
    });
    text.push_str(&format!(", {place}"));
    if backend.local_only {
        text.push_str(", left to other clients by topology hints");
    }
    if backend.weight > 1 {
        text.push_str(&format!(", weight {}", backend.weight));
    }
    text
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

pub(super) fn as_json(row: &ServiceRow) -> Value {
    let backend = |at: &RowBackend| {
        json!({
            "address": SocketAddr::new(at.address, at.port).to_string(), "local": at.local, "ready": at.ready,
            "hintedElsewhere": at.local_only, "weight": at.weight,
        })
    };
    json!({
        "address": row.address, "port": row.port, "protocol": row.proto.name(), "kind": row.kind,
        "trafficPolicy": row.traffic_policy, "id": row.service_id, "ready": addresses(&row.ready),
        "readyLocal": row.ready_local, "terminating": addresses(&row.terminating),
        "consistent": !row.inconsistent, "internalLocal": row.internal_local,
        "externalLocal": row.external_local, "affinitySeconds": row.affinity_timeout_s,
        "sourceRanges": row.has_source_ranges.then_some(&row.source_ranges), "maglev": row.maglev,
        "dsr": row.dsr, "backends": row.backends.iter().map(backend).collect::<Value>(),
    })
}
