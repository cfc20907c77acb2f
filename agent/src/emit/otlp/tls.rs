//! The TLS configuration: trusted certificate authorities and the client certificate.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use super::config::{ConfigError, OtlpConfig, invalid_setting};

const AUTHORITIES: &str = "OTEL_EXPORTER_OTLP_CERTIFICATE";
const CERTIFICATE: &str = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
const KEY: &str = "OTEL_EXPORTER_OTLP_CLIENT_KEY";

/// The TLS configuration. For a plain `http` endpoint no file is read and no authority is trusted.
pub fn client(config: &OtlpConfig) -> Result<ClientConfig, ConfigError> {
    let roots = if config.is_https() {
        roots(config)?
    } else {
        RootCertStore::empty()
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| invalid_setting("TLS", e.to_string()))?
        .with_root_certificates(roots);
    match (&config.tls.certificate, &config.tls.key) {
        (Some(certificate), Some(key)) if config.is_https() => {
            let chain = certificates(CERTIFICATE, certificate)?;
            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|e| unreadable(KEY, "private key", key, &e))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| invalid_setting(CERTIFICATE, e.to_string()))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn roots(config: &OtlpConfig) -> Result<RootCertStore, ConfigError> {
    let mut roots = RootCertStore::empty();
    if let Some(file) = &config.tls.authorities {
        for certificate in certificates(AUTHORITIES, file)? {
            let added = roots.add(certificate);
            added.map_err(|e| invalid_setting(AUTHORITIES, format!("{}: {e}", file.display())))?;
        }
        return Ok(roots);
    }
    // rustls may not be able to parse some of the system's certificates; the others are used.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let remedy = "no certificate authorities found on this system: install ca-certificates, or set this to a PEM file";
        return Err(invalid_setting(AUTHORITIES, remedy));
    }
    Ok(roots)
}

fn certificates(setting: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(invalid_setting(
            setting,
            format!("{} contains no PEM certificate", file.display()),
        )),
        Err(e) => Err(unreadable(setting, "certificates", file, &e)),
    }
}

fn unreadable(
    setting: &str,
    what: &str,
    file: &Path,
    error: &rustls::pki_types::pem::Error,
) -> ConfigError {
    let why = match error {
        rustls::pki_types::pem::Error::Io(e) => e.to_string(),
        other => other.to_string(),
    };
    invalid_setting(
        setting,
        format!("cannot read the {what} in {}: {why}", file.display()),
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::emit::otlp::config::{Protocol, TlsFiles};

    fn config(url: &str, tls: TlsFiles) -> OtlpConfig {
        OtlpConfig {
            tls,
            ..OtlpConfig::to(url.parse().unwrap(), Protocol::HttpProtobuf)
        }
    }

    fn missing() -> Option<PathBuf> {
        Some("/nonexistent/ca.pem".into())
    }

    #[test]
    fn no_file_is_read_for_an_unencrypted_endpoint() {
        let tls = TlsFiles {
            authorities: missing(),
            certificate: missing(),
            key: missing(),
        };
        assert!(client(&config("http://c:4318", tls)).is_ok());
    }

    #[test]
    fn an_unreadable_file_is_reported_with_its_variable() {
        let tls = TlsFiles {
            authorities: missing(),
            ..TlsFiles::default()
        };
        let message = client(&config("https://c:4318", tls))
            .unwrap_err()
            .to_string();
        let expected = "OTEL_EXPORTER_OTLP_CERTIFICATE: cannot read the certificates in /nonexistent/ca.pem: No such";
        assert!(message.starts_with(expected), "{message}");
    }

    #[test]
    fn a_file_without_certificates_is_rejected() {
        let tls = TlsFiles {
            authorities: Some("/dev/null".into()),
            ..TlsFiles::default()
        };
        let message = client(&config("https://c:4318", tls))
            .unwrap_err()
            .to_string();
        assert_eq!(
            message,
            "OTEL_EXPORTER_OTLP_CERTIFICATE: /dev/null contains no PEM certificate"
        );
    }
}
