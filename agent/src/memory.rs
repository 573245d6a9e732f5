//! Memory that is no longer used goes back to the system. Invariant: the resident size follows what the node holds now, not
//! the most that it ever held: a look at the links of a thousand pods takes megabytes for a moment, and what little is kept
//! of it would hold on to the pages between.

#![expect(unsafe_code, reason = "malloc_trim(3) and mallopt(3) have no safe wrapper")]

use tokio_util::sync::CancellationToken;

use crate::limits;

/// Heaps of the allocator. Its own default is eight a processor: whichever threads a burst of calls ran on, each leaves
/// another one behind, full of holes.
#[cfg(target_env = "gnu")]
const HEAPS_MAX: libc::c_int = 2;
/// Bytes at the end of a heap that stay with it. Without a figure the allocator takes twice the largest mapping that
/// was ever freed, and `malloc_trim` cuts the first heap only.
#[cfg(target_env = "gnu")]
const HEAP_END_BYTES: libc::c_int = 128 * 1024;

/// Has the process keep little of what it frees. Call it before there is a second thread: heaps that are there stay.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_ARENA_MAX, HEAPS_MAX), (libc::M_TRIM_THRESHOLD, HEAP_END_BYTES)] {
        // SAFETY: it sets a figure of the allocator, and no other thread is there that could use it meanwhile.
        if unsafe { libc::mallopt(option, value) } == 0 {
            tracing::debug!(option, value, "the allocator refused a setting; more memory may stay resident");
        }
    }
}

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
