//! A whole control plane from its configuration: store, bootstrap, API, controllers, scheduler.
//! It is ready when it answers, and stopped when everything that was accepted is on disk.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnetwork::IpNetwork;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::api::{Server, ServerError, ServerTls};
use crate::controller;
use crate::controller::{NodeRanges, NodeRangesError};
use crate::limits::{EVENT_SWEEP_SECS, EVENT_TTL_SECS};
use crate::pki::{Authority, PkiError, write_private};
use crate::registry::{AddressRanges, Registry, advertised, index_stored};
use crate::resource::ApiError;
use crate::resource::alloc::AllocatorError;
use crate::schedule;
use crate::store::engine::EngineError;
use crate::store::log::{LogStore, OpenError};
use crate::store::redb::RedbEngine;

/// What a control plane is told.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Directory of everything that is kept; made if missing.
    pub state_dir: PathBuf,
    /// Where the API is served; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Where nodes and pods reach it, when that isn't the address it listens on.
    pub advertise_address: Option<IpAddr>,
    /// Cluster IPs: one range, or one of each family.
    pub service_cidrs: Vec<IpNetwork>,
    /// First and last node port.
    pub node_port_range: (u16, u16),
    /// Pods of the whole cluster: at most one range of each family, of which nodes get shares. Empty gives none.
    pub cluster_cidrs: Vec<IpNetwork>,
    /// Prefix length of a node's share of IPv4.
    pub node_cidr_mask_size_ipv4: u8,
    /// Prefix length of a node's share of IPv6.
    pub node_cidr_mask_size_ipv6: u8,
    /// Further names and addresses for the server's certificate.
    pub extra_sans: Vec<String>,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/sheave"),
            listen: SocketAddr::from(([127, 0, 0, 1], 6443)),
            advertise_address: None,
            service_cidrs: vec![
                IpNetwork::V4(
                    ipnetwork::Ipv4Network::new_checked([10, 96, 0, 0].into(), 16).expect("a prefix"),
                ),
                IpNetwork::V6(
                    ipnetwork::Ipv6Network::new_checked([0xfd00, 0x96, 0, 0, 0, 0, 0, 0].into(), 112)
                        .expect("a prefix"),
                ),
            ],
            node_port_range: (30_000, 32_767),
            cluster_cidrs: ["10.244.0.0/16", "fd00:244::/48"]
                .iter()
                .filter_map(|range| range.parse().ok())
                .collect(),
            node_cidr_mask_size_ipv4: 24,
            node_cidr_mask_size_ipv6: 64,
            extra_sans: Vec::new(),
        }
    }
}

/// Why the control plane can't run.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The state directory can't be used.
    #[error("{op} {path}")]
    State {
        /// What was tried.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Another control plane has the state directory.
    #[error("{path} is in use by another control plane: stop it, or choose another --state-dir")]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// The file of the store can't be used.
    #[error("open the store")]
    Engine(#[source] EngineError),
    /// What the store holds can't be used.
    #[error("read the store")]
    Store(#[source] OpenError),
    /// The configured addresses can't be used.
    #[error("use the configured service addresses")]
    Addresses(#[source] AllocatorError),
    /// Nodes can't get shares of the cluster's ranges.
    #[error("use the configured pod ranges")]
    NodeRanges(#[source] NodeRangesError),
    /// The first objects can't be written.
    #[error("set up the cluster's first objects")]
    Bootstrap(#[source] ApiError),
    /// Certificates or kubeconfigs can't be made.
    #[error("set up the cluster's credentials")]
    Pki(#[source] PkiError),
    /// The API can't be served.
    #[error("serve the API")]
    Server(#[source] ServerError),
}

/// What is known once the control plane answers.
#[derive(Clone, Debug)]
pub struct Ready {
    /// Where it listens.
    pub address: SocketAddr,
    /// Credentials of the administrator.
    pub admin_kubeconfig: PathBuf,
    /// Credentials of agents.
    pub agent_kubeconfig: PathBuf,
}

/// Runs until `shutdown`.
pub async fn run(config: ControlConfig, shutdown: CancellationToken) -> Result<(), ControlError> {
    // Nobody waits for the signal.
    let (ready, _) = oneshot::channel();
    run_with(config, shutdown, ready).await
}

/// Like [`run`], and tells when it answers.
pub async fn run_with(
    config: ControlConfig,
    shutdown: CancellationToken,
    ready: oneshot::Sender<Ready>,
) -> Result<(), ControlError> {
    let (size_v4, size_v6) = (config.node_cidr_mask_size_ipv4, config.node_cidr_mask_size_ipv6);
    let node_ranges =
        NodeRanges::new(&config.cluster_cidrs, size_v4, size_v6).map_err(ControlError::NodeRanges)?;
    let _lock = lock_state(&config.state_dir)?;
    // First, because a taken port is the likeliest obstacle and must change nothing on disk.
    let listener = Server::bind(config.listen).await.map_err(ControlError::Server)?;
    let address = listener
        .local_addr()
        .map_err(|source| ControlError::Server(ServerError::Listen { address: config.listen, source }))?;
    let store = open_store(&config).await?;
    let ranges =
        AddressRanges { service_cidrs: config.service_cidrs.clone(), node_ports: config.node_port_range };
    let shared: Arc<dyn crate::store::Store> = Arc::clone(&store) as _;
    let registry = Registry::new(shared, &ranges).map_err(ControlError::Addresses)?;
    let advertise = advertised(config.advertise_address, address);
    registry.bootstrap(advertise).await.map_err(ControlError::Bootstrap)?;
    let authority = Authority::open(&config.state_dir.join("pki")).map_err(ControlError::Pki)?;
    let (tls, told) =
        credentials(&config, &authority, &registry, address, advertise).map_err(ControlError::Pki)?;
    let server = Server::new(listener, tls).map_err(ControlError::Server)?;

    let sweeper = tokio::spawn(sweep_events(registry.clone(), shutdown.clone()));
    let settings = controller::Config { root_ca: Some(authority.certificate_pem), node_ranges };
    let controllers = tokio::spawn(controller::run(registry.clone(), settings, shutdown.clone()));
    let scheduler = tokio::spawn(schedule::run(registry.clone(), shutdown.clone()));
    tracing::info!(%address, revision = registry.revision(), "the API is served");
    if ready.send(told).is_err() {
        tracing::trace!("nobody waits for the start");
    }
    server.run(registry, Arc::clone(&store), shutdown).await;
    for (what, task) in
        [("the sweeper of events", sweeper), ("the controllers", controllers), ("the scheduler", scheduler)]
    {
        if let Err(error) = task.await {
            tracing::error!(%error, "{what} ended badly");
        }
    }
    // Blocks until what was accepted is on disk.
    if let Err(error) = tokio::task::spawn_blocking(move || store.close()).await {
        tracing::error!(%error, "close the store");
    }
    Ok(())
}

/// One control plane a state directory: the lock goes with the process.
fn lock_state(dir: &std::path::Path) -> Result<std::fs::File, ControlError> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let error = |op, path: &std::path::Path| {
        let path = path.to_owned();
        move |source| ControlError::State { op, path, source }
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(error("make", dir))?;
    let path = dir.join("control.lock");
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(ControlError::InUse { path: dir.to_owned() }),
        Err(std::fs::TryLockError::Error(source)) => Err(error("lock", &path)(source)),
    }
}

async fn open_store(config: &ControlConfig) -> Result<Arc<LogStore>, ControlError> {
    let path = config.state_dir.join("store.redb");
    let open = move || {
        let engine = RedbEngine::open(&path).map_err(ControlError::Engine)?;
        LogStore::open(engine, index_stored).map(Arc::new).map_err(ControlError::Store)
    };
    match tokio::task::spawn_blocking(open).await {
        Ok(store) => store,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

fn credentials(
    config: &ControlConfig,
    authority: &Authority,
    registry: &Registry,
    address: SocketAddr,
    advertise: Option<SocketAddr>,
) -> Result<(ServerTls, Ready), PkiError> {
    let mut addresses = registry.api_service_addresses().to_vec();
    addresses.extend(advertise.map(|at| at.ip()));
    if !address.ip().is_unspecified() {
        addresses.push(address.ip());
    }
    let mut names = Vec::new();
    for san in &config.extra_sans {
        match san.parse() {
            Ok(ip) => addresses.push(ip),
            Err(_) => names.push(san.clone()),
        }
    }
    let tls = ServerTls {
        authority: authority.certificate.clone(),
        server: authority.server(&addresses, &names)?,
        agent_client: authority.client("kube-apiserver-kubelet-client", "system:masters")?,
    };
    let local = if address.ip().is_unspecified() {
        SocketAddr::new(IpAddr::from([127, 0, 0, 1]), address.port())
    } else {
        address
    };
    let told = Ready {
        address,
        admin_kubeconfig: config.state_dir.join("admin.kubeconfig"),
        agent_kubeconfig: config.state_dir.join("agent.kubeconfig"),
    };
    let admin = authority.client("kubernetes-admin", "system:masters")?;
    let admin = authority.kubeconfig(local, "kubernetes-admin", &admin);
    write_private(&told.admin_kubeconfig, admin.as_bytes())?;
    let agent = authority.kubeconfig(advertise.unwrap_or(local), "sheave-agent", &authority.agent()?);
    write_private(&told.agent_kubeconfig, agent.as_bytes())?;
    Ok((tls, told))
}

async fn sweep_events(registry: Registry, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(EVENT_SWEEP_SECS)) => {}
            () = shutdown.cancelled() => return,
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        match registry.expire_events(now, EVENT_TTL_SECS).await {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "events expired"),
            Err(error) => tracing::warn!(%error, "expire events"),
        }
    }
}
