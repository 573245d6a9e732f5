//! The data plane beside the agent: watches feed it, a thread of its own drives it. Invariant: whatever waits becomes
//! one round, and a round that was begun is finished before the agent ends.

use super::super::{DataplaneConfig, DataplaneError};
use super::{Driver, Notice};
use crate::cluster::services;
use crate::limits;
use crate::service::Event;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What the data plane's thread is told.
#[derive(Debug)]
pub enum Feed {
    /// Something of the API.
    Event(Event),
    /// The change that comes next was made in the cluster at this time, in seconds since 1970
    /// (`endpoints.kubernetes.io/last-change-trigger-time`).
    Triggered(f64),
    /// Look after links and node addresses.
    Tick,
}

/// Runs the data plane until `shutdown`: watches Services and EndpointSlices and keeps the kernel's table as they
/// want it. What is in the kernel stays when this returns.
///
/// # Errors
/// Only what keeps it from starting; later errors are logged, counted and tried again.
pub async fn run(
    client: kube::Client,
    config: DataplaneConfig,
    shutdown: CancellationToken,
) -> Result<(), DataplaneError> {
    let (feed, inbox) = mpsc::channel(limits::DATAPLANE_EVENTS_QUEUED_MAX);
    let (tell, notices) = mpsc::channel(limits::DATAPLANE_NOTICES_QUEUED_MAX);
    let watches = [
        tokio::spawn(services::watch_services(client.clone(), feed.clone())),
        tokio::spawn(services::watch_slices(client.clone(), config.node_name.clone(), feed.clone())),
        tokio::spawn(services::publish_refusals(client, config.node_name.clone(), notices)),
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(limits::secs(limits::DATAPLANE_REPAIR_PERIOD_S));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            ticks.tick().await;
            while feed.send(Feed::Tick).await.is_ok() {
                ticks.tick().await;
            }
        }),
    ];
    // Opening adopts and may load programs, applying writes maps: all of it blocks, so it has a thread of its own.
    let worker = std::thread::Builder::new().name("dataplane".to_owned());
    let (done, mut ended) = mpsc::channel(1);
    let spawned = worker.spawn(move || {
        let result = Driver::open(&config).map(|driver| drive(driver, inbox, &tell));
        // Nobody listens any more when the agent is on its way out.
        drop(done.blocking_send(result));
    });
    let result = match spawned {
        Err(source) => Err(DataplaneError::Host { op: "start the data plane's thread", source }),
        Ok(_) => {
            let panicked = || {
                let source = std::io::Error::other("it panicked");
                Err(DataplaneError::Host { op: "keep the data plane's thread", source })
            };
            let early = tokio::select! {
                result = ended.recv() => Some(result.unwrap_or_else(panicked)),
                () = shutdown.cancelled() => None,
            };
            watches.iter().for_each(tokio::task::JoinHandle::abort);
            match early {
                Some(result) => result,
                // Without its feeders the thread ends after the round that it is in; the agent waits for its parts
                // so long and no longer.
                None => ended.recv().await.unwrap_or_else(panicked),
            }
        }
    };
    watches.iter().for_each(tokio::task::JoinHandle::abort);
    result
}

/// The thread's loop: everything that is waiting becomes one round. Ends when all senders are gone.
fn drive(mut driver: Driver, mut inbox: mpsc::Receiver<Feed>, tell: &mpsc::Sender<Notice>) {
    while let Some(first) = inbox.blocking_recv() {
        let mut tick = false;
        let mut take = |feed| match feed {
            Feed::Event(event) => driver.handle_one(event),
            Feed::Triggered(at_s) => driver.triggered(at_s),
            Feed::Tick => tick = true,
        };
        take(first);
        for _ in 1..limits::DATAPLANE_EVENTS_QUEUED_MAX {
            match inbox.try_recv() {
                Ok(feed) => take(feed),
                Err(_) => break,
            }
        }
        let result = if tick { driver.tick() } else { driver.step() };
        if let Err(error) = result {
            tracing::error!(error = &error as &dyn std::error::Error, "service table; trying again");
        }
        for notice in driver.notices() {
            let reasons: Vec<String> = notice.reasons.iter().map(ToString::to_string).collect();
            tracing::warn!(service = %notice.service, reasons = ?reasons, "service is not wholly balanced");
            if tell.try_send(notice).is_err() {
                tracing::warn!("too many refused services to tell the API of each");
            }
        }
    }
}
