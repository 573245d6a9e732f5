//! Who the https listener is, and whom it answers: only clients with a certificate that the cluster's CA
//! has signed.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Why the listener has no identity.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read or holds something else.
    #[error("reading {path}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// No certificate could be made.
    #[error("making a self-signed certificate")]
    Make(#[from] rcgen::Error),
    /// The certificates are not accepted.
    #[error("setting up TLS")]
    Rustls(#[from] rustls::Error),
    /// The CA is not accepted.
    #[error("the cluster's CA can't be used to verify clients")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// There is nothing to verify clients with.
    #[error("the kubeconfig has no certificate-authority: nobody could be let in")]
    NoCa,
}

/// What the listener shows of itself.
#[derive(Debug, Clone, Copy)]
pub enum Shown<'a> {
    /// PEM files: certificate and key.
    Files(&'a Path, &'a Path),
    /// What the agent shows the API server: an API server that trusts its own authority knows the agent by it.
    Pem {
        /// Certificate chain.
        certificate: &'a [u8],
        /// Its key.
        key: &'a [u8],
    },
    /// Made at each start, for the node's name and addresses; an API server must not insist on knowing who answers.
    SelfSigned,
}

/// The listener's settings.
pub fn server_config(
    shown: Shown<'_>,
    node_name: &str,
    node_ips: &[IpAddr],
    client_cas: &[Vec<u8>],
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let (chain, key) = match shown {
        Shown::Files(cert, key) => from_files(cert, key)?,
        Shown::Pem { certificate, key } => from_pem(certificate, key)?,
        Shown::SelfSigned => self_signed(node_name, node_ips)?,
    };
    let mut roots = rustls::RootCertStore::empty();
    for ca in client_cas {
        roots.add(CertificateDer::from(ca.clone()))?;
    }
    if roots.is_empty() {
        return Err(TlsError::NoCa);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn from_files(cert: &Path, key: &Path) -> Result<Identity, TlsError> {
    let wrong = |path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::Pem { path, source }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).map_err(wrong(cert))?.collect();
    let chain = chain.map_err(wrong(cert))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(wrong(key))?;
    Ok((chain, key))
}

fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Identity, TlsError> {
    let wrong = |source| TlsError::Pem { path: PathBuf::from("the kubeconfig's client certificate"), source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
    Ok((chain.map_err(wrong)?, PrivateKeyDer::from_pem_slice(key).map_err(wrong)?))
}

fn self_signed(node_name: &str, node_ips: &[IpAddr]) -> Result<Identity, TlsError> {
    let mut names = vec![node_name.to_owned()];
    names.extend(node_ips.iter().map(ToString::to_string));
    let made = rcgen::generate_simple_self_signed(names)?;
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    Ok((vec![made.cert.der().clone()], key))
}
