//! The store over a real redb file: order, conflicts, restarts, expiry and failing disks.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use ::redb::StorageBackend;
use serde_json::json;

use super::log::LogStore;
use super::redb::RedbEngine;
use super::*;
use crate::resource::ObjectIndex;

fn indexer(_: &Key, bytes: &[u8]) -> Option<ObjectIndex> {
    serde_json::from_slice::<serde_json::Value>(bytes).ok()?;
    Some(ObjectIndex::default())
}

fn open(dir: &Path) -> LogStore {
    LogStore::open(RedbEngine::open(&dir.join("store.redb")).unwrap(), indexer).unwrap()
}

fn key(name: &str) -> Key {
    Key::new("pods", "default", name)
}

fn put(name: &str, n: usize) -> Txn {
    put_key(key(name), n)
}

fn put_key(key: Key, n: usize) -> Txn {
    let value = json!({"kind": "Pod", "metadata": {"name": key.name()}, "n": n, "pad": "x".repeat(200)});
    let draft = Draft::new(&value, ObjectIndex::default()).unwrap();
    Txn { key, expect: Expect::Any, op: Op::Put(draft), guards: Vec::new() }
}

fn delete(name: &str) -> Txn {
    Txn { key: key(name), expect: Expect::Any, op: Op::Delete, guards: Vec::new() }
}

fn seen(events: &[Arc<Event>]) -> Vec<(Change, String, Rev)> {
    events.iter().map(|e| (e.change, e.object.key.name().to_owned(), e.rev())).collect()
}

#[tokio::test]
async fn expectations_and_guards_hold_inside_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = store.write(Txn { expect: Expect::Absent, ..put("a", 0) }).await.unwrap();
    assert_eq!(first.rev, 1);
    assert_eq!(first.value()["metadata"]["resourceVersion"], "1");
    // Sent together, so that the writer most likely sees them in one batch.
    let one = store.write(Txn { expect: Expect::Rev(1), ..put("a", 1) });
    let two = store.write(Txn { expect: Expect::Rev(1), ..put("a", 2) });
    let guarded = store.write(Txn { guards: vec![(key("a"), Expect::Rev(1))], ..put("b", 0) });
    let (one, two, guarded) = futures::join!(one, two, guarded);
    assert_eq!(one.unwrap().rev, 2);
    let Err(TxnError::Conflict { current: Some(current), .. }) = two else { panic!("{two:?}") };
    assert_eq!(current.rev, 2);
    assert!(matches!(guarded, Err(TxnError::Conflict { key: k, .. }) if k == key("a")));
    assert!(store.get(&key("b")).is_none());
    assert!(matches!(store.write(delete("b")).await, Err(TxnError::Conflict { current: None, .. })));
    assert_eq!(store.revision(), 2);
}

#[tokio::test]
async fn a_watcher_sees_every_event_once_in_order_and_only_of_its_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut all = store.watch("pods", None, 0).unwrap();
    let mut other = store.watch("pods", Some("other"), 0).unwrap();
    store.write(put("a", 0)).await.unwrap();
    store.write(put("a", 1)).await.unwrap();
    store.write(put_key(Key::new("pods", "other", "o"), 0)).await.unwrap();
    store.write(put_key(Key::new("leases", "default", "noise"), 0)).await.unwrap();
    let gone = store.write(delete("a")).await.unwrap();
    assert_eq!(gone.rev, 5);
    assert_eq!(gone.value()["metadata"]["resourceVersion"], "5");
    let mut got = Vec::new();
    while got.len() < 4 {
        got.extend(seen(&all.next().await.unwrap()));
    }
    let named = |c, n: &str, r| (c, n.to_owned(), r);
    assert_eq!(
        got,
        [
            named(Change::Added, "a", 1),
            named(Change::Modified, "a", 2),
            named(Change::Added, "o", 3),
            named(Change::Deleted, "a", 5)
        ]
    );
    assert_eq!(seen(&other.next().await.unwrap()), [named(Change::Added, "o", 3)]);
    assert!(other.poll().unwrap().is_empty());
    assert_eq!(other.rev(), 5, "progress goes on without events of one's own");
}

#[tokio::test]
async fn a_restart_keeps_objects_history_and_revision() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..5 {
        store.write(put("a", n)).await.unwrap();
    }
    store.write(put("b", 0)).await.unwrap();
    store.write(delete("b")).await.unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.revision(), 7);
    assert_eq!(store.get(&key("a")).unwrap().value()["n"], 4);
    let mut watch = store.watch("pods", None, 3).unwrap();
    let events = watch.poll().unwrap();
    assert_eq!(seen(&events).iter().map(|e| e.2).collect::<Vec<_>>(), [4, 5, 6, 7]);
    assert_eq!(events[0].prev.as_ref().unwrap().value()["n"], 2);
    assert_eq!(events[3].change, Change::Deleted);
    assert_eq!(store.write(put("c", 0)).await.unwrap().rev, 8);
}

#[tokio::test]
async fn the_past_is_listed_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut past: Vec<Vec<(String, Rev, bytes::Bytes)>> = vec![Vec::new()];
    let state = |objects: &[Arc<Object>]| -> Vec<(String, Rev, bytes::Bytes)> {
        objects.iter().map(|o| (o.key.name().to_owned(), o.rev, o.bytes.clone())).collect()
    };
    for txn in [put("a", 0), put("b", 0), put("a", 1), delete("a"), put("a", 2), delete("b"), put("c", 0)] {
        store.write(txn).await.unwrap();
        past.push(state(&store.list("pods", None).0));
    }
    for (rev, expected) in past.iter().enumerate() {
        let objects = store.list_at("pods", None, rev as Rev).unwrap();
        assert_eq!(&state(&objects), expected, "at {rev}");
    }
    assert!(store.list_at("pods", Some("other"), 3).unwrap().is_empty());
    store.reached(7).await;
}

#[tokio::test]
async fn a_full_history_expires_old_watchers_honestly_and_noise_stays_in_its_resource() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.write(put("quiet", 0)).await.unwrap();
    let mut slow = store.watch("leases", None, 0).unwrap();
    let big = "x".repeat(1 << 20);
    let writes = 2 * crate::limits::HISTORY_BYTES_MAX / big.len();
    for n in 0..writes {
        let value = json!({"metadata": {"name": "l"}, "n": n, "big": big});
        let op = Op::Put(Draft::new(&value, ObjectIndex::default()).unwrap());
        let key = Key::new("leases", "default", "l");
        store.write(Txn { key, expect: Expect::Any, op, guards: Vec::new() }).await.unwrap();
    }
    let expired = slow.poll().unwrap_err();
    assert_eq!(store.watch("leases", None, expired.oldest - 1).err().unwrap().oldest, expired.oldest);
    assert!(store.watch("leases", None, expired.oldest).is_ok());
    assert_eq!(store.watch("pods", None, 0).unwrap().poll().unwrap().len(), 1);
    drop(store);
    let store = open(dir.path());
    assert!(store.watch("leases", None, expired.oldest - 1).is_err(), "a restart invents no history");
    let mut rest = store.watch("leases", None, expired.oldest).unwrap();
    assert_eq!(rest.poll().unwrap().first().unwrap().rev(), expired.oldest + 1);
    assert!(std::fs::metadata(dir.path().join("store.redb")).unwrap().len() < 512 << 20);
}

/// A file that fails with `ENOSPC` once its budget of writes is used up.
#[derive(Debug)]
struct Failing {
    file: std::fs::File,
    budget: Arc<AtomicI64>,
}

impl Failing {
    fn spend(&self) -> io::Result<()> {
        if self.budget.fetch_sub(1, Ordering::SeqCst) > 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(28))
        }
    }
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.spend()?;
        self.file.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.spend()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.spend()?;
        std::os::unix::fs::FileExt::write_all_at(&self.file, data, offset)
    }
}

const PLENTY: i64 = i64::MAX / 2;

fn failing(dir: &Path, budget: &Arc<AtomicI64>) -> LogStore {
    let budget = Arc::clone(budget);
    let open = move |path: &Path| -> io::Result<Box<dyn StorageBackend>> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Box::new(Failing { file, budget: Arc::clone(&budget) }))
    };
    let engine = RedbEngine::open_with(&dir.join("store.redb"), Box::new(open)).unwrap();
    LogStore::open(engine, indexer).unwrap()
}

/// The disk fills up at every possible operation of a commit in turn; what was refused is not
/// there unless the store says so, what was acknowledged is, and the store works again afterwards.
#[tokio::test]
async fn a_full_disk_refuses_and_the_store_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Arc::new(AtomicI64::new(PLENTY));
    let store = failing(dir.path(), &budget);
    let mut watch = store.watch("pods", None, 0).unwrap();
    store.write(put("before", 0)).await.unwrap();
    let mut acknowledged = vec!["before".to_owned()];
    let mut refusals = 0;
    for fails_at in 0..40 {
        budget.store(fails_at, Ordering::SeqCst);
        let name = format!("p{fails_at}");
        match store.write(put(&name, 0)).await {
            Ok(_) => acknowledged.push(name),
            Err(TxnError::Io { full, message, .. }) => {
                refusals += 1;
                assert!(full, "{message}");
                assert!(store.get(&key(&name)).is_none());
            }
            Err(other) => panic!("{other}"),
        }
        let again = format!("q{fails_at}");
        assert_eq!(store.get(&key("before")).unwrap().rev, 1, "reads go on");
        budget.store(PLENTY, Ordering::SeqCst);
        store.write(put(&again, 0)).await.unwrap();
        acknowledged.push(again);
    }
    assert!(refusals > 3, "the disk never failed");
    let mut revs = Vec::new();
    loop {
        let events = watch.poll().unwrap();
        if events.is_empty() {
            break;
        }
        revs.extend(events.iter().map(|e| e.rev()));
    }
    assert!(revs.windows(2).all(|w| w[0] < w[1]), "watchers never see a revision twice");
    let (before, rev) = store.list("pods", None);
    drop(store);
    let store = failing(dir.path(), &budget);
    let (after, rev_after) = store.list("pods", None);
    assert_eq!(rev, rev_after);
    let names = |objects: &[Arc<Object>]| objects.iter().map(|o| o.key.clone()).collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after), "memory and disk agree");
    for name in acknowledged {
        assert!(store.get(&key(&name)).is_some(), "{name} was acknowledged");
    }
}

#[tokio::test]
async fn a_closed_store_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.close();
    assert!(matches!(store.write(put("a", 0)).await, Err(TxnError::Closed)));
}

#[test]
fn a_file_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    std::fs::write(&path, "not a database, but long enough to look at".repeat(1000)).unwrap();
    let error = RedbEngine::open(&path).err().unwrap();
    assert!(error.to_string().contains("store.redb"));
}
