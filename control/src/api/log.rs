//! `pods/log`: the API server asks the pod's node and passes the text on as it comes. The agent
//! lets in only who shows a certificate of our authority. The other way round the agent, which
//! signs its own certificate as a kubelet does, is believed by the address its Node tells.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::request::{Query, Target, encode};
use super::respond::{self, Answer};
use crate::limits::AGENT_CONNECT_TIMEOUT_MS;
use crate::pki::Leaf;
use crate::registry::Registry;
use crate::resource::object::{items_at, str_at};
use crate::resource::{ApiError, kinds};

/// Annotation that names the container that is meant when none is.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
const FORWARDED: [&str; 7] =
    ["follow", "tailLines", "sinceSeconds", "sinceTime", "timestamps", "previous", "limitBytes"];

/// Connects to agents.
pub(super) struct AgentClient(TlsConnector);

impl AgentClient {
    /// `leaf` is what agents are shown.
    pub(super) fn new(provider: Arc<CryptoProvider>, leaf: &Leaf) -> Result<Self, rustls::Error> {
        let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(SelfSigned(provider)))
            .with_client_auth_cert(vec![leaf.certificate.clone()], leaf.key())?;
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

/// Takes any certificate whose key the server has.
#[derive(Debug)]
struct SelfSigned(Arc<CryptoProvider>);

impl ServerCertVerifier for SelfSigned {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Answers `pods/log`.
pub(super) async fn logs(
    agents: &AgentClient,
    registry: &Registry,
    target: &Target,
    query: &Query,
) -> Result<Answer, ApiError> {
    let name = target.name.as_deref().unwrap_or("");
    let pod = registry.get(&kinds::PODS, target.key_namespace(), name)?.value();
    let container = container(&pod, name, query.get("container"))?;
    let node = str_at(&pod, &["spec", "nodeName"]);
    if node.is_empty() {
        return Err(ApiError::bad_request(format!("pod {name} does not have a host assigned")));
    }
    let at = agent_address(&registry.get(&kinds::NODES, "", node)?.value(), node)?;
    let mut path = String::from("/containerLogs");
    for part in [target.key_namespace(), name, &container] {
        path.push('/');
        encode(part, &mut path);
    }
    path.push_str(&query.forward(&FORWARDED));
    fetch(agents, at, &path)
        .await
        .map_err(|error| ApiError::internal(format!("Get \"https://{at}{path}\": {error}")))
}

/// Which container is meant; 400 when that isn't clear.
fn container(pod: &Value, name: &str, asked: Option<&str>) -> Result<String, ApiError> {
    let names = |list: &str| -> Vec<String> {
        let items = items_at(pod, &["spec", list]).iter();
        items.map(|c| str_at(c, &["name"]).to_owned()).collect()
    };
    let (regular, init) = (names("containers"), names("initContainers"));
    if let Some(asked) = asked {
        return if regular.iter().chain(&init).any(|n| n == asked) {
            Ok(asked.to_owned())
        } else {
            Err(ApiError::bad_request(format!("container {asked} is not valid for pod {name}")))
        };
    }
    let preferred = str_at(pod, &["metadata", "annotations", DEFAULT_CONTAINER]);
    match regular.as_slice() {
        _ if regular.iter().any(|n| n == preferred) => Ok(preferred.to_owned()),
        [only] => Ok(only.clone()),
        _ => Err(ApiError::bad_request(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            regular.join(" ")
        ))),
    }
}

fn agent_address(node: &Value, name: &str) -> Result<SocketAddr, ApiError> {
    let port = node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    let ip = items_at(node, &["status", "addresses"])
        .iter()
        .filter(|a| str_at(a, &["type"]) == "InternalIP")
        .find_map(|a| str_at(a, &["address"]).parse::<IpAddr>().ok());
    match (ip, port.and_then(|p| u16::try_from(p).ok())) {
        (Some(ip), Some(port)) => Ok(SocketAddr::new(ip, port)),
        _ => Err(ApiError::internal(format!("node {name} has not told where its agent listens"))),
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn fetch(agents: &AgentClient, at: SocketAddr, path: &str) -> Result<Answer, AnyError> {
    let connect = async {
        let tcp = TcpStream::connect(at).await?;
        agents.0.connect(ServerName::from(at.ip()), tcp).await.map_err(AnyError::from)
    };
    let tls = tokio::time::timeout(Duration::from_millis(AGENT_CONNECT_TIMEOUT_MS), connect)
        .await
        .map_err(|_| "the agent does not answer")??;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to an agent ended");
        }
    });
    let request = Request::get(path).header(header::HOST, at.to_string()).body(Empty::<Bytes>::new())?;
    let (head, body) = sender.send_request(request).await?.into_parts();
    if head.status != StatusCode::OK {
        // What the agent says about it is for people: a Status of ours carries it.
        let text = body.collect().await?.to_bytes();
        let message = String::from_utf8_lossy(&text).trim().to_owned();
        let reason = if head.status == StatusCode::NOT_FOUND { "NotFound" } else { "BadRequest" };
        let error = ApiError { code: head.status.as_u16(), reason, message, details: None };
        return Ok(respond::error(&error));
    }
    let mut answer = Answer::new(body.map_err(AnyError::from).boxed_unsync());
    let plain = header::HeaderValue::from_static("text/plain");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn which_container() {
        let one = json!({"spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(container(&one, "p", None).unwrap(), "a");
        assert_eq!(container(&one, "p", Some("i")).unwrap(), "i");
        assert_eq!(container(&one, "p", Some("x")).unwrap_err().code, 400);
        let mut two = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
        assert!(container(&two, "p", None).unwrap_err().message.contains("choose one of: [a b]"));
        two["metadata"] = json!({"annotations": {DEFAULT_CONTAINER: "b"}});
        assert_eq!(container(&two, "p", None).unwrap(), "b");
    }

    #[test]
    fn where_the_agent_is() {
        let node = json!({"status": {"addresses": [{"type": "Hostname", "address": "n"},
            {"type": "InternalIP", "address": "fd00::1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}}}});
        assert_eq!(agent_address(&node, "n").unwrap(), "[fd00::1]:10250".parse().unwrap());
        assert!(agent_address(&json!({}), "n").is_err());
    }
}
