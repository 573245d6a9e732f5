//! `sheave raw`: one request to the API, its answer as it comes; for scripts on hosts that have no kubectl.

use std::io::Write;

use anyhow::{Context, Result};
use hyper::Request;
use hyper::header::CONTENT_TYPE;

use crate::cli::RawFlags;

pub(super) fn run(flags: &RawFlags) -> Result<()> {
    let kubeconfig = super::kubeconfig(&flags.base, flags.kubeconfig.as_deref())?;
    let method = flags.method.to_ascii_uppercase();
    let content_type = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let request = Request::builder()
        .method(method.as_str())
        .uri(&flags.path)
        .header(CONTENT_TYPE, content_type)
        .body(flags.data.clone().unwrap_or_default().into_bytes())
        .with_context(|| format!("{method} {}", flags.path))?;
    let answer = super::runtime()?.block_on(async {
        let client = super::apply::client(&kubeconfig).await?;
        client.request_text(request).await.with_context(|| format!("{method} {}", flags.path))
    })?;
    std::io::stdout().write_all(answer.as_bytes())?;
    Ok(())
}
