//! When to look. Invariant: every reason leads to the same pass, reasons that come together lead to one, and a pass that
//! failed is repeated soon.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::Network;
use super::super::netlink::{KernelEvent as Event, KernelEvents as Events};
use super::super::plan::is_node_link;
use super::{Done, Inner, Overlay, Peer, plan};
use crate::limits;

/// Whether an event can concern the overlay.
fn matters(event: &Event, own: &[IpNetwork], devices: &[u32]) -> bool {
    match event {
        Event::Lost => true,
        // Each new pod's link gets an address of its own kind, and none of them leads anywhere.
        Event::Address { link, local } => !local || devices.contains(link),
        Event::Queue { .. } => false,
        Event::Link { name, .. } => !is_node_link(name),
        // Pods of this node come and go; what leads to peers is no part of its range, and good on more than one link.
        Event::Route { to, protocol } => {
            let of_pod = |range: &IpNetwork| range.contains(to.network()) && to.prefix() > range.prefix();
            let local = matches!(to.network(), IpAddr::V6(ip) if ip.is_unicast_link_local());
            *protocol == plan::PROTOCOL || !local && !own.iter().any(of_pod)
        }
        // The hosts' own neighbours change all the time.
        Event::Neighbour { link } => devices.contains(link),
    }
}

impl Overlay {
    /// Keeps the kernel as `peers` want it, until `shutdown`, and tells `network` what that means for pods.
    pub(crate) async fn run(
        self,
        mut peers: watch::Receiver<Option<Vec<Peer>>>,
        network: Network,
        shutdown: CancellationToken,
    ) {
        let mut events = listen();
        let mut timer = tokio::time::interval(limits::secs(limits::OVERLAY_RESYNC_PERIOD_S));
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut nat = tokio::time::interval(limits::secs(limits::NAT_LOOK_PERIOD_S));
        nat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut again: Option<Instant> = None;
        let mut pause = limits::OVERLAY_RETRY_FIRST_MS;
        let mut told = false;
        loop {
            let mut news = false;
            let later =
                again.unwrap_or_else(|| Instant::now() + limits::secs(limits::OVERLAY_RESYNC_PERIOD_S));
            tokio::select! {
                changed = peers.changed() => {
                    if changed.is_err() {
                        // Whoever told the peers ended: with the agent.
                        return shutdown.cancelled().await;
                    }
                    news = true;
                }
                heard = self.inner.hear(&mut events) => if !heard { continue },
                _ = nat.tick() => {
                    let inner = Arc::clone(&self.inner);
                    // A look that broke off is followed by the next.
                    tokio::task::spawn_blocking(move || inner.mend_nat()).await.ok();
                    continue;
                }
                _ = timer.tick() => {
                    if events.is_none() {
                        events = listen();
                    }
                }
                () = tokio::time::sleep_until(later), if again.is_some() => {}
                () = shutdown.cancelled() => return,
            }
            if !news {
                // What happens together is looked at once.
                tokio::time::sleep(limits::millis(limits::OVERLAY_GATHER_MS)).await;
            }
            if let Some(now) = peers.borrow_and_update().clone() {
                let mut state = self.inner.state();
                state.peers = now;
                state.synced = true;
            }
            let done = self.inner.pass_on_a_thread().await;
            report(&done, news, &mut told);
            network.set_impaired(done.failed.first().cloned());
            if done.mtu_changed {
                tracing::info!(mtu = self.pod_mtu(), "pods' links get another MTU");
                tokio::spawn(follow_mtu(network.clone()));
            }
            if done.failed.is_empty() {
                (again, pause) = (None, limits::OVERLAY_RETRY_FIRST_MS);
            } else {
                again = Some(Instant::now() + Duration::from_millis(pause));
                pause = (pause * 2).min(limits::OVERLAY_RETRY_MAX_MS);
            }
        }
    }
}

/// Gives pods' links another MTU.
async fn follow_mtu(network: Network) {
    match network.follow_mtu().await {
        Ok(done) => {
            tracing::info!(changed = done.repaired.len(), "pods' links follow the MTU");
            for (pod, why) in &done.broken {
                tracing::warn!(pod, why, "a pod's link keeps its MTU");
            }
            for why in &done.failed {
                tracing::warn!(why, "a pod's link keeps its MTU");
            }
        }
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "pods' links keep their MTU for now");
        }
    }
}

fn report(done: &Done, news: bool, told: &mut bool) {
    for what in &done.steps {
        if news {
            tracing::debug!(what, "overlay");
        } else {
            tracing::info!(what, "overlay repaired");
        }
    }
    for why in &done.failed {
        if !*told {
            tracing::warn!(why, "overlay: tried again until it works");
        }
    }
    *told = !done.failed.is_empty();
}

/// Events that wait for a pass; more wait in the socket, and where that is full the kernel says so.
const QUEUED_MAX: usize = 16;

/// Listens on a thread of its own, which ends when nobody wants to hear it any more.
fn listen() -> Option<mpsc::Receiver<Vec<Event>>> {
    let (told, heard) = mpsc::channel(QUEUED_MAX);
    let listening = Events::open().and_then(|mut events| {
        let listen = move || {
            while !told.is_closed() {
                let taken = events.take().unwrap_or_else(|error| {
                    tracing::debug!(%error, "reading the kernel's events");
                    std::thread::sleep(limits::millis(limits::OVERLAY_RETRY_FIRST_MS));
                    vec![Event::Lost]
                });
                if !taken.is_empty() && told.blocking_send(taken).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("overlay-events".to_owned()).spawn(listen)
    });
    match listening {
        Ok(_) => Some(heard),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the kernel tells no changes of links and routes; they are looked at from time to time"
            );
            None
        }
    }
}

impl Inner {
    /// Waits until something happened; whether it matters.
    async fn hear(&self, events: &mut Option<mpsc::Receiver<Vec<Event>>>) -> bool {
        let Some(receiver) = events else { return std::future::pending().await };
        let Some(mut taken) = receiver.recv().await else {
            *events = None;
            return true;
        };
        while let Ok(more) = receiver.try_recv() {
            taken.extend(more);
        }
        let devices = self.state().devices.clone();
        taken.iter().any(|event| matters(event, &self.config.pod_cidrs, &devices))
    }

    async fn pass_on_a_thread(self: &Arc<Self>) -> Done {
        let inner = Arc::clone(self);
        match tokio::task::spawn_blocking(move || inner.pass()).await {
            Ok(done) => done,
            Err(_) => Done { failed: vec!["the overlay's worker stopped".to_owned()], ..Done::default() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_concerns_the_overlay_is_looked_at() {
        let own: Vec<IpNetwork> = vec!["10.244.1.0/24".parse().unwrap()];
        let route = |to: &str, protocol| Event::Route { to: to.parse().unwrap(), protocol };
        let link = |name: &str| Event::Link { index: 1, name: name.to_owned() };
        let all = [
            (Event::Lost, true),
            (route("10.244.1.7/32", 4), false),
            (route("fe80::5/128", 4), false),
            (route("10.244.1.0/24", 84), true),
            (route("10.244.2.0/24", 84), true),
            (route("0.0.0.0/0", 4), true),
            (link("eth0"), true),
            (link("sheave-vx4"), true),
            (link("shv0123456789ab"), false),
            (Event::Address { link: 2, local: false }, true),
            (Event::Address { link: 5, local: true }, true),
            (Event::Address { link: 6, local: true }, false),
            (Event::Queue { link: 5 }, false),
            (Event::Neighbour { link: 5 }, true),
            (Event::Neighbour { link: 6 }, false),
        ];
        for (event, wanted) in all {
            assert_eq!(matters(&event, &own, &[5]), wanted, "{event:?}");
        }
    }
}
