//! One request from its head to its answer: who, what, may they, do it. Nothing is held across
//! requests but counters.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::auth::{Identity, Verb, authorize, may_look};
use super::list;
use super::log::{AgentClient, logs};
use super::metrics::Metrics;
use super::negotiate::{BodyForm, Form, aggregated, body_form, form};
use super::request::{Query, Target, segments, target};
use super::respond::{self, Answer};
use super::watch::watch;
use crate::limits::{
    BODY_BYTES_MAX, BODY_DRAIN_BYTES_MAX, READS_IN_FLIGHT_MAX, REQUEST_TIMEOUT_MS, WRITES_IN_FLIGHT_MAX,
};
use crate::registry::{Deleted, Registry, WriteOpts};
use crate::resource::error::success_status;
use crate::resource::lifecycle::scale_of;
use crate::resource::types::protobuf;
use crate::resource::{
    ApiError, DeleteOptions, FieldValidation, PatchType, Propagation, Selectors, Subresource, discovery,
    openapi,
};
use crate::store::Object;
use crate::store::log::LogStore;

/// What all requests share.
pub(super) struct Api {
    pub(super) registry: Registry,
    pub(super) store: Arc<LogStore>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) agents: AgentClient,
    /// Ends watches.
    pub(super) shutdown: CancellationToken,
    /// `host:port` as discovery shows it.
    pub(super) address: String,
    pub(super) reads: Semaphore,
    pub(super) writes: Semaphore,
}

impl Api {
    pub(super) fn new(
        registry: Registry,
        store: Arc<LogStore>,
        agents: AgentClient,
        address: String,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            registry,
            store,
            metrics: Arc::new(Metrics::default()),
            agents,
            shutdown,
            address,
            reads: Semaphore::new(READS_IN_FLIGHT_MAX),
            writes: Semaphore::new(WRITES_IN_FLIGHT_MAX),
        }
    }
}

/// What a resource request turned out to be, for its counters.
type Class = (Option<Verb>, &'static str);

/// Answers one request. Never fails: a failure is an answer too.
pub(super) async fn handle(
    api: Arc<Api>,
    identity: Option<Arc<Identity>>,
    request: Request<Incoming>,
) -> Answer {
    let started = Instant::now();
    api.metrics.in_flight.fetch_add(1, Ordering::Relaxed);
    let mut class: Class = (None, "");
    let answer = match route(&api, identity.as_deref(), request, &mut class).await {
        Ok(answer) => answer,
        Err(error) => respond::error(&error),
    };
    api.metrics.in_flight.fetch_sub(1, Ordering::Relaxed);
    let took = started.elapsed();
    api.metrics.record(class.0, class.1, answer.status().as_u16(), took);
    answer
}

fn unauthorized() -> ApiError {
    ApiError::unauthorized("Unauthorized: a client certificate signed by the cluster's authority is needed")
}

async fn route(
    api: &Api,
    identity: Option<&Identity>,
    request: Request<Incoming>,
    class: &mut Class,
) -> Result<Answer, ApiError> {
    let path = request.uri().path().to_owned();
    let segments = segments(&path).ok_or_else(ApiError::no_such_path)?;
    let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
    if let ["healthz" | "livez" | "readyz", ..] | ["version"] = parts.as_slice() {
        only_get(&request)?;
        return Ok(if parts[0] == "version" { version() } else { health(api, parts[0]) });
    }
    let identity = identity.ok_or_else(unauthorized)?;
    if let Some(target) = target(&segments) {
        return resource(api, identity, target, request, class).await;
    }
    if !may_look(identity) {
        let why = format!("forbidden: User {:?} cannot {} path {path:?}", identity.user, request.method());
        return Err(ApiError { code: 403, reason: "Forbidden", message: why, details: None });
    }
    let found = documents(api, &parts, &request)?.ok_or_else(ApiError::no_such_path)?;
    only_get(&request)?;
    Ok(found)
}

fn only_get(request: &Request<Incoming>) -> Result<(), ApiError> {
    if request.method() == Method::GET { Ok(()) } else { Err(ApiError::method_not_allowed()) }
}

fn health(api: &Api, which: &str) -> Answer {
    if which == "readyz" && api.shutdown.is_cancelled() {
        return respond::text(StatusCode::INTERNAL_SERVER_ERROR, "shutting down");
    }
    respond::text(StatusCode::OK, "ok")
}

fn version() -> Answer {
    respond::json(
        StatusCode::OK,
        &json!({
            "major": "1", "minor": "33",
            "gitVersion": concat!("v1.33.0-sheave.", env!("CARGO_PKG_VERSION")),
            "gitCommit": "", "gitTreeState": "", "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "none", "compiler": "rustc",
            "platform": format!("{}/{}", std::env::consts::OS, go_arch()),
        }),
    )
}

fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn header_text<'a>(request: &'a Request<Incoming>, name: &header::HeaderName) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok()
}

/// Discovery, schemas and metrics; `None` for paths that aren't there.
fn documents(api: &Api, parts: &[&str], request: &Request<Incoming>) -> Result<Option<Answer>, ApiError> {
    let accept = header_text(request, &header::ACCEPT);
    let value = match parts {
        ["api"] | ["apis"] => {
            let core = parts[0] == "api";
            if let Some(form) = aggregated(accept) {
                let mut answer = respond::json(StatusCode::OK, &discovery::aggregated(core, form));
                let media = HeaderValue::from_static(form.content_type());
                answer.headers_mut().insert(header::CONTENT_TYPE, media);
                return Ok(Some(answer));
            }
            Some(if core { discovery::core_versions(&api.address) } else { discovery::groups() })
        }
        ["api", version] => discovery::resources("", version),
        ["apis", group] => discovery::group(group),
        ["apis", group, version] => discovery::resources(group, version),
        ["openapi", "v3"] => Some(openapi::index()),
        ["openapi", "v3", rest @ ..] => {
            let found = openapi::document(&rest.join("/"));
            return Ok(found.map(|document| schema(document, request)));
        }
        ["metrics"] => return Ok(Some(respond::text(StatusCode::OK, api.metrics.render(&api.store)))),
        _ => None,
    };
    if value.is_some() {
        form(accept)?;
    }
    Ok(value.map(|value| respond::json(StatusCode::OK, &value)))
}

/// A schema document, which a client that has its hash need not load again.
fn schema(document: &'static openapi::Document, request: &Request<Incoming>) -> Answer {
    let tag = format!("\"{}\"", document.hash);
    let known = header_text(request, &header::IF_NONE_MATCH).is_some_and(|known| known.contains(&tag));
    let mut answer = if known {
        respond::text(StatusCode::NOT_MODIFIED, "")
    } else {
        respond::json_bytes(StatusCode::OK, Bytes::from_static(&document.body))
    };
    let headers = answer.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    let asked_by_hash = request.uri().query().is_some_and(|q| q.contains(&document.hash));
    let cache = if asked_by_hash { "public, immutable" } else { "no-cache, private" };
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    answer
}

fn verb(method: &Method, target: &Target, query: &Query) -> Result<Verb, ApiError> {
    let item = target.name.is_some();
    let watching = query.flag("watch")?.unwrap_or(false);
    Ok(match (method.as_str(), item) {
        ("GET", true) => Verb::Get,
        ("GET", false) if watching => Verb::Watch,
        ("GET", false) => Verb::List,
        ("POST", false) => Verb::Create,
        ("POST", true) if target.sub == Subresource::Binding => Verb::Create,
        ("PUT", true) => Verb::Update,
        ("PATCH", true) => Verb::Patch,
        ("DELETE", true) if target.sub == Subresource::Main => Verb::Delete,
        ("DELETE", false) => Verb::DeleteCollection,
        _ => return Err(ApiError::method_not_allowed()),
    })
}

async fn resource(
    api: &Api,
    identity: &Identity,
    target: Target,
    request: Request<Incoming>,
    class: &mut Class,
) -> Result<Answer, ApiError> {
    let query = Query::parse(request.uri().query())?;
    let verb = verb(request.method(), &target, &query)?;
    *class = (Some(verb), target.kind.plural);
    authorize(identity, verb, &target)?;
    if verb == Verb::Watch {
        let form = form(header_text(&request, &header::ACCEPT))?;
        let (metrics, shutdown) = (Arc::clone(&api.metrics), api.shutdown.clone());
        return watch(&api.registry, &target, &query, form, metrics, shutdown).await;
    }
    if target.sub == Subresource::Log {
        return logs(&api.agents, &api.registry, &target, &query).await;
    }
    let lanes = if verb.mutates() { &api.writes } else { &api.reads };
    let _lane = lanes
        .try_acquire()
        .map_err(|_| ApiError::too_many_requests("too many requests in flight, please try again later", 1))?;
    let answering = answer(api, verb, &target, &query, request);
    match tokio::time::timeout(Duration::from_millis(REQUEST_TIMEOUT_MS), answering).await {
        Ok(answer) => answer,
        Err(_) => Err(ApiError::timeout("the request took too long", 1)),
    }
}

async fn answer(
    api: &Api,
    verb: Verb,
    target: &Target,
    query: &Query,
    request: Request<Incoming>,
) -> Result<Answer, ApiError> {
    let accepted = form(header_text(&request, &header::ACCEPT))?;
    let name = target.name.as_deref().unwrap_or("");
    let (kind, namespace, sub) = (target.kind, target.key_namespace(), target.sub);
    let registry = &api.registry;
    let opts = || -> Result<WriteOpts, ApiError> {
        let field_manager = query.get("fieldManager").map(str::to_owned);
        let field_validation = FieldValidation::parse(query.get("fieldValidation").unwrap_or(""))?;
        Ok(WriteOpts { dry_run: query.dry_run()?, field_manager, field_validation })
    };
    match verb {
        Verb::List | Verb::Watch => list::list(registry, target, query, accepted).await,
        Verb::Get => {
            if let Some(rev) = list::revision(query)? {
                registry.reach(rev).await?;
            }
            let object = registry.get(kind, namespace, name)?;
            show(target, query, accepted, StatusCode::OK, object)
        }
        Verb::Create if sub == Subresource::Binding => {
            let body = read_object(request).await?;
            registry.update(kind, namespace, name, sub, body, opts()?).await?;
            let done = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
            Ok(respond::json(StatusCode::CREATED, &done))
        }
        Verb::Create => {
            if kind.namespaced && target.namespace.is_none() {
                return Err(ApiError::method_not_allowed());
            }
            let body = read_object(request).await?;
            let made = registry.create(kind, namespace, body, opts()?).await?;
            show(target, query, accepted, StatusCode::CREATED, made)
        }
        Verb::Update => {
            let body = read_object(request).await?;
            let stored = registry.update(kind, namespace, name, sub, body, opts()?).await?;
            show(target, query, accepted, StatusCode::OK, stored)
        }
        Verb::Patch => {
            let media = header_text(&request, &header::CONTENT_TYPE).unwrap_or("").to_owned();
            let patch = PatchType::from_content_type(&media)?;
            let body = read_body(request).await?;
            let (stored, created) = registry.patch(kind, namespace, name, sub, patch, &body, opts()?).await?;
            let status = if created { StatusCode::CREATED } else { StatusCode::OK };
            show(target, query, accepted, status, stored)
        }
        Verb::Delete => {
            let options = delete_options(query, request).await?;
            match registry.delete(kind, namespace, name, options).await? {
                Deleted::Marked(object) => show(target, query, accepted, StatusCode::OK, object),
                Deleted::Removed(object) => {
                    let done = success_status(kind, name, &object.index.uid);
                    Ok(respond::json(StatusCode::OK, &done))
                }
            }
        }
        Verb::DeleteCollection => {
            let selectors = Selectors::parse(kind, query.get("labelSelector"), query.get("fieldSelector"))?;
            let options = delete_options(query, request).await?;
            let namespace = target.namespace.as_deref();
            let gone = registry.delete_collection(kind, namespace, &selectors, options).await?;
            let metadata = json!({"resourceVersion": registry.revision().to_string()});
            Ok(list::plain(kind, &metadata, gone))
        }
    }
}

/// An object, or the view of it that the subresource is.
fn show(
    target: &Target,
    query: &Query,
    accepted: Form,
    status: StatusCode,
    object: Arc<Object>,
) -> Result<Answer, ApiError> {
    if target.sub == Subresource::Scale {
        return Ok(respond::json(status, &scale_of(&object.value())));
    }
    if accepted == Form::Table {
        let mut table = list::single(target.kind, object, list::include(query)?);
        *table.status_mut() = status;
        return Ok(table);
    }
    Ok(respond::json_bytes(status, object.bytes.clone()))
}

/// Reads a body. One that is too large is read on for a while and thrown away: closing at once
/// would take the answer away from a client that is still sending.
async fn read_body(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    let mut body = request.into_body();
    let expected = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut bytes = BytesMut::with_capacity(expected.min(BODY_BYTES_MAX));
    let mut total = 0_usize;
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| ApiError::bad_request(format!("the body of the request broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        total = total.saturating_add(data.len());
        if total <= BODY_BYTES_MAX {
            bytes.extend_from_slice(&data);
        } else {
            bytes = BytesMut::new();
        }
        if total > BODY_DRAIN_BYTES_MAX {
            break;
        }
    }
    if total > BODY_BYTES_MAX { Err(ApiError::too_large(BODY_BYTES_MAX)) } else { Ok(bytes.freeze()) }
}

fn parse(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        let what = if error.is_eof() { "ends too early" } else { "is not valid JSON" };
        ApiError::bad_request(format!("the body of the request {what}: {error}"))
    })
}

/// Reads an object, which some clients send as protobuf.
fn decode(media: BodyForm, body: &[u8]) -> Result<Value, ApiError> {
    match media {
        BodyForm::Json => parse(body),
        BodyForm::Protobuf => protobuf::to_json(body).map_err(|error| {
            ApiError::bad_request(format!("the body of the request can't be read: {error}"))
        }),
    }
}

async fn read_object(request: Request<Incoming>) -> Result<Value, ApiError> {
    let media = body_form(header_text(&request, &header::CONTENT_TYPE))?;
    let value = decode(media, &read_body(request).await?)?;
    if !value.is_object() {
        return Err(ApiError::bad_request("the body of the request must be a JSON object"));
    }
    Ok(value)
}

/// Options come in the body, in the query, or in both; the body wins.
async fn delete_options(query: &Query, request: Request<Incoming>) -> Result<DeleteOptions, ApiError> {
    let media = header_text(&request, &header::CONTENT_TYPE).map(str::to_owned);
    let body = read_body(request).await?;
    let mut options = if body.is_empty() {
        DeleteOptions::default()
    } else {
        DeleteOptions::from_json(&decode(body_form(media.as_deref())?, &body)?)?
    };
    if options.grace_period_seconds.is_none()
        && let Some(text) = query.get("gracePeriodSeconds")
    {
        let seconds = text.parse().map_err(|_| {
            ApiError::bad_request(format!("gracePeriodSeconds={text:?} is not a whole number"))
        })?;
        options.grace_period_seconds = Some(seconds);
    }
    if options.propagation.is_none() {
        options.propagation = query.get("propagationPolicy").map(Propagation::parse).transpose()?;
    }
    options.dry_run |= query.dry_run()?;
    Ok(options)
}
