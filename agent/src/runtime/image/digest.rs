//! SHA-256 digests. Invariant: a [`Digest`] is 64 lower-case hex digits, so it is safe as a file name.

use std::fmt;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest; shown as `sha256:<hex>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Digest(String);

impl Digest {
    /// Reads `sha256:<64 lower-case hex>`; the error says what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let hex = match text.split_once(':') {
            Some(("sha256", hex)) => hex,
            Some((other, _)) if !other.is_empty() => {
                return Err(format!("digest algorithm {other:?} is not supported, only sha256 is"));
            }
            _ => return Err(format!("{text:?} is not a digest (sha256:<64 hex digits>)")),
        };
        if hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Digest(hex.to_owned()))
        } else {
            Err(format!("{text:?} is not a digest (sha256:<64 hex digits>)"))
        }
    }

    /// The digest of `bytes`.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Digest::from_hash(Sha256::digest(bytes).as_slice())
    }

    /// The id of the chain that ends in the layer `diff_id` on top of `parent` (image specification, "Layer
    /// ChainID").
    pub(super) fn chain(parent: Option<&Digest>, diff_id: &Digest) -> Self {
        match parent {
            None => diff_id.clone(),
            Some(parent) => Digest::of(format!("{parent} {diff_id}").as_bytes()),
        }
    }

    /// The 64 hex digits.
    pub(super) fn hex(&self) -> &str {
        &self.0
    }

    /// The first 12 hex digits, for messages.
    pub(super) fn short(&self) -> &str {
        &self.0[..12]
    }

    fn from_hash(hash: &[u8]) -> Self {
        use fmt::Write;
        let mut hex = String::with_capacity(64);
        for byte in hash {
            // Writing to a String cannot fail.
            write!(hex, "{byte:02x}").unwrap_or_default();
        }
        Digest(hex)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Digest::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// Passes a stream through, hashing and counting it.
pub(super) struct Hashed<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Hashed<R> {
    pub(super) fn new(inner: R) -> Self {
        Hashed { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// Bytes passed so far.
    pub(super) fn count(&self) -> u64 {
        self.bytes
    }

    /// The digest of what has passed.
    pub(super) fn finish(self) -> Digest {
        self.finish_with_inner().0
    }

    /// The digest of what has passed, and the reader.
    pub(super) fn finish_with_inner(self) -> (Digest, R) {
        (Digest::from_hash(self.hash.finalize().as_slice()), self.inner)
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf abc | sha256sum`
    const ABC: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn digests_match_a_known_one() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        let mut stream = Hashed::new(&b"abc"[..]);
        io::copy(&mut stream, &mut io::sink()).unwrap();
        assert_eq!((stream.count(), stream.finish().to_string()), (3, ABC.to_owned()));
    }

    #[test]
    fn only_whole_sha256_digests_are_read() {
        assert_eq!(Digest::parse(ABC).unwrap().to_string(), ABC);
        for bad in ["", "abc", "sha256:", "sha256:AB", "sha256:../../../../etc/passwd", "sha512:00", ":00"] {
            assert!(Digest::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Digest::parse(&ABC.to_uppercase()).is_err());
    }

    #[test]
    fn a_chain_of_one_is_its_layer() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(Digest::chain(None, &a), a);
        assert_eq!(Digest::chain(Some(&a), &b), Digest::of(format!("{a} {b}").as_bytes()));
        assert_ne!(Digest::chain(Some(&a), &b), Digest::chain(Some(&b), &a));
    }
}
