//! Delivery over TLS.

use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use tailback::emit::otlp::{Exporter, OtlpConfig, TlsFiles};
use tailback_tests::{temp::TempDir, wait};
use tokio_rustls::rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};

use crate::{
    collector::{Collector, DEADLINE, Protocol},
    spans::{config, notices, roots, wait_settled},
};

/// A TLS collector on 127.0.0.1, and the PEM certificate of its CA.
fn tls_collector(protocol: Protocol) -> (Collector, String) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut tls = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    if protocol == Protocol::Grpc {
        tls.alpn_protocols = vec![b"h2".to_vec()];
    }
    (Collector::with_tls(protocol, tls), authority.pem())
}

fn exporter(
    collector: &Collector,
    protocol: Protocol,
    authority: &str,
    temp: &TempDir,
) -> Exporter {
    let scheme = if protocol == Protocol::Grpc {
        "grpcs"
    } else {
        "https"
    };
    let config = config(&format!("{scheme}://{}", collector.address));
    let authorities = Some(temp.write("ca.pem", authority).unwrap());
    let tls = TlsFiles {
        authorities,
        ..TlsFiles::default()
    };
    Exporter::start(&OtlpConfig { tls, ..config }).unwrap()
}

#[test]
fn spans_go_encrypted_to_a_collector_with_a_trusted_certificate() {
    for protocol in [Protocol::Http, Protocol::Grpc] {
        let temp = TempDir::new("otlp-tls").unwrap();
        let (collector, authority) = tls_collector(protocol);
        let exporter = exporter(&collector, protocol, &authority, &temp);
        exporter.send(roots([1, 2]));
        assert_eq!(wait_settled(&exporter).delivered, 2);
        assert_eq!(collector.next().ids(), [1, 2]);
    }
}

#[test]
fn no_spans_go_to_a_collector_with_an_untrusted_certificate() {
    for protocol in [Protocol::Http, Protocol::Grpc] {
        let temp = TempDir::new("otlp-tls").unwrap();
        let (collector, _) = tls_collector(protocol);
        let (_, other_ca) = tls_collector(protocol);
        let exporter = exporter(&collector, protocol, &other_ca, &temp);
        exporter.send(roots([1]));
        let tried = || Ok(Some(()).filter(|()| exporter.stats().retries > 0));
        wait::until("a retry", DEADLINE, tried).unwrap();
        assert!(collector.rest().is_empty());
        assert_eq!(exporter.stats().waiting, 1);
        let text = &notices(&exporter)[0].1;
        assert!(
            text.contains("cannot be reached: invalid peer certificate"),
            "{text}"
        );
    }
}
