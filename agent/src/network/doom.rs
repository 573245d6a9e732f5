//! Removing links. Invariant: a link whose removal is reported is out of sight, with its peer, its addresses and its
//! routes; how many are removed at once is nobody's business but this room's.
//!
//! The kernel takes a link out of sight in well under a millisecond and then waits for grace periods, which takes
//! tens; a link that is removed by itself costs the same wait as a hundred that are removed together. So one thread
//! removes, all that have come up while it waited at once, and those that ask go on when the link is out of sight.

use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

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

/// Removes links of the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Doom {
    /// Absent until the first link is removed, so that a network nobody uses costs no thread.
    sender: Mutex<Option<Sender<Doomed>>>,
}

impl Doom {
    pub(super) fn new() -> Self {
        Doom { sender: Mutex::new(None) }
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
        thread::Builder::new().name("links-removed".to_owned()).spawn(move || remove_all(&work))?;
        new.send(doomed).map_err(|_| io::Error::other("the thread that removes links stopped"))?;
        *sender = Some(new);
        Ok(())
    }
}

/// What the thread does, as long as anybody may send.
fn remove_all(work: &Receiver<Doomed>) {
    while let Ok(first) = work.recv() {
        let mut batch = vec![first];
        batch.extend(work.try_iter().take(limits::LINKS_REMOVED_AT_ONCE_MAX - 1));
        if let Err(error) = remove(&batch) {
            // All together did not go; which one is in the way shows one by one.
            for doomed in &batch {
                if remove(std::slice::from_ref(doomed)).is_err() {
                    let error = io::Error::new(error.kind(), error.to_string());
                    // One that has seen its link go does not listen any more.
                    doomed.complain.try_send(error).unwrap_or_default();
                }
            }
        }
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
