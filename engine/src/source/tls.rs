//! TLS as libpq's `sslmode` means it, by rustls.
//!
//! | `sslmode` | TLS | the server's certificate |
//! |---|---|---|
//! | `disable` | never | |
//! | `allow` | when the server refuses to go on without | not checked |
//! | `prefer` | when the server offers it | not checked |
//! | `require` | always | not checked; chain checked if there is a root certificate file, as in libpq |
//! | `verify-ca` | always | chain |
//! | `verify-full` | always | chain and host name |
//!
//! A Unix socket never uses TLS.
//!
//! What rustls does otherwise than OpenSSL, and what we do about it:
//!
//! * It refuses a certificate that is marked as an authority (`CA:TRUE`) as a server's. `openssl req -x509` makes
//!   such, and the PostgreSQL manual has it copied to `root.crt`; so a server certificate that *is* one of the
//!   root certificates, byte for byte, is accepted. Its period of validity is not looked at: replacing the
//!   trusted file is how it is revoked.
//! * It refuses X.509 version 1 certificates, and takes a host name from `subjectAltName` only, never from the
//!   common name. With the checked modes the error says so. In the unchecked modes nothing of the certificate is
//!   read, not even its signature: where anybody's certificate is accepted, a signature under it proves nothing.
//! * It cannot decrypt a private key, nor read revocation lists by OpenSSL's file names: those settings are
//!   refused where the parameters are read.
//!
//! PostgreSQL: src/interfaces/libpq/fe-secure-openssl.c, initialize_SSL.

use std::io::ErrorKind::{NotADirectory, NotFound};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, SupportedProtocolVersion,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, Result};

/// libpq's `sslmode`, from weak to strong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Where trusted certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RootCertificates {
    /// The operating system's.
    System,
    /// A PEM file, which need not exist unless the mode checks.
    File(PathBuf),
    /// Nowhere: no file was named, and there is no home directory to look in.
    None,
}

/// libpq's `sslcertmode`: whether a client certificate is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CertificateMode {
    Disable,
    Allow,
    Require,
}

/// What TLS needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TlsParameters {
    pub(super) mode: SslMode,
    pub(super) roots: RootCertificates,
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
    pub(super) certificate_mode: CertificateMode,
    pub(super) only_tls13: bool,
    pub(super) only_tls12: bool,
    pub(super) server_name_indication: bool,
    pub(super) direct: bool,
}

impl TlsParameters {
    /// Of a connection that speaks no TLS: no file is read.
    pub(super) fn none() -> Self {
        Self {
            mode: SslMode::Disable,
            roots: RootCertificates::None,
            certificate: None,
            key: None,
            certificate_mode: CertificateMode::Disable,
            only_tls13: false,
            only_tls12: false,
            server_name_indication: false,
            direct: false,
        }
    }
}

/// The connector for these parameters; reads the certificate files.
///
/// # Errors
///
/// `Missing` or `Invalid` for a certificate or key file that is needed and not there, or not readable as PEM.
pub(super) fn connector(parameters: &TlsParameters) -> Result<MakeRustlsConnect> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&'static SupportedProtocolVersion] = match (parameters.only_tls12, parameters.only_tls13) {
        (true, true) => return Err(Error::invalid("ssl_min_protocol_version is above ssl_max_protocol_version")),
        (true, false) => &[&rustls::version::TLS12],
        (false, true) => &[&rustls::version::TLS13],
        (false, false) => rustls::DEFAULT_VERSIONS,
    };
    let verifier = Verifier::new(parameters, provider.clone())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| Error::invalid("cannot set up TLS").because(error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client_certificate(parameters)? {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| Error::invalid("the client certificate and its key cannot be used").because(error))?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = parameters.server_name_indication;
    if parameters.direct {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(MakeRustlsConnect::new(config))
}

/// What a user can do about a handshake that failed for what a certificate is.
pub(super) fn certificate_hint(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(rustls::Error::InvalidCertificate(problem)) = error.downcast_ref() {
            return Some(match problem {
                CertificateError::UnknownIssuer => {
                    "put the certificate of the authority that signed the server's into ~/.postgresql/root.crt, \
                     or name its file with sslrootcert"
                }
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    "connect under a name that is in the certificate's subjectAltName (the common name is not \
                     looked at), or use sslmode=verify-ca"
                }
                _ => {
                    "the server's certificate must be X.509 version 3, for this use, and in its period of \
                     validity; sslmode=require does not check it"
                }
            });
        }
        // The source of an io::Error is that of what it wraps, so that the wrapped error itself would be missed.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = wrapped.map(|inner| inner as &(dyn std::error::Error + 'static)).or_else(|| error.source());
    }
    None
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Nothing,
    Chain,
    ChainAndName,
}

#[derive(Debug)]
struct Verifier {
    check: Check,
    roots: RootCertStore,
    /// The root certificates as they are, for a server that presents one of them as its own.
    trusted: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(parameters: &TlsParameters, provider: Arc<CryptoProvider>) -> Result<Self> {
        let check = match parameters.mode {
            SslMode::Disable | SslMode::Allow | SslMode::Prefer => Check::Nothing,
            SslMode::Require => match &parameters.roots {
                RootCertificates::File(file) if file.exists() => Check::Chain,
                _ => Check::Nothing,
            },
            SslMode::VerifyCa => Check::Chain,
            SslMode::VerifyFull => Check::ChainAndName,
        };
        let trusted = if check == Check::Nothing { Vec::new() } else { root_certificates(&parameters.roots)? };
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(trusted.iter().cloned());
        if check != Check::Nothing && added == 0 {
            return Err(Error::invalid("none of the root certificates can be used").at(place(&parameters.roots)));
        }
        Ok(Self { check, roots, trusted, provider })
    }

    fn check_chain(
        &self,
        certificate: &ParsedCertificate<'_>,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<(), rustls::Error> {
        if self.trusted.contains(der) {
            return Ok(());
        }
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(certificate, &self.roots, intermediates, now, algorithms)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if self.check != Check::Nothing {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            self.check_chain(&certificate, end_entity, intermediates, now)?;
            if self.check == Check::ChainAndName {
                verify_server_name(&certificate, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        if self.check == Check::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        if self.check == Check::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn place(roots: &RootCertificates) -> String {
    match roots {
        RootCertificates::System => "the system's certificates".to_owned(),
        RootCertificates::File(file) => file.display().to_string(),
        RootCertificates::None => "no file".to_owned(),
    }
}

fn root_certificates(roots: &RootCertificates) -> Result<Vec<CertificateDer<'static>>> {
    match roots {
        RootCertificates::System => {
            let mut found = rustls_native_certs::load_native_certs();
            match found.errors.pop() {
                Some(error) if found.certs.is_empty() => {
                    Err(Error::invalid("cannot read the system's root certificates").because(error))
                }
                _ => Ok(found.certs),
            }
        }
        RootCertificates::File(file) => read_certificates(file).map_err(|error| {
            error.hint("provide the file, use sslrootcert=system, or use a mode that does not verify (sslmode=require)")
        }),
        RootCertificates::None => {
            Err(Error::invalid("the sslmode verifies the server, and there is no root certificate file")
                .hint("name one with sslrootcert, or use sslrootcert=system"))
        }
    }
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = std::fs::read(file).map_err(|error| Error::io("read certificate file", file, error))?;
    let certificates = CertificateDer::pem_slice_iter(&bytes).collect::<std::result::Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| {
        Error::invalid("not a certificate in PEM form").at(file.display().to_string()).because(error)
    })?;
    if certificates.is_empty() {
        return Err(Error::invalid("no certificate in the file").at(file.display().to_string()));
    }
    Ok(certificates)
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The certificate to show to the server. As in libpq, a file that is not there means none, even if it was
/// named: pointing `PGSSLCERT` at nothing is how one is switched off.
fn client_certificate(parameters: &TlsParameters) -> Result<Option<ClientCertificate>> {
    let exists = |file: &&PathBuf| match std::fs::metadata(file) {
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => false,
        Ok(metadata) => metadata.is_file(),
        Err(_) => true,
    };
    let wanted = parameters.mode != SslMode::Disable && parameters.certificate_mode != CertificateMode::Disable;
    let Some(file) = parameters.certificate.as_ref().filter(|_| wanted).filter(exists) else {
        if wanted && parameters.certificate_mode == CertificateMode::Require {
            return Err(Error::invalid("sslcertmode=require, and there is no client certificate")
                .hint("name one with sslcert and its key with sslkey"));
        }
        return Ok(None);
    };
    let key_file = parameters.key.as_ref().ok_or_else(|| {
        Error::invalid("there is a client certificate, and no private key").at(file.display().to_string())
    })?;
    let chain = read_certificates(file)?;
    Ok(Some((chain, read_key(key_file)?)))
}

fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    let metadata = std::fs::metadata(file).map_err(|error| Error::io("read private key file", file, error))?;
    // root's key may be readable by a group that the system manages, as Debian's ssl-cert.
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(Error::invalid(format!("private key file {} has group or world access", file.display()))
            .hint("its permissions must be 0600 or less, or 0640 or less if root owns it"));
    }
    PrivateKeyDer::from_pem_file(file).map_err(|error| {
        Error::invalid("cannot read the private key")
            .at(file.display().to_string())
            .because(error)
            .hint("it must be PEM and not encrypted: `openssl pkey -in KEY -out PLAIN_KEY` takes the passphrase off")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;

    use super::*;

    /// An authority, valid until 2126.
    const ROOT: &str = "-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIURvi65eVfWEw7/K53bFZJEl8E3HAwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEcm9vdDAgFw0yNjExMjIxNjU3MjFaGA8yMTI2MTAyOTE2NTcy
MVowDzENMAsGA1UEAwwEcm9vdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJSv
lXOMI0w4eexwvLW4F9W/fMjHnKLY+hElUpw0kBxLTOISyxFIaEYVEFYUc062QXbR
7azpaackndH6/84LlQyjUzBRMB0GA1UdDgQWBBTXEw4TYc3C0/pR3l7SzO5m7zRf
GzAfBgNVHSMEGDAWgBTXEw4TYc3C0/pR3l7SzO5m7zRfGzAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0cAMEQCIEnFnktjhO/HOl6MYLCuWdfxe2yKu4v4PYVE
DbG5CfQWAiBi3pxq9+SiD09f4nMrZG94J9GD1PeobrVl2ixPoTXVPg==
-----END CERTIFICATE-----";
    /// Another authority.
    const OTHER_ROOT: &str = "-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIUB/RpsSf2re1P9HCjDQWoeFl3L3owCgYIKoZIzj0EAwIw
EDEOMAwGA1UEAwwFb3RoZXIwIBcNMjYxMTIyMTY1NzIxWhgPMjEyNjEwMjkxNjU3
MjFaMBAxDjAMBgNVBAMMBW90aGVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
ulQxwT46SI4FzbBEe2xRhG8bIwQrK74z2/jj7Ua6Jy6801r1sDUOvkpCFBox1VYC
5eIkEolScLIpOOnrTvgBFKNTMFEwHQYDVR0OBBYEFF5M1FW9RiZjBI41bdyNkLN5
z3sSMB8GA1UdIwQYMBaAFF5M1FW9RiZjBI41bdyNkLN5z3sSMA8GA1UdEwEB/wQF
MAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIgPhThKqCOwKBPW221OrysHkGOKiNtWOWY
fLTzLV3rC2ACIQC2fQr2jAevlZj7MpsyB9iYpScDFpLuT2VrrTMGkjZq5w==
-----END CERTIFICATE-----";
    /// Signed by the authority for db.example.
    const SERVER: &str = "-----BEGIN CERTIFICATE-----
MIIBeDCCAR+gAwIBAgIUMvng87lTG9caxbELnqQJ3zaLEYowCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEcm9vdDAgFw0yNjExMjIxNjU3MjFaGA8yMTI2MTAyOTE2NTcy
MVowDTELMAkGA1UEAwwCZGIwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAS7ZBi4
mWXwhBK+gi9aN+tSa/VCmzScrT4wvqZlAT+2G25U301E9IoKNhNTqBk8fJ0h4usC
LGOBwAaokZ/bojh/o1kwVzAVBgNVHREEDjAMggpkYi5leGFtcGxlMB0GA1UdDgQW
BBTWLYFDw/AIPaEz3jmVO5N1mOtkpDAfBgNVHSMEGDAWgBTXEw4TYc3C0/pR3l7S
zO5m7zRfGzAKBggqhkjOPQQDAgNHADBEAiAjV5Vtx4ipaEUqltLBBwIsBhZOwLzi
droMDaaqyFNokQIgKbE1UbcZXlzcPdZNTAJ6ZPSEZdq6ZyM5Ow6Ck1oAfCc=
-----END CERTIFICATE-----";
    /// The same without extensions, in version 1, as `openssl x509 -req` makes it by default.
    const VERSION_1: &str = "-----BEGIN CERTIFICATE-----
MIIBGDCBvwIUMvng87lTG9caxbELnqQJ3zaLEYswCgYIKoZIzj0EAwIwDzENMAsG
A1UEAwwEcm9vdDAgFw0yNjExMjIxNjU3MjFaGA8yMTI2MTAyOTE2NTcyMVowDTEL
MAkGA1UEAwwCZGIwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAS7ZBi4mWXwhBK+
gi9aN+tSa/VCmzScrT4wvqZlAT+2G25U301E9IoKNhNTqBk8fJ0h4usCLGOBwAao
kZ/bojh/MAoGCCqGSM49BAMCA0gAMEUCIFw8Ohy1PDwaOtC4JfoBZ5vVRZLEQT2A
Koka2EM5hSk2AiEA7f4QimzuDdLLgfXMzLa59t678rKEhumVLj/xU33fVGA=
-----END CERTIFICATE-----";
    /// Signed by itself for db.example and marked as an authority, as `openssl req -x509` makes it by default.
    const SELF_SIGNED: &str = "-----BEGIN CERTIFICATE-----
MIIBiTCCAS6gAwIBAgIUWljygIeB9PJ1b9VTIeJrDYTP5qMwCgYIKoZIzj0EAwIw
DTELMAkGA1UEAwwCZGIwIBcNMjYxMTIyMTY1NzIxWhgPMjEyNjEwMjkxNjU3MjFa
MA0xCzAJBgNVBAMMAmRiMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEp6ZcZbge
pNJ64f1KBvNSCPZgdQk8p7UL2UNCf4YGwDxeUDeMtgcLFgw9lJP8Dzi/LWSx+Ng6
DAiJt4MA7gOI0aNqMGgwHQYDVR0OBBYEFM15mDrnoy9hDsJ4l8a9IXNp+CpSMB8G
A1UdIwQYMBaAFM15mDrnoy9hDsJ4l8a9IXNp+CpSMA8GA1UdEwEB/wQFMAMBAf8w
FQYDVR0RBA4wDIIKZGIuZXhhbXBsZTAKBggqhkjOPQQDAgNJADBGAiEAsLpTTu7p
FLyXgV8QEegpliNFpGuYDBok9vktDWFhUfwCIQDJathWk+j7xwX8fBanh0aOPuXf
SgA/LCVL4jNRwrJdyQ==
-----END CERTIFICATE-----";

    fn parameters(mode: SslMode, roots: RootCertificates) -> TlsParameters {
        TlsParameters {
            mode,
            roots,
            certificate: None,
            key: None,
            certificate_mode: CertificateMode::Allow,
            only_tls13: false,
            only_tls12: false,
            server_name_indication: true,
            direct: false,
        }
    }

    /// What a client in `mode` that trusts `root` says to `server`, who is reached as `name`.
    fn verify(
        mode: SslMode,
        root: Option<&str>,
        server: &str,
        name: &'static str,
    ) -> std::result::Result<(), rustls::Error> {
        let directory = TempDir::new().unwrap();
        let file = directory.path().join("root.crt");
        if let Some(root) = root {
            fs::write(&file, root).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier::new(&parameters(mode, RootCertificates::File(file)), provider).unwrap();
        let server = CertificateDer::from_pem_slice(server.as_bytes()).unwrap();
        let name = ServerName::try_from(name).unwrap();
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_800_000_000));
        verifier.verify_server_cert(&server, &[], &name, &[], now).map(drop)
    }

    fn hint(error: rustls::Error) -> &'static str {
        let wrapped = std::io::Error::other(error);
        certificate_hint(&Error::bug("outer").because(wrapped)).unwrap()
    }

    #[test]
    fn any_certificate_will_do_where_none_is_checked() {
        for mode in [SslMode::Allow, SslMode::Prefer, SslMode::Require] {
            for server in [SERVER, VERSION_1, SELF_SIGNED] {
                verify(mode, None, server, "elsewhere.example").unwrap();
            }
        }
        verify(SslMode::Prefer, Some(OTHER_ROOT), SERVER, "elsewhere.example").unwrap();
    }

    #[test]
    fn require_checks_the_chain_if_there_is_a_root_certificate_as_libpq_does() {
        verify(SslMode::Require, Some(ROOT), SERVER, "elsewhere.example").unwrap();
        let error = verify(SslMode::Require, Some(OTHER_ROOT), SERVER, "db.example").unwrap_err();
        assert!(hint(error).contains("root.crt"));
    }

    #[test]
    fn only_verify_full_checks_the_name() {
        verify(SslMode::VerifyCa, Some(ROOT), SERVER, "elsewhere.example").unwrap();
        verify(SslMode::VerifyFull, Some(ROOT), SERVER, "db.example").unwrap();
        let error = verify(SslMode::VerifyFull, Some(ROOT), SERVER, "elsewhere.example").unwrap_err();
        assert!(hint(error).contains("subjectAltName"));
    }

    #[test]
    fn a_certificate_signed_by_itself_will_do_if_it_is_the_trusted_one() {
        verify(SslMode::VerifyFull, Some(SELF_SIGNED), SELF_SIGNED, "db.example").unwrap();
        assert!(verify(SslMode::VerifyFull, Some(SELF_SIGNED), SELF_SIGNED, "elsewhere.example").is_err());
        assert!(verify(SslMode::VerifyCa, Some(ROOT), SELF_SIGNED, "db.example").is_err());
        let both = format!("{ROOT}\n{SELF_SIGNED}");
        verify(SslMode::VerifyCa, Some(&both), SELF_SIGNED, "db.example").unwrap();
        verify(SslMode::VerifyCa, Some(&both), SERVER, "db.example").unwrap();
    }

    #[test]
    fn a_certificate_of_version_1_fails_the_check_with_a_hint() {
        let error = verify(SslMode::VerifyCa, Some(ROOT), VERSION_1, "db.example").unwrap_err();
        assert!(hint(error).contains("version 3"));
    }

    #[test]
    fn a_mode_that_checks_needs_root_certificates() {
        let none = parameters(SslMode::VerifyFull, RootCertificates::None);
        assert!(connector(&none).err().unwrap().hint_text().unwrap().contains("sslrootcert"));
        let missing = RootCertificates::File("/nowhere/root.crt".into());
        let error = connector(&parameters(SslMode::VerifyCa, missing.clone())).err().unwrap();
        assert_eq!(error.kind(), crate::ErrorKind::Missing);
        assert!(connector(&parameters(SslMode::Require, missing)).is_ok());
        let directory = TempDir::new().unwrap();
        let empty = directory.path().join("root.crt");
        fs::write(&empty, "not PEM").unwrap();
        assert!(connector(&parameters(SslMode::VerifyCa, RootCertificates::File(empty))).is_err());
    }

    #[test]
    fn contradicting_protocol_versions_are_refused() {
        let base = parameters(SslMode::Prefer, RootCertificates::None);
        assert!(connector(&TlsParameters { only_tls12: true, only_tls13: true, ..base.clone() }).is_err());
        assert!(connector(&TlsParameters { only_tls12: true, ..base }).is_ok());
    }

    #[test]
    fn a_client_certificate_that_is_not_there_is_not_sent_unless_it_is_demanded() {
        let base = parameters(SslMode::Require, RootCertificates::None);
        let absent = TlsParameters { certificate: Some("/nowhere/a".into()), key: Some("/nowhere/b".into()), ..base };
        assert!(client_certificate(&absent).unwrap().is_none());
        let demanded = TlsParameters { certificate_mode: CertificateMode::Require, ..absent };
        assert!(client_certificate(&demanded).is_err());
    }

    #[test]
    fn a_private_key_that_others_can_read_is_refused() {
        let directory = TempDir::new().unwrap();
        let file = directory.path().join("key");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(read_key(&file).unwrap_err().to_string().contains("group or world access"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(read_key(&file).unwrap_err().hint_text().unwrap().contains("not encrypted"));
    }
}
