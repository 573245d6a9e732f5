//! Waiting for conditions. Nothing here sleeps for luck: a wait ends when its condition holds, or panics at its
//! deadline with what was last seen.

use std::time::{Duration, Instant};

/// How long a test waits for anything, unless it says otherwise. Generous: only a failing test ever waits it out.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// First pause between two looks; doubled up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Calls `look` until it gives `Ok`, and returns that; panics with `what` and the last `Err` after [`PATIENCE`].
#[track_caller]
pub fn wait_for<T, E: std::fmt::Display>(what: &str, look: impl FnMut() -> Result<T, E>) -> T {
    wait_until(what, PATIENCE, look)
}

/// [`wait_for`] with a deadline of the caller's.
#[track_caller]
pub fn wait_until<T, E: std::fmt::Display>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<T, E>,
) -> T {
    let start = Instant::now();
    let mut pause = PAUSE_MIN;
    loop {
        match look() {
            Ok(value) => return value,
            Err(last) if start.elapsed() >= patience => {
                panic!("waited {:.1} s for {what}: {last}", start.elapsed().as_secs_f64())
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_the_first_success() {
        let mut looks = 0;
        let seen = wait_for("the third look", || {
            looks += 1;
            if looks == 3 { Ok(looks) } else { Err("not yet") }
        });
        assert_eq!(seen, 3);
    }

    #[test]
    #[should_panic(expected = "for a pig to fly: it walks")]
    fn panics_with_what_was_last_seen() {
        wait_until("a pig to fly", Duration::from_millis(5), || Err::<(), _>("it walks"));
    }
}
