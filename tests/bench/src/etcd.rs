//! Debian's etcd-server as the yardstick for durable writes: started on the same disk, written to by the same number
//! of clients over its own gRPC API. The one message that is needed is encoded by hand.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

/// A running etcd, ended when dropped.
pub(crate) struct Etcd {
    child: Child,
    port: u16,
}

impl Etcd {
    /// Starts etcd with its data under `dir` and waits until it takes writes.
    pub(crate) async fn start(dir: &Path) -> Result<Self> {
        let (port, peer_port) = (free_port()?, free_port()?);
        let client_url = format!("http://127.0.0.1:{port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let child = Command::new("etcd")
            .args(["--name", "bench", "--data-dir"])
            .arg(dir)
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("bench={peer_url}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting etcd (Debian's etcd-server; `cargo xtask setup` installs it)")?;
        let etcd = Self { child, port };
        for _ in 0..200 {
            if let Ok(mut client) = etcd.client().await
                && client.put(b"ready", b"1").await.is_ok()
            {
                return Ok(etcd);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("etcd on port {port} took no write within 10 s");
    }

    /// A client with a connection of its own.
    pub(crate) async fn client(&self) -> Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Client { sender, uri: format!("http://127.0.0.1:{}/etcdserverpb.KV/Put", self.port) })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub(crate) struct Client {
    sender: http2::SendRequest<Full<Bytes>>,
    uri: String,
}

impl Client {
    /// One durable write: answered after etcd has synced its log.
    pub(crate) async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let request = Request::post(&self.uri)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(put_frame(key, value)))?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        ensure!(response.status().is_success(), "etcd answered {}", response.status());
        let collected = response.into_body().collect().await?;
        let status = collected.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
        ensure!(status.is_some_and(|status| status == "0"), "etcd refused the write");
        Ok(())
    }
}

/// A gRPC frame with `PutRequest { key = 1, value = 2 }`.
fn put_frame(key: &[u8], value: &[u8]) -> Bytes {
    let mut message = BytesMut::with_capacity(key.len() + value.len() + 16);
    for (tag, bytes) in [(0x0a_u8, key), (0x12, value)] {
        message.put_u8(tag);
        put_varint(&mut message, bytes.len());
        message.put_slice(bytes);
    }
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(&message);
    frame.freeze()
}

fn put_varint(out: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_what_protobuf_says() {
        let frame = put_frame(b"k", &[7; 200]);
        assert_eq!(&frame[..5], [0, 0, 0, 0, (3 + 3 + 200) as u8]);
        assert_eq!(&frame[5..8], [0x0a, 1, b'k']);
        assert_eq!(&frame[8..11], [0x12, 0xc8, 0x01]);
    }
}
