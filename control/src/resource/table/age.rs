//! Durations as kubectl abbreviates them: at most two units, fewer the longer it is.

use jiff::Timestamp;
use serde_json::Value;

use crate::resource::object;

/// Abbreviates a length of time given in seconds: `5s`, `3m7s`, `47m`, `2h5m`, `3d4h`, `400d`, `3y20d`.
pub fn short_duration(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let seconds = seconds.max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |big: i64, unit: char, small: i64, sub: char| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{sub}") }
    };
    if seconds < 120 {
        format!("{seconds}s")
    } else if minutes < 10 {
        two(minutes, 'm', seconds % 60, 's')
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 {
        two(hours, 'h', minutes % 60, 'm')
    } else if hours < 48 {
        format!("{hours}h")
    } else if days < 8 {
        two(days, 'd', hours % 24, 'h')
    } else if days < 730 {
        format!("{days}d")
    } else if days < 2920 {
        two(days / 365, 'y', days % 365, 'd')
    } else {
        format!("{}y", days / 365)
    }
}

/// How long ago the time at a path was; `<unknown>` when it is not set.
pub(super) fn since(object: &Value, path: &[&str], now: Timestamp) -> String {
    match object::time_at(object, path) {
        Some(time) => short_duration(now.as_second() - time.as_second()),
        None => "<unknown>".to_owned(),
    }
}

/// The AGE column.
pub(super) fn age(object: &Value, now: Timestamp) -> Value {
    Value::String(since(object, &["metadata", "creationTimestamp"], now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abbreviations() {
        for (seconds, text) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (187, "3m7s"),
            (599, "9m59s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (3 * 3600 + 300, "3h5m"),
            (8 * 3600, "8h"),
            (47 * 3600 + 3599, "47h"),
            (48 * 3600, "2d"),
            (52 * 3600, "2d4h"),
            (8 * 86_400, "8d"),
            (729 * 86_400, "729d"),
            (730 * 86_400, "2y"),
            (735 * 86_400, "2y5d"),
            (2920 * 86_400, "8y"),
        ] {
            assert_eq!(short_duration(seconds), text, "{seconds}");
        }
    }
}
