//! The client side of `bench connect`, a process of its own because it must live in the node's network namespace and
//! below the cgroup where balancing attaches. It connects to the pod directly and through the service by turns, so that
//! whatever else the machine does meets both alike.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

use crate::latency::Latencies;

#[derive(Debug, Args)]
pub(crate) struct ConnectClient {
    /// The pod's own address
    #[arg(long)]
    direct: SocketAddr,
    /// The service's ClusterIP
    #[arg(long)]
    service: SocketAddr,
    /// Connects to each
    #[arg(long)]
    count: usize,
}

impl ConnectClient {
    pub(crate) fn run(&self) -> Result<()> {
        let mut latencies = [Latencies::new(), Latencies::new()];
        let targets = [self.direct, self.service];
        for round in 0..self.count + self.count / 10 {
            // Each goes first half of the time; the first tenth warms up and is not counted.
            for turn in 0..2 {
                let which = (round + turn) % 2;
                let took =
                    connect(targets[which]).with_context(|| format!("connecting to {}", targets[which]))?;
                if round >= self.count / 10 {
                    latencies[which].record(took);
                }
            }
        }
        println!("{}", json!({"direct": quantiles(&latencies[0]), "service": quantiles(&latencies[1])}));
        Ok(())
    }
}

fn connect(target: SocketAddr) -> Result<Duration> {
    let start = Instant::now();
    let stream = TcpStream::connect(target)?;
    let took = start.elapsed();
    // A reset instead of TIME_WAIT, so that ports do not run out.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(took)
}

fn quantiles(latencies: &Latencies) -> Value {
    json!({"p50_us": latencies.us(0.5), "p90_us": latencies.us(0.9), "p99_us": latencies.us(0.99), "n": latencies.len()})
}
