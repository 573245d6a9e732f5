//! A plain HTTP/1.1 GET from inside a namespace, over a connection of its own, so that each is balanced.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::NetNs;

/// For a connection to be made and for each read; a suite that waits longer polls.
const PATIENCE: Duration = Duration::from_secs(5);

/// Status and body of `GET path` from `address`, asked by the calling thread in its own namespace and cgroup.
pub fn get(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    parse(&answer)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP answer: {answer:?}")))
}

/// [`get`], asked inside `netns`. The process's cgroup applies: services of a node are seen only from inside the
/// node's, so ask those by `Node::command` and a client program.
pub fn get_in(netns: &NetNs, address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    netns.run(|| get(address, path))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        assert_eq!(parse("HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello"), Some((200, "hello".into())));
        assert_eq!(parse("HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(parse("SSH-2.0\r\n\r\n"), None);
    }
}
