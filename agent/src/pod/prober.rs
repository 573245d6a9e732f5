//! Carrying out probes and hooks: one try, one answer, never longer than its timeout. What the answer
//! means is decided elsewhere.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::http::{Request, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::model::{Container, GrpcHandler, Handler, HttpHandler, TcpHandler};
use super::probe::ProbeResult;
use crate::limits;
use crate::runtime::{ExecSpec, Runtime};

/// Where a handler is to be carried out.
#[derive(Debug, Clone)]
pub struct Place {
    /// The pod.
    pub uid: String,
    /// Its address.
    pub ip: Option<IpAddr>,
}

/// Carries handlers out; cheap to clone.
#[derive(Clone)]
pub struct Prober {
    runtime: Runtime,
    slots: Arc<tokio::sync::Semaphore>,
    tls: Arc<rustls::ClientConfig>,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prober")
    }
}

impl Prober {
    /// A prober that runs commands through `runtime`.
    pub fn new(runtime: Runtime) -> Result<Self, rustls::Error> {
        let slots = Arc::new(tokio::sync::Semaphore::new(limits::PROBES_IN_FLIGHT_MAX));
        Ok(Prober { runtime, slots, tls: tls_without_names()? })
    }

    /// One try, no more than so many at the same time on the node.
    pub async fn probe(
        &self,
        place: &Place,
        container: &Container,
        handler: &Handler,
        timeout: Duration,
    ) -> ProbeResult {
        let Ok(_slot) = self.slots.acquire().await else {
            return ProbeResult::Unknown("the agent is stopping".to_owned());
        };
        self.run(place, container, handler, timeout).await
    }

    /// One try. A handler that names nothing to do succeeds.
    pub async fn run(
        &self,
        place: &Place,
        container: &Container,
        handler: &Handler,
        timeout: Duration,
    ) -> ProbeResult {
        if let Some(exec) = &handler.exec {
            return self.exec(place, container, &exec.command, timeout).await;
        }
        over_network(&self.tls, place.ip, container, handler, timeout).await
    }

    async fn exec(
        &self,
        place: &Place,
        container: &Container,
        command: &[String],
        timeout: Duration,
    ) -> ProbeResult {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let spec = ExecSpec { command: command.to_vec(), timeout_ms };
        match self.runtime.exec(&place.uid, &container.name, spec).await {
            Ok(output) if output.timed_out => ProbeResult::Failure(format!("no answer within {timeout:?}")),
            Ok(output) if output.code == 0 => ProbeResult::Success,
            Ok(output) => {
                let text = shortened(&output.output);
                ProbeResult::Failure(format!("the command ended with {}: {text}", output.code))
            }
            Err(error @ crate::runtime::RuntimeError::Start { .. }) => {
                ProbeResult::Failure(crate::cluster::chain(&error))
            }
            Err(error) => ProbeResult::Unknown(crate::cluster::chain(&error)),
        }
    }
}

fn tls_without_names() -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Ok(Arc::new(tls))
}

async fn over_network(
    tls: &Arc<rustls::ClientConfig>,
    ip: Option<IpAddr>,
    container: &Container,
    handler: &Handler,
    timeout: Duration,
) -> ProbeResult {
    let ip = ip.map(|ip| ip.to_string());
    let work = async {
        if let Some(http) = &handler.http_get {
            http_get(tls, ip.as_deref(), container, http).await
        } else if let Some(tcp) = &handler.tcp_socket {
            tcp_connect(ip.as_deref(), container, tcp).await
        } else if let Some(grpc) = &handler.grpc {
            grpc_health(ip.as_deref(), grpc).await
        } else if let Some(sleep) = &handler.sleep {
            tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
            Ok(())
        } else {
            Ok(())
        }
    };
    match tokio::time::timeout(timeout, work).await {
        Ok(Ok(())) => ProbeResult::Success,
        Ok(Err(why)) => ProbeResult::Failure(why),
        Err(_) => ProbeResult::Failure(format!("no answer within {timeout:?}")),
    }
}

async fn http_get(
    tls: &Arc<rustls::ClientConfig>,
    ip: Option<&str>,
    container: &Container,
    http: &HttpHandler,
) -> Result<(), String> {
    let port = container.port(&http.port).ok_or_else(|| format!("no port {:?}", http.port))?;
    let host = if http.host.is_empty() { ip.ok_or("the pod has no address")? } else { &http.host };
    let stream = connect(host, port).await?;
    let path = match http.path.as_str() {
        "" => "/".to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        path => format!("/{path}"),
    };
    let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let mut request = Request::builder().uri(path);
    let named = |name: &str| http.http_headers.iter().any(|h| h.name.eq_ignore_ascii_case(name));
    if !named("host") {
        request = request.header(header::HOST, &authority);
    }
    if !named("user-agent") {
        request =
            request.header(header::USER_AGENT, concat!("kube-probe/sheave-", env!("CARGO_PKG_VERSION")));
    }
    if !named("accept") {
        request = request.header(header::ACCEPT, "*/*");
    }
    request = request.header(header::CONNECTION, "close");
    for extra in &http.http_headers {
        request = request.header(extra.name.as_str(), extra.value.as_str());
    }
    let request =
        request.body(Empty::<Bytes>::new()).map_err(|e| format!("the request can't be made: {e}"))?;
    if http.scheme.eq_ignore_ascii_case("https") {
        let name = rustls::pki_types::ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(tls.clone());
        let stream = connector.connect(name, stream).await.map_err(|e| format!("TLS: {e}"))?;
        get(stream, request).await
    } else {
        get(stream, request).await
    }
}

async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let stream = match host.parse::<IpAddr>() {
        Ok(ip) => TcpStream::connect(SocketAddr::new(ip, port)).await,
        Err(_) => TcpStream::connect((host, port)).await,
    };
    stream.map_err(|e| format!("connecting to {host} port {port}: {e}"))
}

async fn get<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<(), String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let mut connection = std::pin::pin!(connection);
    let answer = async {
        let response = sender.send_request(request).await.map_err(|e| crate::cluster::chain(&e))?;
        let status = response.status();
        if (200..400).contains(&status.as_u16()) {
            return Ok(());
        }
        let body = Limited::new(response.into_body(), limits::PROBE_BODY_BYTES_MAX).collect().await;
        let text =
            body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()).unwrap_or_default();
        Err(format!("HTTP probe failed with statuscode: {}: {}", status.as_u16(), shortened(&text)))
    };
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        result = &mut answer => result,
        ended = &mut connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(crate::cluster::chain(&error)),
        },
    }
}

async fn tcp_connect(ip: Option<&str>, container: &Container, tcp: &TcpHandler) -> Result<(), String> {
    let port = container.port(&tcp.port).ok_or_else(|| format!("no port {:?}", tcp.port))?;
    let host = if tcp.host.is_empty() { ip.ok_or("the pod has no address")? } else { &tcp.host };
    connect(host, port).await.map(|_| ())
}

/// One call of `grpc.health.v1.Health/Check`: its two messages are small enough to write by hand.
async fn grpc_health(ip: Option<&str>, grpc: &GrpcHandler) -> Result<(), String> {
    let ip = ip.ok_or("the pod has no address")?;
    let port = u16::try_from(grpc.port).map_err(|_| format!("no port {}", grpc.port))?;
    let service = grpc.service.as_deref().unwrap_or("").as_bytes();
    let length = u8::try_from(service.len()).map_err(|_| "the service's name is too long".to_owned())?;
    let mut message = vec![];
    if length > 0 {
        let low = length & 0x7f;
        message.push(0x0a);
        match length >> 7 {
            0 => message.push(low),
            high => message.extend([low | 0x80, high]),
        }
        message.extend(service);
    }
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    frame.extend(message);
    let stream = connect(ip, port).await?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|e| crate::cluster::chain(&e))?;
    let uri = format!(
        "http://{}/grpc.health.v1.Health/Check",
        SocketAddr::new(ip.parse().map_err(|_| "bad address")?, port)
    );
    let request = Request::post(uri)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Full::new(Bytes::from(frame)))
        .map_err(|e| e.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|e| crate::cluster::chain(&e))?;
        let body = Limited::new(response.into_body(), limits::PROBE_BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|e| e.to_string())?.to_bytes();
        if body.get(5..) == Some(&[0x08, 0x01]) {
            Ok(())
        } else {
            Err("the service is not SERVING".to_owned())
        }
    };
    tokio::select! {
        result = answer => result,
        ended = connection => Err(ended.err().map_or("the connection ended".to_owned(), |e| crate::cluster::chain(&e))),
    }
}

fn shortened(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(limits::PROBE_OUTPUT_BYTES_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A probe asks whether a server answers, not who it is: kubelet's probes check no certificate either.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &rustls::pki_types::CertificateDer<'_>,
        _intermediates: &[rustls::pki_types::CertificateDer<'_>],
        _server_name: &rustls::pki_types::ServerName<'_>,
        _ocsp: &[u8],
        _now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::model::PortRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Serves one connection with a fixed answer; returns the port.
    async fn serve(answer: &'static str) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut head = [0; 1024];
            let read = stream.read(&mut head).await.expect("read");
            assert!(read > 0);
            stream.write_all(answer.as_bytes()).await.expect("write");
        });
        port
    }

    async fn ask(handler: Handler) -> ProbeResult {
        let tls = tls_without_names().expect("tls");
        let ip = Some("127.0.0.1".parse().expect("ip"));
        over_network(&tls, ip, &Container::default(), &handler, Duration::from_secs(5)).await
    }

    fn http(port: u16) -> Handler {
        let get = HttpHandler {
            port: PortRef::Number(i32::from(port)),
            path: "x".into(),
            ..HttpHandler::default()
        };
        Handler { http_get: Some(get), ..Handler::default() }
    }

    #[tokio::test]
    async fn http_answers() {
        let port = serve("HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(ask(http(port)).await, ProbeResult::Success);
        let port = serve("HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy").await;
        let failure = "HTTP probe failed with statuscode: 503: busy".to_owned();
        assert_eq!(ask(http(port)).await, ProbeResult::Failure(failure));
        assert!(matches!(ask(http(0)).await, ProbeResult::Failure(why) if why.contains("no port")));
        let port = serve("junk\r\n\r\n").await;
        assert!(matches!(ask(http(port)).await, ProbeResult::Failure(_)));
    }

    #[tokio::test]
    async fn tcp_answers() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        let handler = || Handler {
            tcp_socket: Some(TcpHandler { port: PortRef::Number(i32::from(port)), host: String::new() }),
            ..Handler::default()
        };
        assert_eq!(ask(handler()).await, ProbeResult::Success);
        drop(listener);
        assert!(matches!(ask(handler()).await, ProbeResult::Failure(why) if why.contains("refused")));
    }
}
