//! Errors as the interface knows them. Invariant: a message names the object, and the field with its value where one
//! is at fault; the code says what the runtime can do about it.

use std::fmt;

use serde_json::{Value, json};

use crate::version::Version;

/// Error codes: up to 99 the specification's, from 100 on our own.
pub mod code {
    /// The configuration's version is not spoken.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field of the configuration is known, and what it asks for is not done.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is not known.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A variable of the environment is missing or wrong.
    pub const BAD_ENVIRONMENT: u32 = 4;
    /// Something could not be read or written.
    pub const IO: u32 = 5;
    /// Something could not be decoded.
    pub const DECODE: u32 = 6;
    /// The configuration is wrong.
    pub const BAD_CONFIG: u32 = 7;
    /// The network namespace is the plugin's own (used by the reference library).
    pub const BAD_NETNS: u32 = 8;
    /// Later it may work.
    pub const TRY_LATER: u32 = 11;
    /// No container can be added now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// No container can be added now, and those that are there are impaired.
    pub const LIMITED: u32 = 51;
    /// The kernel refused.
    pub const KERNEL: u32 = 100;
    /// The attachment is there already, or what it needs is somebody else's.
    pub const TAKEN: u32 = 101;
    /// What CHECK found is not what ADD made.
    pub const BROKEN: u32 = 102;
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// One of [`code`], or what a delegate said.
    pub code: u32,
    /// What failed, in a sentence.
    pub message: String,
    /// More about it; empty where there is nothing more.
    pub details: String,
}

impl Error {
    /// An error without details.
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), details: String::new() }
    }

    /// Says more about it.
    #[must_use]
    pub fn with(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// As printed for a caller that speaks `version`.
    pub fn to_value(&self, version: Version) -> Value {
        let mut value = json!({
            "cniVersion": version.to_string(),
            "code": self.code,
            "msg": self.message,
        });
        if !self.details.is_empty() {
            value["details"] = self.details.clone().into();
        }
        value
    }

    /// Reads what [`Error::to_value`] or another plugin printed.
    pub fn from_value(value: &Value) -> Option<Self> {
        let code = u32::try_from(value.get("code")?.as_u64()?).ok()?;
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(Error { code, message: text("msg"), details: text("details") })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.details.is_empty() {
            write!(f, "; {}", self.details)?;
        }
        write!(f, " (code {})", self.code)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_printed_and_read() {
        let error = Error::new(code::TRY_LATER, "no address left").with("10.0.0.0/30");
        let value = error.to_value(Version::V1_0_0);
        assert_eq!(value["cniVersion"], "1.0.0");
        assert_eq!(Error::from_value(&value), Some(error));
        assert_eq!(Error::from_value(&json!({"ips": []})), None);
        assert!(Error::new(7, "x").to_value(Version::NEWEST).get("details").is_none());
    }
}
