//! What load balancers ask: `/healthz` and `/livez` of the service proxy, as kube-proxy answers them (KEP-3836), and one
//! little server for each service with a `healthCheckNodePort`. Invariant: the answers come from what was last applied
//! to the kernel; a port that is taken costs its own server and nothing else.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Body, plain, serve, text};
use crate::dataplane::{CodeLabels, ProxyHealth, ProxyMetrics, ServiceCheck, ServiceChecks};
use crate::limits;
use crate::service::ObjectKey;

fn checked(ok: bool, body: &serde_json::Value) -> Response<Body> {
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = text(status, "application/json", format!("{body}\n"));
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}

/// Answers `/healthz` and `/livez` like kube-proxy.
fn answer(health: &ProxyHealth, metrics: &ProxyMetrics, request: &Request<Incoming>) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    }
    let verdict = health.verdict(Instant::now());
    let now = jiff::Timestamp::now();
    let mut body = json!({
        // Before the first round there is no such time; kube-proxy says the zero of its clock then.
        "lastUpdated": verdict.updated.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |at| at.to_string()),
        "currentTime": now.to_string(),
    });
    let (ok, family) = match request.uri().path() {
        "/healthz" => {
            body["nodeEligible"] = verdict.eligible.into();
            (verdict.healthy && verdict.eligible, &metrics.healthz)
        }
        "/livez" => (verdict.alive, &metrics.livez),
        _ => return plain(StatusCode::NOT_FOUND, "there are /healthz and /livez\n"),
    };
    let response = checked(ok, &body);
    family.get_or_create(&CodeLabels { code: response.status().as_u16() }).inc();
    response
}

/// Answers `/healthz` and `/livez` until `shutdown`. An address that is taken is tried again and again, and said once.
pub async fn serve_proxy(
    address: SocketAddr,
    health: ProxyHealth,
    metrics: ProxyMetrics,
    shutdown: CancellationToken,
) {
    let mut told = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(
                        %address,
                        %error,
                        "/healthz of the service proxy is not served (does a kube-proxy run here?); trying again, \
                         --proxy-health-listen names another address"
                    );
                }
                tokio::select! {
                    () = tokio::time::sleep(limits::secs(limits::PROXY_LISTEN_RETRY_S)) => {}
                    () = shutdown.cancelled() => return,
                }
            }
        }
    };
    if told {
        tracing::info!(%address, "/healthz of the service proxy is served now");
    }
    serve(listener, None, shutdown, move |request| {
        let response = answer(&health, &metrics, &request);
        async move { response }
    })
    .await;
}

/// A server that runs.
#[derive(Debug)]
struct Running {
    port: u16,
    local_ready: Arc<AtomicUsize>,
    stop: CancellationToken,
}

fn service_answer(service: &ObjectKey, local: usize, health: &ProxyHealth) -> Response<Body> {
    let (namespace, name) = service.split_once('/').unwrap_or_default();
    let healthy = health.is_healthy();
    let body = json!({
        "service": {"namespace": namespace, "name": name},
        "localEndpoints": local,
        "serviceProxyHealthy": healthy,
    });
    let mut response = checked(local != 0 && healthy, &body);
    let weight = header::HeaderName::from_static("x-load-balancing-endpoint-weight");
    response.headers_mut().insert(weight, header::HeaderValue::from(local));
    response
}

/// All addresses of the node, both families where it has both.
async fn listen_everywhere(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        result => result,
    }
}

/// Keeps a server for every check that `checks` tells of, until `shutdown`: starts, moves, stops.
pub async fn serve_checks(
    mut checks: watch::Receiver<ServiceChecks>,
    health: ProxyHealth,
    shutdown: CancellationToken,
) {
    let mut running: BTreeMap<ObjectKey, Running> = BTreeMap::new();
    let mut told: BTreeMap<ObjectKey, u16> = BTreeMap::new();
    loop {
        let wanted = checks.borrow_and_update().clone();
        running.retain(|service, held| {
            let stays = wanted.get(service).is_some_and(|check| check.port == held.port);
            if !stays {
                held.stop.cancel();
            }
            stays
        });
        told.retain(|service, port| wanted.get(service).is_some_and(|check| check.port == *port));
        for (service, check) in &wanted {
            if let Some(held) = running.get(service) {
                held.local_ready.store(check.local_ready, Ordering::Relaxed);
                continue;
            }
            match listen_everywhere(check.port).await {
                Ok(listener) => {
                    told.remove(service);
                    let held = start(service.clone(), check, listener, &health, &shutdown);
                    running.insert(service.clone(), held);
                }
                Err(error) => {
                    if told.insert(service.clone(), check.port) != Some(check.port) {
                        tracing::error!(%service, port = check.port, %error, "healthCheckNodePort is not served; trying again");
                    }
                }
            }
        }
        let again = limits::secs(limits::PROXY_LISTEN_RETRY_S);
        tokio::select! {
            changed = checks.changed() => if changed.is_err() {
                // The data plane has ended; the agent is on its way out.
                shutdown.cancelled().await;
                return;
            },
            () = tokio::time::sleep(again), if !told.is_empty() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

fn start(
    service: ObjectKey,
    check: &ServiceCheck,
    listener: TcpListener,
    health: &ProxyHealth,
    shutdown: &CancellationToken,
) -> Running {
    let local_ready = Arc::new(AtomicUsize::new(check.local_ready));
    let stop = shutdown.child_token();
    let (count, health) = (local_ready.clone(), health.clone());
    tokio::spawn(serve(listener, None, stop.clone(), move |_request| {
        let response = service_answer(&service, count.load(Ordering::Relaxed), &health);
        async move { response }
    }));
    Running { port: check.port, local_ready, stop }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get(port: u16, path: &str) -> Option<(u16, String)> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some((answer.get(9..12)?.parse().ok()?, answer))
    }

    async fn until(port: u16, path: &str, code: u16) -> String {
        for _ in 0..500 {
            if let Some((found, answer)) = get(port, path).await
                && found == code
            {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{path} on port {port} never answered {code}");
    }

    async fn free_port() -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bind");
        listener.local_addr().expect("address").port()
    }

    #[tokio::test]
    async fn healthz_and_livez_answer_as_kube_proxy_does() {
        let (health, metrics) = (ProxyHealth::default(), ProxyMetrics::default());
        let port = free_port().await;
        let shutdown = CancellationToken::new();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let serving = tokio::spawn(serve_proxy(address, health.clone(), metrics.clone(), shutdown.clone()));
        until(port, "/healthz", 503).await;
        health.updated();
        let answer = until(port, "/healthz", 200).await;
        let body: serde_json::Value =
            serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("JSON");
        assert_eq!(body["nodeEligible"], true);
        assert!(body["lastUpdated"].is_string() && body["currentTime"].is_string(), "{body}");
        health.set_leaving(true);
        assert_eq!(get(port, "/healthz").await.expect("an answer").0, 503);
        assert_eq!(get(port, "/livez").await.expect("an answer").0, 200);
        assert_eq!(get(port, "/nope").await.expect("an answer").0, 404);
        assert!(metrics.healthz.get_or_create(&CodeLabels { code: 503 }).get() >= 2);
        assert_eq!(metrics.livez.get_or_create(&CodeLabels { code: 200 }).get(), 1);
        shutdown.cancel();
        serving.await.expect("ended");
    }

    #[tokio::test]
    async fn checks_start_move_and_stop_with_their_services() {
        let health = ProxyHealth::default();
        health.updated();
        let (first, second) = (free_port().await, free_port().await);
        let (tell, checks) = watch::channel(ServiceChecks::new());
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve_checks(checks, health.clone(), shutdown.clone()));
        let say = |port, local_ready| {
            let all = [("default/web".into(), ServiceCheck { port, local_ready })];
            tell.send(all.into_iter().collect()).expect("somebody listens");
        };
        say(first, 2);
        let answer = until(first, "/", 200).await;
        assert!(answer.contains("x-load-balancing-endpoint-weight: 2"), "{answer}");
        assert!(answer.contains(r#""service":{"name":"web","namespace":"default"}"#), "{answer}");
        assert!(answer.contains(r#""localEndpoints":2"#) && answer.contains(r#""serviceProxyHealthy":true"#));
        say(first, 0);
        until(first, "/", 503).await;
        say(second, 1);
        until(second, "/", 200).await;
        assert!(get(first, "/").await.is_none(), "nothing listens on the old port");
        health.stop();
        until(second, "/", 503).await;
        tell.send(ServiceChecks::new()).expect("somebody listens");
        for _ in 0..500 {
            if get(second, "/").await.is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(get(second, "/").await.is_none(), "nothing listens any more");
        shutdown.cancel();
        serving.await.expect("ended");
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_had_when_it_is_free() {
        let health = ProxyHealth::default();
        health.updated();
        let holder = TcpListener::bind(("0.0.0.0", 0)).await.expect("bind");
        let port = holder.local_addr().expect("address").port();
        let (_tell, checks) = watch::channel(
            [("default/web".into(), ServiceCheck { port, local_ready: 1 })].into_iter().collect(),
        );
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve_checks(checks, health, shutdown.clone()));
        tokio::task::yield_now().await;
        drop(holder);
        until(port, "/", 200).await;
        shutdown.cancel();
        serving.await.expect("ended");
    }
}
