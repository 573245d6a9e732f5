//! The door that the plugin `sheave-cni` knocks at. Invariant: only root is answered, a call is answered once and
//! whole, what waited in the spool is done before anything new, and an ADD that nobody waits for any more is undone.

mod calls;
mod translate;
mod verify;

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use sheave_cni::spool::{Spool, has_calls};
use sheave_cni::wire::{self, Reply, Request};
use sheave_cni::{Command, Error, code};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Network, NetworkError, Report, blocking};
use crate::limits;

/// Where runtimes' calls come in.
#[derive(Debug, Clone)]
pub struct CniSettings {
    /// The socket. Beside it lies a lock that tells agents apart.
    pub socket: PathBuf,
    /// Where DEL waits while no agent is there.
    pub spool: PathBuf,
}

impl CniSettings {
    /// The usual places below the agent's directories.
    pub fn below(run_dir: &Path, state_dir: &Path) -> Self {
        CniSettings { socket: run_dir.join("cni.sock"), spool: state_dir.join("network/spool") }
    }
}

/// The open door. Calls wait in its queue until [`Door::serve`].
#[derive(Debug)]
pub struct Door {
    network: Network,
    settings: CniSettings,
    listener: UnixListener,
    _lock: Flock<File>,
}

impl Door {
    /// Listens, then does what waits in the spool: a plugin that finds nobody listening writes before that, or sees
    /// us. Fails where another agent has the socket.
    pub async fn open(network: Network, settings: CniSettings) -> Result<Self, NetworkError> {
        let (place, again) = (settings.clone(), network.clone());
        let (listener, lock) = blocking(move || {
            let bound = bind(&place.socket)?;
            report("calls that waited", drain(&again, &place.spool));
            // Before anybody gets an address: one whose lease was lost may be in use.
            say(&again.inner.reconcile_attachments()?);
            Ok(bound)
        })
        .await?;
        let fail = |source| NetworkError::Io { op: "listen on", path: settings.socket.clone(), source };
        listener.set_nonblocking(true).map_err(fail)?;
        let listener = UnixListener::from_std(listener).map_err(fail)?;
        Ok(Door { network, settings, listener, _lock: lock })
    }

    /// Answers calls, and looks after what runtimes connected, until `shutdown`; calls under way are finished.
    pub async fn serve(self, shutdown: CancellationToken) {
        let slots = Arc::new(Semaphore::new(limits::CNI_CALLS_IN_FLIGHT_MAX));
        let mut look = tokio::time::interval(limits::secs(limits::CNI_RECONCILE_PERIOD_S));
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let stream = tokio::select! {
                () = shutdown.cancelled() => break,
                _ = look.tick() => {
                    tokio::spawn(look_after(self.network.clone(), self.settings.spool.clone()));
                    continue;
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "accepting a call of the plugin");
                        tokio::time::sleep(Duration::from_millis(limits::CNI_ACCEPT_PAUSE_MS)).await;
                        continue;
                    }
                },
            };
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
            let (network, spool) = (self.network.clone(), self.settings.spool.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = one(&network, &spool, stream) {
                    tracing::debug!(%error, "a call of the plugin was cut off");
                }
                drop(slot);
            });
        }
        // What is doomed would be found by the next agent, but need not wait for it.
        let network = self.network;
        let flushed = tokio::task::spawn_blocking(move || network.inner.doom.flush());
        if flushed.await.is_err() {
            tracing::warn!("links of disconnected containers are left to the next agent");
        }
    }
}

fn bind(socket: &Path) -> Result<(std::os::unix::net::UnixListener, Flock<File>), NetworkError> {
    let fail = |op, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| NetworkError::Io { op, path, source }
    };
    let lock_path = socket.with_extension("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&lock_path);
    let file = file.map_err(fail("open", &lock_path))?;
    let deadline = Instant::now() + Duration::from_millis(limits::RUNTIME_LOCK_TIMEOUT_MS);
    let lock = take(file, deadline).map_err(fail("lock (is another agent there?)", &lock_path))?;
    // Under another name until nobody else can open it.
    let new = socket.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail("remove", &new)(error)),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(&new).map_err(fail("listen on", &new))?;
    std::fs::set_permissions(&new, Permissions::from_mode(0o600)).map_err(fail("restrict", &new))?;
    std::fs::rename(&new, socket).map_err(fail("rename to", socket))?;
    Ok((listener, lock))
}

/// An agent that was just killed may not have let go yet.
fn take(mut file: File, deadline: Instant) -> io::Result<Flock<File>> {
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, errno)) if errno != nix::Error::EWOULDBLOCK || Instant::now() > deadline => {
                return Err(errno.into());
            }
            Err((back, _)) => file = back,
        }
        std::thread::sleep(Duration::from_millis(limits::CNI_ACCEPT_PAUSE_MS));
    }
}

async fn look_after(network: Network, spool: PathBuf) {
    let done = blocking(move || {
        report("calls that waited", drain(&network, &spool));
        network.inner.reconcile_attachments()
    })
    .await;
    match done {
        Ok(report) => say(&report),
        Err(error) => tracing::error!(error = super::in_full(&error), "reconciling what runtimes connected"),
    }
}

fn say(report: &Report) {
    for removed in &report.removed {
        tracing::info!(removed, "left over in the pod network");
    }
    for repaired in &report.repaired {
        tracing::warn!(repaired, "missing from the pod network");
    }
    for (key, why) in &report.broken {
        tracing::error!(key, why, "a container has no network");
    }
    for failed in &report.failed {
        tracing::error!(failed, "reconciling what runtimes connected");
    }
}

fn report(what: &str, done: io::Result<usize>) {
    match done {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "{what} in the spool were done"),
        Err(error) => tracing::warn!(%error, "{what} in the spool could not be looked at"),
    }
}

/// Does what waits in the spool.
fn drain(network: &Network, dir: &Path) -> io::Result<usize> {
    let deadline = Instant::now() + Duration::from_millis(limits::CNI_SPOOL_LOCK_TIMEOUT_MS);
    Spool::lock(dir, deadline)?.drain(|bytes| {
        let done = Request::decode(bytes).and_then(|request| match Command::parse(&request.command) {
            Some(Command::Del) => calls::answer(network, &request, None),
            _ => Err(Error::new(code::DECODE, format!("{:?} does not wait", request.command))),
        });
        match done {
            Ok(_) => true,
            // What can't be understood now can't be later.
            Err(error) if error.code != code::KERNEL && error.code != code::IO => {
                tracing::warn!(%error, "a call in the spool is dropped");
                true
            }
            Err(error) => {
                tracing::warn!(%error, "a call in the spool stays there");
                false
            }
        }
    })
}

/// One connection.
fn one(network: &Network, spool: &Path, stream: tokio::net::UnixStream) -> io::Result<()> {
    let stream: UnixStream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let deadline = Instant::now() + Duration::from_millis(limits::CNI_RECEIVE_TIMEOUT_MS);
    let send = |reply: &Reply| wire::send(&stream, &wire::encode_reply(reply), None, deadline_now());
    let uid = wire::peer_uid(&stream)?;
    if uid != 0 {
        let message = format!("user {uid} may not ask for connections: only root may");
        return send(&Err(Error::new(code::BAD_ENVIRONMENT, message)));
    }
    let (bytes, netns) = wire::receive(&stream, deadline)?;
    let request = match Request::decode(&bytes) {
        Ok(request) => request,
        Err(error) => return send(&Err(error)),
    };
    let begun = Instant::now();
    // A DEL of the same container may wait there: it was before, and must not come after.
    if request.command == "ADD" && has_calls(spool) {
        report("calls that waited", drain(network, spool));
    }
    let reply = calls::answer(network, &request, netns);
    let sent = send(&reply);
    let key = calls::key_of(&request);
    let micros = begun.elapsed().as_micros();
    match &reply {
        Ok(_) => tracing::debug!(command = request.command, key, micros, "call done"),
        Err(error) => tracing::info!(command = request.command, key, %error, "call refused"),
    }
    if let (Err(error), Ok(_), "ADD") = (&sent, &reply, request.command.as_str()) {
        tracing::warn!(key, %error, "nobody waits for this ADD any more: undone");
        if let Err(error) = network.inner.detach(&key) {
            tracing::warn!(key, error = super::in_full(&error), "undoing an ADD");
        }
    }
    sent
}

fn deadline_now() -> Instant {
    Instant::now() + Duration::from_millis(limits::CNI_RECEIVE_TIMEOUT_MS)
}
