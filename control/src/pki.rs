//! The cluster's own authority: made once and kept; everything it signs is made anew at each start,
//! so a leaf never outlives its address or its key by more than one run. Private keys and
//! kubeconfigs are readable by their owner only and replaced atomically.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

const CA_DAYS: i64 = 3650;
const LEAF_DAYS: i64 = 730;

/// Why the credentials could not be made or kept.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be read or written.
    #[error("{op} {path}")]
    File {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A certificate could not be made or understood.
    #[error("{op}")]
    Certificate {
        /// What was tried.
        op: String,
        /// The cause.
        #[source]
        source: rcgen::Error,
    },
    /// The authority has lost its key: a new one would lock out everybody who trusts the old.
    #[error("{key} is missing although {certificate} exists; restore it or remove both")]
    KeyLost {
        /// The file that isn't there.
        key: PathBuf,
        /// The file that is.
        certificate: PathBuf,
    },
}

/// A certificate and its key.
pub struct Leaf {
    /// DER of the certificate.
    pub certificate: CertificateDer<'static>,
    /// DER of the key (PKCS #8).
    key: Vec<u8>,
    certificate_pem: String,
    key_pem: String,
}

impl Leaf {
    /// The key in the form that rustls takes.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()))
    }
}

/// The authority.
pub struct Authority {
    /// PEM of its certificate: what clients trust.
    pub certificate_pem: String,
    /// DER of its certificate.
    pub certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

fn certificate_error(op: impl Into<String>) -> impl FnOnce(rcgen::Error) -> PkiError {
    let op = op.into();
    move |source| PkiError::Certificate { op, source }
}

impl Authority {
    /// Reads the authority under `dir`, or makes it there.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        make_private_dir(dir)?;
        let (certificate_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        match (certificate_path.exists(), key_path.exists()) {
            (true, true) => Self::load(&certificate_path, &key_path),
            // The key is written first, so this is a first start that was cut off; with the same key
            // a new certificate is as good as the one that may have been.
            (false, true) => Self::certify(&certificate_path, read_key(&key_path)?),
            (false, false) => {
                let key = KeyPair::generate().map_err(certificate_error("make the authority's key"))?;
                write_private(&key_path, key.serialize_pem().as_bytes())?;
                Self::certify(&certificate_path, key)
            }
            (true, false) => Err(PkiError::KeyLost { key: key_path, certificate: certificate_path }),
        }
    }

    fn load(certificate_path: &Path, key_path: &Path) -> Result<Self, PkiError> {
        let certificate_pem = read(certificate_path)?;
        let key = read_key(key_path)?;
        let what = |path: &Path| format!("read {}", path.display());
        let certificate = rustls_pem(&certificate_pem)
            .ok_or(rcgen::Error::CouldNotParseCertificate)
            .map_err(certificate_error(what(certificate_path)))?;
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(certificate_error(what(certificate_path)))?;
        Ok(Self { certificate_pem, certificate, issuer })
    }

    fn certify(path: &Path, key: KeyPair) -> Result<Self, PkiError> {
        let mut params = params("sheave-ca", None, CA_DAYS);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate =
            params.self_signed(&key).map_err(certificate_error("make the authority's certificate"))?;
        write_private(path, certificate.pem().as_bytes())?;
        Ok(Self {
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    fn sign(&self, mut params: CertificateParams, op: &str) -> Result<Leaf, PkiError> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(certificate_error(op))?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(certificate_error(op))?;
        Ok(Leaf {
            certificate: certificate.der().clone(),
            certificate_pem: certificate.pem(),
            key: key.serialize_der(),
            key_pem: key.serialize_pem(),
        })
    }

    /// The API server's own certificate, for these addresses and names beside the usual ones.
    pub fn server(&self, addresses: &[IpAddr], names: &[String]) -> Result<Leaf, PkiError> {
        let op = "make the API server's certificate";
        let mut params = params("kube-apiserver", None, LEAF_DAYS);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let usual = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        for name in usual.into_iter().chain(names.iter().map(String::as_str)) {
            let name = name.try_into().map_err(certificate_error(format!("{op} for the name {name:?}")))?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        let local = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])];
        for address in local.iter().chain(addresses) {
            let san = SanType::IpAddress(*address);
            if !params.subject_alt_names.contains(&san) {
                params.subject_alt_names.push(san);
            }
        }
        self.sign(params, op)
    }

    /// A client's certificate.
    pub fn client(&self, user: &str, group: &str) -> Result<Leaf, PkiError> {
        let mut params = params(user, Some(group), LEAF_DAYS);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, &format!("make the certificate of {user}"))
    }

    /// The agents' certificate.
    pub fn agent(&self) -> Result<Leaf, PkiError> {
        self.client("system:node:sheave", "system:nodes")
    }

    /// Text of a kubeconfig with `leaf` as the credentials.
    pub fn kubeconfig(&self, server: SocketAddr, user: &str, leaf: &Leaf) -> String {
        let data = |pem: &str| STANDARD.encode(pem);
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: {user}@sheave\n\
             clusters:\n- name: sheave\n  cluster:\n    server: https://{server}\n    \
             certificate-authority-data: {}\n\
             users:\n- name: {user}\n  user:\n    client-certificate-data: {}\n    client-key-data: {}\n\
             contexts:\n- name: {user}@sheave\n  context:\n    cluster: sheave\n    user: {user}\n",
            data(&self.certificate_pem),
            data(&leaf.certificate_pem),
            data(&leaf.key_pem),
        )
    }
}

fn params(name: &str, group: Option<&str>, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    if let Some(group) = group {
        subject.push(DnType::OrganizationName, group);
    }
    params.distinguished_name = subject;
    let now = Timestamp::now();
    let day = |days: i64| {
        let at = now.saturating_add(SignedDuration::from_hours(24 * days)).unwrap_or(now);
        let date = at.to_zoned(jiff::tz::TimeZone::UTC).date();
        date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    // A day of slack for clocks that run behind.
    params.not_before = day(-1);
    params.not_after = day(days);
    params
}

fn rustls_pem(pem: &str) -> Option<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).ok()
}

fn read_key(path: &Path) -> Result<KeyPair, PkiError> {
    KeyPair::from_pem(&read(path)?).map_err(certificate_error(format!("read {}", path.display())))
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::File { op: "read", path: path.into(), source })
}

fn make_private_dir(dir: &Path) -> Result<(), PkiError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::File {
        op: "make",
        path: dir.into(),
        source,
    })
}

/// Makes the entry of a file in its directory durable.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => std::fs::File::open(dir)?.sync_all(),
        _ => Ok(()),
    }
}

/// Replaces a file as a whole, with mode 0600.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), PkiError> {
    use std::os::unix::fs::OpenOptionsExt;
    let error = |op| move |source| PkiError::File { op, path: path.into(), source };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        sync_parent(path)
    };
    write().map_err(|source| {
        // What can't be removed either is a file that the next attempt truncates.
        std::fs::remove_file(&temporary).ok();
        error("write")(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Identity;

    #[test]
    fn the_authority_is_kept_and_its_leaves_name_their_owner() {
        let dir = tempfile::tempdir().unwrap();
        let first = Authority::open(dir.path()).unwrap();
        let again = Authority::open(dir.path()).unwrap();
        assert_eq!(first.certificate, again.certificate);
        let admin = again.client("kubernetes-admin", "system:masters").unwrap();
        let identity = Identity::from_certificate(&admin.certificate).unwrap();
        assert_eq!(identity.user, "kubernetes-admin");
        assert_eq!(identity.groups, ["system:masters"]);
        let agent = Identity::from_certificate(&again.agent().unwrap().certificate).unwrap();
        assert_eq!(agent.groups, ["system:nodes"]);
        let (_, parsed) = x509_parser::parse_x509_certificate(&admin.certificate).unwrap();
        let (_, ca) = x509_parser::parse_x509_certificate(&first.certificate).unwrap();
        assert!(parsed.verify_signature(Some(ca.public_key())).is_ok());
        assert!(parsed.validity().is_valid());
    }

    #[test]
    fn half_an_authority_is_no_reason_for_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let old = Authority::open(dir.path()).unwrap();
        let admin = old.client("kubernetes-admin", "system:masters").unwrap();
        std::fs::remove_file(dir.path().join("ca.crt")).unwrap();
        let again = Authority::open(dir.path()).unwrap();
        let (_, leaf) = x509_parser::parse_x509_certificate(&admin.certificate).unwrap();
        let (_, ca) = x509_parser::parse_x509_certificate(&again.certificate).unwrap();
        assert!(leaf.verify_signature(Some(ca.public_key())).is_ok(), "old clients are still let in");
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        assert!(matches!(Authority::open(dir.path()), Err(PkiError::KeyLost { .. })));
    }

    #[test]
    fn private_files_are_private_and_replaced() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "old").unwrap();
        write_private(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
