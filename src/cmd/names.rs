//! What only the API and the agent know of services: their names and addresses, and why one is not wholly balanced.
//! Invariant: without them a command says less, never something wrong.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, ListParams};
use serde_json::Value;
use sheave_agent::service::{FrontendKey, Proto};

/// How long the API server or the agent may take, since names are an extra.
const PATIENCE: Duration = Duration::from_secs(3);

/// The addresses that a Service is reached at. NodePorts have the unspecified address.
pub(super) fn frontends(service: &Service) -> Vec<FrontendKey> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let ingress = service.status.iter().filter_map(|status| status.load_balancer.as_ref());
    let ingress = ingress.flat_map(|held| held.ingress.iter().flatten());
    let ingress = ingress.filter(|at| at.ip_mode.as_deref() != Some("Proxy")).filter_map(|at| at.ip.as_ref());
    let cluster_ips: Vec<IpAddr> = parse(spec.cluster_ips.iter().flatten());
    let addresses: Vec<IpAddr> = cluster_ips
        .iter()
        .copied()
        .chain(parse(spec.external_ips.iter().flatten()))
        .chain(parse(ingress))
        .collect();
    let mut found = Vec::new();
    for port in spec.ports.iter().flatten() {
        let Some(proto) = Proto::from_name(port.protocol.as_deref().unwrap_or("TCP")) else { continue };
        let number = |number: i32| u16::try_from(number).ok().filter(|port| *port != 0);
        if let Some(port) = number(port.port) {
            found.extend(addresses.iter().map(|addr| FrontendKey { addr: *addr, port, proto }));
        }
        if let Some(port) = port.node_port.and_then(number) {
            let any = |addr: &IpAddr| -> IpAddr {
                if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
            };
            found.extend(cluster_ips.iter().map(|addr| FrontendKey { addr: any(addr), port, proto }));
        }
    }
    found
}

fn parse<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    texts.filter_map(|text| text.parse().ok()).collect()
}

/// One Service by its name.
pub(super) async fn service(kubeconfig: &Path, namespace: &str, name: &str) -> Result<Service> {
    let client = super::apply::client(kubeconfig).await?;
    let api = Api::<Service>::namespaced(client, namespace);
    let found =
        tokio::time::timeout(PATIENCE, api.get(name)).await.context("the API server does not answer")?;
    found.with_context(|| format!("looking up service {namespace}/{name}"))
}

/// Names of all services by their frontends.
pub(super) async fn all(kubeconfig: &Path) -> Result<HashMap<FrontendKey, String>> {
    let client = super::apply::client(kubeconfig).await?;
    let api = Api::<Service>::all(client);
    let params = ListParams::default();
    let listed = tokio::time::timeout(PATIENCE, api.list(&params))
        .await
        .context("the API server does not answer")??;
    let mut names = HashMap::new();
    for service in &listed {
        let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
        let name = format!("{namespace}/{}", service.metadata.name.as_deref().unwrap_or_default());
        names.extend(frontends(service).into_iter().map(|key| (key, name.clone())));
    }
    Ok(names)
}

/// What the running agent says at a path of its health address, as JSON.
pub(super) fn of_agent(address: SocketAddr, path: &str) -> Result<Value> {
    let unreachable = || format!("asking the agent at {address}");
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).with_context(unreachable)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(unreachable)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    serde_json::from_str(body).with_context(unreachable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_service_is_reached_at_all_its_addresses() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {
                "clusterIPs": ["10.96.0.5", "fd00::5"], "externalIPs": ["192.0.2.7"],
                "ports": [{"port": 80, "nodePort": 30080}, {"port": 53, "protocol": "UDP"}],
            },
            "status": {"loadBalancer": {"ingress": [
                {"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "Proxy"}, {"hostname": "a.b"},
            ]}},
        }))
        .unwrap();
        let found: Vec<String> = frontends(&service)
            .iter()
            .map(|key| format!("{} {}", SocketAddr::new(key.addr, key.port), key.proto.name()))
            .collect();
        let wanted = [
            "10.96.0.5:80 TCP",
            "[fd00::5]:80 TCP",
            "192.0.2.7:80 TCP",
            "198.51.100.1:80 TCP",
            "0.0.0.0:30080 TCP",
            "[::]:30080 TCP",
            "10.96.0.5:53 UDP",
            "[fd00::5]:53 UDP",
            "192.0.2.7:53 UDP",
            "198.51.100.1:53 UDP",
        ];
        assert_eq!(found, wanted);
    }
}
