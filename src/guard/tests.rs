use super::*;

fn denial(guard: &Guard, url: &str) -> Option<String> {
    let denied = guard.check(url).err()?;
    assert!(denied.is_denied() && denied.is_request(), "{denied:?}");
    assert_eq!(denied.field(), Some("url"));
    Some(denied.to_string())
}

fn resolved(guard: &Guard, name: &str, addresses: &[&str]) -> Result<(), String> {
    let addresses = addresses.iter().map(|address| address.parse().unwrap());
    guard
        .admit_resolved(name, addresses)
        .map_err(|denied| denied.to_string())
}

#[test]
fn a_denial_says_what_was_denied_and_why() {
    let guard = Guard::new().deny("*.evil.example").deny("8.8.8.0/24");
    for (url, reason) in [
        ("http://127.0.0.1/p?q", "127.0.0.1: a loopback address"),
        ("http://0x7f.1:81/p", "127.0.0.1: a loopback address"),
        ("http://[fe80::1]/", "[fe80::1]: a link-local address"),
        ("http://localhost./", "localhost.: a loopback address"),
        ("http://a.b.localhost/", "a.b.localhost: a loopback address"),
        (
            "http://169.254.169.254/latest",
            "an address of cloud metadata",
        ),
        (
            "http://metadata.google.internal/",
            "an address of cloud metadata",
        ),
        ("http://[fd00:ec2::254]/", "an address of cloud metadata"),
        (
            "http://[64:ff9b::a00:1]/",
            "leads to 10.0.0.1, a private address",
        ),
        (
            "http://[2002:a9fe:a9fe::1]/",
            "leads to 169.254.169.254, an address of cloud metadata",
        ),
        ("http://a.evil.example/", "a.evil.example: a rule denies it"),
        ("http://8.8.8.8/", "8.8.8.8: a rule denies it"),
        ("http://[::ffff:8.8.8.8]/", "a rule denies it"),
    ] {
        let text = denial(&guard, url).unwrap_or_else(|| panic!("{url} is allowed"));
        assert!(text.contains(reason), "{url}: {text}");
        assert!(!text.contains("/p") && !text.contains("latest"), "{text}");
    }
    for url in [
        "https://evil.example/",
        "http://8.8.4.4/",
        "http://localhost.example/",
    ] {
        assert_eq!(denial(&guard, url), None, "{url}");
    }
}

#[test]
fn one_bad_address_among_good_ones_denies_a_name() {
    let guard = Guard::new();
    assert_eq!(
        resolved(&guard, "a.example", &["1.1.1.1", "2606:4700::1"]),
        Ok(())
    );
    for bad in ["10.0.0.1", "::1", "::ffff:127.0.0.1", "fe80::1"] {
        for addresses in [[bad, "1.1.1.1"], ["1.1.1.1", bad]] {
            let text = resolved(&guard, "a.example", &addresses).unwrap_err();
            assert!(
                text.contains(&format!("a.example: it resolves to {bad}, ")),
                "{text}"
            );
        }
    }
}

#[test]
fn rules_that_deny_win_over_rules_that_allow() {
    let guard = Guard::new()
        .allow("10.0.0.0/8")
        .deny("10.1.0.0/16")
        .allow("10.1.2.3")
        .allow("*.internal.example")
        .deny("secret.internal.example");
    assert_eq!(denial(&guard, "http://10.2.0.1/"), None);
    assert_eq!(denial(&guard, "http://[::ffff:10.2.0.1]/"), None);
    assert!(denial(&guard, "http://10.1.2.3/").is_some());
    assert!(denial(&guard, "http://[::ffff:10.1.2.3]/").is_some());
    assert!(denial(&guard, "http://192.168.0.1/").is_some());
    assert_eq!(
        resolved(&guard, "a.internal.example", &["192.168.0.1", "::1"]),
        Ok(())
    );
    assert!(resolved(&guard, "a.internal.example", &["10.1.2.3"]).is_err());
    assert!(resolved(&guard, "secret.internal.example", &["1.1.1.1"]).is_err());
    assert_eq!(resolved(&guard, "a.example", &["10.2.0.1"]), Ok(()));
    assert!(resolved(&guard, "a.example", &["10.2.0.1", "192.168.0.1"]).is_err());
}

#[test]
fn only_a_rule_for_exactly_this_address_allows_metadata() {
    let wide = Guard::new()
        .allow("169.254.0.0/16")
        .allow("fc00::/7")
        .allow("*.internal.example")
        .allow("metadata.google.internal");
    assert_eq!(denial(&wide, "http://169.254.1.1/"), None);
    assert_eq!(denial(&wide, "http://[fd00:ec2::1]/"), None);
    for url in [
        "http://169.254.169.254/",
        "http://[fd00:ec2::254]/",
        "http://[::ffff:169.254.169.254]/",
        "http://100.100.100.200/",
    ] {
        assert!(denial(&wide, url).is_some(), "{url}");
    }
    // Behind a translator of one's own, in each of the forms of RFC 6052.
    let translated = Guard::new()
        .allow("64:ff9b:1::/48")
        .allow("*.example")
        .deny("10.0.0.1");
    assert_eq!(denial(&translated, "http://[64:ff9b:1::808:808]/"), None);
    assert_eq!(denial(&translated, "http://[64:ff9b:1::a00:2]/"), None);
    for address in [
        "64:ff9b:1:a9fe:a9:fe00::",
        "64:ff9b:1:a9:fe:a9fe::",
        "64:ff9b:1::a9:fea9:fe00:0",
        "64:ff9b:1::a9fe:a9fe",
        "64:ff9b:1::a00:1",
    ] {
        let url = format!("http://[{address}]/");
        assert!(denial(&translated, &url).is_some(), "{address}");
        assert!(
            resolved(&translated, "a.example", &[address]).is_err(),
            "{address}"
        );
    }
    for name in ["a.internal.example", "metadata.google.internal"] {
        assert!(
            resolved(&wide, name, &["169.254.169.254"]).is_err(),
            "{name}"
        );
    }
    let exact = wide.allow("169.254.169.254");
    assert_eq!(denial(&exact, "http://169.254.169.254/"), None);
    assert_eq!(
        resolved(&exact, "a.internal.example", &["169.254.169.254"]),
        Ok(())
    );
}

#[test]
fn ports_are_allowed_and_denied() {
    let guard = Guard::new().allow_ports([80, 443]).deny_ports([80]);
    assert_eq!(denial(&guard, "https://a.example/"), None);
    for url in [
        "http://a.example/",
        "https://a.example:8443/",
        "http://a.example:80/",
    ] {
        let text = denial(&guard, url).unwrap();
        assert!(text.contains("is not permitted"), "{text}");
    }
    let guard = Guard::new().deny_ports([25]);
    assert_eq!(denial(&guard, "http://a.example:8080/"), None);
    assert!(denial(&guard, "http://a.example:25/").is_some());
}

#[test]
fn a_wrong_setting_is_named() {
    for (guard, reason) in [
        (
            Guard::new().allow("10.0.0.0/33"),
            "\"10.0.0.0/33\": must have a number up to 32",
        ),
        (
            Guard::new().deny("nonsense here"),
            "\"nonsense here\": must be an address",
        ),
        (
            Guard::new().trust_proxy("socks5://u:secret@a"),
            "an absolute http or https URL",
        ),
        (
            Guard::new().trust_proxy("smokescreen:4750"),
            "an absolute http or https URL",
        ),
    ] {
        // What is set later doesn't hide it.
        let error = guard
            .allow("10.0.0.0/8")
            .check("http://a.example/")
            .unwrap_err();
        assert!(error.is_config() && error.field() == Some("guard"));
        let text = error.to_string();
        assert!(text.contains(reason) && !text.contains("secret"), "{text}");
    }
    let guard = Guard::new().trust_proxy("http://u:secret@proxy:4750");
    assert!(!format!("{guard:?}").contains("secret"));
    for url in [
        "ftp://a.example/",
        "a.example",
        "http://[::1",
        "http://1.2.3.4.5/",
    ] {
        let error = Guard::new().check(url).unwrap_err();
        assert!(
            error.is_request() && error.field() == Some("url"),
            "{error}"
        );
    }
}
