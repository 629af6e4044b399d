//! Reads hosts and rules that an attacker may have given: nothing of them panics, and no notation
//! gets an address past the guard.
//!
//! Each case is an entry of the corpus in `tests/corpus`, with changes at random places. More cases
//! run with `PROPTEST_CASES=100000 cargo test --lib guard::fuzz`.

use core::net::{IpAddr, Ipv6Addr};

use proptest::prelude::*;
use url::Host as Parsed;

use super::*;
use crate::codec::fuzz::changed;

const HOSTS: &str = include_str!("../../tests/corpus/hosts.txt");

/// What the standard library knows to be no address of the public internet.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_broadcast()
                || v4.is_multicast()
                || v4.is_documentation()
        }
        IpAddr::V6(v6) => {
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_multicast()
                || v6.is_unique_local()
                || v6.is_unicast_link_local()
                || mapped(v6).is_some_and(|v4| is_special(v4.into()))
        }
    }
}

fn mapped(address: Ipv6Addr) -> Option<Ipv4Addr> {
    address.to_ipv4_mapped()
}

proptest! {
    #[test]
    fn what_a_client_connects_to_is_no_special_address(
        host in changed(HOSTS),
        scheme in "https?",
    ) {
        let guard = Guard::new();
        let text = format!("{scheme}://{host}/");
        // As a client of reqwest reads it.
        if let Ok(url) = Url::parse(&text) {
            let address = match url.host() {
                Some(Parsed::Ipv4(address)) => Some(IpAddr::V4(address)),
                Some(Parsed::Ipv6(address)) => Some(IpAddr::V6(address)),
                _ => None,
            };
            let is_permitted = guard.check(&text).is_ok();
            prop_assert!(!(is_permitted && address.is_some_and(is_special)), "{}", text);
        }
        // As a client reads it that takes the host as it is.
        if let Ok(uri) = text.parse::<Uri>() {
            let host = uri.host().unwrap_or_default();
            let inside = host.trim_start_matches('[').trim_end_matches(']');
            let address = inside.parse::<IpAddr>().ok();
            let is_permitted = guard.admit(&uri).is_ok();
            prop_assert!(!(is_permitted && address.is_some_and(is_special)), "{}", text);
        }
    }

    #[test]
    fn a_rule_is_taken_or_refused_and_a_denying_one_permits_nothing_more(
        rule in changed(HOSTS),
        host in changed(HOSTS),
    ) {
        let denying = Guard::new().deny(&rule);
        let is_taken = denying.validate().is_ok() && Guard::new().allow(&rule).validate().is_ok();
        prop_assert!(is_taken || denying.check("http://8.8.8.8/").is_err());
        let text = format!("http://{host}/");
        if denying.check(&text).is_ok() {
            prop_assert!(Guard::new().check(&text).is_ok(), "{} {}", rule, text);
        }
    }
}
