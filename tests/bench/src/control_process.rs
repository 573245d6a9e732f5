//! The control plane alone as a child process, on a loopback port of its own choosing.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};

/// A running `sheave control`, killed when dropped.
pub(crate) struct ControlPlane {
    child: Child,
    state_dir: PathBuf,
}

impl ControlPlane {
    /// Starts it with its state under `state_dir` and waits until it answers.
    pub(crate) async fn start(state_dir: &Path, listen: &str) -> Result<Self> {
        let kubeconfig = state_dir.join("admin.kubeconfig");
        if kubeconfig.exists() {
            std::fs::remove_file(&kubeconfig)?;
        }
        let log = std::fs::File::create(state_dir.join("control.log"))?;
        let child = Command::new(crate::sheave()?)
            .args(["control", "--listen", listen, "--state-dir"])
            .arg(state_dir)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting sheave control")?;
        let mut control = Self { child, state_dir: state_dir.to_owned() };
        control.wait_ready().await?;
        Ok(control)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        for _ in 0..400 {
            if let Some(status) = self.child.try_wait()? {
                let log = std::fs::read_to_string(self.state_dir.join("control.log")).unwrap_or_default();
                bail!("sheave control ended with {status}:\n{log}");
            }
            if let Ok(client) = self.client().await
                && client.apiserver_version().await.is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        bail!("sheave control did not answer within 10 s");
    }

    /// A client with connections of its own.
    pub(crate) async fn client(&self) -> Result<kube::Client> {
        client(&self.state_dir.join("admin.kubeconfig")).await
    }

    /// SIGKILL, and the wait for its end.
    pub(crate) fn kill9(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A client for the API server that `kubeconfig` names.
pub(crate) async fn client(kubeconfig: &Path) -> Result<kube::Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}
