//! `sheave service trace`: which backend a packet would get, and why. Nothing is sent; the kernel's maps are read.

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sheave_agent::dataplane::Mode;
use sheave_agent::dataplane::ebpf::{Candidate, Origin, Question, Trace, trace};
use sheave_agent::service::Proto;

use crate::cli::{AgentFlags, NetworkFlags, Output, ServiceFlags, ServiceTraceFlags};
use crate::config::File;

pub(super) fn run(flags: &ServiceTraceFlags) -> Result<()> {
    let paths = super::paths(&flags.base)?;
    let mut out = std::io::stdout();
    if let Some(active) = super::active(&paths)?
        && active.mode != Mode::Ebpf
    {
        let why = format!(
            "services are balanced by {} on this node ({}): which backend it gives is decided in the kernel, where this \
             command can't look; {}",
            active.mode.name(),
            active.why,
            super::elsewhere(active.mode)
        );
        match flags.output {
            Output::Json => {
                writeln!(out, "{}", json!({"mode": active.mode.name(), "outcome": "unknown", "why": why}))?;
            }
            Output::Table => writeln!(out, "unknown: {why}")?,
        }
        return Ok(());
    }
    let found = trace(&paths.pin_dir, &question(flags)?)?;
    match flags.output {
        Output::Json => writeln!(out, "{}", as_json(&found))?,
        Output::Table => print(&mut out, &found)?,
    }
    Ok(())
}

fn question(flags: &ServiceTraceFlags) -> Result<Question> {
    let origin = match (flags.from_node, flags.from_pod, flags.from_outside) {
        (true, ..) => Some(Origin::Node),
        (_, true, _) => Some(Origin::Pod),
        (.., true) => Some(Origin::Outside),
        _ => None,
    };
    let proto = Proto::from_name(&flags.proto.to_uppercase())
        .with_context(|| format!("--proto {:?}: there are tcp, udp and sctp", flags.proto))?;
    let pod_cidrs = if flags.pod_cidr.is_empty() {
        let file = File::read(flags.base.config.as_deref())?;
        let given = AgentFlags { node_name: Some("any".to_owned()), ..AgentFlags::default() };
        super::agent::config(&file, &flags.base, &given, &NetworkFlags::default(), &ServiceFlags::default())?
            .pod_cidrs
    } else {
        flags.pod_cidr.clone()
    };
    Ok(Question { from: flags.from, origin, to: flags.to, proto, pod_cidrs })
}

fn print(out: &mut impl Write, found: &Trace) -> Result<()> {
    for step in &found.steps {
        writeln!(out, "{:<14} {}", step.of, step.said)?;
    }
    writeln!(out, "{:<14} {}", "outcome", found.outcome.name())?;
    for at in &found.candidates {
        writeln!(out, "    {}", candidate(at))?;
    }
    Ok(())
}

fn candidate(at: &Candidate) -> String {
    let place = if at.local { "this node" } else { "another node" };
    let state = if at.ready { "ready" } else { "terminating" };
    let source = match (at.masqueraded, at.direct) {
        (true, _) => "sees the node's address",
        (_, true) => "sees the sender's address and answers it directly",
        _ => "sees the sender's address",
    };
    format!("{:>5.1} %  {:<24} {state}, {place}, {source}", at.share * 100.0, at.address.to_string())
}

fn as_json(found: &Trace) -> Value {
    let step = |step: &sheave_agent::dataplane::ebpf::Step| json!({"of": step.of, "said": step.said});
    let candidate = |at: &Candidate| {
        json!({
            "address": at.address.to_string(), "share": at.share, "local": at.local, "ready": at.ready,
            "masqueraded": at.masqueraded,
            "direct": at.direct,
        })
    };
    json!({
        "mode": "ebpf",
        "outcome": found.outcome.name(),
        "steps": found.steps.iter().map(step).collect::<Value>(),
        "candidates": found.candidates.iter().map(candidate).collect::<Value>(),
        "frontend": found.frontend.as_ref().map(super::service::as_json),
    })
}
