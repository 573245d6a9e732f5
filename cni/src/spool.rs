//! Where disconnecting waits for an agent that is away. Invariant: a call that is in the spool is whole, on disk, and
//! handled before the agent that finds it connects anything new: the writer looks for the agent once more under the
//! lock that the agent empties the spool under.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};

/// Calls that wait at most; beyond them the runtime is told to come again.
const CALLS_MAX: usize = 4096;
/// Pause between two tries of a lock that is held.
const LOCK_PAUSE_MS: u64 = 5;

/// True where calls wait, as far as can be seen without the lock: a call that its writer is done with is seen.
pub fn has_calls(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut all| all.any(|entry| entry.is_ok_and(|entry| is_call(&entry.path()))))
}

fn is_call(path: &Path) -> bool {
    path.extension().is_some_and(|ext| ext == "json")
}

/// The spool, locked.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Spool {
    /// Makes the directory where it is missing, and waits for the lock until `deadline`.
    pub fn lock(dir: &Path, deadline: Instant) -> io::Result<Spool> {
        fs::create_dir_all(dir)?;
        let mut file = File::options().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Spool { dir: dir.to_owned(), _lock: lock }),
                Err((_, errno)) if errno != nix::Error::EWOULDBLOCK => return Err(errno.into()),
                Err((_, _)) if Instant::now() >= deadline => return Err(ErrorKind::TimedOut.into()),
                Err((back, _)) => file = back,
            }
            std::thread::sleep(Duration::from_millis(LOCK_PAUSE_MS));
        }
    }

    /// Names of waiting calls, the oldest first.
    fn names(&self) -> io::Result<Vec<PathBuf>> {
        let all = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.path()));
        let mut names: Vec<PathBuf> = all.collect::<io::Result<_>>()?;
        names.retain(|path| is_call(path));
        names.sort();
        Ok(names)
    }

    /// Adds a call; it is on disk when this returns.
    pub fn push(&self, call: &[u8]) -> io::Result<()> {
        if self.names()?.len() >= CALLS_MAX {
            return Err(io::Error::other(format!("{CALLS_MAX} calls wait for the agent already")));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("{:020}-{}", now.as_nanos(), std::process::id());
        let (new, path) = (self.dir.join(format!("{name}.new")), self.dir.join(format!("{name}.json")));
        let mut file = File::options().create_new(true).write(true).open(&new)?;
        file.write_all(call)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Hands every call to `handle` and removes those that it is done with; what a writer that was killed left
    /// half-written goes too. Returns how many were done.
    pub fn drain(&self, mut handle: impl FnMut(&[u8]) -> bool) -> io::Result<usize> {
        let mut done = 0;
        for path in self.names()? {
            if handle(&fs::read(&path)?) {
                fs::remove_file(&path)?;
                done += 1;
            }
        }
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ext| ext == "new") {
                fs::remove_file(&path)?;
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn calls_wait_in_order_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/spool");
        let spool = Spool::lock(&dir, soon()).unwrap();
        assert!(!has_calls(&dir));
        spool.push(b"one").unwrap();
        assert!(has_calls(&dir));
        spool.push(b"two").unwrap();
        fs::write(dir.join("3.new"), "half").unwrap();
        let mut seen = Vec::new();
        let first = spool.drain(|call| {
            seen.push(call.to_vec());
            seen.len() == 1
        });
        assert_eq!(first.unwrap(), 1);
        assert_eq!(seen, [b"one".to_vec(), b"two".to_vec()]);
        assert_eq!(spool.drain(|call| call == b"two").unwrap(), 1);
        assert_eq!(spool.drain(|_| true).unwrap(), 0);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "only the lock is left");
    }

    #[test]
    fn the_lock_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let held = Spool::lock(dir.path(), soon()).unwrap();
        let error = Spool::lock(dir.path(), Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        drop(held);
        Spool::lock(dir.path(), soon()).unwrap();
    }
}
