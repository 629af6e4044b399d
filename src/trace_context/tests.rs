use super::*;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let pairs = pairs.iter().map(|(name, value)| {
        let value = HeaderValue::from_str(value).unwrap();
        (HeaderName::from_static(name), value)
    });
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(name, value);
    }
    headers
}

fn field_of(refused: Result<TraceContext, Error>) -> &'static str {
    refused.unwrap_err().field().unwrap()
}

#[test]
fn a_traceparent_of_version_00_is_taken_apart() {
    let context = TraceContext::new(PARENT).unwrap();
    assert_eq!(context.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(context.parent_id(), "00f067aa0ba902b7");
    assert!(context.is_sampled());
    let quiet = PARENT.replace("-01", "-02");
    assert!(!TraceContext::new(&quiet).unwrap().is_sampled());
}

#[test]
fn other_traceparents_are_refused_by_field() {
    for wrong in [
        "",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0é",
        "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
        "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
    ] {
        assert_eq!(field_of(TraceContext::new(wrong)), "traceparent", "{wrong}");
    }
}

#[test]
fn a_traceparent_of_a_later_version_is_read_as_version_00() {
    let read = |text: &str| TraceContext::from_headers(&headers(&[("traceparent", text)]));
    let context = |text: &str| read(text).map(|context| context.traceparent().to_owned());
    assert_eq!(context(PARENT).as_deref(), Some(PARENT));
    for later in [
        PARENT.replace("00-4", "cc-4"),
        PARENT.replace("00-4", "01-4") + "-more",
    ] {
        assert_eq!(context(&later).as_deref(), Some(PARENT), "{later}");
    }
    let flags = PARENT.replace("00-4", "cc-4").replace("-01", "-ff");
    assert_eq!(context(&flags).as_deref(), Some(PARENT));
    for wrong in [
        PARENT.replace("00-4", "ff-4"),
        PARENT.replace("00-4", "cc-4") + ".more",
        PARENT.to_owned() + "-more",
        "cc".to_owned(),
    ] {
        assert_eq!(context(&wrong), None, "{wrong}");
    }
    let twice = headers(&[("traceparent", PARENT), ("traceparent", PARENT)]);
    assert_eq!(TraceContext::from_headers(&twice), None);
}

#[test]
fn a_tracestate_is_a_list_with_limits() {
    let with = |text: &str| TraceContext::new(PARENT).unwrap().with_tracestate(text);
    let kept = |text: &str| with(text).unwrap().tracestate().map(str::to_owned);
    assert_eq!(kept(""), None);
    assert_eq!(kept(" a=1 ,, 7t@b=x y,").as_deref(), Some("a=1,7t@b=x y"));
    let many = |count| {
        (0..count)
            .map(|at| format!("k{at}=v"))
            .collect::<Vec<_>>()
            .join(",")
    };
    assert!(with(&many(32)).is_ok());
    for wrong in [
        &many(33),
        "a",
        "A=1",
        "7=1",
        "a=",
        "a=b=c",
        "a=1,a=2",
        "a=é",
        "a@B=1",
        "@a=1",
    ] {
        assert_eq!(field_of(with(wrong)), "tracestate", "{wrong}");
    }
    // A long entry goes first, then those at the end.
    let (long, short) = ("v".repeat(200), "v".repeat(100));
    let list = format!("a={short},b={long},c={short},d={short},e={short},f={short}");
    let expected = format!("a={short},c={short},d={short},e={short}");
    assert_eq!(kept(&list), Some(expected));
}

#[test]
fn several_tracestates_are_one_list_and_a_wrong_one_is_left_out() {
    let read = |states: &[&str]| {
        let mut pairs = vec![("traceparent", PARENT)];
        pairs.extend(states.iter().map(|state| ("tracestate", *state)));
        let context = TraceContext::from_headers(&headers(&pairs)).unwrap();
        context.tracestate().map(str::to_owned)
    };
    assert_eq!(read(&["a=1", "b=2"]).as_deref(), Some("a=1,b=2"));
    assert_eq!(read(&["a=1", "a=2"]), None);
    assert_eq!(read(&[]), None);
}

#[test]
fn baggage_is_a_list_with_limits() {
    let with = |text: &str| TraceContext::new(PARENT).unwrap().with_baggage(text);
    for right in ["", "a=1", " a = 1 ; p ; q=2 , b=%20 ", "a="] {
        assert!(with(right).is_ok(), "{right}");
    }
    let many = vec!["a=1"; 65].join(",");
    let long = format!("a={}", "v".repeat(8191));
    for wrong in [
        "a", "=1", "a=1,,b=2", "a b=1", "a=\"1\"", "a=é", &many, &long,
    ] {
        assert_eq!(field_of(with(wrong)), "baggage", "{wrong}");
    }
}

#[test]
fn a_traceparent_of_the_request_stays_with_its_tracestate() {
    let context = TraceContext::new(PARENT).unwrap();
    let context = context
        .with_tracestate("a=1")
        .unwrap()
        .with_baggage("b=2")
        .unwrap();
    let own = "00-11111111111111111111111111111111-2222222222222222-00";
    let mut kept = headers(&[("traceparent", own)]);
    context.insert_into(&mut kept);
    assert_eq!(kept, headers(&[("traceparent", own)]));
    context.replace_in(&mut kept);
    let all = [
        ("traceparent", PARENT),
        ("tracestate", "a=1"),
        ("baggage", "b=2"),
    ];
    assert_eq!(kept, headers(&all));
    assert!(kept["baggage"].is_sensitive());
    let mut lone = headers(&[("tracestate", "of=nothing"), ("baggage", "own=1")]);
    context.insert_into(&mut lone);
    let all = [
        ("traceparent", PARENT),
        ("tracestate", "a=1"),
        ("baggage", "own=1"),
    ];
    assert_eq!(lone, headers(&all));
}

#[test]
fn debug_shows_no_baggage() {
    let context = TraceContext::new(PARENT)
        .unwrap()
        .with_baggage("a=hunter2")
        .unwrap();
    let shown = format!("{context:?}");
    assert!(
        shown.contains(PARENT) && !shown.contains("hunter"),
        "{shown}"
    );
}
