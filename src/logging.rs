//! Logging: structured, to standard error, one line an event, so that standard output stays for what was asked.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::cli::{LogFlags, LogFormat};

/// Starts logging for the daemons; `--log-level` takes the filter syntax of tracing (`info`, `sheave_agent=debug`).
pub(crate) fn start(flags: &LogFlags) -> Result<()> {
    let level = flags.log_level.as_deref().unwrap_or("info,kube_client=warn,kube_runtime=warn,tower=warn");
    let filter = EnvFilter::try_new(level).with_context(|| format!("--log-level {level:?}"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match flags.log_format.unwrap_or(LogFormat::Text) {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
