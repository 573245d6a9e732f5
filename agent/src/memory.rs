//! Memory that is no longer used goes back to the system. Invariant: the resident size follows what the node holds now, not
//! the most that it ever held: a look at the links of a thousand pods takes megabytes for a moment, and what little is kept
//! of it would hold on to the pages between.

#![expect(unsafe_code, reason = "malloc_trim(3) has no safe wrapper")]

use tokio_util::sync::CancellationToken;

use crate::limits;

/// Gives back what is free, from time to time, until `shutdown`.
pub(crate) async fn give_back(shutdown: CancellationToken) {
    let mut period = tokio::time::interval(limits::secs(limits::MEMORY_TRIM_PERIOD_S));
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = period.tick() => {}
        }
        // It walks what is free, under the allocator's locks: not on a thread that others wait for.
        if tokio::task::spawn_blocking(trim).await.is_err() {
            return;
        }
    }
}

fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time from any thread, and frees nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
