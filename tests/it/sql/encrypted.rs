//! Plain SQL and statements beside handles with encryption keys, and headers marked sensitive.

use std::sync::{Arc, Mutex};

use requeuest::encryption::{Key, Keyring};
use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn_with};
use requeuest::testkit::TestDatabase;
use requeuest::{DeadLetterFilter, Durable, DurableBuilder, Options, Request, Status};

use super::{id, statement};
use crate::support::{LONG, Server, eventually_some, in_time, migrated, outcome_of};

/// What must not be seen.
const SECRET: &str = "k4n4ri3";

fn keys() -> Keyring {
    Keyring::new(Key::new("one", (0..32).collect::<Vec<u8>>()).unwrap())
}

/// A handle that reads and writes encrypted requests alone.
fn strict(database: &TestDatabase) -> DurableBuilder {
    Durable::builder(database.pool().clone())
        .encryption(keys())
        .require_encryption(true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_of_a_handle_with_keys_is_encrypted_before_it_is_run() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = strict(&database).build().unwrap();
    let request = http::Request::post(server.url(&format!("/{SECRET}")))
        .header("x-token", SECRET)
        .body(SECRET)
        .unwrap();
    let options = Options::default().key("one").ordered("o");
    let request = Request::try_from(request).unwrap().with(options);
    let stated = durable.statement(&request).unwrap();
    let (text, body) = stated.parameters();
    assert!(!text.contains(SECRET), "{text}");
    assert!(!String::from_utf8_lossy(body.unwrap()).contains(SECRET));
    statement::run(database.pool(), &stated).await.unwrap();
    let outcome = outcome_of(&durable, stated.id()).await;
    assert_eq!(outcome.status(), Status::Completed);
    let seen = &server.seen()[0];
    assert_eq!(seen.body, SECRET);
    assert_eq!(seen.headers["x-token"], SECRET);
    // The same request, by its key.
    let again = durable.statement(&request).unwrap();
    let first = statement::run(database.pool(), &again).await.unwrap();
    assert_eq!(first, stated.id());
    in_time(durable.shutdown(LONG)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_plain_sql_stores_is_parked_where_encryption_is_required() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = strict(&database).build().unwrap();
    let fire = format!(
        "SELECT requeuest.fire('POST', '{}', body => 'x')",
        server.url("/")
    );
    let plain = id(database.pool(), &fire).await;
    let parked = eventually_some("the request is parked", || async {
        durable.parked(None).await.unwrap().pop()
    })
    .await;
    assert_eq!(parked.id, plain);
    assert!(parked.reason.contains("not encrypted"), "{parked:?}");
    assert_eq!(server.count(), 0);
    // It would look at the request again, and leave it parked.
    in_time(durable.shutdown(LONG)).await.unwrap();
    // A handle that encrypts without requiring it sends such requests.
    let lenient = Durable::builder(database.pool().clone()).encryption(keys());
    let lenient = lenient.build().unwrap();
    assert_eq!(
        outcome_of(&lenient, plain).await.status(),
        Status::Completed
    );
    assert_eq!(server.bodies(), ["x"]);
    in_time(lenient.shutdown(LONG)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_sql_marks_are_masked_as_in_rust() {
    let database = migrated().await;
    let server = Server::always(404).await;
    // What a client, its layers and their logs get to see.
    let shown = Arc::new(Mutex::new(String::new()));
    let look = async |shown: &Arc<Mutex<String>>, attempt: &mut OutgoingAttempt| {
        *shown.lock().unwrap() = format!("{:?} {attempt:?}", attempt.headers());
        Ok::<_, Refusal>(())
    };
    let durable = Durable::builder(database.pool().clone())
        .on_attempt(hook_fn_with(Arc::clone(&shown), look))
        .build()
        .unwrap();
    let fire = format!(
        "SELECT requeuest.fire(
            'POST', '{}',
            '{{\"X-Partner\": \"{SECRET}\", \"Cookie\": \"{SECRET}\", \"x-a\": \"b\"}}', 'x',
            '{{\"sensitive\": [\"x-Partner\"]}}'
         )",
        server.url("/")
    );
    let id = id(database.pool(), &fire).await;
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Discarded);
    let seen = &server.seen()[0];
    assert_eq!(seen.headers["x-partner"], SECRET);
    let letters = durable.dead_letters(&DeadLetterFilter::default()).await;
    let info = durable.admin().request(id).await.unwrap();
    let shown = shown.lock().unwrap().clone();
    assert!(shown.contains("\"x-a\": \"b\""), "{shown}");
    assert_eq!(
        shown.matches("\"x-partner\": Sensitive").count(),
        1,
        "{shown}"
    );
    let shown = format!("{shown} {:?} {outcome:?} {info:?}", letters.unwrap());
    assert!(!shown.contains(SECRET), "{shown}");
    in_time(durable.shutdown(LONG)).await.unwrap();
}
