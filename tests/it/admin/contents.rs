//! What an operator sees of a request's content, if he asks for it.

use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::{Options, RequestId, Status, Uuid};

use crate::damaged::damage;
use crate::support::{Server, builder, eventually, migrated, other_process, outcome_of, reply};

fn secretive(url: &str, options: Options) -> requeuest::Request {
    let request = http::Request::post(url)
        .header("authorization", "hunter2")
        .header("x-open", "shown")
        .body("a body")
        .unwrap();
    requeuest::Request::try_from(request).unwrap().with(options)
}

#[tokio::test]
async fn content_is_shown_with_its_secret_headers_masked() {
    let database = migrated().await;
    let server = Server::start(|number, _| async move {
        let mut response = reply(if number == 0 { 404 } else { 503 }, "an answer");
        let cookie = "id=hunter2".parse().unwrap();
        response.headers_mut().insert("set-cookie", cookie);
        response
    })
    .await;
    let durable = builder(&database).build().unwrap();
    let admin = durable.admin();
    let url = server.url("/a?b=c");
    let keyed = Options::default().key("invoice");
    let letter = durable.fire(secretive(&url, keyed)).await.unwrap();
    outcome_of(&durable, letter).await;
    let retry = Options::default().retry(RetryPolicy::constant(Duration::from_secs(3600)));
    let waiting = durable.fire(secretive(&url, retry)).await.unwrap();
    eventually("the attempt has failed", || async {
        durable.status(waiting).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    for (id, status) in [(letter, 404), (waiting, 503)] {
        let content = admin.content(id).await.unwrap().unwrap();
        let (request, response) = (content.request.unwrap(), content.response.unwrap());
        assert_eq!(
            (request.method().as_str(), request.url()),
            ("POST", url.clone())
        );
        assert_eq!(request.headers()["authorization"], "***");
        assert_eq!(request.headers()["x-open"], "shown");
        assert_eq!(request.body().unwrap(), "a body");
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["set-cookie"], "***");
        assert_eq!(response.text().unwrap(), "an answer");
    }

    let found = admin.request_by_key("default", "invoice").await.unwrap();
    assert_eq!(found.unwrap().id, letter);
    assert!(
        admin
            .request_by_key("default", "other")
            .await
            .unwrap()
            .is_none()
    );
    let error = admin.request_by_key("", "invoice").await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
    let unknown = RequestId::from(Uuid::nil());
    assert!(admin.content(unknown).await.unwrap().is_none());
}

#[tokio::test]
async fn content_that_can_not_be_read_is_an_error_for_its_id() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let request = secretive("http://localhost:1/", Options::default());
    let id = there.fire(request).await.unwrap();
    damage(&database, id, "mq_payloads", "head = 'hunter2' || head").await;
    let error = there.admin().content(id).await.unwrap_err();
    assert!(error.is_unreadable(), "{error}");
    assert_eq!(error.request_id(), Some(id));
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
}
