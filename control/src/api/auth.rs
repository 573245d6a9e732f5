//! Who asks, and whether they may. Identity is the client certificate's subject (CN the user, O
//! the groups); rules are static: masters may do everything, nodes what an agent needs.

use x509_parser::prelude::{FromDer, X509Certificate};

use super::request::Target;
use crate::resource::{ApiError, Subresource, kinds};

/// A caller whose certificate our authority signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Common name.
    pub user: String,
    /// Organisations.
    pub groups: Vec<String>,
}

/// What a request does, in the words of Kubernetes' authorisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }

    pub(super) fn mutates(self) -> bool {
        !matches!(self, Self::Get | Self::List | Self::Watch)
    }
}

impl Identity {
    /// Reads a certificate that was verified; `None` when it names nobody.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
        Some(Self { user, groups })
    }

    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

/// Whether `identity` may do this; 403 says what was refused.
pub(super) fn authorize(identity: &Identity, verb: Verb, target: &Target) -> Result<(), ApiError> {
    if identity.is_in("system:masters") || (identity.is_in("system:nodes") && node_may(verb, target)) {
        return Ok(());
    }
    let sub =
        if target.sub == Subresource::Main { String::new() } else { format!("/{}", target.sub.as_str()) };
    let scope = match &target.namespace {
        Some(namespace) => format!("in the namespace {namespace:?}"),
        None => "at the cluster scope".to_owned(),
    };
    let why = format!(
        "User {:?} cannot {} resource \"{}{sub}\" in API group {:?} {scope}",
        identity.user,
        verb.as_str(),
        target.kind.plural,
        target.kind.group
    );
    Err(ApiError::forbidden(target.kind, target.name.as_deref().unwrap_or(""), &why))
}

/// Whether a caller without a resource in mind (discovery, metrics) may be answered.
pub(super) fn may_look(identity: &Identity) -> bool {
    identity.is_in("system:masters") || identity.is_in("system:nodes")
}

fn node_may(verb: Verb, target: &Target) -> bool {
    let kind = target.kind;
    if !verb.mutates() {
        return target.sub != Subresource::Log;
    }
    match (verb, target.sub) {
        (Verb::Create | Verb::Update | Verb::Patch, Subresource::Main) => {
            kind == &kinds::NODES || kind == &kinds::EVENTS || kind == &kinds::LEASES
        }
        (Verb::Update | Verb::Patch, Subresource::Status) => kind == &kinds::NODES || kind == &kinds::PODS,
        (Verb::Delete, Subresource::Main) => kind == &kinds::PODS,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::{segments, target};
    use super::*;

    fn may(group: &str, verb: Verb, path: &str) -> bool {
        let identity = Identity { user: "u".to_owned(), groups: vec![group.to_owned()] };
        authorize(&identity, verb, &target(&segments(path).unwrap()).unwrap()).is_ok()
    }

    #[test]
    fn masters_may_everything_and_strangers_nothing() {
        assert!(may("system:masters", Verb::Delete, "/api/v1/nodes/n"));
        assert!(!may("system:authenticated", Verb::Get, "/api/v1/nodes/n"));
    }

    #[test]
    fn nodes_report_but_do_not_rule() {
        let node = "system:nodes";
        assert!(may(node, Verb::Watch, "/api/v1/pods"));
        assert!(may(node, Verb::Get, "/api/v1/namespaces/d/secrets/s"));
        assert!(may(node, Verb::Patch, "/api/v1/namespaces/d/pods/p/status"));
        assert!(may(node, Verb::Delete, "/api/v1/namespaces/d/pods/p"));
        assert!(may(node, Verb::Create, "/api/v1/nodes"));
        assert!(may(node, Verb::Update, "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n"));
        assert!(!may(node, Verb::Create, "/api/v1/namespaces/d/pods"));
        assert!(!may(node, Verb::Patch, "/api/v1/namespaces/d/pods/p"));
        assert!(!may(node, Verb::Delete, "/api/v1/nodes/n"));
        assert!(!may(node, Verb::Update, "/api/v1/namespaces/d/secrets/s"));
        assert!(!may(node, Verb::DeleteCollection, "/api/v1/namespaces/d/pods"));
    }

    #[test]
    fn a_refusal_says_what_was_refused() {
        let identity = Identity { user: "eve".to_owned(), groups: Vec::new() };
        let target = target(&segments("/apis/apps/v1/namespaces/d/deployments/x/scale").unwrap()).unwrap();
        let error = authorize(&identity, Verb::Update, &target).unwrap_err();
        assert_eq!(error.code, 403);
        assert!(error.message.contains("User \"eve\" cannot update resource \"deployments/scale\""));
    }
}
