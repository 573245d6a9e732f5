//! What was last reported of a container. Invariant: plain data, with the names of the API.

use serde::{Deserialize, Serialize};

/// State of a reported container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorState {
    pub waiting: Option<PriorWaiting>,
    pub running: Option<PriorRunning>,
    pub terminated: Option<PriorTerminated>,
}

/// A reported container that waits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorWaiting {
    pub reason: String,
    pub message: String,
}

/// A reported container that ran.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorRunning {
    pub started_at: Option<String>,
}

/// A reported container that ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct PriorTerminated {
    pub exit_code: i32,
    pub signal: Option<i32>,
    pub reason: String,
    pub message: String,
    pub started_at: Option<String>,
    pub finished_at: Option<String>,
    #[serde(rename = "containerID")]
    pub container_id: String,
}
