//! Times and durations as people write and read them.

use std::time::{Duration, SystemTime};

use humantime::{format_rfc3339_millis, format_rfc3339_seconds};

/// A point of time: RFC 3339, or a time ago such as `2h`.
pub(crate) fn past(text: &str) -> Result<SystemTime, String> {
    if let Ok(ago) = humantime::parse_duration(text.trim_end_matches(" ago")) {
        return SystemTime::now()
            .checked_sub(ago)
            .ok_or_else(|| "is too long ago".to_owned());
    }
    absolute(text).ok_or_else(|| {
        "must be a time such as 2026-01-31T07:15:00Z, or a time ago such as 2h".to_owned()
    })
}

/// A point of time: RFC 3339, or a time from now such as `2h`.
pub(crate) fn future(text: &str) -> Result<SystemTime, String> {
    if let Ok(ahead) = humantime::parse_duration(text) {
        return SystemTime::now()
            .checked_add(ahead)
            .ok_or_else(|| "is too far ahead".to_owned());
    }
    absolute(text).ok_or_else(|| {
        "must be a time such as 2026-01-31T07:15:00Z, or a time from now such as 2h".to_owned()
    })
}

fn absolute(text: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(text)
        .or_else(|_| humantime::parse_rfc3339_weak(text))
        .ok()
}

/// A duration such as `90s` or `1h 30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "must be a duration such as 30s or 2h".to_owned())
}

/// For JSON, in UTC.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    // What is before 1970 is no time of a request.
    format_rfc3339_millis(time.max(SystemTime::UNIX_EPOCH)).to_string()
}

/// For a person: the time, and how long ago it was or will be.
pub(crate) fn both(time: SystemTime) -> String {
    let shown = format_rfc3339_seconds(time.max(SystemTime::UNIX_EPOCH));
    format!("{shown} ({})", relative(time))
}

/// For a person: how long ago it was, or will be.
pub(crate) fn relative(time: SystemTime) -> String {
    match time.elapsed() {
        Ok(ago) if ago < Duration::from_secs(1) => "now".to_owned(),
        Ok(ago) => format!("{} ago", rough(ago)),
        Err(ahead) => format!("in {}", rough(ahead.duration())),
    }
}

/// A duration in its largest unit, or two of them.
pub(crate) fn rough(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_absolute_or_relative() {
        let hours = past("2h").unwrap().elapsed().unwrap().as_secs();
        assert!((7200..7300).contains(&hours), "{hours}");
        let ahead = future("1d 2h").unwrap();
        assert!(ahead.duration_since(SystemTime::now()).unwrap() > Duration::from_secs(93_500));
        let time = past("2026-01-31T07:15:00Z").unwrap();
        assert_eq!(rfc3339(time), "2026-01-31T07:15:00.000Z");
        assert!(past("2026-01-31 07:15:00").is_ok());
        for bad in ["", "yesterday", "2026-13-01T00:00:00Z", "2 parsecs"] {
            assert!(past(bad).unwrap_err().contains("2026-01-31"), "{bad}");
        }
        assert!(duration("x").unwrap_err().contains("30s"));
    }

    #[test]
    fn a_duration_is_shown_in_its_largest_units() {
        for (seconds, shown) in [(5, "5s"), (125, "2m"), (7260, "2h01m"), (90_000, "1d01h")] {
            assert_eq!(rough(Duration::from_secs(seconds)), shown);
        }
        assert_eq!(rough(Duration::from_millis(12)), "12ms");
    }
}
