//! Signed webhooks: what arrives is checked by the library that receivers use.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use requeuest::hooks::Refusal;
use requeuest::webhooks::{Endpoint, Signer, SigningKey, Verifier};
use requeuest::{DeadLetterFilter, IdempotencyHeader, Options, Status};
use standardwebhooks::Webhook;

use super::{failures, values};
use crate::support::{Seen, Server, builder, migrated, outcome_of, post, quick, reply};

const FIRST: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const SECOND: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX";
const PRIVATE: &str = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbc=";
const PUBLIC: &str = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=";

fn key(text: &str) -> SigningKey {
    text.parse().unwrap()
}

/// Whether the library of Standard Webhooks takes what arrived.
fn is_accepted(seen: &Seen, key: &str) -> bool {
    let webhook = Webhook::new(key).unwrap();
    webhook.verify(&seen.body, &seen.headers).is_ok()
}

fn is_accepted_here(seen: &Seen, key: &str) -> bool {
    let verifier = Verifier::new([key]).unwrap();
    verifier.verify(&seen.headers, &seen.body).is_ok()
}

#[tokio::test]
async fn each_attempt_is_signed_anew_under_the_same_id() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let durable = builder(&database)
        .retry(requeuest::retry::RetryPolicy::constant(
            Duration::from_millis(1100),
        ))
        .on_attempt(Signer::new([key(FIRST)]))
        .build()
        .unwrap();
    let body = "{\"order\": \"é\"}";
    let id = durable.fire(post(server.url("/"), body)).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.attempts(), 2);
    assert_eq!(
        values(&server, "webhook-id"),
        [id.to_string(), id.to_string()]
    );
    let timestamps = values(&server, "webhook-timestamp");
    assert_ne!(timestamps[0], timestamps[1]);
    for mut seen in server.seen() {
        assert!(is_accepted(&seen, FIRST) && is_accepted_here(&seen, FIRST));
        assert!(!is_accepted(&seen, SECOND) && !is_accepted_here(&seen, SECOND));
        seen.body = "{}".into();
        assert!(!is_accepted(&seen, FIRST) && !is_accepted_here(&seen, FIRST));
    }
}

#[tokio::test]
async fn what_the_library_signs_is_verified() {
    let webhook = Webhook::new(FIRST).unwrap();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let timestamp = now.as_secs() as i64;
    let signature = webhook.sign("msg_1", timestamp, b"body").unwrap();
    let headers = http::Request::post("http://localhost/")
        .header("webhook-id", "msg_1")
        .header("webhook-timestamp", timestamp)
        .header("webhook-signature", signature)
        .body(())
        .unwrap();
    let verifier = Verifier::new([FIRST]).unwrap();
    let verified = verifier.verify(headers.headers(), b"body").unwrap();
    assert_eq!(verified.id, "msg_1");
    assert!(verifier.verify(headers.headers(), b"bodY").is_err());
}

#[tokio::test]
async fn every_key_that_is_still_valid_signs() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let expired = "whsec_BgcICQoLDA0ODxAREhMUFRYXGBkaGxwd";
    let keys = [
        key(FIRST).valid_until(now + hour),
        key(expired).valid_until(now - hour),
        key(SECOND),
        key(PRIVATE),
    ];
    let durable = builder(&database)
        .on_attempt(Signer::new(keys))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&durable, id).await;
    let seen = server.seen().remove(0);
    let signatures = values(&server, "webhook-signature").remove(0);
    assert_eq!(signatures.split(' ').count(), 3);
    for key in [FIRST, SECOND] {
        assert!(is_accepted(&seen, key) && is_accepted_here(&seen, key));
    }
    assert!(is_accepted_here(&seen, PUBLIC));
    assert!(!is_accepted(&seen, expired) && !is_accepted_here(&seen, expired));
}

#[tokio::test]
async fn each_customer_has_a_key_of_its_own() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let origin: Arc<str> = format!("http://{}", server.addr).into();
    let signer = Signer::lookup(move |endpoint: Endpoint| {
        let origin = Arc::clone(&origin);
        async move {
            assert_eq!(
                (&*endpoint.destination, &*endpoint.channel),
                (&*origin, "default")
            );
            match endpoint.limit_key.as_deref() {
                Some("first") => Ok(vec![FIRST.parse()?]),
                Some("second") => Ok(vec![SECOND.parse()?]),
                Some("bad") => Ok(vec!["whsec_hunter2".parse()?]),
                Some("none") => Ok(Vec::new()),
                _ => Err(Refusal::discard("the customer is gone")),
            }
        }
    });
    let durable = builder(&database)
        .retry(quick().max_attempts(1))
        .on_attempt(signer)
        .build()
        .unwrap();
    let fire = async |customer: &'static str| {
        let options = Options::default().limit_key(customer);
        let request = post(server.url("/"), "x").with(options);
        let id = durable.fire(request).await.unwrap();
        (outcome_of(&durable, id).await.status(), id)
    };
    for customer in ["first", "second"] {
        assert_eq!(fire(customer).await.0, Status::Completed);
    }
    let seen = server.seen();
    assert!(is_accepted(&seen[0], FIRST) && is_accepted(&seen[1], SECOND));
    for customer in ["bad", "none", "gone"] {
        assert_eq!(fire(customer).await.0, Status::Discarded);
    }
    assert_eq!(server.count(), 2);
    let filter = DeadLetterFilter::default();
    let letters = durable.dead_letters(&filter).await.unwrap();
    let errors: Vec<_> = letters
        .into_iter()
        .filter_map(|letter| letter.error)
        .collect();
    for expected in [
        "is not Base64",
        "no key is valid now",
        "the customer is gone",
    ] {
        assert!(
            errors.iter().any(|error| error.contains(expected)),
            "{errors:?}"
        );
    }
    assert!(!errors.concat().contains("hunter"), "{errors:?}");
}

#[tokio::test]
async fn a_replay_keeps_the_id_and_a_caller_may_choose_it() {
    let database = migrated().await;
    let server =
        Server::start(|number, _| async move { reply(if number == 0 { 400 } else { 200 }, "") })
            .await;
    let durable = builder(&database)
        .retry(quick())
        .on_attempt(Signer::new([key(FIRST)]))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    let replay = durable.replay(id).await.unwrap();
    assert_ne!(replay, id);
    outcome_of(&durable, replay).await;
    // By its own header, or by the one that the crate adds.
    let mut own = post(server.url("/"), "x");
    own.headers_mut()
        .insert("webhook-id", "evt_1".parse().unwrap());
    let id_of_own = durable.fire(own.clone()).await.unwrap();
    outcome_of(&durable, id_of_own).await;
    let header = IdempotencyHeader::bare().name("webhook-id").unwrap();
    let named = post(server.url("/"), "x").with(Options::default().idempotency_header(header));
    let named = durable.fire(named).await.unwrap();
    outcome_of(&durable, named).await;
    let expected = [
        id.to_string(),
        id.to_string(),
        "evt_1".to_owned(),
        named.to_string(),
    ];
    assert_eq!(values(&server, "webhook-id"), expected);
    assert!(server.seen().iter().all(|seen| is_accepted(seen, FIRST)));
    // A dot would let parts of what is signed change places.
    own.headers_mut()
        .insert("webhook-id", "evt.1".parse().unwrap());
    let dotted = durable.fire(own).await.unwrap();
    assert_eq!(
        outcome_of(&durable, dotted).await.status(),
        Status::Discarded
    );
    assert_eq!(failures(&database, dotted).await.len(), 0);
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn a_signer_without_keys_is_refused_when_the_handle_is_built() {
    let database = migrated().await;
    let error = builder(&database)
        .on_attempt(Signer::new([]))
        .build()
        .unwrap_err();
    assert_eq!(error.field(), Some("on_attempt"));
}
