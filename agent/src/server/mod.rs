//! What the agent answers over HTTP: health and metrics in clear text, logs and pods over https to
//! clients that the cluster's CA vouches for.

pub mod logs;
pub mod metrics;
pub mod proxy;
pub mod tls;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry as MetricsRegistry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::dataplane::StatsHandle;
use crate::limits;
use crate::pod::model::Pod;
use crate::pod::registry::Registry;
use crate::runtime::Runtime;

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn text(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    text(status, "text/plain; charset=utf-8", body)
}

/// What `/metrics` is made of.
#[derive(Debug)]
pub struct Health {
    /// Everything that is registered.
    pub metrics: MetricsRegistry,
    /// Brings gauges up to date before they are shown.
    pub refresh: Refresh,
    /// Says which data plane is at work and which services are refused.
    pub services: StatsHandle,
}

/// See [`Health::refresh`].
pub struct Refresh(pub Box<dyn Fn(&mut String) + Send + Sync>);

impl std::fmt::Debug for Refresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refresh")
    }
}

impl Health {
    fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match request.uri().path() {
            "/healthz" | "/livez" | "/readyz" => plain(StatusCode::OK, "ok"),
            "/services" => text(StatusCode::OK, "application/json", services(&self.services)),
            "/metrics" => {
                let mut out = String::new();
                (self.refresh.0)(&mut out);
                match prometheus_client::encoding::text::encode(&mut out, &self.metrics) {
                    Ok(()) => text(
                        StatusCode::OK,
                        "application/openmetrics-text; version=1.0.0; charset=utf-8",
                        out,
                    ),
                    Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
                }
            }
            _ => plain(StatusCode::NOT_FOUND, "there are /healthz, /livez, /metrics and /services\n"),
        }
    }
}

/// The data plane at work and the services that it does not wholly balance, as JSON.
fn services(stats: &StatsHandle) -> String {
    let figures = stats.snapshot();
    let refused: BTreeMap<String, Vec<String>> = figures
        .refused
        .iter()
        .map(|(key, reasons)| (key.to_string(), reasons.iter().map(ToString::to_string).collect()))
        .collect();
    let mode = figures.mode.as_ref().map(|(mode, _)| mode.name());
    let why = figures.mode.as_ref().map(|(_, why)| why);
    serde_json::json!({"mode": mode, "why": why, "services": figures.services, "refused": refused})
        .to_string()
}

/// Answers health and metrics in clear text until `shutdown`.
pub async fn serve_health(listener: TcpListener, health: Arc<Health>, shutdown: CancellationToken) {
    serve(listener, None, shutdown, move |request| {
        let health = health.clone();
        async move { health.answer(&request) }
    })
    .await;
}

/// What the https listener reads from.
#[derive(Debug, Clone)]
pub struct Node {
    /// Whether containers still run.
    pub runtime: Runtime,
    /// Which pods there are.
    pub registry: Registry,
    /// Container logs.
    pub log_dir: PathBuf,
}

impl Node {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match parts.as_slice() {
            ["pods"] => text(StatusCode::OK, "application/json", self.registry.list().to_string()),
            ["containerLogs", namespace, pod, container] => {
                let query = request.uri().query().unwrap_or("");
                match logs::LogQuery::parse(query, jiff::Timestamp::now()) {
                    Ok(query) => self.logs(namespace, pod, container, query).await,
                    Err(why) => plain(StatusCode::BAD_REQUEST, why),
                }
            }
            _ => plain(
                StatusCode::NOT_FOUND,
                "there are /pods and /containerLogs/<namespace>/<pod>/<container>\n",
            ),
        }
    }

    async fn logs(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        query: logs::LogQuery,
    ) -> Response<Body> {
        let Some(pod) = self.registry.by_name(namespace, name) else {
            return plain(StatusCode::NOT_FOUND, format!("pod {namespace}/{name} is not on this node"));
        };
        if crate::pod::machine::find(&pod, container).is_none() {
            return plain(StatusCode::NOT_FOUND, format!("container {container} not found in pod {name}"));
        }
        let Some(latest) = self.latest_attempt(&pod, container).await else {
            let message = format!("container {container:?} in pod {name:?} is waiting to start");
            return plain(StatusCode::BAD_REQUEST, message);
        };
        let attempt = match (query.previous, latest.checked_sub(1)) {
            (false, _) => latest,
            (true, Some(before)) => before,
            (true, None) => {
                let message =
                    format!("previous terminated container {container:?} in pod {name:?} not found");
                return plain(StatusCode::BAD_REQUEST, message);
            }
        };
        let file = crate::pod::act::log_path(&self.log_dir, &pod, container, attempt);
        if let Err(error) = std::fs::metadata(&file) {
            let message =
                format!("the log of run {attempt} of container {container:?} can't be read: {error}");
            return plain(StatusCode::NOT_FOUND, message);
        }
        let (to, from) = mpsc::channel::<Bytes>(limits::LOG_CHUNKS_QUEUED_MAX);
        let (runtime, uid, container) = (self.runtime.clone(), pod.uid.clone(), container.to_owned());
        tokio::spawn(async move {
            let ended = || async {
                let record = runtime.pod(&uid).await;
                let run = record.and_then(|pod| pod.containers.into_iter().find(|c| c.name == container));
                run.is_none_or(|run| run.attempt != attempt || run.exit.is_some())
            };
            if let Err(error) = logs::send(file.clone(), query, ended, to).await {
                tracing::warn!(file = %file.display(), %error, "reading a log");
            }
        });
        let chunks = futures::stream::unfold(from, |mut from| async {
            from.recv().await.map(|chunk| (Ok::<_, Infallible>(Frame::data(chunk)), from))
        });
        let mut response = Response::new(StreamBody::new(chunks.boxed()).boxed_unsync());
        let kind = header::HeaderValue::from_static("text/plain");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    async fn latest_attempt(&self, pod: &Pod, container: &str) -> Option<u32> {
        let record = self.runtime.pod(&pod.uid).await;
        let run = record.and_then(|pod| pod.containers.into_iter().find(|c| c.name == container));
        if let Some(run) = run {
            return Some(run.attempt);
        }
        let file = crate::pod::act::log_path(&self.log_dir, pod, container, 0);
        logs::latest_attempt(file.parent()?)
    }
}

/// Answers logs and pods over https until `shutdown`.
pub async fn serve_node(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    node: Node,
    shutdown: CancellationToken,
) {
    serve(listener, Some(tls), shutdown, move |request| {
        let node = node.clone();
        async move { node.answer(request).await }
    })
    .await;
}

async fn serve<S, F>(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    shutdown: CancellationToken,
    answer: S,
) where
    S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(limits::SERVER_CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                tokio::time::sleep(tokio::time::Duration::from_millis(limits::API_RETRY_FIRST_MS)).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            continue;
        };
        let (tls, answer, shutdown) = (tls.clone(), answer.clone(), shutdown.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let ended = match tls {
                None => connection(TokioIo::new(stream), answer, shutdown).await,
                Some(config) => {
                    let handshake = tokio_rustls::TlsAcceptor::from(config).accept(stream);
                    let limit = limits::secs(limits::SERVER_HANDSHAKE_TIMEOUT_S);
                    match tokio::time::timeout(limit, handshake).await {
                        Ok(Ok(stream)) => connection(TokioIo::new(stream), answer, shutdown).await,
                        Ok(Err(error)) => Err(error.to_string()),
                        Err(_) => Err("no TLS handshake in time".to_owned()),
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(error, "connection");
            }
        });
    }
}

async fn connection<I, S, F>(io: I, answer: S, shutdown: CancellationToken) -> Result<(), String>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    S: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::secs(limits::SERVER_HANDSHAKE_TIMEOUT_S))
        .serve_connection(io, service);
    tokio::select! {
        ended = connection => ended.map_err(|e| e.to_string()),
        () = shutdown.cancelled() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(port: u16, request: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }

    #[tokio::test]
    async fn health_and_metrics() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        let mut registry = MetricsRegistry::default();
        metrics::Metrics::default().register(&mut registry);
        let refresh = Refresh(Box::new(|out| out.push_str("extra 1\n")));
        let health = Arc::new(Health { metrics: registry, refresh, services: StatsHandle::default() });
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve_health(listener, health, shutdown.clone()));
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(ask(port, &get("/healthz")).await.starts_with("HTTP/1.1 200"));
        let metrics = ask(port, &get("/metrics")).await;
        assert!(metrics.contains("extra 1") && metrics.contains("sheave_agent_pods 0"), "{metrics}");
        let services = ask(port, &get("/services")).await;
        assert!(services.contains(r#""refused":{}"#), "{services}");
        assert!(ask(port, &get("/nope")).await.starts_with("HTTP/1.1 404"));
        assert!(
            ask(port, "POST /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 405")
        );
        assert!(ask(port, "junk\r\n\r\n").await.starts_with("HTTP/1.1 400"));
        shutdown.cancel();
        serving.await.expect("ended");
    }

    #[test]
    fn a_listener_without_a_ca_lets_nobody_in() {
        let error = tls::server_config(tls::Shown::SelfSigned, "n", &[], &[]).expect_err("refused");
        assert!(matches!(error, tls::TlsError::NoCa));
        let ca = rcgen::generate_simple_self_signed(vec!["ca".to_owned()]).expect("a certificate");
        let ips = ["192.0.2.1".parse().expect("ip")];
        tls::server_config(tls::Shown::SelfSigned, "n", &ips, &[ca.cert.der().to_vec()]).expect("a config");
    }
}
