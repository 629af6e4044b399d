//! Names are judged by the addresses that the connection goes to.

use requeuest::Status;
use requeuest::guard::Guard;

use super::{Answers, at, denied_at_an_attempt, guarded};
use crate::support::{Server, migrated, outcome_of, post, reply};

#[tokio::test]
async fn one_bad_address_among_good_ones_refuses_the_name() {
    let database = migrated().await;
    let server = Server::always(200).await;
    for addresses in [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]] {
        let guard = Guard::new()
            .allow("127.0.0.1")
            .resolve_with(Answers::in_turn(&[&addresses]));
        let durable = guarded(&database, guard);
        let url = at(&server, "a.example", "/hunter2");
        let id = durable.fire(post(url, "x")).await.unwrap();
        let text = denied_at_an_attempt(&durable, id).await;
        let reason = "a.example: it resolves to 127.0.0.2, a loopback address";
        assert!(text.contains(reason) && !text.contains("hunter2"), "{text}");
    }
    assert_eq!(server.count(), 0);
}

/// The name means a permitted address while it is judged, and a denied one a moment later.
#[tokio::test]
async fn a_name_that_is_rebound_after_the_check_leads_nowhere_else() {
    let database = migrated().await;
    // Each answer ends its connection, so that the next request makes another one.
    let server = Server::start(|_, _| async {
        let mut answer = reply(200, "");
        answer
            .headers_mut()
            .insert("connection", "close".parse().unwrap());
        answer
    })
    .await;
    let answers = Answers::in_turn(&[&["127.0.0.1"], &["127.0.0.2"]]);
    let guard = Guard::new()
        .allow("127.0.0.1")
        .resolve_with(answers.clone());
    let durable = guarded(&database, guard);
    let url = at(&server, "a.example", "/");
    let id = durable.fire(post(&url, "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    // A second lookup between check and connect would have had the other answer.
    assert_eq!((server.count(), answers.asked()), (1, 1));
    let id = durable.fire(post(&url, "x")).await.unwrap();
    denied_at_an_attempt(&durable, id).await;
    assert_eq!((server.count(), answers.asked()), (1, 2));
}

#[tokio::test]
async fn a_name_of_the_system_that_means_this_machine_is_denied() {
    let database = migrated().await;
    let server = Server::always(200).await;
    // The system's resolver knows the machine's own name, or fails.
    let name = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = name.trim();
    let durable = guarded(&database, Guard::new());
    let url = at(&server, "localhost", "/");
    assert!(durable.fire(post(&url, "x")).await.unwrap_err().is_denied());
    if !name.is_empty() && tokio::net::lookup_host((name, 0)).await.is_ok() {
        let id = durable
            .fire(post(at(&server, name, "/"), "x"))
            .await
            .unwrap();
        denied_at_an_attempt(&durable, id).await;
    }
    let allowed = guarded(&database, Guard::new().allow("localhost"));
    let id = allowed.fire(post(&url, "x")).await.unwrap();
    assert_eq!(outcome_of(&allowed, id).await.status(), Status::Completed);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_denied_name_is_not_looked_up() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let other = crate::support::builder(&database)
        .runner(false)
        .build()
        .unwrap();
    let id = other
        .fire(post(at(&server, "a.example", "/"), "x"))
        .await
        .unwrap();
    let answers = Answers::in_turn(&[&["127.0.0.1"]]);
    let guard = Guard::new()
        .allow("127.0.0.1")
        .deny("*.example")
        .resolve_with(answers.clone());
    let durable = guarded(&database, guard);
    let text = denied_at_an_attempt(&durable, id).await;
    assert!(text.contains("a.example: a rule denies it"), "{text}");
    assert_eq!((server.count(), answers.asked()), (0, 0));
}
