//! What was moved to another row or column, or changed, is not used.

use requeuest::{Durable, RequestId, Status};

use super::{assert_unreadable, delivering, execute, look_again, parked, there};
use crate::support::{Server, eventually, migrated, outcome_of, post, quick};

const CHANGED: &str = "can't be decrypted with the key `a`: it was changed, or moved";

#[tokio::test]
async fn a_request_that_was_moved_or_changed_is_parked_until_it_is_as_it_was() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = there(&database, &["a"]).await;
    let head_of = "(SELECT o.head FROM requeuest.mq_payloads o WHERE o.id = $2)";
    let body_of = "(SELECT o.body FROM requeuest.mq_payloads o WHERE o.id = $2)";
    let both = format!("head = {head_of}, body = {body_of}");
    let mut cases: Vec<(RequestId, String, &str)> = Vec::new();
    for (change, reason) in [
        (format!("head = {head_of}"), CHANGED),
        (format!("body = {body_of}"), CHANGED),
        (both, CHANGED),
        ("body = NULL".to_owned(), "its body is missing"),
        (
            "body = body || ''".to_owned() + "::bytea || '\\x00'",
            CHANGED,
        ),
        ("body = convert_to(head, 'utf8')".to_owned(), CHANGED),
        (
            r#"head = replace(head, '"POST"', '"PUT"')"#.to_owned(),
            CHANGED,
        ),
        (
            r"head = replace(head, '127.0.0.1', 'localhost')".to_owned(),
            CHANGED,
        ),
        (r"head = replace(head, '_ms', '_m')".to_owned(), CHANGED),
        (
            r"head = replace(head, ':a:', ':b:')".to_owned(),
            "does not have: `b`",
        ),
        (
            r#"head = replace(head, '"1:a:', '"2:a:')"#.to_owned(),
            "a form of a newer version",
        ),
        (
            r#"head = replace(head, '"1:a:', '"x:')"#.to_owned(),
            "encrypted form is malformed",
        ),
    ] {
        let id = client.fire(post(server.url("/"), "x")).await.unwrap();
        cases.push((id, change, reason));
    }
    let other = client.fire(post(server.url("/other"), "y")).await.unwrap();
    let keep = "CREATE TABLE requeuest.kept AS SELECT id, head, body FROM requeuest.mq_payloads";
    execute(&database, keep, &[]).await;
    for (id, change, _) in &cases {
        let change = format!("UPDATE requeuest.mq_payloads SET {change} WHERE id = $1");
        let used = if change.contains("$2") {
            &[*id, other][..]
        } else {
            &[*id]
        };
        execute(&database, &change, used).await;
    }
    let durable = delivering(&database, &["a"]);
    for (id, change, reason) in &cases {
        let shown = parked(&durable, *id).await;
        assert!(shown.contains(reason), "{change}: {shown}");
    }
    assert_eq!(
        outcome_of(&durable, other).await.status(),
        Status::Completed
    );
    assert_eq!(server.count(), 1);

    let mend = "UPDATE requeuest.mq_payloads p SET head = k.head, body = k.body
        FROM requeuest.kept k WHERE k.id = p.id";
    execute(&database, mend, &[]).await;
    for (id, change, _) in cases {
        eventually(&change, || async {
            look_again(&database).await;
            durable.status(id).await.unwrap() == Some(Status::Completed)
        })
        .await;
    }
}

#[tokio::test]
async fn a_response_that_was_moved_or_changed_is_unreadable() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable: Durable = delivering(&database, &["a"]);
    let done = async |body: &'static str| {
        let id = durable.fire(post(server.url("/"), body)).await.unwrap();
        outcome_of(&durable, id).await;
        id
    };
    let other = done("other").await;
    let of = |column: &str| {
        format!("{column} = (SELECT o.{column} FROM requeuest.outcomes o WHERE o.id = $2)")
    };
    for (change, reason) in [
        (of("head"), CHANGED),
        (of("body"), CHANGED),
        (format!("{}, {}", of("head"), of("body")), CHANGED),
        ("body = NULL".to_owned(), "its body is missing"),
        ("http_status = 500".to_owned(), CHANGED),
        (
            "head = replace(head, ':a:', ':b:')".to_owned(),
            "does not have: `b`",
        ),
        (
            "head = head || ' '".to_owned(),
            "encrypted form is malformed",
        ),
    ] {
        let id = done("x").await;
        let statement = format!("UPDATE requeuest.outcomes SET {change} WHERE id = $1");
        let used = if change.contains("$2") {
            &[id, other][..]
        } else {
            &[id]
        };
        execute(&database, &statement, used).await;
        assert_unreadable(durable.response(id).await, id, reason);
    }
    assert_eq!(durable.response(other).await.unwrap().body(), "other");
}

#[tokio::test]
async fn an_error_that_was_moved_is_unreadable_and_shown_as_such() {
    let database = migrated().await;
    let refused = crate::support::closed_port().await;
    let once = quick().max_attempts(1);
    let durable = crate::support::builder(&database)
        .retry(once)
        .encryption(super::ring(&["a"]))
        .build()
        .unwrap();
    let mut ids = Vec::new();
    for _ in 0..2 {
        let id = durable
            .fire(post(format!("http://{refused}/"), "x"))
            .await
            .unwrap();
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
        ids.push(id);
    }
    let filter = requeuest::DeadLetterFilter::default();
    let error = async || {
        durable.dead_letters(&filter).await.unwrap()[0]
            .error
            .clone()
            .unwrap()
    };
    let before = error().await;
    assert!(
        !before.contains("sealed") && !before.contains("crypt"),
        "{before}"
    );
    let change = "UPDATE requeuest.outcomes
        SET error = (SELECT o.error FROM requeuest.outcomes o WHERE o.id = $2) WHERE id = $1";
    execute(&database, change, &ids).await;
    assert!(error().await.contains(CHANGED));
    assert_unreadable(durable.outcome(ids[0]).await, ids[0], CHANGED);
    assert!(durable.outcome(ids[1]).await.is_ok());
}
