//! Attempts that hooks don't let pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn, hook_fn_with};
use requeuest::retry::RetryPolicy;
use requeuest::{
    DeadLetterFilter, DestinationPolicy, DestinationState, Durable, Guarantee, Options, Status,
};
use tokio::sync::Notify;

use super::{failures, number, values};
use crate::support::{
    Server, builder, eventually, eventually_rows, in_time, migrated, outcome_of, post, quick, rows,
    with_middleware,
};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_refused_attempt_is_made_again_after_the_delay() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let closed = async |attempt: &mut OutgoingAttempt| match attempt.number() {
        1 => Err(Refusal::retry_after(
            SECOND,
            "see https://a.example/hunter2",
        )),
        _ => Ok(()),
    };
    let durable = builder(&database)
        .retry(quick())
        .on_attempt(hook_fn(closed))
        .build()
        .unwrap();
    let began = Instant::now();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    eventually("the first attempt", || async {
        !failures(&database, id).await.is_empty()
    })
    .await;
    assert_eq!(server.count(), 0);
    let (class, text) = failures(&database, id).await.remove(0);
    assert_eq!(class, "hook");
    assert_eq!(
        text,
        "the hook refused the attempt: see https://a.example; nothing was sent"
    );
    assert_eq!(outcome_of(&durable, id).await.attempts(), 2);
    assert!(began.elapsed() >= SECOND);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_hook_that_refuses_for_ever_ends_with_the_policy_or_the_deadline() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let refuse = |delay| {
        hook_fn_with(delay, async |delay: &Duration, _: &mut OutgoingAttempt| {
            Err::<(), _>(Refusal::retry_after(*delay, "closed"))
        })
    };
    let attempts = RetryPolicy::constant(Duration::from_millis(1)).max_attempts(3);
    let durable = builder(&database)
        .retry(attempts)
        .on_attempt(refuse(Duration::ZERO))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Discarded, 3)
    );

    // A delay beyond the deadline, or beyond what the policy allows.
    let durable = builder(&database)
        .channel("later")
        .retry(quick().max_age(Duration::from_secs(1000)))
        .on_attempt(refuse(Duration::MAX))
        .build()
        .unwrap();
    let deadline = Options::default().deadline(Duration::from_secs(60));
    for options in [Options::default(), deadline] {
        let request = post(server.url("/"), "x").with(options);
        let id = durable.fire(request).await.unwrap();
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(
            (outcome.status(), outcome.attempts()),
            (Status::Discarded, 1)
        );
    }
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_hook_discards_a_request_with_its_reason() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let gone = async |_: &mut OutgoingAttempt| Err::<(), _>(Refusal::discard("customer 7 left"));
    let durable = builder(&database)
        .on_attempt(hook_fn(gone))
        .build()
        .unwrap();
    let error = in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("customer 7 left"), "{error}");
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    let letters = durable
        .dead_letters(&DeadLetterFilter::default())
        .await
        .unwrap();
    let letter = letters.iter().find(|letter| letter.id == id).unwrap();
    assert_eq!(letter.error_class.as_deref(), Some("hook"));
    assert!(letter.error.as_ref().unwrap().contains("customer 7 left"));
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn what_goes_wrong_in_a_hook_is_a_failure_of_the_attempt() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let wrong = async |attempt: &mut OutgoingAttempt| {
        match attempt.number() {
            1 => panic!("hook at http://a.example/hunter2"),
            2 => std::future::pending().await,
            3 => attempt.set_header("x-key", "a\r\nhunter2: b")?,
            4 => attempt.set_header("content-length", 7)?,
            5 => drop(u8::try_from(1000)?),
            _ => {}
        }
        Ok::<_, Refusal>(())
    };
    let durable = builder(&database)
        .retry(quick())
        .hook_timeout(Duration::from_millis(50))
        .on_attempt(hook_fn(number))
        .on_attempt(hook_fn(wrong))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Completed, 6)
    );
    let expected = [
        "hook 2 of 2 panicked: hook at http://a.example; nothing was sent",
        "hook 2 of 2 did not return within 50ms; nothing was sent",
        "hook 2 of 2 failed: the value of the header `x-key` is not valid in HTTP; \
         nothing was sent",
        "hook 2 of 2 failed: it changed the header `content-length`, which frames the body; \
         nothing was sent",
        "hook 2 of 2 failed: out of range integral type conversion attempted; nothing was sent",
    ];
    let expected = expected.map(|text| ("hook".to_owned(), text.to_owned()));
    assert_eq!(failures(&database, id).await, expected);
    assert_eq!(values(&server, "x-attempt"), ["6"]);
}

#[tokio::test]
async fn a_failing_hook_says_nothing_of_the_destination() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let fail = async |attempt: &mut OutgoingAttempt| match attempt.number() {
        ..=30 => Err(Refusal::failed("no token")),
        _ => Ok(()),
    };
    let policy = DestinationPolicy::webhooks().without_retry_budget();
    let durable = Durable::builder(database.pool().clone())
        .destination("*", policy)
        .retry(quick())
        .on_attempt(hook_fn(fail))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.attempts(), 31);
    let origin = format!("http://{}", server.addr);
    let status = durable
        .destination(&origin)
        .unwrap()
        .status()
        .await
        .unwrap();
    assert_eq!((status.failures, status.state), (0, DestinationState::Open));
}

#[tokio::test]
async fn a_caller_that_goes_away_during_a_hook_leaves_its_request_to_the_runner() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let first = Arc::new((Notify::new(), AtomicBool::new(true)));
    let stuck_once = hook_fn_with(
        Arc::clone(&first),
        async |first: &Arc<(Notify, AtomicBool)>, _: &mut OutgoingAttempt| {
            if first.1.swap(false, Ordering::SeqCst) {
                first.0.notify_one();
                std::future::pending::<()>().await;
            }
            Ok::<_, Refusal>(())
        },
    );
    let durable = builder(&database).on_attempt(stuck_once).build().unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    let once = Options::default().guarantee(Guarantee::AtMostOnce);
    let call = client.post(server.url("/")).with_extension(once).body("x");
    let call = tokio::spawn(call.send());
    in_time(first.0.notified()).await;
    call.abort();
    // Nothing had been sent, so it is the first attempt, and the request is not ambiguous.
    server.wait_for(1).await;
    eventually_rows(
        &database,
        "outcomes WHERE status = 'completed' AND attempts = 1",
        1,
    )
    .await;
    assert_eq!(rows(&database, "attempts").await, 0);
}
