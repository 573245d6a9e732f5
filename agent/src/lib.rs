//! The node daemon. `run` is the whole life of an agent, read from top to bottom; everything that
//! runs on the node outlives it.

pub mod cluster;
pub mod config;
pub mod dataplane;
pub mod limits;
pub mod memory;
pub mod network;
pub mod pod;
pub mod policy;
pub mod preflight;
pub mod runtime;
pub mod server;
pub mod service;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::{AgentConfig, Component, ConfigError};
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use cluster::{Client, events, lease, node, pods};
use dataplane::ebpf::GuardConfig;
use dataplane::{DataplaneConfig, StatsHandle};
use network::cni::{CniSettings, Door};
use network::overlay::{self, Overlay, OverlayConfig, OverlayView, Peer, PeersFile};
use network::{Network, NetworkConfig};
use pod::act::Means;
use pod::driver::Driver;
use pod::prober::Prober;
use pod::spec::NodeSettings;
use pod::worker::{Clock, Shared};
use policy::driver::{PolicyConfig, PolicyStats};
use runtime::image::ImageStore;
use runtime::{Runtime, RuntimeConfig, RuntimeEvent};
use server::metrics::Metrics;
use server::tls::Shown;

/// Why an agent could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration contradicts itself.
    #[error("configuration of the agent")]
    Config(#[from] ConfigError),
    /// The host lacks something.
    #[error("this host lacks {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Host(Vec<preflight::Missing>),
    /// A file or directory of the agent's own can't be used.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The kubeconfig can't be used.
    #[error("kubeconfig {path}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: kube::config::KubeconfigError,
    },
    /// No client can be made of the kubeconfig.
    #[error("client for {path}")]
    Client {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<kube::Error>,
    },
    /// An address is taken or not this host's.
    #[error("listening on {address} ({field})")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting.
        field: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The https listener has no identity.
    #[error("the https listener")]
    Tls(#[from] server::tls::TlsError),
    /// The probes' TLS can't be set up.
    #[error("TLS of probes")]
    ProbeTls(#[from] rustls::Error),
    /// Containers can't be run.
    #[error("starting the container runtime")]
    Runtime(#[from] runtime::RuntimeError),
    /// Images can't be used.
    #[error("opening the image store")]
    Images(#[from] runtime::image::ImageError),
    /// Volumes could not be shown to pods.
    #[error("preparing volumes: {0}")]
    Volumes(String),
    /// Pods can't be connected.
    #[error("starting the pod network")]
    Network(#[from] network::NetworkError),
    /// The peers file can't be used.
    #[error("the overlay's peers")]
    Peers(#[from] network::overlay::PeersError),
    /// The peers file says nothing of this node.
    #[error("peers file {path} does not name this node, {node}: add an entry for it, or give --pod-cidr")]
    NotAmongPeers {
        /// The file.
        path: PathBuf,
        /// The node.
        node: String,
    },
    /// Services can't be balanced.
    #[error("starting the data plane")]
    Dataplane(#[from] Box<dataplane::DataplaneError>),
    /// A part of the agent ended that never should.
    #[error("the agent's {0} ended unexpectedly")]
    Ended(&'static str),
}

/// Runs an agent until `shutdown` is cancelled. Containers, their network and the service tables stay
/// as they are when it returns; the next agent adopts them.
pub async fn run(mut config: AgentConfig, shutdown: CancellationToken) -> Result<(), AgentError> {
    complete(&mut config)?;
    config.validate()?;
    let missing = preflight::check(&preflight::Host::read(), &config);
    if !missing.is_empty() {
        return Err(AgentError::Host(missing));
    }
    make_directories(&config)?;
    let api = match config.needs_api() {
        true => Some(connect(&config.kubeconfig).await?),
        false => None,
    };
    let health_listener = listen(config.health_listen, "health_listen").await?;
    let metrics = Metrics::default();
    let mut tasks: JoinSet<Result<(), AgentError>> = JoinSet::new();
    let (mut registry, mut network) = (None, None);
    if config.does(Component::Network) {
        let client = api.as_ref().map(|(client, _)| client);
        if !find_ranges(&mut config, client, &shutdown).await? {
            return Ok(());
        }
        let (opened, overlay) = open_network(&config).await?;
        let peers = watch_peers(&config, client, &mut tasks, &shutdown);
        spawn(&mut tasks, "overlay", overlay.run(peers, opened.clone(), shutdown.clone()), &shutdown);
        let door = Door::open(opened.clone(), CniSettings::below(&config.run_dir, &config.state_dir)).await?;
        spawn(&mut tasks, "CNI server", door.serve(shutdown.clone()), &shutdown);
        if let Some(client) = client {
            tell_exhaustion(client, &config.node_name, &opened, &mut tasks, &shutdown);
        }
        network = Some(opened);
    }
    if let (Some((client, credentials)), Some(network), true) = (&api, &network, config.does(Component::Pods))
    {
        let pods = open_pods(&config, client, credentials, network, &metrics, &shutdown).await?;
        registry = Some(pods.shared.registry.clone());
        pods.spawn(&config, client, &mut tasks, &shutdown);
    }
    let stats = StatsHandle::default();
    // Outlives the other parts: that the agent is about to end is said before it does.
    let last = CancellationToken::new();
    if let (Some((client, _)), true) = (&api, config.does(Component::Services)) {
        let plane = dataplane::run(client.kube(), dataplane_config(&config, &stats), shutdown.clone());
        tasks.spawn(async move { plane.await.map_err(|error| AgentError::Dataplane(Box::new(error))) });
        serve_proxy(&config, client, &stats, &last);
    }
    let policies = PolicyStats::default();
    if network.is_some() {
        let client = api.as_ref().map(|(client, _)| client.kube());
        let enforcing =
            policy::driver::run(client, policy_config(&config), policies.clone(), shutdown.clone());
        spawn(&mut tasks, "network policies", enforcing, &shutdown);
    }
    let health = Arc::new(health(&metrics, registry, stats.clone(), network.is_some().then_some(policies)));
    let serving = server::serve_health(health_listener, health, shutdown.clone());
    spawn(&mut tasks, "health listener", serving, &shutdown);
    spawn(&mut tasks, "memory", memory::give_back(shutdown.clone()), &shutdown);
    tracing::info!(node = config.node_name, version = env!("CARGO_PKG_VERSION"), "agent started");
    let mut result = Ok(());
    tokio::select! {
        () = shutdown.cancelled() => {}
        Some(ended) = tasks.join_next() => result = ended.unwrap_or(Err(AgentError::Ended("task"))),
    }
    stats.health.stop();
    shutdown.cancel();
    let settle = limits::secs(limits::SHUTDOWN_TIMEOUT_S);
    if tokio::time::timeout(settle, async { while tasks.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!("parts of the agent did not end in time and are cut off");
    }
    last.cancel();
    tracing::info!("agent stopped; what runs keeps running");
    result
}

/// Answers load balancers until `last`.
fn serve_proxy(config: &AgentConfig, client: &Client, stats: &StatsHandle, last: &CancellationToken) {
    let (health, proxy) = (stats.health.clone(), stats.proxy.clone());
    let address = config.services.proxy_health_listen;
    tokio::spawn(server::proxy::serve_proxy(address, health.clone(), proxy, last.clone()));
    tokio::spawn(server::proxy::serve_checks(stats.checks(), health.clone(), last.clone()));
    let name = config.node_name.clone();
    tokio::spawn(cluster::departure::watch(client.kube(), name, health, last.clone()));
}

/// What an agent with this configuration tells its data plane.
pub fn dataplane_config(config: &AgentConfig, stats: &StatsHandle) -> DataplaneConfig {
    let services = &config.services;
    DataplaneConfig {
        mode: services.data_plane,
        pod_links: pod_links(config),
        pod_packets: services.pod_packets.unwrap_or_else(|| !config.does(Component::Pods)),
        host_routing: services.host_routing,
        watched_pod_links: config.does(Component::Network),
        node_port_addresses: services.node_port_addresses.clone(),
        masquerade_all: services.masquerade_all,
        xdp: services.xdp,
        ipvs_scheduler: services.ipvs_scheduler,
        kube_proxy_leftovers: services.kube_proxy_leftovers,
        sizes: services.map_sizes.sizes(u64::try_from(node::read_memory().0).unwrap_or(0)),
        run_dir: Some(config.run_dir.clone()),
        pin_dir: config.pin_dir.clone(),
        cgroup_path: config.cgroup_path.clone(),
        uplinks: config.uplinks.clone(),
        node_name: config.node_name.clone(),
        node_ips: config.node_ips.clone(),
        node_port_range: config.node_port_range,
        pod_cidrs: config.pod_cidrs.clone(),
        stats: stats.clone(),
    }
}

fn policy_config(config: &AgentConfig) -> PolicyConfig {
    PolicyConfig {
        guard: GuardConfig { pin_dir: config.pin_dir.clone(), fast: config.fast_path },
        node_name: config.node_name.clone(),
        pod_links: pod_links(config),
        uplinks: config.uplinks.clone(),
        tunnels: ["sheave-vx4", "sheave-vx6"].map(str::to_owned).into(),
    }
}

/// Beginnings of the names of pods' devices: those that the agent makes itself, and those it was told of.
fn pod_links(config: &AgentConfig) -> Vec<String> {
    let own = config.does(Component::Network).then(|| network::NODE_LINK_PREFIX.to_owned());
    own.into_iter().chain(config.services.pod_links.iter().cloned()).collect()
}

/// Fills in what the host knows.
fn complete(config: &mut AgentConfig) -> Result<(), AgentError> {
    if config.node_name.is_empty() {
        let name = nix::unistd::gethostname().unwrap_or_default();
        config.node_name = name.to_string_lossy().to_lowercase();
    }
    if let Some(path) = config.overlay.peers_file.clone().filter(|_| config.does(Component::Network)) {
        let file = PeersFile::read(&path)?;
        match file.node(&config.node_name) {
            Some(own) => {
                if config.node_ips.is_empty() {
                    config.node_ips.clone_from(&own.node_ips);
                }
                if config.pod_cidrs_of_node {
                    config.pod_cidrs.clone_from(&own.pod_cidrs);
                }
            }
            None if config.pod_cidrs_of_node => {
                return Err(AgentError::NotAmongPeers { path, node: config.node_name.clone() });
            }
            None => {}
        }
        config.pod_cidrs_of_node = false;
    }
    if config.node_ips.is_empty() || config.uplinks.is_empty() {
        let found = network::node_addresses(&config.uplinks)?;
        if config.node_ips.is_empty() {
            config.node_ips = found.ips;
        }
        if config.uplinks.is_empty() {
            config.uplinks = found.uplinks;
        }
    }
    Ok(())
}

fn memory_dir(config: &AgentConfig) -> PathBuf {
    config.run_dir.join("agent")
}

fn make_directories(config: &AgentConfig) -> Result<(), AgentError> {
    let mut dirs = vec![config.state_dir.clone(), config.run_dir.clone(), memory_dir(config)];
    if config.does(Component::Pods) {
        dirs.push(config.log_dir.clone());
    }
    dirs.extend(config.cgroup_path.clone());
    for path in dirs {
        if let Err(source) = std::fs::create_dir_all(&path) {
            return Err(AgentError::Io { op: "making directory", path, source });
        }
    }
    Ok(())
}

/// What the kubeconfig says beside the way to the API server.
struct Credentials {
    /// DER certificates of the cluster's authority.
    cas: Vec<Vec<u8>>,
    /// PEM certificate and key that the agent shows the API server.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// The client certificate of a kubeconfig, from its data or its files.
fn identity(auth: &kube::config::AuthInfo) -> Option<(Vec<u8>, Vec<u8>)> {
    use base64::Engine;
    let decode = |data: &str| base64::engine::general_purpose::STANDARD.decode(data).ok();
    let certificate = match &auth.client_certificate_data {
        Some(data) => decode(data)?,
        None => std::fs::read(auth.client_certificate.as_ref()?).ok()?,
    };
    let key = match &auth.client_key_data {
        Some(data) => decode(data.expose_secret())?,
        None => std::fs::read(auth.client_key.as_ref()?).ok()?,
    };
    Some((certificate, key))
}

async fn connect(path: &Path) -> Result<(Client, Credentials), AgentError> {
    let wrong = |source| AgentError::Kubeconfig { path: path.to_owned(), source };
    let kubeconfig = kube::config::Kubeconfig::read_from(path).map_err(wrong)?;
    let options = kube::config::KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(wrong)?;
    config.connect_timeout = Some(limits::secs(limits::API_CONNECT_TIMEOUT_S));
    let cas = config.root_cert.clone().unwrap_or_default();
    let credentials = Credentials { cas, identity: identity(&config.auth_info) };
    let client = kube::Client::try_from(config)
        .map_err(|source| AgentError::Client { path: path.to_owned(), source: Box::new(source) })?;
    Ok((Client::new(client), credentials))
}

async fn listen(address: SocketAddr, field: &'static str) -> Result<TcpListener, AgentError> {
    TcpListener::bind(address).await.map_err(|source| AgentError::Listen { address, field, source })
}

/// Puts the Node's ranges into the configuration where it asks for them; false when the agent is to end first.
async fn find_ranges(
    config: &mut AgentConfig,
    client: Option<&Client>,
    shutdown: &CancellationToken,
) -> Result<bool, AgentError> {
    let Some(client) = client.filter(|_| config.pod_cidrs_of_node) else { return Ok(true) };
    let facts = node::Facts { pod_cidrs: Vec::new(), ..node_facts(config, 0) };
    let register = config.does(Component::Pods);
    let Some(ranges) = cluster::ranges::wait(client, &facts, register, &config.state_dir, shutdown).await
    else {
        return Ok(false);
    };
    tracing::info!(node = config.node_name, ?ranges, "pod ranges of this node");
    config.pod_cidrs = ranges;
    config.validate()?;
    Ok(true)
}

/// What connects pods, those of this agent and those of other runtimes.
async fn open_network(config: &AgentConfig) -> Result<(Network, Overlay), AgentError> {
    let view = OverlayView::default();
    let overlay = OverlayConfig {
        settings: config.overlay.clone(),
        node_name: config.node_name.clone(),
        node_ips: config.node_ips.clone(),
        pod_cidrs: config.pod_cidrs.clone(),
        uplinks: config.uplinks.clone(),
        run_dir: config.run_dir.clone(),
        view: view.clone(),
    };
    let network = NetworkConfig {
        state_dir: config.state_dir.clone(),
        node_ips: config.node_ips.clone(),
        pod_cidrs: config.pod_cidrs.clone(),
        uplinks: config.uplinks.clone(),
        overlay: view,
    };
    let network = Network::open(network).await?;
    let overlay = Overlay::open(overlay, network.nat()).await?;
    // The first pod gets the MTU that it is to have.
    network.look_again().await?;
    Ok((network, overlay))
}

/// Other nodes, from the peers file or else from the API.
fn watch_peers(
    config: &AgentConfig,
    client: Option<&Client>,
    tasks: &mut JoinSet<Result<(), AgentError>>,
    shutdown: &CancellationToken,
) -> tokio::sync::watch::Receiver<Option<Vec<Peer>>> {
    let (told, peers) = tokio::sync::watch::channel(None);
    let name = config.node_name.clone();
    match (&config.overlay.peers_file, client) {
        (Some(path), _) => {
            let following = overlay::follow(path.clone(), name, told, shutdown.clone());
            spawn(tasks, "peers file", following, shutdown);
        }
        (None, Some(client)) => {
            let ranges = config.pod_cidrs.clone();
            let watching = cluster::peers::watch(client.kube(), name, ranges, told, shutdown.clone());
            spawn(tasks, "watch of nodes", watching, shutdown);
        }
        // `needs_api` is false only with a peers file.
        (None, None) => {}
    }
    peers
}

/// Makes an event of the node each time that no address was left for a runtime's container.
fn tell_exhaustion(
    client: &Client,
    node: &str,
    network: &Network,
    tasks: &mut JoinSet<Result<(), AgentError>>,
    shutdown: &CancellationToken,
) {
    let (recorder, telling) = events::Recorder::start(client.clone(), node.to_owned(), shutdown.clone());
    spawn(tasks, "events of the network", telling, shutdown);
    let (mut exhaustion, name, shutdown) = (network.exhaustion(), node.to_owned(), shutdown.clone());
    let watching = async move {
        while exhaustion.changed().await.is_ok() {
            let message = exhaustion.borrow_and_update().clone();
            let subject = events::Subject::node(&name);
            let reason = "PodAddressesExhausted";
            let note = pod::machine::Note { warning: true, reason, message, container: None };
            recorder.record(subject, note, false);
        }
    };
    let stop = shutdown.clone();
    tasks.spawn(async move {
        tokio::select! { () = watching => {} () = stop.cancelled() => {} }
        Ok(())
    });
}

/// Everything that runs pods, open but idle.
struct Pods {
    shared: Arc<Shared>,
    events: mpsc::UnboundedReceiver<RuntimeEvent>,
    telling: futures::future::BoxFuture<'static, ()>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    facts: node::Facts,
}

async fn open_pods(
    config: &AgentConfig,
    client: &Client,
    credentials: &Credentials,
    network: &Network,
    metrics: &Metrics,
    shutdown: &CancellationToken,
) -> Result<Pods, AgentError> {
    let listener = listen(config.listen, "listen").await?;
    let port = listener.local_addr().map_or(config.listen.port(), |address| address.port());
    let shown = match (&config.tls_cert, &config.tls_key, &credentials.identity) {
        (Some(cert), Some(key), _) => Shown::Files(cert, key),
        (_, _, Some((certificate, key))) => Shown::Pem { certificate, key },
        _ => Shown::SelfSigned,
    };
    let tls = server::tls::server_config(shown, &config.node_name, &config.node_ips, &credentials.cas)?;
    let (runtime, events) = Runtime::open(RuntimeConfig {
        state_dir: config.state_dir.clone(),
        run_dir: config.run_dir.clone(),
        log_dir: config.log_dir.clone(),
        cgroup_path: config.cgroup_path.clone(),
        shim_exe: config.shim_exe.clone(),
    })
    .await?;
    pod::volumes::share(&config.state_dir.join("pods")).map_err(AgentError::Volumes)?;
    let state_dir = config.state_dir.clone();
    let images = tokio::task::spawn_blocking(move || ImageStore::open(&state_dir))
        .await
        .map_err(|_| AgentError::Ended("image store"))??;
    let facts = node_facts(config, port);
    let (recorder, telling) =
        events::Recorder::start(client.clone(), config.node_name.clone(), shutdown.clone());
    let means = Means {
        prober: Prober::new(runtime.clone())?,
        runtime,
        images,
        network: network.clone(),
        api: client.clone(),
        node: node_settings(config, &facts),
        state_dir: config.state_dir.clone(),
        log_dir: config.log_dir.clone(),
        starts: tokio::sync::Semaphore::new(limits::POD_STARTS_IN_FLIGHT_MAX),
    };
    let shared = Arc::new(Shared {
        means: Arc::new(means),
        recorder,
        metrics: metrics.clone(),
        registry: pod::registry::Registry::default(),
        memory_dir: memory_dir(config),
        clock: Clock::start(),
    });
    Ok(Pods { shared, events, telling: Box::pin(telling), listener, tls, facts })
}

fn node_facts(config: &AgentConfig, port: u16) -> node::Facts {
    node::Facts {
        name: config.node_name.clone(),
        ips: config.node_ips.clone(),
        pod_cidrs: config.pod_cidrs.clone(),
        labels: config.node_labels.clone(),
        port,
        cpus: std::thread::available_parallelism().map_or(1, |n| i64::try_from(n.get()).unwrap_or(1)),
        memory_bytes: node::read_memory().0,
        storage_bytes: node::read_storage(&config.state_dir),
        max_pods: config.max_pods,
        info: node::read_info(),
    }
}

fn node_settings(config: &AgentConfig, facts: &node::Facts) -> NodeSettings {
    let resolver = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    NodeSettings {
        ips: config.node_ips.clone(),
        allocatable: facts.allocatable(),
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        resolver: pod::spec::parse_resolver(&resolver),
    }
}

impl Pods {
    fn spawn(
        self,
        config: &AgentConfig,
        client: &Client,
        tasks: &mut JoinSet<Result<(), AgentError>>,
        shutdown: &CancellationToken,
    ) {
        let (uid, uid_seen) = tokio::sync::watch::channel(String::new());
        let revived = Arc::new(tokio::sync::Notify::new());
        let keeper = node::Keeper {
            client: client.clone(),
            facts: self.facts,
            storage: config.state_dir.clone(),
            uid,
            revived: revived.clone(),
        };
        spawn(tasks, "node registration", keeper.keep(shutdown.clone()), shutdown);
        let name = config.node_name.clone();
        let lease = lease::keep(client.clone(), name, uid_seen, revived, shutdown.clone());
        spawn(tasks, "lease renewal", lease, shutdown);
        spawn(tasks, "event recorder", self.telling, shutdown);
        let node = server::Node {
            runtime: self.shared.means.runtime.clone(),
            registry: self.shared.registry.clone(),
            log_dir: config.log_dir.clone(),
        };
        let serving = server::serve_node(self.listener, self.tls, node, shutdown.clone());
        spawn(tasks, "https listener", serving, shutdown);
        let watch = pods::watch(client.kube(), &config.node_name);
        let driver = Driver::run(self.shared, watch, self.events, shutdown.clone());
        spawn(tasks, "pod driver", driver, shutdown);
    }
}

/// Starts a part that ends only with the agent.
fn spawn(
    tasks: &mut JoinSet<Result<(), AgentError>>,
    name: &'static str,
    work: impl Future<Output = ()> + Send + 'static,
    shutdown: &CancellationToken,
) {
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        work.await;
        if shutdown.is_cancelled() { Ok(()) } else { Err(AgentError::Ended(name)) }
    });
}

fn health(
    metrics: &Metrics,
    pods: Option<pod::registry::Registry>,
    stats: StatsHandle,
    policies: Option<PolicyStats>,
) -> server::Health {
    let mut registry = prometheus_client::registry::Registry::default();
    metrics.register(&mut registry);
    stats.proxy.register(&mut registry);
    let (metrics, services) = (metrics.clone(), stats.clone());
    let refresh = move |out: &mut String| {
        server::metrics::write_dataplane(out, &stats.snapshot());
        if let Some(policies) = &policies {
            server::metrics::write_policies(out, &policies.snapshot());
        }
        if let Some(pods) = &pods {
            let (_, running) = pods.counts();
            metrics.containers.set(i64::try_from(running).unwrap_or(i64::MAX));
        }
    };
    server::Health { metrics: registry, refresh: server::Refresh(Box::new(refresh)), services }
}
