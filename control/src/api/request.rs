//! What a URL asks for: one parser for every resource path, and the query parameters of the API.
//! Pure; a path that names nothing is `None`, a parameter that makes no sense is a 400.

use crate::resource::{ApiError, Kind, Subresource, find};

/// A path below `/api/v1` or `/apis/<group>/<version>`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) kind: &'static Kind,
    /// `None` stands for all namespaces, or for a kind without.
    pub(super) namespace: Option<String>,
    /// `None` stands for the collection.
    pub(super) name: Option<String>,
    pub(super) sub: Subresource,
}

impl Target {
    /// The namespace as keys have it: empty for kinds without.
    pub(super) fn key_namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or("")
    }
}

/// Splits a path into decoded segments; `None` when it isn't valid percent-encoded UTF-8.
pub(super) fn segments(path: &str) -> Option<Vec<String>> {
    path.split('/').filter(|s| !s.is_empty()).map(|s| decode(s, false)).collect()
}

/// Reads the segments of a resource path.
pub(super) fn target(segments: &[String]) -> Option<Target> {
    let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return None,
    };
    let namespaces_kind = |segment: &str| find("", "v1", "namespaces")?.subresource(segment);
    let (namespace, plural, rest) = match rest {
        ["namespaces", ns, plural, rest @ ..]
            if !(group.is_empty() && rest.is_empty() && namespaces_kind(plural).is_some()) =>
        {
            (Some((*ns).to_owned()), *plural, rest)
        }
        [plural, rest @ ..] => (None, *plural, rest),
        [] => return None,
    };
    let kind = find(group, version, plural)?;
    let (name, sub) = match rest {
        [] => (None, Subresource::Main),
        [name] => (Some((*name).to_owned()), Subresource::Main),
        [name, sub] => (Some((*name).to_owned()), kind.subresource(sub)?.sub),
        _ => return None,
    };
    let fits = match (&namespace, kind.namespaced) {
        (Some(_), namespaced) => namespaced,
        (None, namespaced) => !namespaced || name.is_none(),
    };
    fits.then_some(Target { kind, namespace, name, sub })
}

/// Query parameters in the order given.
#[derive(Clone, Debug, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn parse(query: Option<&str>) -> Result<Self, ApiError> {
        let pairs = query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            decode(key, true).zip(decode(value, true)).ok_or_else(|| {
                ApiError::bad_request(format!("the query parameter {pair:?} is not valid UTF-8"))
            })
        });
        Ok(Self(pairs.collect::<Result<_, _>>()?))
    }

    /// The first value; `None` when absent or empty.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str()).filter(|v| !v.is_empty())
    }

    /// `true`/`1` or `false`/`0`; `None` when absent.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some("true" | "1" | "True") => Ok(Some(true)),
            Some("false" | "0" | "False") => Ok(Some(false)),
            Some(other) => Err(ApiError::bad_request(format!("{key}={other:?} is neither true nor false"))),
        }
    }

    /// A number; 400 when it isn't one or is negative.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|_| ApiError::bad_request(format!("{key}={text:?} is not a number from 0 up"))),
        }
    }

    /// Whether `dryRun=All` is asked for; other values are 400s.
    pub(super) fn dry_run(&self) -> Result<bool, ApiError> {
        match self.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => {
                Err(ApiError::bad_request(format!("dryRun={other:?} is not supported: use \"All\"")))
            }
        }
    }

    /// Encodes the given parameters that are present, for another server.
    pub(super) fn forward(&self, keys: &[&str]) -> String {
        let mut out = String::new();
        for (key, value) in self.0.iter().filter(|(k, _)| keys.contains(&k.as_str())) {
            out.push(if out.is_empty() { '?' } else { '&' });
            out.push_str(key);
            out.push('=');
            encode(value, &mut out);
        }
        out
    }
}

/// Percent-encodes everything but unreserved characters.
pub(super) fn encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
}

fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    if !text.bytes().any(|b| b == b'%' || b == b'+') {
        return Some(text.to_owned());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16);
                let value = digit(bytes.next())? * 16 + digit(bytes.next())?;
                out.push(u8::try_from(value).ok()?);
            }
            b'+' if plus_is_space => out.push(b' '),
            other => out.push(other),
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(path: &str) -> Option<(String, Option<String>, Option<String>, Subresource)> {
        let target = target(&segments(path)?)?;
        Some((target.kind.resource_key(), target.namespace, target.name, target.sub))
    }

    #[test]
    fn every_shape_of_resource_path() {
        let some = |s: &str| Some(s.to_owned());
        let main = Subresource::Main;
        let pods = "pods".to_owned();
        assert_eq!(parsed("/api/v1/pods"), Some((pods.clone(), None, None, main)));
        assert_eq!(parsed("/api/v1/namespaces/n/pods"), Some((pods.clone(), some("n"), None, main)));
        assert_eq!(
            parsed("/api/v1/namespaces/n/pods/p/log"),
            Some((pods, some("n"), some("p"), Subresource::Log))
        );
        let namespaces = "namespaces".to_owned();
        assert_eq!(parsed("/api/v1/namespaces"), Some((namespaces.clone(), None, None, main)));
        assert_eq!(parsed("/api/v1/namespaces/n"), Some((namespaces.clone(), None, some("n"), main)));
        assert_eq!(
            parsed("/api/v1/namespaces/n/status"),
            Some((namespaces, None, some("n"), Subresource::Status))
        );
        assert_eq!(
            parsed("/apis/apps/v1/namespaces/n/deployments/d/scale"),
            Some(("deployments.apps".to_owned(), some("n"), some("d"), Subresource::Scale))
        );
        assert_eq!(parsed("/api/v1/nodes/a%2Fb").and_then(|p| p.2), some("a/b"));
    }

    #[test]
    fn paths_that_name_nothing() {
        for path in [
            "/",
            "/api",
            "/api/v1",
            "/api/v2/pods",
            "/api/v1/pods/p",
            "/api/v1/widgets",
            "/api/v1/namespaces/n/nodes",
            "/api/v1/namespaces/n/pods/p/exec",
            "/api/v1/namespaces/n/pods/p/log/x",
            "/apis/apps/v1",
            "/api/v1/nodes/%ff",
        ] {
            assert_eq!(parsed(path), None, "{path}");
        }
    }

    #[test]
    fn queries() {
        let q = Query::parse(Some("labelSelector=a%3Db%2Cc+in+%28d%29&limit=5&watch=1&empty=&x=%zz")).err();
        assert_eq!(q.unwrap().code, 400);
        let q = Query::parse(Some("labelSelector=a%3Db%2Cc+in+%28d%29&limit=5&watch=1&empty=")).unwrap();
        assert_eq!(q.get("labelSelector"), Some("a=b,c in (d)"));
        assert_eq!(q.number("limit").unwrap(), Some(5));
        assert_eq!(q.flag("watch").unwrap(), Some(true));
        assert_eq!(q.get("empty"), None);
        assert_eq!(q.forward(&["labelSelector"]), "?labelSelector=a%3Db%2Cc%20in%20%28d%29");
        let bad = Query::parse(Some("limit=-1&watch=maybe&dryRun=Some")).unwrap();
        assert!(bad.number("limit").is_err() && bad.flag("watch").is_err() && bad.dry_run().is_err());
    }
}
