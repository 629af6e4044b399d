//! Nothing of a request or a response is in any column of any table.

use http::{Request, Response};
use requeuest::testkit::TestDatabase;
use requeuest::{Body, Options, Outcome, RequestId, Status, outcome_fn};
use sqlx::PgConnection;
use tower::service_fn;

use super::{ring, there};
use crate::support::{builder, count, eventually, migrated, other_process, outcome_of, quick};

const SECRETS: [&str; 10] = [
    "canary-in-the-path",
    "canary-in-the-query",
    "canary-in-the-user-info",
    "canary-in-a-header",
    "canary-in-the-body",
    "canary-in-an-early-answer",
    "canary-in-an-answers-header",
    "canary-in-an-answers-body",
    "canary-in-an-error",
    "canary-in-a-handlers-error",
];

/// How many rows of the schema contain this text, in any column and as text or as bytes.
async fn found(database: &TestDatabase, secret: &str) -> Vec<String> {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c
         WHERE c.relnamespace = 'requeuest'::regnamespace AND c.relkind IN ('r', 'p')",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    assert!(tables.len() > 20, "{tables:?}");
    let mut found = Vec::new();
    for table in tables {
        let matching = format!(
            "SELECT count(*) FROM requeuest.{table} t
             WHERE strpos(lower(t::text), '{secret}') > 0
                OR strpos(lower(t::text), encode('{secret}', 'hex')) > 0"
        );
        if count(database, &matching).await > 0 {
            found.push(table);
        }
    }
    found
}

/// Answers as the path asks for.
async fn answer(request: Request<Body>) -> Result<Response<Body>, std::io::Error> {
    let path = request.uri().path().to_owned();
    if path.ends_with("/fails") {
        return Err(std::io::Error::other("refused: canary-in-an-error"));
    }
    let attempt = request
        .extensions()
        .get::<requeuest::AttemptNumber>()
        .unwrap()
        .get();
    let (status, body) = if attempt == 1 || path.ends_with("/busy") {
        (503, "canary-in-an-early-answer")
    } else {
        (200, "canary-in-an-answers-body")
    };
    let response = Response::builder()
        .status(status)
        .header("x-answer", "canary-in-an-answers-header");
    Ok(response.body(Body::from(body)).unwrap())
}

async fn handle(_: &mut PgConnection, _: &Outcome) -> Result<(), std::io::Error> {
    Err(std::io::Error::other("not now: canary-in-a-handlers-error"))
}

fn request(path: &str, key: &str) -> requeuest::Request {
    let url = format!(
        "http://user:canary-in-the-user-info@example.com/canary-in-the-path/{path}\
         ?a=canary-in-the-query"
    );
    let request = Request::post(url)
        .header("authorization", "canary-in-a-header")
        .body("canary-in-the-body")
        .unwrap();
    requeuest::Request::try_from(request)
        .unwrap()
        .with(Options::default().key(key).retry(quick().max_attempts(3)))
}

/// Fills the tables with all that a request leaves behind. Returns what was found of the secrets.
async fn what_is_found(database: &TestDatabase, encrypted: bool) -> Vec<(&'static str, bool)> {
    let handles = builder(database).transport(service_fn(answer));
    let handles = if encrypted {
        handles.encryption(ring(&["a"]))
    } else {
        handles
    };
    let enqueuing = if encrypted {
        there(database, &["a"]).await
    } else {
        other_process(database).await
    };
    let mut seen = SECRETS.map(|secret| (secret, false));
    let mut look = async || {
        for (secret, seen) in &mut seen {
            *seen |= !found(database, secret).await.is_empty();
        }
    };
    let mut ids: Vec<RequestId> = Vec::new();
    for path in ["answered", "fails", "busy"] {
        ids.push(enqueuing.fire(request(path, path)).await.unwrap());
    }
    look().await;
    let durable = handles.build().unwrap();
    let _handler = durable
        .on_outcome("default", outcome_fn(handle))
        .await
        .unwrap();
    // Waits between two attempts for ever, with its first answer stored.
    let slow = quick()
        .base(std::time::Duration::from_secs(3600))
        .jitter(requeuest::retry::Jitter::None);
    let slow = slow.cap(std::time::Duration::from_secs(3600));
    let waiting = request("answered", "slow").with(Options::default().key("slow").retry(slow));
    durable.fire(waiting).await.unwrap();
    for (id, status) in ids
        .iter()
        .zip([Status::Completed, Status::Discarded, Status::Discarded])
    {
        assert_eq!(outcome_of(&durable, *id).await.status(), status);
    }
    eventually("handlers have failed, and an answer waits", || async {
        let stored = "SELECT count(*) FROM requeuest.mq_payloads WHERE response_head IS NOT NULL";
        durable.failed_hand_overs(None).await.unwrap().len() == 3
            && count(database, stored).await >= 1
    })
    .await;
    let failed = durable.failed_hand_overs(None).await.unwrap();
    assert!(
        failed[0]
            .error
            .as_ref()
            .unwrap()
            .contains("canary-in-a-handlers-error")
    );
    look().await;
    for id in &ids[1..] {
        let again = durable.replay(*id).await.unwrap();
        assert_eq!(
            outcome_of(&durable, again).await.status(),
            Status::Discarded
        );
        look().await;
    }
    let letters = durable
        .dead_letters(&requeuest::DeadLetterFilter::default())
        .await
        .unwrap();
    let error = letters.iter().find_map(|letter| letter.error.as_ref());
    assert!(error.unwrap().contains("canary-in-an-error"), "{letters:?}");
    seen.to_vec()
}

#[tokio::test]
async fn a_secret_of_a_request_or_a_response_is_in_no_column_of_any_table() {
    let database = migrated().await;
    for (secret, seen) in what_is_found(&database, true).await {
        assert!(!seen, "{secret}: {:?}", found(&database, secret).await);
    }
}

#[tokio::test]
async fn without_encryption_the_search_finds_each_secret() {
    let database = migrated().await;
    for (secret, seen) in what_is_found(&database, false).await {
        assert!(seen, "{secret}");
    }
}
