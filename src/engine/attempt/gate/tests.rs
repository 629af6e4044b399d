use http::StatusCode;

use super::destination::Shared;
use super::pace::Failing;
use super::share::RESERVE;
use super::*;
use crate::destination::{CircuitBreaker, RateLimit, Report, State};
use crate::store::destinations::{Grant, LeaseRequest, StoredDestination};

const SLOTS: usize = 64;
const SECOND: Duration = Duration::from_secs(1);

fn gate(policy: DestinationPolicy) -> Arc<Gate> {
    Gate::new(Rules {
        slots: SLOTS,
        share: 0.5,
        policies: Policies::default(),
        policy,
        lease: 15 * SECOND,
    })
}

/// As many passes as there are.
fn fill(gate: &Arc<Gate>, name: &str, now: Instant) -> Vec<Pass> {
    std::iter::from_fn(|| gate.try_enter_at(name, Turn::First, now).ok()).collect()
}

/// Lets a destination answer within this time.
fn answer(gate: &Arc<Gate>, name: &str, took: Duration, now: Instant) {
    let mut pass = gate.try_enter_at(name, Turn::First, now).unwrap();
    pass.begin();
    pass.began = now.checked_sub(took);
    drop(pass);
}

#[test]
fn a_destination_alone_leaves_some_slots_for_the_first_requests_to_others() {
    let gate = gate(DestinationPolicy::default());
    let now = Instant::now();
    let alone = fill(&gate, "a", now);
    assert_eq!(alone.len(), SLOTS - SLOTS / RESERVE);
    assert_eq!(fill(&gate, "b", now).len(), 1);
    answer(&gate, "b", Duration::ZERO, now);
    assert_eq!(fill(&gate, "b", now).len(), SLOTS / 2);
    drop(alone);
    assert_eq!(fill(&gate, "a", now).len(), 3 * SLOTS / 8);
}

#[test]
fn slow_destinations_share_a_half_and_fast_ones_have_one_each() {
    let gate = gate(DestinationPolicy::default());
    let now = Instant::now();
    for name in ["fast", "slow", "slower"] {
        let took = if name == "fast" {
            Duration::ZERO
        } else {
            SECOND
        };
        answer(&gate, name, took, now);
    }
    let slow = fill(&gate, "slow", now);
    let slower = fill(&gate, "slower", now);
    assert_eq!((slow.len(), slower.len()), (24, 6));
    assert_eq!(fill(&gate, "fast", now).len(), SLOTS / 2);
    // Each new one gets its chance, however many hang.
    let mut firsts = Vec::new();
    for number in 0..SLOTS {
        firsts.extend(
            gate.try_enter_at(&number.to_string(), Turn::First, now)
                .ok(),
        );
    }
    assert_eq!(slow.len() + slower.len() + firsts.len(), 62);
    let full = gate.try_enter_at("slow", Turn::First, now).unwrap_err();
    assert_eq!(full, Full::Lasting);
    let room: serde_json::Value = serde_json::from_str(&gate.room().json).unwrap();
    assert_eq!(room, serde_json::json!({"slow": 0, "slower": 0}));
}

#[test]
fn a_destination_whose_attempts_hang_is_slow_until_it_answers() {
    let gate = gate(DestinationPolicy::default());
    let now = Instant::now();
    answer(&gate, "a", Duration::ZERO, now);
    answer(&gate, "b", Duration::ZERO, now);
    let mut held = fill(&gate, "a", now);
    for pass in &mut held {
        pass.begin();
    }
    let later = Instant::now() + SECOND;
    drop(held.pop());
    let full = gate.try_enter_at("a", Turn::First, later).unwrap_err();
    assert_eq!(full, Full::Lasting);
    assert!(gate.try_enter_at("b", Turn::First, later).is_ok());
    drop(held);
    assert_eq!(gate.lock().slow_passes, 0);
}

#[test]
fn permits_are_asked_for_and_end_with_their_lease() {
    let gate = gate(DestinationPolicy::default().max_concurrency(5));
    let now = Instant::now();
    let enter = |now| gate.try_enter_at("a", Turn::First, now);
    assert_eq!(enter(now).unwrap_err(), Full::Short);
    let grant = |permits| {
        let asks = gate.asks();
        assert_eq!(asks[0].limit, Some(5));
        let grant = Grant {
            permits,
            tokens: 0,
            wait: Duration::ZERO,
        };
        let grants = HashMap::from([("a".to_owned(), grant)]);
        gate.answer(now, &asks, Some(&grants));
    };
    grant(3);
    let passes = fill(&gate, "a", now);
    assert_eq!(passes.len(), 3);
    drop(passes);
    assert!(enter(now + 14 * SECOND).is_ok());
    assert_eq!(enter(now + 16 * SECOND).unwrap_err(), Full::Short);
}

#[test]
fn permits_that_are_all_in_use_are_asked_for_rarely_and_only_if_others_have_some() {
    let gate = gate(DestinationPolicy::default().max_concurrency(2));
    let now = Instant::now();
    let enter = |now| gate.try_enter_at("a", Turn::First, now);
    let is_wanted = || gate.lock().destinations["a"].leased.is_wanted();
    let grant = |permits| {
        let grant = Grant {
            permits,
            tokens: 0,
            wait: Duration::ZERO,
        };
        let grants = HashMap::from([("a".to_owned(), grant)]);
        gate.answer(now, &gate.asks(), Some(&grants));
    };
    assert_eq!(enter(now).unwrap_err(), Full::Short);
    assert!(is_wanted());
    grant(1);
    let _one = enter(now).unwrap();
    assert_eq!(enter(now).unwrap_err(), Full::Short);
    assert!(!is_wanted());
    assert_eq!(enter(now + SECOND).unwrap_err(), Full::Short);
    assert!(is_wanted());
    grant(2);
    let _two = enter(now).unwrap();
    assert_eq!(enter(now + SECOND).unwrap_err(), Full::Short);
    assert!(!is_wanted());
}

#[test]
fn tokens_that_are_wanted_during_a_question_are_asked_for_after_its_answer() {
    let limit = RateLimit::new(20, SECOND).burst(4);
    let gate = gate(DestinationPolicy::default().max_concurrency(5).rate(limit));
    let now = Instant::now();
    let enter = || gate.try_enter_at("a", Turn::First, now);
    let answer = |asks: &[LeaseRequest], tokens| {
        let grant = Grant {
            permits: 5,
            tokens,
            wait: Duration::ZERO,
        };
        gate.answer(now, asks, Some(&HashMap::from([("a".to_owned(), grant)])));
    };
    assert_eq!(enter().unwrap_err(), Full::Short);
    answer(&gate.asks(), 2);
    // Renews the permits.
    let renewal = gate.asks();
    assert_eq!(renewal[0].tokens, 0);
    let _passes = (enter().unwrap(), enter().unwrap());
    assert_eq!(enter().unwrap_err(), Full::Short);
    answer(&renewal, 0);
    assert_eq!(gate.asks()[0].tokens, 2);
}

#[test]
fn permits_from_before_a_breaker_opened_allow_no_probes() {
    let breaker = CircuitBreaker::default();
    let policy = DestinationPolicy::default()
        .max_concurrency(5)
        .circuit_breaker(breaker);
    let gate = gate(policy.clone());
    let now = Instant::now();
    assert!(fill(&gate, "a", now).is_empty());
    let grant = |permits| {
        let asks = gate.asks();
        let grant = Grant {
            permits,
            tokens: 0,
            wait: Duration::ZERO,
        };
        let grants = HashMap::from([("a".to_owned(), grant)]);
        gate.answer(now - SECOND, &asks, Some(&grants));
        asks[0].limit
    };
    assert_eq!(grant(5), Some(5));
    let mut state = State::default();
    let failures = Report {
        attempts: 20,
        failures: 20,
        ..Report::default()
    };
    state.apply(&policy, &failures, 0);
    let is_half_open = |at| {
        let shared = Shared {
            state: state.clone(),
            clock: (now, at),
            was_closed: false,
        };
        let mut inner = gate.lock();
        inner.destinations.get_mut("a").unwrap().shared = Some(shared);
    };
    is_half_open(60_000);
    // Other processes may have permits from before, too. Only the database knows of all probes.
    assert!(fill(&gate, "a", now).is_empty());
    assert_eq!(grant(0), Some(1));
    assert!(fill(&gate, "a", now).is_empty());
    assert_eq!(grant(1), Some(1));
    assert_eq!(fill(&gate, "a", now).len(), 1);
}

#[test]
fn a_token_is_spent_by_each_attempt_and_given_back_by_one_that_does_not_begin() {
    let limit = RateLimit::new(20, SECOND).burst(4);
    let gate = gate(DestinationPolicy::default().rate(limit));
    let now = Instant::now();
    let enter = || gate.try_enter_at("a", Turn::First, now);
    assert_eq!(enter().unwrap_err(), Full::Short);
    let asks = gate.asks();
    assert_eq!(asks[0].tokens, 2);
    let grant = Grant {
        permits: 0,
        tokens: 2,
        wait: Duration::ZERO,
    };
    gate.answer(now, &asks, Some(&HashMap::from([("a".to_owned(), grant)])));
    drop(enter().unwrap());
    for _ in 0..2 {
        enter().unwrap().begin();
    }
    assert_eq!(enter().unwrap_err(), Full::Short);
}

#[test]
fn a_destination_that_fails_is_asked_at_a_bounded_rate_until_it_answers() {
    let gate = gate(DestinationPolicy::default());
    let now = Instant::now();
    let attempt = |failed, now| {
        gate.try_enter_at("a", Turn::First, now).map(|pass| {
            pass.note(Seen {
                turn: Turn::First,
                status: None,
                retry_after: None,
                fault: if failed {
                    Blame::Destination
                } else {
                    Blame::Success
                },
                is_repeated: failed,
            });
        })
    };
    let attempts = |now| (0..1000).take_while(|_| attempt(true, now).is_ok()).count();
    // Seven until it shows, then a burst.
    assert!((7 + 5..=7 + 25).contains(&attempts(now)));
    assert!(attempts(now + SECOND / 20) <= 4);
    let later = now + 10 * SECOND;
    for _ in 0..10 {
        attempt(false, later).unwrap();
    }
    assert!((0..100).all(|_| attempt(false, later).is_ok()));
}

#[test]
fn a_pause_closes_the_destination_here_at_once() {
    let gate = gate(DestinationPolicy::default());
    let now = Instant::now();
    let pass = gate.try_enter_at("a", Turn::First, now).unwrap();
    pass.note(Seen {
        turn: Turn::First,
        status: Some(StatusCode::TOO_MANY_REQUESTS),
        retry_after: Some(10 * SECOND),
        fault: Blame::Destination,
        is_repeated: true,
    });
    drop(pass);
    let full = |now| gate.try_enter_at("a", Turn::First, now).unwrap_err();
    assert_eq!(full(now), Full::Lasting);
    assert_eq!(gate.room().json, r#"{"a":0}"#);
    let reports = gate.take_reports();
    assert_eq!(reports[0].2.retry_after, Some(10 * SECOND));
    assert!(gate.take_reports().is_empty());
    assert!(
        gate.try_enter_at("a", Turn::First, now + 11 * SECOND)
            .is_ok()
    );
}

#[test]
fn a_destination_is_asked_less_often_the_more_of_its_attempts_fail() {
    let now = Instant::now();
    let asked_in_a_second = |failures: &[bool]| {
        let mut failing = Failing::default();
        for failed in failures {
            failing.note(*failed);
        }
        let mut asked = 0;
        for time in 0..1000 {
            let now = now + Duration::from_millis(time);
            while failing.free(now) > 0 && asked < 10_000 {
                failing.spend(now);
                asked += 1;
            }
        }
        asked
    };
    let most = asked_in_a_second(&[true; 7]);
    let all = asked_in_a_second(&[true; 100]);
    assert!((75..=125).contains(&most), "{most}");
    assert!((50..=65).contains(&all), "{all}");
    // As soon as it answers again, there is no such limit.
    let answers = [[true; 100].as_slice(), &[false; 7]].concat();
    assert_eq!(asked_in_a_second(&answers), 10_000);
}

#[test]
fn a_poll_for_a_slow_destination_comes_when_some_of_its_attempts_have_ended() {
    let soon = |took: Duration| {
        let gate = gate(DestinationPolicy::default());
        let now = Instant::now();
        answer(&gate, "other", Duration::ZERO, now);
        answer(&gate, "a", took, now);
        let _passes = fill(&gate, "a", now);
        gate.note_deferred("a");
        gate.room().soon.unwrap().as_millis()
    };
    assert_eq!(soon(Duration::ZERO), 50);
    assert_eq!(soon(Duration::from_millis(300)), 50);
    assert_eq!(soon(Duration::from_millis(800)), 100);
    assert_eq!(soon(10 * SECOND), 250);
}

#[test]
fn a_policy_of_the_database_outlives_a_quiet_time_and_ends_with_its_row() {
    let gate = gate(DestinationPolicy::default());
    let now = Instant::now();
    let row = StoredDestination {
        name: "a".to_owned(),
        state: State::default(),
        policy: Some(DestinationPolicy::default().max_concurrency_per_process(1)),
        now: 1_790_000_000_000,
        is_leased: false,
        is_readable: true,
    };
    gate.learn(vec![row]);
    assert_eq!(fill(&gate, "a", now).len(), 1);
    answer(&gate, "a", Duration::ZERO, now);
    assert_eq!(fill(&gate, "a", now + 125 * SECOND).len(), 1);
    gate.forget_others(&std::collections::HashSet::new());
    assert!(fill(&gate, "a", now + 125 * SECOND).len() > 1);
}
