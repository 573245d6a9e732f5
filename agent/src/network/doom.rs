//! Removing links. Invariant: a link that is doomed goes, with its peer, its addresses and its routes, and nobody takes
//! it for one that lives; how many go at once is nobody's business but this room's.
//!
//! Removing a link holds the kernel's lock for some milliseconds and then waits for grace periods, which takes tens;
//! a link that is removed by itself costs the same as a hundred that are removed together. So one thread removes, all
//! that have come up while it waited at once, and who asks may go on at once.

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;

use super::error::NetworkError;
use super::netlink::Connection;
use crate::limits;

/// Group that links are put into which are to be removed together. Nobody else uses it: the number is arbitrary.
const DOOMED_GROUP: u32 = 0x5348_5600;
/// First pause between two looks at whether a link is out of sight; doubles up to the longest.
const LOOK_PAUSE_US: u64 = 50;
/// The longest.
const LOOK_PAUSE_MAX_US: u64 = 2_000;

/// A link to be removed, and where to complain.
struct Doomed {
    index: u32,
    complain: SyncSender<io::Error>,
}

/// Links that are doomed and not gone yet.
#[derive(Debug, Default)]
struct Pending {
    links: Mutex<BTreeSet<u32>>,
    /// Signalled when some are gone.
    gone: Condvar,
}

impl Pending {
    /// A poisoned lock is taken over: each change of the set is a single call.
    fn links(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes links of the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Doom {
    /// Absent until the first link is removed, so that a network nobody uses costs no thread.
    sender: Mutex<Option<Sender<Doomed>>>,
    pending: Arc<Pending>,
}

impl Doom {
    pub(super) fn new() -> Self {
        Doom { sender: Mutex::new(None), pending: Arc::default() }
    }

    /// Has a link removed without waiting for it; false where there is none. The name is free for another link when
    /// this one is gone. Looks by a way that needs no lock which removing holds.
    pub(super) fn enqueue(&self, name: &str) -> Result<bool, NetworkError> {
        let fail = |source| NetworkError::Netlink { op: format!("remove link {name}"), source };
        let index = match if_nametoindex(name) {
            Ok(index) => index,
            Err(nix::Error::ENODEV) => return Ok(false),
            Err(errno) => return Err(fail(errno.into())),
        };
        if self.pending.links().insert(index) {
            // Nobody listens: what fails is logged.
            let (complain, _) = sync_channel(1);
            self.send(Doomed { index, complain }).map_err(fail)?;
        }
        Ok(true)
    }

    /// Indexes of links that are about to go.
    pub(super) fn pending(&self) -> BTreeSet<u32> {
        self.pending.links().clone()
    }

    /// Waits until the links that are doomed now are gone; false where there were none.
    pub(super) fn flush(&self) -> bool {
        let before = self.pending.links().clone();
        let deadline = Instant::now() + Duration::from_millis(limits::LINK_REMOVE_TIMEOUT_MS);
        let mut now = self.pending.links();
        while !now.is_disjoint(&before) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            now =
                self.pending.gone.wait_timeout(now, left).map_or_else(|e| e.into_inner().0, |woken| woken.0);
        }
        !before.is_empty()
    }

    /// Removes a link; false where there was none. Call it in the namespace that the link is in.
    pub(super) fn remove(&self, name: &str) -> Result<bool, NetworkError> {
        let fail = |source| NetworkError::Netlink { op: format!("remove link {name}"), source };
        let mut connection = Connection::open().map_err(fail)?;
        let Some(link) = connection.link(name).map_err(fail)? else { return Ok(false) };
        let (complain, complaints) = sync_channel(1);
        self.send(Doomed { index: link.index, complain }).map_err(fail)?;
        let deadline = Instant::now() + Duration::from_millis(limits::LINK_REMOVE_TIMEOUT_MS);
        let mut pause = LOOK_PAUSE_US;
        loop {
            // Another link of that name is somebody's new one.
            if connection.link(name).map_err(fail)?.is_none_or(|now| now.index != link.index) {
                return Ok(true);
            }
            match complaints.try_recv() {
                Ok(error) => return Err(fail(error)),
                Err(TryRecvError::Empty) if Instant::now() < deadline => {}
                Err(_) => return Err(fail(io::ErrorKind::TimedOut.into())),
            }
            thread::sleep(Duration::from_micros(pause));
            pause = (pause * 2).min(LOOK_PAUSE_MAX_US);
        }
    }

    fn send(&self, mut doomed: Doomed) -> io::Result<()> {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = sender.as_ref() {
            match known.send(doomed) {
                Ok(()) => return Ok(()),
                // The thread ended, which only a panic makes it: the next one may fare better.
                Err(back) => doomed = back.0,
            }
        }
        let (new, work) = channel();
        let pending = Arc::clone(&self.pending);
        thread::Builder::new().name("links-removed".to_owned()).spawn(move || remove_all(&work, &pending))?;
        new.send(doomed).map_err(|_| io::Error::other("the thread that removes links stopped"))?;
        *sender = Some(new);
        Ok(())
    }
}

/// What the thread does, as long as anybody may send.
fn remove_all(work: &Receiver<Doomed>, pending: &Pending) {
    while let Ok(first) = work.recv() {
        let mut batch = vec![first];
        batch.extend(work.try_iter().take(limits::LINKS_REMOVED_AT_ONCE_MAX - 1));
        if let Err(error) = remove(&batch) {
            // All together did not go; which one is in the way shows one by one.
            for doomed in &batch {
                if remove(std::slice::from_ref(doomed)).is_err() {
                    tracing::warn!(index = doomed.index, %error, "a link stays for now");
                    let error = io::Error::new(error.kind(), error.to_string());
                    // One that has seen its link go does not listen any more.
                    doomed.complain.try_send(error).unwrap_or_default();
                }
            }
        }
        let mut links = pending.links();
        batch.iter().for_each(|doomed| {
            links.remove(&doomed.index);
        });
        drop(links);
        pending.gone.notify_all();
    }
}

fn remove(batch: &[Doomed]) -> io::Result<()> {
    let mut connection = Connection::open()?;
    if let [one] = batch {
        return connection.delete_link_at(one.index).map(drop);
    }
    let mut any = false;
    for doomed in batch {
        any |= connection.set_group(doomed.index, DOOMED_GROUP)?;
    }
    if any { connection.delete_group(DOOMED_GROUP) } else { Ok(()) }
}
