//! The grammars of names: each check returns the rule that is broken, in words that say how to put it right.

/// Longest DNS-1123 label and longest name part of a qualified name, in bytes.
pub const LABEL_LENGTH_MAX: usize = 63;
/// Longest DNS-1123 subdomain, in bytes.
pub const SUBDOMAIN_LENGTH_MAX: usize = 253;

fn lower_alnum(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

fn is_label(s: &str) -> bool {
    let b = s.as_bytes();
    match (b.first(), b.last()) {
        (Some(&first), Some(&last)) => {
            lower_alnum(first) && lower_alnum(last) && b.iter().all(|&c| lower_alnum(c) || c == b'-')
        }
        _ => false,
    }
}

fn too_long(max: usize) -> String {
    format!("must be no more than {max} bytes")
}

/// RFC 1123 label: namespaces, containers, ports of pods, volumes.
pub fn dns1123_label(s: &str) -> Result<(), String> {
    if s.len() > LABEL_LENGTH_MAX {
        return Err(too_long(LABEL_LENGTH_MAX));
    }
    if is_label(s) {
        return Ok(());
    }
    Err("a lowercase RFC 1123 label must consist of lower case letters, digits or '-', and start and end with a letter or digit (such as 'my-name' or '123-abc')".to_owned())
}

/// RFC 1123 subdomain: the names of most objects.
pub fn dns1123_subdomain(s: &str) -> Result<(), String> {
    if s.len() > SUBDOMAIN_LENGTH_MAX {
        return Err(too_long(SUBDOMAIN_LENGTH_MAX));
    }
    if !s.is_empty() && s.split('.').all(is_label) {
        return Ok(());
    }
    Err("a lowercase RFC 1123 subdomain must consist of lower case letters, digits, '-' or '.', and each part between dots must start and end with a letter or digit (such as 'example.com')".to_owned())
}

/// RFC 1035 label: services.
pub fn dns1035_label(s: &str) -> Result<(), String> {
    if s.len() > LABEL_LENGTH_MAX {
        return Err(too_long(LABEL_LENGTH_MAX));
    }
    if is_label(s) && s.as_bytes()[0].is_ascii_lowercase() {
        return Ok(());
    }
    Err("a DNS-1035 label must consist of lower case letters, digits or '-', start with a letter and end with a letter or digit (such as 'my-name' or 'abc-123')".to_owned())
}

fn is_qualified_part(s: &str) -> bool {
    let b = s.as_bytes();
    match (b.first(), b.last()) {
        (Some(first), Some(last)) => {
            first.is_ascii_alphanumeric()
                && last.is_ascii_alphanumeric()
                && b.iter().all(|&c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
        }
        _ => false,
    }
}

/// A label or annotation key: an optional DNS subdomain prefix, `/`, and a name of at most 63 bytes.
pub fn qualified_name(s: &str) -> Result<(), String> {
    let name = match s.split_once('/') {
        None => s,
        Some((prefix, name)) => {
            if prefix.is_empty() {
                return Err("the prefix before '/' must not be empty".to_owned());
            }
            dns1123_subdomain(prefix).map_err(|why| format!("the prefix before '/': {why}"))?;
            name
        }
    };
    if name.len() > LABEL_LENGTH_MAX {
        return Err(format!("the name part {}", too_long(LABEL_LENGTH_MAX)));
    }
    if is_qualified_part(name) {
        return Ok(());
    }
    Err("the name part must consist of letters, digits, '-', '_' or '.', and start and end with a letter or digit (such as 'MyName' or 'example.com/my.name')".to_owned())
}

/// The value of a label: empty, or like the name part of a qualified name.
pub fn label_value(s: &str) -> Result<(), String> {
    if s.len() > LABEL_LENGTH_MAX {
        return Err(too_long(LABEL_LENGTH_MAX));
    }
    if s.is_empty() || is_qualified_part(s) {
        return Ok(());
    }
    Err("a label value must be empty or consist of letters, digits, '-', '_' or '.', and start and end with a letter or digit (such as 'MyValue' or '12345')".to_owned())
}

/// A key of a config map or secret: at most 253 letters, digits, `-`, `_` or `.`, but not `.` or `..`-led.
pub fn data_key(s: &str) -> Result<(), String> {
    if s.len() > SUBDOMAIN_LENGTH_MAX {
        return Err(too_long(SUBDOMAIN_LENGTH_MAX));
    }
    if s.is_empty() || !s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.')) {
        return Err("a key must consist of letters, digits, '-', '_' or '.' (such as 'key.name')".to_owned());
    }
    if s == "." || s.starts_with("..") {
        return Err("a key must not be '.' or start with '..'".to_owned());
    }
    Ok(())
}

/// The name of an environment variable: any printable ASCII but `=`.
pub fn env_var(s: &str) -> Result<(), String> {
    if !s.is_empty() && s.bytes().all(|c| (b' '..=b'~').contains(&c) && c != b'=') {
        return Ok(());
    }
    Err("a valid environment variable name must consist of printable ASCII characters other than '='"
        .to_owned())
}

/// The name of a container port: at most 15 lower-case letters, digits or `-`, with one letter at least.
pub fn port_name(s: &str) -> Result<(), String> {
    let ok = s.len() <= 15 && is_label(s) && !s.contains("--") && s.bytes().any(|c| c.is_ascii_lowercase());
    if ok {
        return Ok(());
    }
    Err("a port name must be at most 15 lower case letters, digits or single '-' with at least one letter, and start and end with a letter or digit (such as 'http')".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rule: fn(&str) -> Result<(), String>, good: &[&str], bad: &[&str]) {
        for s in good {
            assert_eq!(rule(s), Ok(()), "{s:?} should pass");
        }
        for s in bad {
            assert!(rule(s).is_err(), "{s:?} should be refused");
        }
    }

    #[test]
    fn labels() {
        let long = "a".repeat(64);
        check(dns1123_label, &["a", "0", "a-b", "web-1"], &["", "-a", "a-", "A", "a.b", "a_b", "ü", &long]);
        check(dns1035_label, &["a", "a-1"], &["", "1a", "a-", "a.b", &long]);
        check(port_name, &["http", "a", "p-1"], &["", "1", "a--b", "-a", "averyveryverylong"]);
    }

    #[test]
    fn subdomains() {
        let long = "a".repeat(254);
        check(
            dns1123_subdomain,
            &["a", "a.b", "1.2", "kube-root-ca.crt"],
            &["", ".", "a..b", "a.-b", ".a", "A.b", &long],
        );
    }

    #[test]
    fn qualified_names_and_values() {
        let long = "a".repeat(64);
        check(
            qualified_name,
            &["a", "A_b.c-d", "example.com/App", "kubernetes.io/metadata.name"],
            &["", "/a", "a/", "a/b/c", "-a", "Ex.com/a", &long],
        );
        check(label_value, &["", "a", "A.b_c-1"], &["-", "a-", "a b", "a/b", &long]);
    }

    #[test]
    fn data_keys_and_env() {
        check(data_key, &["a", ".x", "a..b", "A_1"], &["", ".", "..", "..a", "a/b", "a b"]);
        check(env_var, &["PATH", "a.b", "1", "a b"], &["", "a=b", "ü", "a\n"]);
    }
}
