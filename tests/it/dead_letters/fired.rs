//! Fired requests that get a final response other than a success: no caller would see it.

use http_body_util::Full;
use requeuest::{AcceptedResponse, Durable, Options, Request, RequestId, Status, StatusCode};
use tower::{Layer, ServiceExt};

use super::{all_dead_letters, ends, ids, single_attempt};
use crate::support::{
    Server, builder, hyper_client, in_time, migrated, outcome_of, post, quick, reply, rows,
    with_middleware,
};

/// Answers with the status that the path names.
async fn as_asked() -> Server {
    Server::start(|_, seen| async move {
        let status = seen.uri.path().trim_matches('/').parse().unwrap();
        reply(status, "the answer")
    })
    .await
}

/// The request ended as a dead letter with its content and its response.
async fn assert_kept(durable: &Durable, id: RequestId, status: u16) {
    let outcome = outcome_of(durable, id).await;
    assert_eq!(outcome.status(), Status::Discarded, "{status}");
    assert_eq!(outcome.attempts(), 1);
    let response = outcome.response().unwrap();
    assert_eq!(response.status(), status);
    // A 304 has no body.
    let body = if status == 304 { "" } else { "the answer" };
    assert_eq!(response.text().unwrap(), body);
    // The response is there for any caller that asks by the id.
    let response = in_time(durable.response(id)).await.unwrap();
    assert_eq!(response.status(), status);
    let letters = all_dead_letters(durable).await;
    let letter = letters.iter().find(|letter| letter.id == id).unwrap();
    assert_eq!(letter.http_status, Some(status));
    let error = letter.error.as_deref().unwrap();
    assert!(
        error.starts_with(&format!("answered with {status}")),
        "{error}"
    );
}

#[tokio::test]
async fn a_fired_request_without_success_is_a_dead_letter() {
    let database = migrated().await;
    let server = as_asked().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let statuses = [301, 304, 400, 401, 404, 409];
    for status in statuses {
        let request = post(server.url(&format!("/{status}")), "x");
        let id = durable.fire(request).await.unwrap();
        assert_kept(&durable, id, status).await;
    }
    assert_eq!(server.count(), statuses.len());
    assert_eq!(rows(&database, "mq_payloads").await, statuses.len() as i64);
    for status in [200, 204] {
        let request = post(server.url(&format!("/{status}")), "x");
        ends(&durable, request, Status::Completed).await;
    }
    assert_eq!(rows(&database, "mq_payloads").await, statuses.len() as i64);
}

#[tokio::test]
async fn every_way_to_fire_makes_the_same_dead_letter() {
    let database = migrated().await;
    let server = as_asked().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let request = || post(server.url("/401"), "x");
    let fired = durable.fire(request()).await.unwrap();
    let fired_in = durable.fire_in(database.pool(), request()).await.unwrap();
    let many = durable.fire_many([request(), request()]).await.unwrap();
    let mut transaction = database.pool().begin().await.unwrap();
    let many_in = durable
        .fire_many_in(&mut transaction, [request()])
        .await
        .unwrap();
    transaction.commit().await.unwrap();

    let service = durable.layer().layer(hyper_client());
    let through_layer = http::Request::post(server.url("/401"))
        .extension(Options::default().fire())
        .body(Full::<bytes::Bytes>::from("x"))
        .unwrap();
    let accepted = in_time(service.oneshot(through_layer)).await.unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    let sent = client
        .post(server.url("/401"))
        .with_extension(Options::default().fire());
    let sent = in_time(sent.send()).await.unwrap();
    let id_of = |headers: &http::HeaderMap| {
        let id = headers[requeuest::REQUEST_ID_HEADER].to_str().unwrap();
        id.parse::<RequestId>().unwrap()
    };
    let mut all = vec![
        fired,
        fired_in,
        id_of(accepted.headers()),
        id_of(sent.headers()),
    ];
    all.extend(many);
    all.extend(many_in);
    for id in all {
        assert_kept(&durable, id, 401).await;
    }
}

#[tokio::test]
async fn a_fired_request_is_completed_by_what_it_accepts() {
    let database = migrated().await;
    let server = as_asked().await;
    let durable = single_attempt(&database).build().unwrap();
    let accept =
        |status| Options::default().accept([AcceptedResponse::Success, StatusCode::into(status)]);
    let gone = post(server.url("/404"), "x").with(accept(StatusCode::NOT_FOUND));
    ends(&durable, gone, Status::Completed).await;
    let other = post(server.url("/404"), "x").with(accept(StatusCode::GONE));
    ends(&durable, other, Status::Discarded).await;
}

#[tokio::test]
async fn an_awaited_404_is_a_response_and_no_dead_letter() {
    let database = migrated().await;
    let server = as_asked().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let response = in_time(durable.await_response(post(server.url("/404"), "x"))).await;
    let id = response.unwrap().id();
    assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
    assert_eq!(rows(&database, "mq_payloads").await, 0);
    // A call that attaches to a fired request gets the response of that request.
    let keyed = || post(server.url("/404"), "x").with(Options::default().key("k"));
    let fired = durable.fire(keyed()).await.unwrap();
    let attached = in_time(durable.await_response(keyed())).await.unwrap();
    assert_eq!((attached.id(), attached.status().as_u16()), (fired, 404));
}

#[tokio::test]
async fn a_final_401_halts_its_ordering_key_until_it_is_replayed() {
    let database = migrated().await;
    let server = Server::in_turn(&[401, 200]).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let ordered =
        |body| post(server.url("/"), body).with(Options::default().ordered("k").halt_on_discard());
    let first = ends(&durable, ordered("first"), Status::Discarded).await;
    let second = durable.fire(ordered("second")).await.unwrap();
    let halted = durable.halted().await.unwrap();
    assert_eq!((halted.len(), halted[0].id), (1, first));
    let again = durable.replay(first).await.unwrap();
    for id in [again, second] {
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    }
    assert_eq!(server.bodies(), ["first", "first", "second"]);
}

/// No caller waits for what is sent again.
#[tokio::test]
async fn a_replayed_call_that_gets_a_404_is_a_dead_letter_again() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 404, 204]).await;
    let durable = single_attempt(&database).build().unwrap();
    let request: Request = post(server.url("/"), "x");
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 503);
    let again = durable.replay(response.id()).await.unwrap();
    assert_eq!(
        outcome_of(&durable, again).await.status(),
        Status::Discarded
    );
    let letters = all_dead_letters(&durable).await;
    assert_eq!(ids(&letters), [again]);
    assert_eq!(letters[0].http_status, Some(404));
    let last = durable.replay(again).await.unwrap();
    assert_eq!(outcome_of(&durable, last).await.status(), Status::Completed);
    assert_eq!(server.bodies(), ["x", "x", "x"]);
}
