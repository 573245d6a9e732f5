//! `pods/log`, with a make-believe agent: only who shows the API server's certificate is let in,
//! and lines arrive as they are written.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::api_server::{ControlPlane, DEADLINE, Who, read_answer};

const PODS: &str = "/api/v1/namespaces/default/pods";

struct Agent {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Agent {
    async fn start(api: &ControlPlane) -> Self {
        let text = std::fs::read_to_string(&api.ready.admin_kubeconfig).unwrap();
        let file: Value = serde_saphyr::from_str(&text).unwrap();
        let pem = |pointer: &str| STANDARD.decode(file.pointer(pointer).unwrap().as_str().unwrap()).unwrap();
        let mut roots = RootCertStore::empty();
        let authority = pem("/clusters/0/cluster/certificate-authority-data");
        roots.add(CertificateDer::from_pem_slice(&authority).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        // Any certificate will do: an agent is believed by its address.
        let certificate =
            CertificateDer::from_pem_slice(&pem("/users/0/user/client-certificate-data")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&pem("/users/0/user/client-key-data")).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { listener, acceptor: TlsAcceptor::from(Arc::new(config)) }
    }

    /// The next request: its first line, and where to answer.
    async fn next(&self) -> (String, TlsStream<TcpStream>) {
        let (tcp, _) = self.listener.accept().await.unwrap();
        let mut tls = self.acceptor.accept(tcp).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tls.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        (head.lines().next().unwrap().to_owned(), tls)
    }
}

async fn pod_on_a_node(api: &ControlPlane, port: u16) {
    let node = json!({"metadata": {"name": "n"}, "status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    assert_eq!(api.send("POST", "/api/v1/nodes", &node).await.code, 201);
    let pod = json!({"metadata": {"name": "p"},
        "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}});
    assert_eq!(api.send("POST", PODS, &pod).await.code, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_come_as_they_are_written() {
    let api = ControlPlane::start().await;
    let agent = Agent::start(&api).await;
    pod_on_a_node(&api, agent.listener.local_addr().unwrap().port()).await;
    let mut client = api.connect(Who::Admin).await;
    let request = format!("GET {PODS}/p/log?follow=true&tailLines=5&container=c HTTP/1.0\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let (asked, mut answer) = agent.next().await;
    assert_eq!(asked, "GET /containerLogs/default/p/c?follow=true&tailLines=5 HTTP/1.1");
    answer.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nfirst\n").await.unwrap();
    answer.flush().await.unwrap();
    let mut client = BufReader::new(client);
    let mut line = String::new();
    while line != "first\n" {
        line.clear();
        let read = tokio::time::timeout(DEADLINE, client.read_line(&mut line)).await.unwrap();
        assert!(read.unwrap() > 0, "the answer ended early");
    }
    answer.write_all(b"second\n").await.unwrap();
    answer.shutdown().await.unwrap();
    let mut rest = String::new();
    tokio::time::timeout(DEADLINE, client.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, "second\n");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_agent_refuses_is_told() {
    let api = ControlPlane::start().await;
    let agent = Agent::start(&api).await;
    pod_on_a_node(&api, agent.listener.local_addr().unwrap().port()).await;
    let mut client = api.connect(Who::Admin).await;
    client.write_all(format!("GET {PODS}/p/log HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let (_, mut answer) = agent.next().await;
    let text = "container c has not started";
    let head = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    answer.write_all(head.as_bytes()).await.unwrap();
    answer.flush().await.unwrap();
    assert_eq!(read_answer(client).await.refused(400), text);
    api.get(&format!("{PODS}/p/log?container=x")).await.refused(400);
    drop(agent);
    drop(answer);
    let away = api.get(&format!("{PODS}/p/log")).await.refused(500);
    assert!(away.contains("/containerLogs/default/p/c"), "{away}");
    let refused = api.request(Who::Agent, &format!("GET {PODS}/p/log"), "", "").await;
    refused.refused(403);
    api.stop().await;
}
