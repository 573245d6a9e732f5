//! Image names, PURE. Invariant: a [`Reference`] is complete — it names its registry and carries a tag or a
//! digest — so two spellings of one image compare equal.

use std::fmt;

use super::digest::Digest;

/// Registry of names that give none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Namespace on [`DEFAULT_REGISTRY`] of names that give none.
const DEFAULT_NAMESPACE: &str = "library";
/// Tag of names that give neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest repository name, bytes (distribution specification).
const REPOSITORY_BYTES_MAX: usize = 255;
/// Longest tag, bytes (distribution specification).
const TAG_BYTES_MAX: usize = 128;

/// A normalised image name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reference {
    /// `docker.io/library/web`.
    pub(super) repository: String,
    /// Absent only where there is a digest.
    pub(super) tag: Option<String>,
    /// Of a manifest.
    pub(super) digest: Option<Digest>,
}

impl Reference {
    /// Reads `web`, `web:1`, `localhost:5000/a/b@sha256:…`; the error says what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        // A colon after the last slash starts a tag; one before it belongs to the registry's port.
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let repository = complete(path)?;
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Reference { repository, tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Adds the registry and namespace that `path` leaves out, and checks every part.
fn complete(path: &str) -> Result<String, String> {
    if path.is_empty() {
        return Err("the name is empty".to_owned());
    }
    let (registry, rest) = match path.split_once('/') {
        Some((first, rest)) if is_registry(first) => (first, rest),
        _ => (DEFAULT_REGISTRY, path),
    };
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    check_registry(registry)?;
    for part in rest.split('/') {
        check_component(part)?;
    }
    let full = if registry == DEFAULT_REGISTRY && !rest.contains('/') {
        format!("{registry}/{DEFAULT_NAMESPACE}/{rest}")
    } else {
        format!("{registry}/{rest}")
    };
    if full.len() > REPOSITORY_BYTES_MAX {
        return Err(format!("{} bytes are more than the {REPOSITORY_BYTES_MAX} of a repository", full.len()));
    }
    Ok(full)
}

/// The first part of a name is a registry where no namespace could look like it.
fn is_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), String> {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_ok = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        }),
    };
    let port_ok = port.is_none_or(|port| port.parse::<u16>().is_ok());
    if host_ok && port_ok { Ok(()) } else { Err(format!("{registry:?} is not a registry's host and port")) }
}

/// A path component: runs of lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn check_component(part: &str) -> Result<(), String> {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let ends_ok = bytes.first().is_some_and(|b| word(*b)) && bytes.last().is_some_and(|b| word(*b));
    let chars_ok = bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'_' | b'-'));
    let separators_ok = part
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|run| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|b| b == b'-'));
    if ends_ok && chars_ok && separators_ok {
        Ok(())
    } else if part.bytes().any(|b| b.is_ascii_uppercase()) {
        Err(format!("{part:?}: image names are lower case"))
    } else {
        Err(format!(
            "{part:?} is not a path component (lower-case letters and digits, joined by '.', '_', '__' or '-')"
        ))
    }
}

fn check_tag(tag: &str) -> Result<(), String> {
    let first_ok = tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let rest_ok = tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if first_ok && rest_ok && tag.len() <= TAG_BYTES_MAX {
        Ok(())
    } else {
        Err(format!("{tag:?} is not a tag (letters, digits, '_', '.', '-', at most {TAG_BYTES_MAX})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn full(text: &str) -> String {
        Reference::parse(text).unwrap().to_string()
    }

    #[test]
    fn short_names_are_completed() {
        let hex = "ab".repeat(32);
        for (given, wanted) in [
            ("web", "docker.io/library/web:latest".to_owned()),
            ("web:1.2", "docker.io/library/web:1.2".to_owned()),
            ("me/web", "docker.io/me/web:latest".to_owned()),
            ("index.docker.io/web", "docker.io/library/web:latest".to_owned()),
            ("docker.io/web", "docker.io/library/web:latest".to_owned()),
            ("localhost/web", "localhost/web:latest".to_owned()),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            ("quay.io/x/y__z", "quay.io/x/y__z:latest".to_owned()),
            (&format!("web@sha256:{hex}"), format!("docker.io/library/web@sha256:{hex}")),
            (&format!("r.io/web:1@sha256:{hex}"), format!("r.io/web:1@sha256:{hex}")),
        ] {
            assert_eq!(full(given), wanted, "{given}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            ":",
            "web:",
            "/web",
            "web/",
            "a//b",
            "We/b/",
            "WEB",
            "../../etc",
            "a/../b",
            "web:a b",
            "a b",
            "web@sha256:12",
            "web@md5:00",
            "a___b",
            ".a",
            "a.",
            "a..b",
            "host:99999/x",
            "-.io/x",
            "a\0b",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Reference::parse(&"a".repeat(300)).is_err());
        assert!(Reference::parse("me/WEB").unwrap_err().contains("lower case"));
    }

    proptest! {
        #[test]
        fn a_normalised_name_stays_as_it_is(text in "[a-z0-9./:_-]{1,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                let once = reference.to_string();
                prop_assert_eq!(Reference::parse(&once).unwrap(), reference);
            }
        }

        #[test]
        fn anything_is_read_without_panic(text in ".{0,60}") {
            drop(Reference::parse(&text));
        }
    }
}
