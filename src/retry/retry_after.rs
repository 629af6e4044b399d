//! The delay that a response asks for.
//!
//! RFC 9110 section 10.2.3 knows seconds and dates. Servers and proxies also send fractions of
//! seconds, timestamps, negative numbers, and the header twice. All that can mean only one thing is
//! understood.

use std::time::{Duration, SystemTime};

use http::header::{DATE, HeaderMap, RETRY_AFTER};

/// From this number on seconds are no delay, which would be 31 years, but seconds since 1970.
const EPOCH_SECONDS: u64 = 1_000_000_000;
/// From this number on they are milliseconds since 1970.
const EPOCH_MILLIS: u64 = 1_000_000_000_000;

/// The delay in a response's `Retry-After`: the longest, if there are several. `None` if the header
/// is missing or malformed.
///
/// A value is one of:
/// - seconds, also with a fraction; negative ones count as zero;
/// - a date in one of the three forms of RFC 9110 section 5.6.7, also with `UTC` or `+0000` for
///   `GMT`;
/// - a timestamp of RFC 3339, in UTC if it has no offset;
/// - seconds or milliseconds since 1970.
///
/// A date is on the server's clock, and so is the response's own `Date`. The local clock, `now`, is
/// used only if there is no `Date`. A date that has passed asks for no delay.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let mut values = headers.get_all(RETRY_AFTER).into_iter().peekable();
    values.peek()?;
    let date = headers.get(DATE).and_then(|date| date.to_str().ok());
    let sent = date.and_then(|date| httpdate::parse_http_date(date.trim()).ok());
    let now = sent.unwrap_or(now);
    values
        .filter_map(|value| value.to_str().ok())
        .filter_map(|value| longest(value, now))
        .max()
}

/// The longest delay in a list, whose dates have commas too.
fn longest(list: &str, now: SystemTime) -> Option<Duration> {
    let mut longest = None;
    let mut parts = list.split(',').map(str::trim).peekable();
    while let Some(part) = parts.next() {
        let mut found = delay(part, now);
        if let (None, Some(rest)) = (found, parts.peek()) {
            found = delay(&format!("{part}, {rest}"), now);
            if found.is_some() {
                parts.next();
            }
        }
        longest = longest.max(found);
    }
    longest
}

fn delay(value: &str, now: SystemTime) -> Option<Duration> {
    if let Some(rest) = value.strip_prefix('-') {
        return number(rest).map(|_| Duration::ZERO);
    }
    let since_epoch = match number(value) {
        Some(number) if number.as_secs() >= EPOCH_MILLIS => Duration::from_millis(number.as_secs()),
        Some(number) if number.as_secs() >= EPOCH_SECONDS => number,
        Some(number) => return Some(number),
        None => return Some(date(value)?.duration_since(now).unwrap_or_default()),
    };
    // A system's time may have less room than a duration.
    let now = now.duration_since(SystemTime::UNIX_EPOCH);
    Some(since_epoch.saturating_sub(now.unwrap_or_default()))
}

/// `120` or `1.5`. More seconds than a `u64` can hold count as its maximum.
fn number(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let seconds = Duration::from_secs(whole.parse().unwrap_or(u64::MAX));
    Some(seconds.saturating_add(Duration::from_nanos(nanos(fraction))))
}

/// The nanoseconds that these decimals of a second are.
fn nanos(decimals: &str) -> u64 {
    let nine = decimals.bytes().chain(std::iter::repeat(b'0')).take(9);
    nine.fold(0, |nanos, digit| nanos * 10 + u64::from(digit - b'0'))
}

fn date(value: &str) -> Option<SystemTime> {
    let utc = [" UTC", " +0000"].into_iter();
    let as_gmt = utc
        .filter_map(|zone| value.strip_suffix(zone))
        .map(|date| format!("{date} GMT"))
        .next();
    let http_date = as_gmt.as_deref().unwrap_or(value);
    httpdate::parse_http_date(http_date)
        .ok()
        .or_else(|| timestamp(value))
}

/// A timestamp of RFC 3339: `2026-11-28T10:33:04.5+01:00`. A space may stand for the `T`, and the
/// offset may be missing.
fn timestamp(text: &str) -> Option<SystemTime> {
    let (date, rest) = text.split_at_checked(10)?;
    let clock = rest.strip_prefix(['T', 't', ' '])?;
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let (clock, offset) = match clock.find(['Z', 'z', '+', '-']) {
        Some(at) => clock.split_at(at),
        None => (clock, "Z"),
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let [hour, minute, second] = numbers(clock, ':', [2, 2, 2])?;
    if fraction.is_empty() || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let offset = match offset.strip_prefix(['+', '-']) {
        Some(digits) => {
            let [hours, minutes] = numbers(digits, ':', [2, 2])?;
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = (hours * 60 + minutes) * 60;
            if offset.starts_with('-') {
                -seconds
            } else {
                seconds
            }
        }
        None if matches!(offset, "Z" | "z") => 0,
        None => return None,
    };
    // Second 60 is a leap second.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let days = days_since_epoch(year, month, day)?;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second - offset;
    let since = Duration::new(u64::try_from(seconds).ok()?, nanos(fraction) as u32);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// Numbers with so many digits each, and this character between them.
fn numbers<const N: usize>(text: &str, between: char, digits: [usize; N]) -> Option<[i64; N]> {
    let mut numbers = [0; N];
    let mut parts = text.split(between);
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let part = parts.next()?;
        if part.len() != digits || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

/// The days from 1970 to a date of the Gregorian calendar. `None` if there is no such date.
fn days_since_epoch(year: i64, month: i64, day: i64) -> Option<i64> {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let february = if is_leap { 29 } else { 28 };
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let index = usize::try_from(month - 1).ok()?;
    let length = *lengths.get(index)?;
    if !(1..=length).contains(&day) {
        return None;
    }
    let before: i64 = lengths[..index].iter().sum();
    // Leap days in the years before this one.
    let leaps = |years: i64| years / 4 - years / 100 + years / 400;
    let of_years = (year - 1970) * 365 + leaps(year - 1) - leaps(1969);
    Some(of_years + before + day - 1)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    /// Sun, 06 Nov 1994 08:49:37 GMT, the date of the RFC's examples.
    const EXAMPLE: Duration = Duration::from_secs(784_111_777);

    fn asked(retry_after: &str, date: Option<&str>, now: SystemTime) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_str(retry_after).unwrap());
        if let Some(date) = date {
            headers.insert(DATE, HeaderValue::from_str(date).unwrap());
        }
        super::retry_after(&headers, now)
    }

    #[test]
    fn seconds_are_taken_as_they_are() {
        let now = SystemTime::now();
        for (value, seconds) in [
            ("0", 0),
            ("120", 120),
            ("007", 7),
            (" 30 ", 30),
            ("999999999", 999_999_999),
        ] {
            assert_eq!(asked(value, None, now), Some(Duration::from_secs(seconds)));
        }
    }

    #[test]
    fn all_three_forms_of_a_date_are_understood() {
        let now = SystemTime::UNIX_EPOCH + EXAMPLE - Duration::from_secs(90);
        for date in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(asked(date, None, now), Some(Duration::from_secs(90)));
        }
    }

    #[test]
    fn lenient_forms_that_servers_send_are_understood() {
        let example = EXAMPLE.as_secs();
        let now = SystemTime::UNIX_EPOCH + EXAMPLE - Duration::from_secs(90);
        for (value, millis) in [
            ("1.5", 1_500),
            ("0.0004", 0),
            ("3.0", 3_000),
            ("-1", 0),
            ("-0.5", 0),
            ("1, 2", 2_000),
            ("7, soon, 5", 7_000),
            ("soon,,8,", 8_000),
            ("Sun, 06 Nov 1994 08:49:37 GMT, 5", 90_000),
            ("100, Sun, 06 Nov 1994 08:49:37 GMT", 100_000),
            ("Sun, 06 Nov 1994 08:49:37 UTC", 90_000),
            ("Sun, 06 Nov 1994 08:49:37 +0000", 90_000),
            ("1994-11-06T08:49:37Z", 90_000),
            ("1994-11-06t08:49:37.25z", 90_250),
            ("1994-11-06 08:49:37", 90_000),
            ("1994-11-06T09:49:37+01:00", 90_000),
            ("1994-11-06T00:19:37.000000-08:30", 90_000),
            ("1994-11-05T08:49:37Z", 0),
        ] {
            let found = asked(value, None, now).map(|delay| delay.as_millis());
            assert_eq!(found, Some(millis), "{value}");
        }
        // Seconds and milliseconds since 1970, of a time after 2001.
        let later = SystemTime::UNIX_EPOCH + Duration::from_secs(2 * example);
        let seconds = (2 * example + 42).to_string();
        for (value, millis) in [
            (seconds.clone(), 42_000),
            (format!("{seconds}.5"), 42_500),
            (format!("{seconds}250"), 42_250),
            ("1000000000".to_owned(), 0),
        ] {
            let found = asked(&value, None, later).map(|delay| delay.as_millis());
            assert_eq!(found, Some(millis), "{value}");
        }
        let endless = asked("99999999999999999999999999", None, later).unwrap();
        assert!(endless > Duration::from_secs(1 << 40));
    }

    #[test]
    fn the_longest_of_several_headers_counts() {
        let mut headers = HeaderMap::new();
        for value in ["3", "junk", "9", "5"] {
            headers.append(RETRY_AFTER, HeaderValue::from_static(value));
        }
        let found = super::retry_after(&headers, SystemTime::now());
        assert_eq!(found, Some(Duration::from_secs(9)));
    }

    #[test]
    fn a_date_is_relative_to_the_servers_clock() {
        let until = "Sun, 06 Nov 1994 08:49:37 GMT";
        let sent = "Sun, 06 Nov 1994 08:49:07 GMT";
        for wrong_clock in [SystemTime::UNIX_EPOCH, SystemTime::now()] {
            let delay = asked(until, Some(sent), wrong_clock);
            assert_eq!(delay, Some(Duration::from_secs(30)));
        }
        // An invalid `Date` leaves the local clock.
        let now = SystemTime::UNIX_EPOCH + EXAMPLE - Duration::from_secs(5);
        assert_eq!(
            asked(until, Some("yesterday"), now),
            Some(Duration::from_secs(5))
        );
    }

    #[test]
    fn a_date_that_has_passed_asks_for_no_delay() {
        let delay = asked("Sun, 06 Nov 1994 08:49:37 GMT", None, SystemTime::now());
        assert_eq!(delay, Some(Duration::ZERO));
    }

    #[test]
    fn junk_is_ignored() {
        for junk in [
            "",
            " ",
            "-",
            "-soon",
            "--1",
            "+1",
            "1.",
            ".5",
            "1.5.2",
            "1e3",
            "0x10",
            "soon",
            "1 s",
            "٣",
            "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 25:49:37 GMT",
            "1994-11-06",
            "1994-02-29T08:49:37Z",
            "1994-13-06T08:49:37Z",
            "1994-00-06T08:49:37Z",
            "1994-11-00T08:49:37Z",
            "1994-11-06T24:49:37Z",
            "1994-11-06T08:60:37Z",
            "1994-11-06T08:49:37.Z",
            "1994-11-06T08:49:37+0100",
            "1994-11-06T08:49:37+24:00",
            "1994-11-06T08:49:37Zulu",
            "1994-11-06T08:49Z",
            "19941106T084937Z",
            "1969-11-06T08:49:37Z",
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(
                RETRY_AFTER,
                HeaderValue::from_bytes(junk.as_bytes()).unwrap(),
            );
            assert_eq!(
                super::retry_after(&headers, SystemTime::now()),
                None,
                "{junk}"
            );
        }
        assert_eq!(
            super::retry_after(&HeaderMap::new(), SystemTime::now()),
            None
        );
    }

    /// Any header value, and values that look like dates.
    fn value() -> impl Strategy<Value = HeaderValue> {
        let bytes = proptest::collection::vec(prop_oneof![0x20u8..0x7f, 0x80u8..=0xff], 0..40);
        let date = "[A-Z][a-z]{2,8},? [0-9 ]{2}[ -][A-Z][a-z]{2}[ -][0-9]{2,4} \
                    [0-9]{2}:[0-9]{2}:[0-9]{2}( GMT)?";
        let asctime = "[A-Z][a-z]{2} (Jan|Feb|Nov) [0-9 ][0-9] [0-9]{2}:[0-9]{2}:[0-9]{2} [0-9]{4}";
        prop_oneof![
            bytes,
            date.prop_map(String::into_bytes),
            asctime.prop_map(String::into_bytes),
            "-?[0-9]{1,40}(\\.[0-9]{0,40})?".prop_map(String::into_bytes),
            "[0-9]{4}-[01][0-9]-[0-3][0-9][T ][0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})?"
                .prop_map(String::into_bytes),
        ]
        .prop_map(|bytes| HeaderValue::from_bytes(&bytes).unwrap())
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(
            retry_after in value(),
            date in proptest::option::of(value()),
            now in 0u64..1 << 40,
        ) {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, retry_after);
            if let Some(date) = date {
                headers.insert(DATE, date);
            }
            let _ = super::retry_after(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(now));
        }

        #[test]
        fn a_formatted_date_comes_back_as_its_distance(
            at in 0u64..1 << 37,
            ahead in 0u64..1 << 32,
        ) {
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(at);
            let until = at + Duration::from_secs(ahead);
            let date = httpdate::fmt_http_date;
            let delay = asked(&date(until), Some(&date(at)), SystemTime::UNIX_EPOCH);
            prop_assert_eq!(delay, Some(Duration::from_secs(ahead)));
        }

        /// The calendar is the one that `httpdate` has.
        #[test]
        fn a_timestamp_means_what_the_same_date_means(at in 0u64..253_402_300_799) {
            let date = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(at));
            let months = "JanFebMarAprMayJunJulAugSepOctNovDec";
            let month = months.find(&date[8..11]).unwrap() / 3 + 1;
            let (day, year, time) = (&date[5..7], &date[12..16], &date[17..25]);
            let stamp = format!("{year}-{month:02}-{day}T{time}Z");
            prop_assert_eq!(timestamp(&stamp), httpdate::parse_http_date(&date).ok());
        }
    }
}
