//! Rows in one redb file: each commit is `Durability::Immediate`, and after an I/O error the file
//! is opened again, because redb refuses further work on the old handle.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use redb::{Builder, Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use super::engine::{Batch, Engine, EngineError, Loaded, Row};
use super::{Key, Rev};
use crate::limits::REDB_CACHE_BYTES;

const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const LAST_REV: &str = "last-rev";
const FORMAT: &str = "format";
const HORIZON: &str = "horizon/";
const FORMAT_VERSION: u64 = 1;

/// Opens the storage under the database; tests put a failing one in.
pub type OpenBackend = Box<dyn Fn(&Path) -> io::Result<Box<dyn StorageBackend>> + Send>;

/// The engine over one file.
pub struct RedbEngine {
    path: PathBuf,
    open: OpenBackend,
    db: Option<Database>,
}

/// `redb` takes its backend by value.
#[derive(Debug)]
struct Boxed(Box<dyn StorageBackend>);

impl StorageBackend for Boxed {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

impl RedbEngine {
    /// Opens or makes the file, readable by its owner only.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        Self::open_with(path, Box::new(|path| Ok(Box::new(FileStorage::open(path)?))))
    }

    /// Like [`RedbEngine::open`] over a storage of the caller's.
    pub fn open_with(path: &Path, open: OpenBackend) -> Result<Self, EngineError> {
        let mut engine = Self { path: path.to_owned(), open, db: None };
        engine.recover()?;
        Ok(engine)
    }

    fn error(&self, op: &'static str, source: redb::Error) -> EngineError {
        let full = matches!(&source, redb::Error::Io(error) if is_full(error));
        EngineError { op, path: self.path.display().to_string(), full, source: Box::new(source) }
    }

    fn database(&self, op: &'static str) -> Result<&Database, EngineError> {
        self.db.as_ref().ok_or_else(|| self.error(op, redb::Error::DatabaseClosed))
    }

    fn try_commit(db: &Database, batch: &Batch) -> Result<(), redb::Error> {
        let mut txn = db.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        {
            let mut rows = txn.open_table(ROWS)?;
            for row in &batch.rows {
                let (bytes, rev_at) = match &row.body {
                    Some((bytes, rev_at)) => (&bytes[..], *rev_at),
                    None => (&[][..], 0),
                };
                let key = row.key.as_str().as_bytes();
                let mut slot = rows.insert_reserve(row.rev, HEAD + key.len() + bytes.len())?;
                fill(slot.as_mut(), row, key, bytes, rev_at);
            }
            for rev in &batch.forget {
                rows.remove(rev)?;
            }
            let mut meta = txn.open_table(META)?;
            meta.insert(LAST_REV, batch.last_rev)?;
            for (resource, rev) in &batch.horizons {
                meta.insert(format!("{HORIZON}{resource}").as_str(), rev)?;
            }
        }
        txn.commit()?;
        Ok(())
    }

    fn try_load(db: &Database) -> Result<Loaded, redb::Error> {
        let txn = db.begin_read()?;
        let mut loaded = Loaded::default();
        let meta = txn.open_table(META)?;
        for entry in meta.iter()? {
            let (key, value) = entry?;
            if key.value() == LAST_REV {
                loaded.last_rev = value.value();
            } else if let Some(resource) = key.value().strip_prefix(HORIZON) {
                loaded.horizons.push((resource.into(), value.value()));
            }
        }
        let rows = txn.open_table(ROWS)?;
        for entry in rows.iter()? {
            let (rev, value) = entry?;
            let row = decode(rev.value(), value.value())
                .ok_or_else(|| redb::Error::Corrupted(format!("row {} is not one of ours", rev.value())))?;
            loaded.rows.push(row);
        }
        Ok(loaded)
    }

    fn try_open(&self) -> Result<(Database, Rev), redb::Error> {
        let backend = (self.open)(&self.path)?;
        let db = Builder::new()
            .set_cache_size(REDB_CACHE_BYTES)
            .create_with_backend(Boxed(backend))
            .map_err(redb::Error::from)?;
        let mut txn = db.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        let last_rev;
        {
            let _rows = txn.open_table(ROWS)?;
            let mut meta = txn.open_table(META)?;
            let format = meta.get(FORMAT)?.map(|v| v.value());
            match format {
                None => drop(meta.insert(FORMAT, FORMAT_VERSION)?),
                Some(FORMAT_VERSION) => {}
                Some(other) => {
                    return Err(redb::Error::Corrupted(format!(
                        "store format {other}, this program knows {FORMAT_VERSION}"
                    )));
                }
            }
            last_rev = meta.get(LAST_REV)?.map_or(0, |v| v.value());
        }
        txn.commit()?;
        Ok((db, last_rev))
    }
}

impl Engine for RedbEngine {
    fn load(&mut self) -> Result<Loaded, EngineError> {
        let db = self.database("read")?;
        Self::try_load(db).map_err(|source| self.error("read", source))
    }

    fn commit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let db = self.database("commit to")?;
        Self::try_commit(db, batch).map_err(|source| self.error("commit to", source))
    }

    fn recover(&mut self) -> Result<Rev, EngineError> {
        self.db = None;
        let (db, last_rev) = self.try_open().map_err(|source| self.error("open", source))?;
        self.db = Some(db);
        Ok(last_rev)
    }
}

/// Bytes before the key in a row: kind, offset of the revision, time, length of the key.
const HEAD: usize = 1 + 4 + 8 + 2;
const PUT: u8 = 1;
const DELETE: u8 = 2;

fn fill(slot: &mut [u8], row: &Row, key: &[u8], bytes: &[u8], rev_at: u32) {
    slot[0] = if row.body.is_some() { PUT } else { DELETE };
    slot[1..5].copy_from_slice(&rev_at.to_le_bytes());
    slot[5..13].copy_from_slice(&row.written_secs.to_le_bytes());
    // Keys are at most three names of 253 bytes, so the length fits.
    slot[13..15].copy_from_slice(&(key.len() as u16).to_le_bytes());
    slot[15..15 + key.len()].copy_from_slice(key);
    slot[15 + key.len()..].copy_from_slice(bytes);
}

fn decode(rev: Rev, value: &[u8]) -> Option<Row> {
    let (head, rest) = value.split_at_checked(HEAD)?;
    let rev_at = u32::from_le_bytes(head[1..5].try_into().ok()?);
    let written_secs = u64::from_le_bytes(head[5..13].try_into().ok()?);
    let key_len = usize::from(u16::from_le_bytes(head[13..15].try_into().ok()?));
    let (key, bytes) = rest.split_at_checked(key_len)?;
    let key = Key::parse(std::str::from_utf8(key).ok()?)?;
    let body = match head[0] {
        PUT => Some((Bytes::copy_from_slice(bytes), rev_at)),
        DELETE => None,
        _ => return None,
    };
    Some(Row { rev, key, written_secs, body })
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// A file without redb's own locks: the state directory has one lock for everything in it.
#[derive(Debug)]
struct FileStorage(Arc<std::fs::File>);

impl FileStorage {
    fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        // A new file's data is durable only if the file is found again.
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            std::fs::File::open(dir)?.sync_all()?;
        }
        Ok(Self(Arc::new(file)))
    }
}

impl StorageBackend for FileStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&*self.0, out, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&*self.0, data, offset)
    }
}
