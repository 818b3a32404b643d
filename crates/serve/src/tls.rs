//! TLS: a certificate and its key, read again when their files change.

use crate::keys::version;
use anyhow::{Context, Result, ensure};
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;
use tokio_rustls::TlsAcceptor;

/// What a server proves with that it is who it says.
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: RwLock<Current>,
}

/// What the files said, and which versions of them that was.
struct Current {
    config: Arc<ServerConfig>,
    versions: [Option<(SystemTime, u64)>; 2],
}

impl Tls {
    /// Reads PEM files: a certificate, with those that lead to its authority behind it, and the certificate's private key.
    ///
    /// # Errors
    /// When a file cannot be read or has something else, or the key is not the certificate's.
    pub fn read(certificate: &Path, key: &Path) -> Result<Tls> {
        let versions = [version(certificate), version(key)];
        let current = RwLock::new(Current { versions, config: Arc::new(config(certificate, key)?) });
        Ok(Tls { certificate: certificate.into(), key: key.into(), current })
    }

    /// Reads the files again if they are others than before, for connections that come from then on. Returns whether anything
    /// was read.
    ///
    /// # Errors
    /// As [`Tls::read`]; all stays as it was.
    pub(crate) fn refresh(&self) -> Result<bool> {
        let versions = [version(&self.certificate), version(&self.key)];
        if versions == self.current.read().unwrap_or_else(PoisonError::into_inner).versions {
            return Ok(false);
        }
        // However long the files take to be read, no connection waits for it.
        let config = config(&self.certificate, &self.key);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // What is wrong is told of once. A new certificate whose key is not there yet is wrong for a moment.
        current.versions = versions;
        current.config = Arc::new(config?);
        Ok(true)
    }

    /// For a new connection.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).config.clone().into()
    }
}

fn config(certificate: &Path, key: &Path) -> Result<ServerConfig> {
    let (cert, private) = (certificate.display(), key.display());
    let chain: Vec<CertificateDer<'_>> = CertificateDer::pem_file_iter(certificate)
        .and_then(|certificates| certificates.collect())
        .with_context(|| format!("cannot read certificates from {cert}"))?;
    ensure!(
        !chain.is_empty(),
        "{cert} has no certificate; expected PEM, with lines such as -----BEGIN CERTIFICATE-----"
    );
    let own = PrivateKeyDer::from_pem_file(key).with_context(|| {
        format!(
            "cannot read a private key from {private}; expected PEM without a password, with a line such as -----BEGIN \
             PRIVATE KEY-----"
        )
    })?;
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .context("TLS 1.2 and 1.3 cannot be set up")?
        .with_no_client_auth()
        .with_single_cert(chain, own);
    let mut config =
        config.with_context(|| format!("cannot use the key {private} with the certificate {cert}"))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
