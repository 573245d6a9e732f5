//! A server that names its pod in every answer, and a client that counts who answered: what the examples, the demo and
//! the suites run inside pods. No runtime and no framework, so that what is measured is the node and not this program.

mod client;
mod http;
mod server;

use std::process::ExitCode;

const USAGE: &str = "\
usage: echo [serve]                   serve HTTP and UDP on $PORT (8080) until SIGTERM
       echo client URL [N] [WORKERS]  N (100) requests, each over a connection of its own, by WORKERS (1) threads;
                                      prints who answered and how fast as one JSON object
       echo client udp://HOST:PORT [N] [WORKERS]

The server's environment: POD_NAME (default: the host name), PORT, DRAIN_MS (how long it goes on accepting after
SIGTERM, so that whoever routes to it can notice; default 0).";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        [] | ["serve"] => server::main(),
        ["client", url, rest @ ..] if rest.len() <= 2 => client::main(url, rest),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(code) => code,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}
