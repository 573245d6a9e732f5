//! Versions of the interface. Invariant: only versions that are spoken have a value of this type.

use std::fmt;

use serde_json::{Value, json};

use crate::error::{Error, code};

/// A version that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    major: u8,
    minor: u8,
    patch: u8,
}

impl Version {
    /// 0.3.0: several addresses and interfaces in a result.
    pub const V0_3_0: Version = Version::of(0, 3, 0);
    /// 0.3.1: the same, with fields spelt as they should be.
    pub const V0_3_1: Version = Version::of(0, 3, 1);
    /// 0.4.0: CHECK.
    pub const V0_4_0: Version = Version::of(0, 4, 0);
    /// 1.0.0: addresses without a version of their own.
    pub const V1_0_0: Version = Version::of(1, 0, 0);
    /// 1.1.0: STATUS and GC.
    pub const V1_1_0: Version = Version::of(1, 1, 0);
    /// The newest.
    pub const NEWEST: Version = Version::V1_1_0;
    /// All of them, the oldest first.
    pub const ALL: [Version; 5] =
        [Version::V0_3_0, Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    const fn of(major: u8, minor: u8, patch: u8) -> Self {
        Version { major, minor, patch }
    }

    /// The version of that name; code 1 where it is not spoken.
    pub fn parse(text: &str) -> Result<Version, Error> {
        Version::ALL.into_iter().find(|version| version.to_string() == text).ok_or_else(|| {
            let spoken = Version::ALL.map(|version| version.to_string()).join(", ");
            Error::new(
                code::INCOMPATIBLE_VERSION,
                format!("cniVersion {text:?} is not spoken: choose one of {spoken}"),
            )
        })
    }

    /// What VERSION answers.
    pub fn answer() -> Value {
        json!({
            "cniVersion": Version::NEWEST.to_string(),
            "supportedVersions": Version::ALL.map(|version| version.to_string()),
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_spoken_versions_are_read() {
        for version in Version::ALL {
            assert_eq!(Version::parse(&version.to_string()), Ok(version));
        }
        assert!(Version::ALL.is_sorted());
        for bad in ["", "1", "1.1", "0.2.0", "2.0.0", "1.0.0 ", "01.0.0"] {
            let error = Version::parse(bad).unwrap_err();
            assert_eq!(error.code, code::INCOMPATIBLE_VERSION);
            assert!(error.message.contains(&format!("{bad:?}")) && error.message.contains("1.1.0"));
        }
        assert_eq!(Version::answer()["supportedVersions"].as_array().unwrap().len(), 5);
    }
}
