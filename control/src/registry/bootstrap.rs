//! What every cluster has from its first moment: the permanent namespaces and the service through
//! which pods reach the API server. Running it again changes nothing that is right already.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::{PERMANENT_NAMESPACES, Registry, WriteOpts};
use crate::resource::{ApiError, Kind, Subresource, kinds};

impl Registry {
    /// Creates or repairs the permanent objects. `advertise` is where nodes reach the API server.
    pub async fn bootstrap(&self, advertise: Option<SocketAddr>) -> Result<(), ApiError> {
        for name in PERMANENT_NAMESPACES {
            let namespace = json!({"metadata": {"name": name}});
            self.ensure(&kinds::NAMESPACES, "", name, namespace).await?;
        }
        let families = self.api_service_addresses();
        let service = json!({
            "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": families[0].to_string(),
                "clusterIPs": [families[0].to_string()],
                "ports": [{
                    "name": "https", "port": 443, "protocol": "TCP",
                    "targetPort": advertise.map_or(6443, |at| at.port()),
                }],
            },
        });
        self.ensure(&kinds::SERVICES, "default", "kubernetes", service).await?;
        if let Some(at) = advertise {
            let slice = json!({
                "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
                "addressType": if at.is_ipv4() { "IPv4" } else { "IPv6" },
                "endpoints": [{"addresses": [at.ip().to_string()], "conditions": {"ready": true}}],
                "ports": [{"name": "https", "port": at.port(), "protocol": "TCP"}],
            });
            self.settle(&kinds::ENDPOINT_SLICES, "default", "kubernetes", slice).await?;
        }
        Ok(())
    }

    async fn ensure(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        object: Value,
    ) -> Result<(), ApiError> {
        if self.get(kind, namespace, name).is_ok() {
            return Ok(());
        }
        match self.create(kind, namespace, object, WriteOpts::default()).await {
            Err(error) if !error.is_already_exists() => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Creates the object, or brings the stored one to its content.
    async fn settle(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        object: Value,
    ) -> Result<(), ApiError> {
        if let Ok(stored) = self.get(kind, namespace, name) {
            // The address family of a slice can't be changed in place.
            if stored.value().get("addressType") == object.get("addressType") {
                let opts = WriteOpts::default();
                self.update(kind, namespace, name, Subresource::Main, object, opts).await?;
                return Ok(());
            }
            self.delete(kind, namespace, name, crate::resource::DeleteOptions::default()).await?;
        }
        self.ensure(kind, namespace, name, object).await
    }
}

/// Where nodes reach the server: the given address, else the one it listens on unless that is a
/// wildcard or the loopback that other hosts can't use.
pub fn advertised(advertise: Option<IpAddr>, listen: SocketAddr) -> Option<SocketAddr> {
    let reachable = !listen.ip().is_unspecified() && !listen.ip().is_loopback();
    let ip = advertise.or_else(|| reachable.then_some(listen.ip()))?;
    Some(SocketAddr::new(ip, listen.port()))
}
