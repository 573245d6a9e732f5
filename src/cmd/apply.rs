//! `sheave apply`: server-side apply of a manifest, for hosts that have no kubectl.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::discovery::Discovery;
use kube::{Client, ResourceExt};
use serde::Deserialize;

use crate::cli::ApplyFlags;

pub(super) fn run(flags: &ApplyFlags) -> Result<()> {
    let text = std::fs::read_to_string(&flags.filename)
        .with_context(|| format!("reading {}", flags.filename.display()))?;
    let objects = parse(&text).with_context(|| format!("parsing {}", flags.filename.display()))?;
    let kubeconfig = super::kubeconfig(&flags.base, flags.kubeconfig.as_deref())?;
    super::runtime()?.block_on(apply(&kubeconfig, &objects))
}

fn parse(text: &str) -> Result<Vec<DynamicObject>> {
    let mut objects = Vec::new();
    for (number, document) in serde_yaml_documents(text)?.into_iter().enumerate() {
        let object = DynamicObject::deserialize(document).with_context(|| {
            format!("document {}: an object needs apiVersion, kind and metadata", number + 1)
        })?;
        objects.push(object);
    }
    Ok(objects)
}

fn serde_yaml_documents(text: &str) -> Result<Vec<serde_json::Value>> {
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(text)?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

async fn apply(kubeconfig: &Path, objects: &[DynamicObject]) -> Result<()> {
    let client = client(kubeconfig).await?;
    let discovery = Discovery::new(client.clone()).run().await.context("discovery")?;
    for object in objects {
        let types = object.types.clone().context("an object without apiVersion and kind")?;
        let gvk = kube::core::GroupVersionKind::try_from(&types)?;
        let (resource, capabilities) = discovery
            .resolve_gvk(&gvk)
            .with_context(|| format!("the API server does not serve {} {}", types.api_version, types.kind))?;
        let api: Api<DynamicObject> = match capabilities.scope {
            kube::discovery::Scope::Cluster => Api::all_with(client.clone(), &resource),
            kube::discovery::Scope::Namespaced => {
                let namespace = object.namespace().unwrap_or_else(|| "default".to_owned());
                Api::namespaced_with(client.clone(), &namespace, &resource)
            }
        };
        let name = object.metadata.name.as_deref().context("an object without metadata.name")?;
        api.patch(name, &PatchParams::apply("sheave").force(), &Patch::Apply(object))
            .await
            .with_context(|| format!("applying {} {name}", types.kind))?;
        writeln!(std::io::stdout(), "{}/{name} applied", resource.plural)?;
    }
    Ok(())
}

/// A client for the API server that `kubeconfig` names.
pub(super) async fn client(kubeconfig: &Path) -> Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("reading {}; name another with --kubeconfig", kubeconfig.display()))?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_documents_are_several_objects() {
        let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: b\n";
        let objects = parse(text).unwrap();
        assert_eq!(objects.iter().map(|o| o.name_any()).collect::<Vec<_>>(), ["a", "b"]);
    }
}
