//! Peers from a file that may change. Invariant: a file that can't be used changes nothing; it is said once.

use std::path::PathBuf;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::peers::{Peer, PeersFile};
use crate::limits;

/// What tells one version of a file from the next.
fn version(path: &PathBuf) -> Option<(SystemTime, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

/// Tells the other nodes that `path` names, now and whenever it changes, until `shutdown`.
pub(crate) async fn follow(
    path: PathBuf,
    own_name: String,
    told: watch::Sender<Option<Vec<Peer>>>,
    shutdown: CancellationToken,
) {
    let mut look = tokio::time::interval(limits::millis(limits::PEERS_FILE_LOOK_PERIOD_MS));
    let mut seen = None;
    loop {
        tokio::select! {
            _ = look.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let now = version(&path);
        if now.is_some() && now == seen {
            continue;
        }
        match PeersFile::read(&path) {
            Ok(file) => {
                let peers = Some(file.others(&own_name));
                told.send_if_modified(|held| {
                    let changed = *held != peers;
                    *held = peers;
                    changed
                });
            }
            Err(error) if seen != now || seen.is_some() => {
                tracing::warn!(error = &error as &dyn std::error::Error, "peers stay as they were");
            }
            Err(_) => {}
        }
        seen = now;
    }
}
