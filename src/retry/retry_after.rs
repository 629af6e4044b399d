//! The delay that a response asks for.

use std::time::{Duration, SystemTime};

use http::header::{DATE, HeaderMap, HeaderName, RETRY_AFTER};

/// The delay in a response's `Retry-After` (RFC 9110 section 10.2.3): seconds, or a date in one of
/// the three forms of section 5.6.7. `None` if the header is missing or malformed.
///
/// A date is on the server's clock, and so is the response's own `Date`. The local clock, `now`, is
/// used only if there is no `Date`.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = text(headers, &RETRY_AFTER)?;
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More seconds than a `u64` can hold count as its maximum.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let sent = text(headers, &DATE).and_then(|date| httpdate::parse_http_date(date).ok());
    // A date in the past asks for no delay.
    Some(
        until
            .duration_since(sent.unwrap_or(now))
            .unwrap_or_default(),
    )
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
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
            ("99999999999999999999999999", u64::MAX),
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
            "-1",
            "+1",
            "1.5",
            "1e3",
            "0x10",
            "soon",
            "1, 2",
            "1 s",
            "٣",
            "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 25:49:37 GMT",
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
            "[0-9]{1,40}".prop_map(String::into_bytes),
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
    }
}
