//! A control plane for the API's tests: real TLS on a loopback port of its own, state in a
//! directory that goes with the test.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use sheave_control::{ControlConfig, Ready, run_with};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

/// Longest that any of these tests waits for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A running control plane in this process.
pub(crate) struct ControlPlane {
    pub(crate) dir: Arc<TempDir>,
    pub(crate) ready: Ready,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Admin,
    Agent,
    Nobody,
}

/// An answer to a raw request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e} in {}", self.body))
    }

    /// Checks that this is a Status of the code, and gives its message.
    pub(crate) fn refused(&self, code: u16) -> String {
        let status = self.json();
        assert_eq!(self.code, code, "{status}");
        assert_eq!(status["kind"], "Status");
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["code"], code);
        status["message"].as_str().expect("a Status has a message").to_owned()
    }
}

impl ControlPlane {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("sheave-api-").tempdir().unwrap();
        Self::start_in(Arc::new(dir), SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts over the state in `dir`.
    pub(crate) async fn start_in(dir: Arc<TempDir>, listen: SocketAddr) -> Self {
        let config = ControlConfig { state_dir: dir.path().to_owned(), listen, ..ControlConfig::default() };
        let shutdown = CancellationToken::new();
        let (ready, told) = tokio::sync::oneshot::channel();
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            run_with(config, stop, ready).await.unwrap();
        });
        let ready = tokio::time::timeout(DEADLINE, told).await.unwrap().unwrap();
        Self { dir, ready, shutdown, task }
    }

    /// Stops it as SIGTERM would; gives what it takes to start it again.
    pub(crate) async fn stop(self) -> (Arc<TempDir>, SocketAddr) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.unwrap().unwrap();
        (self.dir, self.ready.address)
    }

    pub(crate) async fn client(&self) -> Client {
        client(&self.ready.admin_kubeconfig).await
    }

    pub(crate) async fn connect(&self, who: Who) -> TlsStream<TcpStream> {
        let file = match who {
            Who::Admin | Who::Nobody => &self.ready.admin_kubeconfig,
            Who::Agent => &self.ready.agent_kubeconfig,
        };
        connect(file, self.ready.address, who != Who::Nobody).await
    }

    /// Sends bytes and reads the answer to its end.
    pub(crate) async fn raw(&self, who: Who, request: &[u8]) -> Answer {
        let mut tls = self.connect(who).await;
        // A server that has seen enough answers and closes before it has read everything.
        let written = tls.write_all(request).await;
        if let Err(error) = written {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe, "{error}");
        }
        read_answer(tls).await
    }

    /// A request with a JSON body; HTTP/1.0, so that the end of the answer is the end of the stream.
    pub(crate) async fn request(&self, who: Who, line: &str, headers: &str, body: &str) -> Answer {
        let length = body.len();
        let text = format!("{line} HTTP/1.0\r\nHost: api\r\nContent-Length: {length}\r\n{headers}\r\n{body}");
        self.raw(who, text.as_bytes()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.request(Who::Admin, &format!("GET {path}"), "", "").await
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        let headers = "Content-Type: application/json\r\n";
        self.request(Who::Admin, &format!("{method} {path}"), headers, &body.to_string()).await
    }

    pub(crate) async fn patch(&self, media: &str, path: &str, body: &Value) -> Answer {
        let headers = format!("Content-Type: application/{media}\r\n");
        self.request(Who::Admin, &format!("PATCH {path}"), &headers, &body.to_string()).await
    }
}

pub(crate) async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    Client::try_from(config).unwrap()
}

async fn connect(kubeconfig: &Path, address: SocketAddr, with_identity: bool) -> TlsStream<TcpStream> {
    let file: Value = serde_saphyr::from_str(&std::fs::read_to_string(kubeconfig).unwrap()).unwrap();
    let pem = |pointer: &str| STANDARD.decode(file.pointer(pointer).unwrap().as_str().unwrap()).unwrap();
    let mut roots = RootCertStore::empty();
    let authority = pem("/clusters/0/cluster/certificate-authority-data");
    roots.add(CertificateDer::from_pem_slice(&authority).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = if with_identity {
        let certificate = CertificateDer::from_pem_slice(&pem("/users/0/user/client-certificate-data"));
        let key = PrivateKeyDer::from_pem_slice(&pem("/users/0/user/client-key-data"));
        config.with_client_auth_cert(vec![certificate.unwrap()], key.unwrap()).unwrap()
    } else {
        config.with_no_client_auth()
    };
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("kubernetes.default.svc").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap()
}

/// Reads an answer until the server closes.
pub(crate) async fn read_answer(mut tls: TlsStream<TcpStream>) -> Answer {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(DEADLINE, tls.read_to_end(&mut bytes)).await.unwrap();
    // A server that closes on an unfinished request may do so without TLS' goodbye.
    if let Err(error) = read {
        assert!(!bytes.is_empty(), "no answer: {error}");
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
    let code = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    Answer { code, head: head.to_lowercase(), body: body.to_owned() }
}
