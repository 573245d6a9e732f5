//! The client: every request over a connection of its own, so that every one of them is balanced. What it prints is
//! one JSON object; it exits 0 only if every request was answered.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::http;

/// For a connection to be made, and for an answer to come.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone)]
enum Target {
    Http { address: SocketAddr, host: String, path: String },
    Udp { address: SocketAddr },
}

/// What came of the requests: microseconds by pod, and how often each error was met.
#[derive(Default)]
struct Tally {
    pods: BTreeMap<String, Vec<u64>>,
    errors: BTreeMap<String, u64>,
}

pub(crate) fn main(url: &str, rest: &[&str]) -> Result<ExitCode, String> {
    let target = parse(url)?;
    let number = |at: usize, default: usize| match rest.get(at) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| format!("{text} is no number")),
    };
    let (count, workers) = (number(0, 100)?, number(1, 1)?.max(1));
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|worker| {
                let (target, mine) = (&target, count / workers + usize::from(worker < count % workers));
                scope.spawn(move || requests(target, mine))
            })
            .collect();
        for thread in threads {
            match thread.join() {
                Ok(part) => tally.add(part),
                Err(_) => *tally.errors.entry("a worker panicked".to_owned()).or_default() += 1,
            }
        }
    });
    println!("{}", tally.json());
    Ok(if tally.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn parse(url: &str) -> Result<Target, String> {
    let resolve = |host: &str, port: &str| {
        let with_port = if host.rsplit(']').next().unwrap_or(host).contains(':') {
            host.to_owned()
        } else {
            format!("{host}{port}")
        };
        let mut found = with_port.to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
        found.next().ok_or_else(|| format!("{host} has no address"))
    };
    if let Some(host) = url.strip_prefix("udp://") {
        return Ok(Target::Udp { address: resolve(host, "")? });
    }
    let rest = url.strip_prefix("http://").ok_or_else(|| format!("{url}: neither http:// nor udp://"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    Ok(Target::Http { address: resolve(host, ":80")?, host: host.to_owned(), path: format!("/{path}") })
}

fn requests(target: &Target, count: usize) -> Tally {
    let mut tally = Tally::default();
    for number in 0..count {
        let start = Instant::now();
        match request(target, number) {
            Ok(pod) => {
                let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
                tally.pods.entry(pod).or_default().push(us);
            }
            Err(error) => *tally.errors.entry(error.to_string()).or_default() += 1,
        }
    }
    tally
}

/// The pod that answered.
fn request(target: &Target, number: usize) -> io::Result<String> {
    match target {
        Target::Http { address, host, path } => {
            let mut stream = TcpStream::connect_timeout(address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
            let answer = http::read(&mut BufReader::new(stream))?;
            let answer = answer.ok_or_else(|| io::Error::other("closed without an answer"))?;
            if !answer.first.starts_with("HTTP/1.1 200 ") {
                return Err(io::Error::other(answer.first));
            }
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            let named = body.split_once("\"pod\":\"").and_then(|(_, rest)| rest.split_once('"'));
            Ok(named.map_or_else(|| "(unnamed)".to_owned(), |(pod, _)| pod.to_owned()))
        }
        Target::Udp { address } => {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let payload = format!("request {number}");
            socket.send_to(payload.as_bytes(), address)?;
            let mut buffer = [0; 512];
            let (length, peer) = socket.recv_from(&mut buffer)?;
            // A program that asked a service must see the service answer.
            if peer != *address {
                return Err(io::Error::other(format!("{address} was asked, {peer} answered")));
            }
            let text = String::from_utf8_lossy(&buffer[..length]);
            let (pod, echoed) = text.split_once(' ').unwrap_or((&text, ""));
            if echoed != payload {
                return Err(io::Error::other("the answer is to another request"));
            }
            Ok(pod.to_owned())
        }
    }
}

impl Tally {
    fn add(&mut self, other: Tally) {
        for (pod, mut us) in other.pods {
            self.pods.entry(pod).or_default().append(&mut us);
        }
        for (error, count) in other.errors {
            *self.errors.entry(error).or_default() += count;
        }
    }

    /// `{"answered":…,"failed":…,"pods":{"<pod>":{"answers":…,"p50_us":…,"p99_us":…,"max_us":…}},"errors":{"<why>":…}}`
    fn json(&mut self) -> String {
        let answered: usize = self.pods.values().map(Vec::len).sum();
        let failed: u64 = self.errors.values().sum();
        let mut pods = Vec::new();
        for (pod, us) in &mut self.pods {
            us.sort_unstable();
            let at = |percent: usize| us[(us.len() - 1) * percent / 100];
            let (answers, p50, p99, max) = (us.len(), at(50), at(99), at(100));
            let mut text = quoted(pod);
            // Writing to a string cannot fail.
            write!(text, ":{{\"answers\":{answers},\"p50_us\":{p50},\"p99_us\":{p99},\"max_us\":{max}}}")
                .ok();
            pods.push(text);
        }
        let errors: Vec<_> =
            self.errors.iter().map(|(why, count)| format!("{}:{count}", quoted(why))).collect();
        let (pods, errors) = (pods.join(","), errors.join(","));
        format!("{{\"answered\":{answered},\"failed\":{failed},\"pods\":{{{pods}}},\"errors\":{{{errors}}}}}")
    }
}

fn quoted(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("\"{}\"", plain.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_addresses() {
        let address = |url: &str| match parse(url).expect(url) {
            Target::Http { address, path, .. } => (address.to_string(), path),
            Target::Udp { address } => (address.to_string(), String::new()),
        };
        assert_eq!(address("http://10.0.0.1"), ("10.0.0.1:80".into(), "/".into()));
        assert_eq!(address("http://[fd00::1]:8080/readyz"), ("[fd00::1]:8080".into(), "/readyz".into()));
        assert_eq!(address("http://[fd00::1]/"), ("[fd00::1]:80".into(), "/".into()));
        assert_eq!(address("udp://10.0.0.1:53").0, "10.0.0.1:53");
        assert!(parse("ftp://10.0.0.1").is_err() && parse("udp://10.0.0.1").is_err());
    }

    #[test]
    fn the_tally_is_json() {
        let mut tally = Tally::default();
        tally.pods.insert("a".into(), vec![30, 10, 20]);
        tally.errors.insert("said \"no\"".into(), 2);
        assert_eq!(
            tally.json(),
            "{\"answered\":3,\"failed\":2,\"pods\":{\"a\":{\"answers\":3,\"p50_us\":20,\"p99_us\":20,\"max_us\":30}},\
             \"errors\":{\"said \\\"no\\\"\":2}}"
        );
    }
}
