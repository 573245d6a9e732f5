//! The one way to objects: every write, by HTTP or by a controller, is admitted by the same
//! rules (`resource`) and is atomic against what it was decided on (`store`).

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde_json::Value;

use crate::limits::{
    COLLECTION_WRITES_AT_ONCE, FUTURE_REV_WAIT_MS, GENERATE_NAME_TRIES, OBJECT_BYTES_MAX, WRITE_TRIES,
};
use crate::resource::alloc::AllocatorError;
use crate::resource::lifecycle::{name_suffix, scale_of};
use crate::resource::{
    ApiError, DeleteOptions, DeleteOutcome, FieldValidation, Kind, ObjectIndex, PatchType, Selectors, Stamp,
    Subresource, UpdateOutcome, apply_patch, default_object, find_by_gvk, finish_update, kinds, plan_delete,
    prepare_create, prepare_update, validate_create, validate_update,
};
use crate::store::{Draft, Event, Expect, Expired, Key, Object, Op, Rev, Store, Txn, TxnError, Watch};

mod addresses;
mod bootstrap;
#[cfg(test)]
mod tests;
pub use addresses::AddressRanges;
use addresses::Addresses;
pub use bootstrap::advertised;

/// Namespaces that are always there and can't be deleted.
pub const PERMANENT_NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// How a write is to be done.
#[derive(Clone, Debug, Default)]
pub struct WriteOpts {
    /// Decide and answer, but change nothing (`dryRun=All`).
    pub dry_run: bool,
    /// Who writes (`fieldManager`); recorded nowhere yet.
    pub field_manager: Option<String>,
    /// Whether members that the kind does not have are refused (`fieldValidation`).
    pub field_validation: FieldValidation,
}

/// Where a watch starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// After what is stored now.
    Now,
    /// After this revision.
    Rev(Rev),
}

/// What became of an object that was to be deleted.
#[derive(Clone, Debug)]
pub enum Deleted {
    /// It is gone; its last state, with the revision of the removal.
    Removed(Arc<Object>),
    /// It is marked, and goes when its finalizers are done or its grace is over.
    Marked(Arc<Object>),
}

impl Deleted {
    /// The object in either case.
    pub fn object(&self) -> &Arc<Object> {
        match self {
            Self::Removed(object) | Self::Marked(object) => object,
        }
    }
}

/// Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    store: Arc<dyn Store>,
    addresses: Addresses,
}

/// What a read-modify-write decided.
enum Write {
    Put(Value),
    Remove,
    Keep,
}

impl Registry {
    /// Over a store that was just opened; the addresses in use are read from it.
    pub fn new(store: Arc<dyn Store>, ranges: &AddressRanges) -> Result<Self, AllocatorError> {
        let (services, _) = store.list(&kinds::SERVICES.resource_key(), None);
        let addresses = Addresses::new(ranges, services.iter().map(|s| s.value()))?;
        Ok(Self(Arc::new(Inner { store, addresses })))
    }

    /// Revision of the last write.
    pub fn revision(&self) -> Rev {
        self.0.store.revision()
    }

    /// The addresses of the API server's own service, one of each range.
    pub fn api_service_addresses(&self) -> &[std::net::IpAddr] {
        self.0.addresses.api_server()
    }

    /// One object, or 404. `namespace` is empty for kinds without.
    pub fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Arc<Object>, ApiError> {
        self.0
            .store
            .get(&Key::new(&kind.resource_key(), namespace, name))
            .ok_or_else(|| ApiError::not_found(kind, name))
    }

    /// Objects of one namespace or all, ordered by key, and the revision at which they were these.
    pub fn list(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        selectors: &Selectors,
    ) -> (Vec<Arc<Object>>, Rev) {
        let (mut objects, rev) = self.0.store.list(&kind.resource_key(), namespace);
        if !selectors.is_everything() {
            objects.retain(|object| selectors.matches(&object.index));
        }
        (objects, rev)
    }

    /// Like [`Registry::list`], as it was at `rev`. 410 when the history doesn't reach back.
    pub fn list_at(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        selectors: &Selectors,
        rev: Rev,
    ) -> Result<Vec<Arc<Object>>, ApiError> {
        let listed = self.0.store.list_at(&kind.resource_key(), namespace, rev);
        let mut objects = listed.map_err(|e| expired(&e))?;
        objects.retain(|object| selectors.matches(&object.index));
        Ok(objects)
    }

    /// Waits until everything up to `rev` is visible; 504 when that takes too long.
    pub async fn reach(&self, rev: Rev) -> Result<(), ApiError> {
        let reached = self.0.store.reached(rev);
        match tokio::time::timeout(Duration::from_millis(FUTURE_REV_WAIT_MS), reached).await {
            Ok(()) => Ok(()),
            Err(_) => Err(ApiError::too_large_resource_version(rev, self.revision())),
        }
    }

    /// Events of one namespace or all. 410 when the history doesn't reach back to `from`, 504
    /// when `from` is in the future.
    pub fn watch(&self, kind: &Kind, namespace: Option<&str>, from: Start) -> Result<Watch, ApiError> {
        let current = self.revision();
        let from = match from {
            Start::Now => current,
            Start::Rev(rev) if rev > current => {
                return Err(ApiError::too_large_resource_version(rev, current));
            }
            Start::Rev(rev) => rev,
        };
        self.0.store.watch(&kind.resource_key(), namespace, from).map_err(|e| expired(&e))
    }

    /// Stores a new object.
    pub async fn create(
        &self,
        kind: &'static Kind,
        namespace: &str,
        object: Value,
        opts: WriteOpts,
    ) -> Result<Arc<Object>, ApiError> {
        if !crate::resource::object::name(&object).is_empty() {
            return self.create_named(kind, namespace, object, &opts).await;
        }
        for _ in 1..GENERATE_NAME_TRIES {
            match self.create_named(kind, namespace, object.clone(), &opts).await {
                Err(error) if error.is_already_exists() => {}
                other => return other,
            }
        }
        self.create_named(kind, namespace, object, &opts).await
    }

    async fn create_named(
        &self,
        kind: &'static Kind,
        namespace: &str,
        mut object: Value,
        opts: &WriteOpts,
    ) -> Result<Arc<Object>, ApiError> {
        let suffix = name_suffix(rand::random());
        let stamp = Stamp { now: Timestamp::now(), uid: uuid::Uuid::new_v4().to_string(), suffix };
        // The warnings of the milder mode have no way to the client yet.
        drop(opts.field_validation.check(kind, Subresource::Main, &object)?);
        prepare_create(kind, namespace, &mut object, &stamp)?;
        default_object(kind, &mut object);
        let name = crate::resource::object::name(&object).to_owned();
        let guards = self.namespace_guard(kind, namespace, &name)?;
        let mut claim = self.0.addresses.claim(kind, &mut object, None)?;
        validate_create(kind, &object)?;
        let key = Key::new(&kind.resource_key(), namespace, &name);
        if opts.dry_run {
            if self.0.store.get(&key).is_some() {
                return Err(ApiError::already_exists(kind, &name));
            }
            return detached(kind, key, &object);
        }
        let op = Op::Put(draft(kind, &object)?);
        let mut txn = Txn { key: key.clone(), expect: Expect::Absent, op, guards };
        for _ in 0..WRITE_TRIES {
            match self.0.store.write(txn.clone()).await {
                Ok(stored) => {
                    claim.keep();
                    return Ok(stored);
                }
                Err(TxnError::Conflict { key: at, .. }) if at == key => {
                    return Err(ApiError::already_exists(kind, &name));
                }
                // The namespace changed between the look at it and the write.
                Err(TxnError::Conflict { .. }) => {
                    txn.guards = self.namespace_guard(kind, namespace, &name)?
                }
                Err(error) => return Err(store_error(&error)),
            }
        }
        Err(too_busy(kind))
    }

    /// A namespaced object goes only into a namespace that is there and stays.
    fn namespace_guard(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Vec<(Key, Expect)>, ApiError> {
        if !kind.namespaced {
            return Ok(Vec::new());
        }
        let found = self.get(&kinds::NAMESPACES, "", namespace)?;
        if found.index.deletion.is_some() {
            return Err(ApiError::namespace_terminating(kind, name, namespace));
        }
        Ok(vec![(found.key.clone(), Expect::Rev(found.rev))])
    }

    /// Replaces an object or a part of it. A `resourceVersion` in the body must be the current
    /// one (409); without one the last write wins.
    pub async fn update(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        sub: Subresource,
        object: Value,
        opts: WriteOpts,
    ) -> Result<Arc<Object>, ApiError> {
        self.rewrite(kind, namespace, name, sub, &opts, |_| Ok(object.clone())).await
    }

    /// Applies a patch; what it was computed on is what it replaces. With [`PatchType::Apply`] an
    /// object that isn't there is created; the flag says so.
    #[expect(clippy::too_many_arguments, reason = "a request has that many parts")]
    pub async fn patch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        sub: Subresource,
        patch: PatchType,
        body: &[u8],
        opts: WriteOpts,
    ) -> Result<(Arc<Object>, bool), ApiError> {
        let compute = |old: &Value| {
            if sub == Subresource::Scale {
                apply_patch(kind, patch, &scale_of(old), body)
            } else {
                apply_patch(kind, patch, old, body)
            }
        };
        let patched = self.rewrite(kind, namespace, name, sub, &opts, compute).await;
        match patched {
            Err(error) if error.is_not_found() && patch == PatchType::Apply && sub == Subresource::Main => {
                let mut object: Value = serde_json::from_slice(body)
                    .map_err(|e| ApiError::bad_request(format!("the patch is not valid JSON: {e}")))?;
                name_from_path(&mut object, name)?;
                Ok((self.create(kind, namespace, object, opts).await?, true))
            }
            other => Ok((other?, false)),
        }
    }

    /// Read-modify-write for controllers; `f` may run several times, each on the newest object.
    pub async fn mutate(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        sub: Subresource,
        mut f: impl FnMut(&mut Value) -> Result<(), ApiError> + Send,
    ) -> Result<Arc<Object>, ApiError> {
        let compute = |old: &Value| {
            let mut new = old.clone();
            f(&mut new)?;
            Ok(new)
        };
        self.rewrite(kind, namespace, name, sub, &WriteOpts::default(), compute).await
    }

    async fn rewrite(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        sub: Subresource,
        opts: &WriteOpts,
        mut compute: impl FnMut(&Value) -> Result<Value, ApiError> + Send,
    ) -> Result<Arc<Object>, ApiError> {
        for _ in 0..WRITE_TRIES {
            let stored = self.get(kind, namespace, name)?;
            let old = stored.value();
            let mut new = compute(&old)?;
            drop(opts.field_validation.check(kind, sub, &new)?);
            prepare_update(kind, &mut new, &old, sub, Timestamp::now())?;
            default_object(kind, &mut new);
            let mut claim = self.0.addresses.claim(kind, &mut new, Some(&old))?;
            validate_update(kind, &new, &old)?;
            let write = match finish_update(kind, &mut new, &old) {
                UpdateOutcome::Unchanged => Write::Keep,
                UpdateOutcome::Changed => Write::Put(new),
                UpdateOutcome::Remove => Write::Remove,
            };
            match self.commit(kind, &stored, write, opts.dry_run).await {
                Err(Refused::Moved) => {}
                Err(Refused::Api(error)) => return Err(error),
                Ok((done, removed)) => {
                    if !opts.dry_run {
                        claim.keep();
                        if removed {
                            self.0.addresses.release(kind, &old);
                        }
                    }
                    return Ok(done);
                }
            }
        }
        Err(too_busy(kind))
    }

    /// Carries out what was decided on `stored`; whether the object was removed.
    async fn commit(
        &self,
        kind: &Kind,
        stored: &Arc<Object>,
        write: Write,
        dry_run: bool,
    ) -> Result<(Arc<Object>, bool), Refused> {
        let (op, removes) = match write {
            Write::Keep => return Ok((Arc::clone(stored), false)),
            Write::Remove if dry_run => return Ok((Arc::clone(stored), true)),
            Write::Put(new) if dry_run => {
                let draft = draft(kind, &new)?;
                let as_if = draft.finish(stored.key.clone(), stored.rev, stored.written_secs);
                return Ok((Arc::new(as_if), false));
            }
            Write::Remove => (Op::Delete, true),
            Write::Put(new) => (Op::Put(draft(kind, &new)?), false),
        };
        let expect = Expect::Rev(stored.rev);
        match self.0.store.write(Txn { key: stored.key.clone(), expect, op, guards: Vec::new() }).await {
            Ok(object) => Ok((object, removes)),
            Err(TxnError::Conflict { .. }) => Err(Refused::Moved),
            Err(error) => Err(store_error(&error).into()),
        }
    }

    /// Deletes an object, or marks it when somebody else has to end it.
    pub async fn delete(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        options: DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        if kind == &kinds::NAMESPACES && PERMANENT_NAMESPACES.contains(&name) {
            return Err(ApiError::forbidden(kind, name, "this namespace may not be deleted"));
        }
        for _ in 0..WRITE_TRIES {
            let stored = self.get(kind, namespace, name)?;
            let old = stored.value();
            let write = match plan_delete(kind, &old, &options, Timestamp::now())? {
                DeleteOutcome::Remove => Write::Remove,
                DeleteOutcome::Mark(new) => Write::Put(*new),
                DeleteOutcome::Unchanged => Write::Keep,
            };
            match self.commit(kind, &stored, write, options.dry_run).await {
                Err(Refused::Moved) => {}
                Err(Refused::Api(error)) => return Err(error),
                Ok((object, true)) => {
                    if !options.dry_run {
                        self.0.addresses.release(kind, &old);
                    }
                    return Ok(Deleted::Removed(object));
                }
                Ok((object, false)) => return Ok(Deleted::Marked(object)),
            }
        }
        Err(too_busy(kind))
    }

    /// Deletes what matches, each object by itself; what was there. An object that goes away by
    /// itself meanwhile is no error.
    pub async fn delete_collection(
        &self,
        kind: &'static Kind,
        namespace: Option<&str>,
        selectors: &Selectors,
        options: DeleteOptions,
    ) -> Result<Vec<Arc<Object>>, ApiError> {
        let (objects, _) = self.list(kind, namespace, selectors);
        let deletions = objects.into_iter().map(|object| {
            let options = options.clone();
            async move { self.delete(kind, object.key.namespace(), object.key.name(), options).await }
        });
        let mut deletions = stream::iter(deletions).buffered(COLLECTION_WRITES_AT_ONCE);
        let mut deleted = Vec::new();
        while let Some(done) = deletions.next().await {
            match done {
                Ok(done) => deleted.push(Arc::clone(done.object())),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(deleted)
    }

    /// Removes events that nobody wrote to for `ttl_secs`; how many.
    pub async fn expire_events(&self, now_secs: u64, ttl_secs: u64) -> Result<usize, ApiError> {
        let kind = &kinds::EVENTS;
        let (events, _) = self.list(kind, None, &Selectors::everything());
        let mut due = Vec::new();
        for event in events {
            if now_secs.saturating_sub(event.written_secs) >= ttl_secs {
                let (key, expect) = (event.key.clone(), Expect::Rev(event.rev));
                due.push(Txn { key, expect, op: Op::Delete, guards: Vec::new() });
            }
        }
        let removals = due.into_iter().map(|txn| self.0.store.write(txn));
        let mut removals = stream::iter(removals).buffer_unordered(COLLECTION_WRITES_AT_ONCE);
        let mut removed = 0;
        while let Some(done) = removals.next().await {
            match done {
                Ok(_) => removed += 1,
                // Written to meanwhile, so it isn't due.
                Err(TxnError::Conflict { .. }) => {}
                Err(error) => return Err(store_error(&error)),
            }
        }
        Ok(removed)
    }
}

/// Why one attempt at a write came to nothing.
enum Refused {
    /// What it was decided on has changed; decide again.
    Moved,
    Api(ApiError),
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

/// Index of an object that comes from disk.
pub fn index_stored(key: &Key, bytes: &[u8]) -> Option<ObjectIndex> {
    let value: Value = serde_json::from_slice(bytes).ok()?;
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    let kind = find_by_gvk(field("apiVersion")?, field("kind")?)?;
    (kind.resource_key() == key.resource()).then(|| ObjectIndex::extract(kind, &value))
}

/// Whether an event concerns a watcher that selects, and how it looks to it: an object that
/// starts to match is added, one that stops is deleted.
pub fn select(event: &Event, selectors: &Selectors) -> Option<crate::store::Change> {
    use crate::store::Change::{Added, Deleted, Modified};
    let now = selectors.matches(&event.object.index);
    let before = event.prev.as_ref().is_some_and(|prev| selectors.matches(&prev.index));
    match (event.change, before, now) {
        (Deleted, _, true) => Some(Deleted),
        (Added, _, true) | (Modified, false, true) => Some(Added),
        (Modified, true, true) => Some(Modified),
        (Modified, true, false) => Some(Deleted),
        (Deleted | Added, _, false) | (Modified, false, false) => None,
    }
}

fn draft(kind: &Kind, object: &Value) -> Result<Draft, ApiError> {
    let draft = Draft::new(object, ObjectIndex::extract(kind, object))
        .ok_or_else(|| ApiError::bad_request("the object has no metadata"))?;
    if draft.len() > OBJECT_BYTES_MAX {
        return Err(ApiError::too_large(OBJECT_BYTES_MAX));
    }
    Ok(draft)
}

/// An object that would be created: it has no revision.
fn detached(kind: &Kind, key: Key, object: &Value) -> Result<Arc<Object>, ApiError> {
    let draft = draft(kind, object)?;
    Ok(Arc::new(draft.without_rev(key)))
}

fn name_from_path(object: &mut Value, name: &str) -> Result<(), ApiError> {
    let got = crate::resource::object::name(object);
    if !got.is_empty() && got != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({got}) does not match the name on the URL ({name})"
        )));
    }
    crate::resource::object::map_mut(object, "metadata").insert("name".to_owned(), name.into());
    Ok(())
}

fn expired(error: &Expired) -> ApiError {
    ApiError::expired(error.to_string())
}

fn too_busy(kind: &Kind) -> ApiError {
    ApiError::too_many_requests(
        format!("the object of kind {} changed with every attempt to write it", kind.kind),
        1,
    )
}

fn store_error(error: &TxnError) -> ApiError {
    match error {
        TxnError::Closed => ApiError::unavailable("the API server is shutting down"),
        other => ApiError::internal(other.to_string()),
    }
}
