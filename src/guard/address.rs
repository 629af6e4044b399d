//! Which addresses a guard denies without being told.
//!
//! The ranges are those of IANA's registries of special-purpose addresses, and the addresses at
//! which clouds hand credentials to their machines. Of IPv6, only the global unicast range
//! `2000::/3` is permitted: the rest is reserved, local or unassigned. An address that carries an
//! IPv4 address leads there through a translator or a tunnel, so the IPv4 address is judged.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What kind of address is denied, as texts say it.
pub(super) type Kind = &'static str;

/// IPv4 ranges that are not on the public internet: an address of the range, its prefix, its kind.
const RANGES_V4: [(Ipv4Addr, u8, Kind); 16] = [
    (Ipv4Addr::UNSPECIFIED, 8, "an address of this host"),
    (Ipv4Addr::new(10, 0, 0, 0), 8, "a private address"),
    (Ipv4Addr::new(100, 64, 0, 0), 10, "an address of a carrier"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "a loopback address"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "a link-local address"),
    (Ipv4Addr::new(172, 16, 0, 0), 12, "a private address"),
    (Ipv4Addr::new(192, 0, 0, 0), 24, "a reserved address"),
    (Ipv4Addr::new(192, 0, 2, 0), 24, "an example address"),
    (Ipv4Addr::new(192, 88, 99, 0), 24, "a reserved address"),
    (Ipv4Addr::new(192, 168, 0, 0), 16, "a private address"),
    (
        Ipv4Addr::new(198, 18, 0, 0),
        15,
        "an address for benchmarks",
    ),
    (Ipv4Addr::new(198, 51, 100, 0), 24, "an example address"),
    (Ipv4Addr::new(203, 0, 113, 0), 24, "an example address"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "a multicast address"),
    (Ipv4Addr::BROADCAST, 32, "the broadcast address"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "a reserved address"),
];

/// IPv6 ranges, judged before `2000::/3` is permitted.
const RANGES_V6: [(Ipv6Addr, u8, Kind); 11] = [
    (Ipv6Addr::UNSPECIFIED, 128, "an address of this host"),
    (Ipv6Addr::LOCALHOST, 128, "a loopback address"),
    (LOCAL_NAT64, 48, "a private address"),
    (v6(0xfc00, 0, 0), 7, "a private address"),
    (v6(0xfe80, 0, 0), 10, "a link-local address"),
    (v6(0xfec0, 0, 0), 10, "a private address"),
    (v6(0xff00, 0, 0), 8, "a multicast address"),
    (v6(0x2001, 0x2, 0), 48, "an address for benchmarks"),
    (v6(0x2001, 0xdb8, 0), 32, "an example address"),
    (v6(0x3fff, 0, 0), 20, "an example address"),
    // IETF protocol assignments, except for Teredo, which carries an IPv4 address.
    (v6(0x2001, 0, 0), 23, "a reserved address"),
];

/// Of translators in networks of one's own (RFC 8215).
const LOCAL_NAT64: Ipv6Addr = v6(0x64, 0xff9b, 1);

/// Where machines in a cloud get credentials. Wide rules don't permit these.
const METADATA_V4: [Ipv4Addr; 6] = [
    Ipv4Addr::new(169, 254, 169, 254),
    // ECS and EKS.
    Ipv4Addr::new(169, 254, 170, 2),
    Ipv4Addr::new(169, 254, 170, 23),
    // Alibaba, Oracle, Azure.
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(192, 0, 0, 192),
    Ipv4Addr::new(168, 63, 129, 16),
];

const METADATA_V6: [Ipv6Addr; 4] = [
    // AWS: EC2 and EKS.
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    // Google.
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    // OpenStack.
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
];

pub(super) const METADATA: Kind = "an address of cloud metadata";

const fn v6(first: u16, second: u16, third: u16) -> Ipv6Addr {
    Ipv6Addr::new(first, second, third, 0, 0, 0, 0, 0)
}

pub(super) fn is_metadata(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => METADATA_V4.contains(&address),
        IpAddr::V6(address) => METADATA_V6.contains(&address),
    }
}

/// Whether two addresses have the same first bits.
pub(super) fn shares_prefix(address: IpAddr, network: IpAddr, prefix: u8) -> bool {
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => shares_v4(address, network, prefix),
        (IpAddr::V6(address), IpAddr::V6(network)) => shares_v6(address, network, prefix),
        _ => false,
    }
}

fn shares_v4(address: Ipv4Addr, network: Ipv4Addr, prefix: u8) -> bool {
    let differing = u32::from(address) ^ u32::from(network);
    differing.leading_zeros() >= u32::from(prefix)
}

fn shares_v6(address: Ipv6Addr, network: Ipv6Addr, prefix: u8) -> bool {
    let differing = u128::from(address) ^ u128::from(network);
    differing.leading_zeros() >= u32::from(prefix)
}

/// What an address is denied as, apart from the IPv4 addresses in it.
pub(super) fn denied(address: IpAddr) -> Option<Kind> {
    match address {
        IpAddr::V4(address) => RANGES_V4
            .iter()
            .find(|(network, prefix, _)| shares_v4(address, *network, *prefix))
            .map(|(_, _, kind)| *kind),
        IpAddr::V6(address) => denied_v6(address),
    }
}

fn denied_v6(address: Ipv6Addr) -> Option<Kind> {
    if is_only_a_carrier(address) {
        return None;
    }
    let range = RANGES_V6
        .iter()
        .find(|(network, prefix, _)| shares_v6(address, *network, *prefix));
    if let Some((_, _, kind)) = range {
        return Some(kind);
    }
    let is_global = shares_v6(address, v6(0x2000, 0, 0), 3);
    (!is_global).then_some("a reserved address")
}

/// Whether the address means the IPv4 addresses in it and nothing else.
fn is_only_a_carrier(address: Ipv6Addr) -> bool {
    match address.segments() {
        // Compatible, but neither `::` nor `::1`.
        [0, 0, 0, 0, 0, 0, high, low] => high != 0 || low > 1,
        // Mapped, translated, NAT64, Teredo, 6to4.
        [0, 0, 0, 0, 0, 0xffff, ..]
        | [0, 0, 0, 0, 0xffff, 0, ..]
        | [0x64, 0xff9b, 0, 0, 0, 0, ..]
        | [0x2001, 0, ..]
        | [0x2002, ..] => true,
        _ => false,
    }
}

/// The IPv4 addresses that an address carries.
pub(super) fn carried(address: IpAddr) -> impl Iterator<Item = Ipv4Addr> {
    let found = match address {
        IpAddr::V4(_) => ([None; 3], [None; 3]),
        IpAddr::V6(address) => (carried_by(address), translated_by(address)),
    };
    found.0.into_iter().chain(found.1).flatten()
}

fn carried_by(address: Ipv6Addr) -> [Option<Ipv4Addr>; 3] {
    let segments = address.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    let last = v4(segments[6], segments[7]);
    let outer = match segments {
        [0x2002, high, low, ..] => [Some(v4(high, low)), None],
        // Teredo: the server, and the client with its bits inverted.
        [0x2001, 0, high, low, ..] => [Some(v4(high, low)), Some(Ipv4Addr::from(!u32::from(last)))],
        _ if is_only_a_carrier(address) || is_of_local_nat64(address) => [Some(last), None],
        _ => [None, None],
    };
    // The interface identifier of ISATAP goes with any prefix. Its first bits say whether it is
    // universal and whether it is a group.
    let isatap = segments[4] & !0x0300 == 0 && segments[5] == 0x5efe;
    [outer[0], outer[1], isatap.then_some(last)]
}

/// What a NAT64 translator of the own network makes of an address, besides the last 32 bits: its
/// prefix may have 48, 56, 64 or 96 bits (RFC 6052 section 2.2).
fn translated_by(address: Ipv6Addr) -> [Option<Ipv4Addr>; 3] {
    let octets = address.octets();
    let is_local = is_of_local_nat64(address);
    [[6, 7, 9, 10], [7, 9, 10, 11], [9, 10, 11, 12]]
        .map(|at| is_local.then(|| Ipv4Addr::from(at.map(|at| octets[at]))))
}

fn is_of_local_nat64(address: Ipv6Addr) -> bool {
    shares_v6(address, LOCAL_NAT64, 48)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether a guard without rules permits the address.
    fn is_permitted(address: IpAddr) -> bool {
        denied(address).is_none()
            && carried(address).all(|address| denied(IpAddr::V4(address)).is_none())
    }

    /// Every form of IPv6 in which an IPv4 address can be written.
    fn forms(address: Ipv4Addr) -> [(&'static str, Ipv6Addr); 10] {
        let bits = u128::from(u32::from(address));
        let with = |prefix: &str, bits: u128| {
            let prefix: Ipv6Addr = prefix.parse().unwrap();
            Ipv6Addr::from(u128::from(prefix) | bits)
        };
        let inverted = u128::from(!u32::from(address));
        [
            ("mapped", with("::ffff:0:0", bits)),
            ("compatible", with("::", bits)),
            ("translated", with("::ffff:0:0:0", bits)),
            ("NAT64", with("64:ff9b::", bits)),
            ("6to4", with("2002::1", bits << 80)),
            ("Teredo client", with("2001:0:808:808::", inverted)),
            ("Teredo server", with("2001::f7f7:f7f7", bits << 64)),
            ("ISATAP", with("2a00::5efe:0:0", bits)),
            ("universal ISATAP", with("2a00::200:5efe:0:0", bits)),
            ("local NAT64", with("64:ff9b:1::", bits)),
        ]
    }

    #[test]
    fn addresses_of_the_public_internet_are_permitted() {
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2606:4700:4700::1111",
            "2001:200::1",
            "2001:4860:4860::8888",
            "3ffe::1",
            "2a00:1450:4001:81b::200e",
        ] {
            assert!(is_permitted(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn every_range_is_denied_from_its_first_to_its_last_address() {
        for (first, last) in [
            ("0.0.0.0", "0.255.255.255"),
            ("10.0.0.0", "10.255.255.255"),
            ("100.64.0.0", "100.127.255.255"),
            ("127.0.0.0", "127.255.255.255"),
            ("169.254.0.0", "169.254.255.255"),
            ("172.16.0.0", "172.31.255.255"),
            ("192.0.0.0", "192.0.0.255"),
            ("192.0.2.0", "192.0.2.255"),
            ("192.88.99.0", "192.88.99.255"),
            ("192.168.0.0", "192.168.255.255"),
            ("198.18.0.0", "198.19.255.255"),
            ("198.51.100.0", "198.51.100.255"),
            ("203.0.113.0", "203.0.113.255"),
            ("224.0.0.0", "239.255.255.255"),
            ("240.0.0.0", "255.255.255.255"),
            ("::", "::1"),
            ("64:ff9b:1::", "64:ff9b:1:ffff:ffff:ffff:ffff:ffff"),
            ("100::", "100::ffff:ffff:ffff:ffff"),
            ("2001:2::", "2001:2:0:ffff:ffff:ffff:ffff:ffff"),
            ("2001:10::", "2001:2f:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("4000::", "fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            // Not only fe80::/64.
            ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            for address in [first, last] {
                assert!(!is_permitted(address.parse().unwrap()), "{address}");
            }
        }
    }

    #[test]
    fn a_public_address_in_a_form_of_ipv6_is_permitted() {
        for (form, address) in forms(Ipv4Addr::new(8, 8, 8, 8)) {
            let local = form == "local NAT64";
            assert_eq!(is_permitted(IpAddr::V6(address)), !local, "{form}");
        }
    }

    #[test]
    fn addresses_of_metadata_are_known_in_every_form() {
        for address in METADATA_V4 {
            assert!(is_metadata(IpAddr::V4(address)));
            for (form, address) in forms(address) {
                let is_known = carried(IpAddr::V6(address)).any(|v4| is_metadata(IpAddr::V4(v4)));
                assert!(is_known, "{form}");
            }
        }
    }

    proptest! {
        /// A form of IPv6 never gets an address past the guard.
        #[test]
        fn an_address_is_denied_in_each_form_if_it_is_denied_itself(
            range in 0..RANGES_V4.len(),
            bits: u32,
        ) {
            let (network, prefix, _) = RANGES_V4[range];
            let host = bits.checked_shr(u32::from(prefix)).unwrap_or(0);
            let address = Ipv4Addr::from(u32::from(network) | host);
            prop_assert!(!is_permitted(IpAddr::V4(address)), "{}", address);
            for (form, address) in forms(address) {
                prop_assert!(!is_permitted(IpAddr::V6(address)), "{} as {}", address, form);
            }
        }

        /// Where the standard library knows better, it agrees.
        #[test]
        fn what_is_permitted_is_not_special_for_the_standard_library(bits: u128, v4: u32) {
            for address in [IpAddr::V6(bits.into()), IpAddr::V4(v4.into())] {
                let special = address.is_loopback()
                    || address.is_multicast()
                    || address.is_unspecified()
                    || match address {
                        IpAddr::V4(v4) => {
                            v4.is_private() || v4.is_link_local() || v4.is_documentation()
                        }
                        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local(),
                    };
                prop_assert!(!(special && is_permitted(address)), "{}", address);
            }
        }
    }
}
