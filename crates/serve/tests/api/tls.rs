//! The server behind TLS, with rustls' client; `scripts/check-clients` has others.

use crate::client::until;
use crate::{Lines, options, stop};
use ferropt_serve::{Limits, Log, Options, Server, Tls};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion, version};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A certificate and its key.
fn files(name: &str) -> [PathBuf; 2] {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/certificates");
    ["pem", "key"].map(|ending| folder.join(name).with_extension(ending))
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// A connection of a client that trusts one certificate.
fn connect(address: SocketAddr, trusted: &str, version: &'static SupportedProtocolVersion) -> Stream {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files(trusted)[0]).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let connection = ClientConnection::new(config, ServerName::from(address.ip())).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    StreamOwned::new(connection, socket)
}

/// Sends a request, and reads until `end` has come.
fn ask(stream: &mut Stream, request: &str, end: &str) -> std::io::Result<String> {
    stream.write_all(request.as_bytes())?;
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&all).contains(end) {
        match stream.read(&mut part)? {
            0 => break,
            count => all.extend_from_slice(&part[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&all).into_owned())
}

const READY: &str = "GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n";
const STREAM: &str = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
    Content-Length: 58\r\n\r\n{\"prompt\": \"the cat\", \"ignore_eos\": true, \"stream\": true }";

/// Whether a client that trusts a certificate gets an answer.
fn trusts(address: SocketAddr, trusted: &str) -> bool {
    ask(&mut connect(address, trusted, &version::TLS13), READY, "}")
        .is_ok_and(|answer| answer.contains("status"))
}

#[test]
fn requests_and_streams_come_encrypted_and_stalled_handshakes_are_ended() {
    let [certificate, key] = files("first");
    let tls = Some(Tls::read(&certificate, &key).unwrap());
    let limits = Limits { client_time: Duration::from_millis(400), ..Limits::default() };
    let server = Server::start(Options { tls, limits, ..options() }).unwrap();
    let address = server.address();
    for version in [&version::TLS13, &version::TLS12] {
        until("ready", || {
            let answer = ask(&mut connect(address, "first", version), READY, "}").unwrap();
            answer.starts_with("HTTP/1.1 200 OK")
        });
        let answer = ask(&mut connect(address, "first", version), STREAM, "[DONE]").unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"finish_reason\":\"length\""),
            "{answer}"
        );
    }
    assert!(!trusts(address, "second"));
    // Without TLS nothing is answered; and who says nothing, or begins and then says nothing, is not waited for.
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    for (begin, at_once) in [(READY.as_bytes(), true), (&b""[..], false), (&hello, false)] {
        let (began, mut stream) = (Instant::now(), TcpStream::connect(address).unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(begin).unwrap();
        let mut answer = Vec::new();
        // It is closed, or reset where something of it was not read.
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
        assert!(at_once || began.elapsed() >= Duration::from_millis(390), "{:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(30));
    }
    let metrics = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    until("they are counted", || {
        let answer = ask(&mut connect(address, "first", &version::TLS13), metrics, "# EOF").unwrap();
        answer.contains("ferropt_tls_failures_total 4")
    });
    stop(server);
}

#[test]
fn renewed_certificates_are_taken_over_and_wrong_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let own = ["pem", "key"].map(|ending| folder.path().join("own").with_extension(ending));
    let put = |name: &str, which: usize| {
        std::fs::copy(&files(name)[which], &own[which]).unwrap();
    };
    put("first", 0);
    put("first", 1);
    let (lines, tls) = (Lines::default(), Some(Tls::read(&own[0], &own[1]).unwrap()));
    let log = Log::new(lines.clone(), false).unwrap();
    let server = Server::start(Options { tls, log, ..options() }).unwrap();
    let address = server.address();
    let mut before = connect(address, "first", &version::TLS13);
    assert!(ask(&mut before, READY, "}").unwrap().contains("status"));
    // A certificate without its key changes nothing but the log.
    put("second", 0);
    until("it is told", || lines.text().contains("certificate_failed"));
    assert!(trusts(address, "first") && !trusts(address, "second"));
    put("second", 1);
    until("it is taken over", || trusts(address, "second"));
    assert!(!trusts(address, "first") && lines.text().contains("certificate_read"));
    assert!(ask(&mut before, READY, "}").unwrap().contains("status"), "connections of before go on");
    stop(server);
}

#[test]
fn wrong_files_are_named_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let [certificate, key] = files("first");
    let text = folder.path().join("text");
    std::fs::write(&text, "no PEM").unwrap();
    let missing = folder.path().join("missing");
    for (certificate, key, parts) in [
        (&missing, &key, ["missing", "No such file"]),
        (&certificate, &missing, ["missing", "No such file"]),
        (&text, &key, ["text has no certificate", "BEGIN CERTIFICATE"]),
        (&key, &key, ["first.key has no certificate", "BEGIN CERTIFICATE"]),
        (&certificate, &certificate, ["private key from", "BEGIN PRIVATE KEY"]),
        (&certificate, &files("second")[1], ["second.key", "first.pem"]),
    ] {
        let error = format!("{:#}", Tls::read(certificate, key).err().unwrap());
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}
