//! Requests to the API server. Every one is bounded in time; none is retried here, and none is sent for
//! an object of another uid than the caller means.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use hyper::http::{Method, Request, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::limits;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The server said no.
    #[error("{op}: {code} {reason}: {message}")]
    Refused {
        /// Method and path.
        op: String,
        /// HTTP status.
        code: u16,
        /// The Status' reason.
        reason: String,
        /// The Status' message.
        message: String,
    },
    /// No answer that could be understood.
    #[error("{op}")]
    Transport {
        /// Method and path.
        op: String,
        /// Why.
        source: Box<kube::Error>,
    },
    /// No answer in time.
    #[error("{op}: no answer within {} s", limits::API_REQUEST_TIMEOUT_S)]
    Timeout {
        /// Method and path.
        op: String,
    },
    /// The request could not be built.
    #[error("{op}: bad request")]
    Request {
        /// Method and path.
        op: String,
        /// Why.
        source: hyper::http::Error,
    },
}

impl ApiError {
    /// The object is not there, or another one of the same name is.
    pub fn is_gone(&self) -> bool {
        match self {
            ApiError::Refused { code: 404, .. } => true,
            ApiError::Refused { code: 409, message, .. } => message.to_lowercase().contains("uid"),
            _ => false,
        }
    }

    /// HTTP status, if the server answered with an error.
    pub fn code(&self) -> Option<u16> {
        match self {
            ApiError::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Asking again later may help: the server can't be reached or is overloaded.
    pub fn is_temporary(&self) -> bool {
        match self {
            ApiError::Refused { code, .. } => *code == 429 || *code >= 500,
            ApiError::Transport { .. } | ApiError::Timeout { .. } => true,
            ApiError::Request { .. } => false,
        }
    }
}

/// Handle on the API server; cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<kube::Client>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

#[derive(Deserialize)]
struct WireData {
    #[serde(default)]
    data: BTreeMap<String, String>,
    #[serde(default, rename = "binaryData")]
    binary_data: BTreeMap<String, String>,
}

impl Client {
    /// Wraps a client.
    pub fn new(inner: kube::Client) -> Self {
        Client { inner: Arc::new(inner) }
    }

    /// The client itself, for watches.
    pub fn kube(&self) -> kube::Client {
        (*self.inner).clone()
    }

    /// One request with a JSON body.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content_type: &'static str,
        body: Option<&Value>,
    ) -> Result<T, ApiError> {
        let op = format!("{method} {path}");
        let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let mut request =
            Request::builder().method(method).uri(path).header(header::ACCEPT, "application/json");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let request = match request.body(bytes) {
            Ok(request) => request,
            Err(source) => return Err(ApiError::Request { op, source }),
        };
        let answer = self.inner.request::<T>(request);
        match tokio::time::timeout(limits::secs(limits::API_REQUEST_TIMEOUT_S), answer).await {
            Err(_) => Err(ApiError::Timeout { op }),
            Ok(Ok(value)) => Ok(value),
            Ok(Err(kube::Error::Api(status))) => Err(ApiError::Refused {
                op,
                code: status.code,
                reason: status.reason.clone(),
                message: status.message.clone(),
            }),
            Ok(Err(source)) => Err(ApiError::Transport { op, source: Box::new(source) }),
        }
    }

    /// GET of any object.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.send(Method::GET, path, "application/json", None).await
    }

    /// POST of a new object.
    pub async fn create(&self, path: &str, object: &Value) -> Result<Value, ApiError> {
        self.send(Method::POST, path, "application/json", Some(object)).await
    }

    /// JSON merge patch.
    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, ApiError> {
        self.send(Method::PATCH, path, "application/merge-patch+json", Some(patch)).await
    }

    /// Strategic merge patch.
    pub async fn strategic(&self, path: &str, patch: &Value) -> Result<Value, ApiError> {
        self.send(Method::PATCH, path, "application/strategic-merge-patch+json", Some(patch)).await
    }

    /// Patches the status of the pod with this uid and no other.
    pub async fn patch_pod_status(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        status: &Value,
    ) -> Result<(), ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
        let patch = json!({"metadata": {"uid": uid}, "status": status});
        let _object: serde::de::IgnoredAny =
            self.send(Method::PATCH, &path, "application/strategic-merge-patch+json", Some(&patch)).await?;
        Ok(())
    }

    /// Removes the pod with this uid, now.
    pub async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        let options = json!({"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0,
            "preconditions": {"uid": uid}});
        let _object: serde::de::IgnoredAny =
            self.send(Method::DELETE, &path, "application/json", Some(&options)).await?;
        Ok(())
    }

    /// The data of a ConfigMap; `None` if there is none of that name.
    pub async fn config_map(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<BTreeMap<String, Vec<u8>>>, ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
        let Some(wire) = none_if_missing(self.get::<WireData>(&path).await)? else { return Ok(None) };
        let mut data: BTreeMap<String, Vec<u8>> =
            wire.data.into_iter().map(|(key, value)| (key, value.into_bytes())).collect();
        data.extend(decoded(wire.binary_data));
        Ok(Some(data))
    }

    /// The data of a Secret; `None` if there is none of that name.
    pub async fn secret(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<BTreeMap<String, Vec<u8>>>, ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{name}");
        let wire = none_if_missing(self.get::<WireData>(&path).await)?;
        Ok(wire.map(|wire| decoded(wire.data)))
    }
}

fn none_if_missing<T>(result: Result<T, ApiError>) -> Result<Option<T>, ApiError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == Some(404) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Values that are not base64 can't come from an API server; they are kept as they are.
fn decoded(data: BTreeMap<String, String>) -> BTreeMap<String, Vec<u8>> {
    let decode = |value: String| {
        base64::engine::general_purpose::STANDARD.decode(&value).unwrap_or_else(|_| value.into_bytes())
    };
    data.into_iter().map(|(key, value)| (key, decode(value))).collect()
}

/// An error and what caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
