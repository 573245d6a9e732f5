//! The listener: TLS with our own authority, HTTP/1.1 and HTTP/2, an identity a connection, and a
//! stop that ends watches first and waits for the rest.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::auth::Identity;
use super::handle::{Api, handle};
use super::log::AgentClient;
use super::stall::Stall;
use crate::limits::{
    CONNECTIONS_MAX, DRAIN_TIMEOUT_MS, H2_STREAMS_MAX, HANDSHAKE_TIMEOUT_MS, REQUEST_HEAD_TIMEOUT_MS,
    STALLED_WRITE_TIMEOUT_MS,
};
use crate::pki::Leaf;
use crate::registry::Registry;
use crate::store::log::LogStore;

/// Why the API can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address can't be listened on.
    #[error("listen on {address}: choose another address with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The credentials don't fit together.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
    /// The clients' certificates can't be checked.
    #[error("set up the check of client certificates")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// Everything that TLS takes.
pub struct ServerTls {
    /// Who signs clients and agents.
    pub authority: CertificateDer<'static>,
    /// What the server shows.
    pub server: Leaf,
    /// What the server shows to agents as their client.
    pub agent_client: Leaf,
}

/// A bound listener, not yet answering.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    agents: AgentClient,
    address: SocketAddr,
}

impl Server {
    /// Binds the address; with port 0 the system chooses one.
    pub async fn bind(address: SocketAddr) -> Result<TcpListener, ServerError> {
        TcpListener::bind(address).await.map_err(|source| ServerError::Listen { address, source })
    }

    /// Puts TLS onto a bound listener.
    pub fn new(listener: TcpListener, tls: ServerTls) -> Result<Self, ServerError> {
        let address = listener
            .local_addr()
            .map_err(|source| ServerError::Listen { address: SocketAddr::from(([0, 0, 0, 0], 0)), source })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(tls.authority).map_err(ServerError::Tls)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(ServerError::Verifier)?;
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(ServerError::Tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![tls.server.certificate.clone()], tls.server.key())
            .map_err(ServerError::Tls)?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let agents = AgentClient::new(provider, &tls.agent_client).map_err(ServerError::Tls)?;
        Ok(Self { listener, acceptor: TlsAcceptor::from(Arc::new(server)), agents, address })
    }

    /// Answers until `shutdown`, then ends watches, and waits for other requests a while.
    pub async fn run(self, registry: Registry, store: Arc<LogStore>, shutdown: CancellationToken) {
        let address = self.address.to_string();
        let api = Arc::new(Api::new(registry, store, self.agents, address, shutdown.clone()));
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place,
                () = shutdown.cancelled() => break,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = shutdown.cancelled() => break,
            };
            let (tcp, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: pausing lets others give theirs back.
                    tracing::warn!(%error, "accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (acceptor, api, watcher) = (self.acceptor.clone(), Arc::clone(&api), graceful.watcher());
            tokio::spawn(async move {
                connection(tcp, peer, acceptor, api, watcher).await;
                drop(place);
            });
        }
        drop(self.listener);
        let drained =
            tokio::time::timeout(Duration::from_millis(DRAIN_TIMEOUT_MS), graceful.shutdown()).await;
        if drained.is_err() {
            tracing::warn!("requests were still running at the end of the stop");
        }
    }
}

async fn connection(
    tcp: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    api: Arc<Api>,
    watcher: Watcher,
) {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%peer, %error, "set TCP_NODELAY");
    }
    let tcp = Stall::new(tcp, Duration::from_millis(STALLED_WRITE_TIMEOUT_MS));
    let handshake =
        tokio::time::timeout(Duration::from_millis(HANDSHAKE_TIMEOUT_MS), acceptor.accept(tcp)).await;
    let tls = match handshake {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake"),
        Err(_) => return tracing::debug!(%peer, "TLS handshake took too long"),
    };
    let identity = tls
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| Identity::from_certificate(chain.first()?))
        .map(Arc::new);
    let metrics = Arc::clone(&api.metrics);
    metrics.connections.fetch_add(1, Ordering::Relaxed);
    let service = service_fn(move |request| {
        let (api, identity) = (Arc::clone(&api), identity.clone());
        async move { Ok::<_, std::convert::Infallible>(handle(api, identity, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(REQUEST_HEAD_TIMEOUT_MS));
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(H2_STREAMS_MAX);
    let serving = watcher.watch(builder.serve_connection(TokioIo::new(tls), service).into_owned());
    if let Err(error) = serving.await {
        tracing::debug!(%peer, %error, "connection ended");
    }
    metrics.connections.fetch_sub(1, Ordering::Relaxed);
}
