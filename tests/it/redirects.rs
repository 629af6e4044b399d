//! Redirects that the crate's own transport follows.

use http::{HeaderName, HeaderValue};
use requeuest::testkit::TestDatabase;
use requeuest::{
    DurableBuilder, FailureClass, Guarantee, Options, Redirects, Request, Response, Status,
};

use crate::support::{
    Seen, Server, builder, closed_port, in_time, migrated, outcome_of, post, quick, reply,
};

/// A receiver that redirects with this status as the path says, and answers 200 elsewhere.
/// `/to/http://…` leads there, and `/round` to itself.
async fn redirecting(status: u16) -> Server {
    Server::start(move |_, seen: Seen| async move {
        let path = seen.uri.path();
        let location = match path.strip_prefix("/to/") {
            Some(location) => location.to_owned(),
            None if path == "/round" => "/round".to_owned(),
            None => return reply(200, seen.body),
        };
        let mut redirect = reply(status, "moved");
        let location = HeaderValue::try_from(location).unwrap();
        redirect.headers_mut().insert("location", location);
        redirect
    })
    .await
}

fn following(database: &TestDatabase, redirects: Redirects) -> DurableBuilder {
    builder(database)
        .retry(quick().max_attempts(1))
        .redirects(redirects)
}

async fn sent(builder: DurableBuilder, request: Request) -> Response {
    let durable = builder.build().unwrap();
    in_time(durable.await_response(request)).await.unwrap()
}

#[tokio::test]
async fn a_redirect_is_the_response_by_default() {
    let database = migrated().await;
    let (end, start) = (Server::echo().await, redirecting(307).await);
    let url = start.url(&format!("/to/{}", end.url("/end")));
    let response = sent(builder(&database), post(&url, "x")).await;
    assert_eq!(response.status(), 307);
    assert_eq!(response.text().unwrap(), "moved");
    let durable = builder(&database).build().unwrap();
    let id = durable.fire(post(&url, "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Discarded, 1)
    );
    let kept = outcome.response().unwrap();
    assert_eq!(kept.headers()["location"], end.url("/end"));
    assert_eq!(end.count(), 0);
}

#[tokio::test]
async fn a_redirect_keeps_the_body_or_asks_with_get() {
    let database = migrated().await;
    let end = Server::echo().await;
    for (status, method, body) in [
        (307, "POST", "payload"),
        (308, "POST", "payload"),
        (303, "GET", ""),
        (302, "GET", ""),
        (301, "GET", ""),
    ] {
        let start = redirecting(status).await;
        let url = start.url(&format!("/to/{}", end.url(&format!("/{status}"))));
        let response = sent(
            following(&database, Redirects::follow(1)),
            post(url, "payload"),
        )
        .await;
        assert_eq!(response.status(), 200, "{status}");
        assert_eq!(response.text().unwrap(), body, "{status}");
        let url = response.url().map(ToString::to_string);
        assert_eq!(url, Some(end.url(&format!("/{status}"))));
        let seen = end.seen().pop().unwrap();
        assert_eq!(
            (seen.method.as_str(), &*seen.body),
            (method, body.as_bytes())
        );
        assert!(!seen.headers.contains_key("referer"));
        // It is one attempt, so the receivers see one key.
        assert_eq!(
            seen.headers["idempotency-key"],
            start.seen()[0].headers["idempotency-key"]
        );
    }
}

/// The second request to the other origin is the one that reqwest sends credentials with.
#[tokio::test]
async fn credentials_never_reach_another_origin() {
    let database = migrated().await;
    let end = redirecting(307).await;
    let start = redirecting(307).await;
    let there = end.url(&format!(
        "/to/{}",
        end.url(&format!("/to/{}", start.url("/back")))
    ));
    // The first redirect stays at its origin.
    let url = start.url(&format!("/to/{}", start.url(&format!("/to/{there}"))));
    let mut request = post(url.replacen("http://", "http://user:hunter2@", 1), "x");
    for name in [
        "authorization",
        "cookie",
        "x-api-key",
        "x-named",
        "x-sensitive",
        "x-other",
    ] {
        let mut value = HeaderValue::from_static("hunter2");
        value.set_sensitive(name == "x-sensitive");
        request
            .headers_mut()
            .insert(HeaderName::from_static(name), value);
    }
    let redirects = Redirects::follow(4).secret_header(HeaderName::from_static("x-named"));
    let response = sent(following(&database, redirects), request).await;
    assert_eq!(response.status(), 200);
    let secret = |seen: &Seen| {
        let values = seen.headers.iter().filter(|(_, value)| *value == "hunter2");
        let mut names: Vec<_> = values.map(|(name, _)| name.to_string()).collect();
        names.sort();
        names.join(" ")
    };
    let all = "authorization cookie x-api-key x-named x-other x-sensitive";
    let at_start: Vec<_> = start.seen().iter().map(secret).collect();
    assert_eq!(at_start, [all, all, "x-other"]);
    let at_end: Vec<_> = end.seen().iter().map(secret).collect();
    assert_eq!(at_end, ["x-other", "x-other"]);
}

#[tokio::test]
async fn endless_redirects_end_with_the_last_one_as_the_response() {
    let database = migrated().await;
    let server = redirecting(302).await;
    let response = sent(
        following(&database, Redirects::follow(5)),
        post(server.url("/round"), "x"),
    )
    .await;
    assert_eq!(response.status(), 302);
    assert_eq!(server.count(), 6);
}

#[tokio::test]
async fn an_at_most_once_request_that_fails_after_a_redirect_is_ambiguous() {
    let database = migrated().await;
    let start = redirecting(303).await;
    let url = start.url(&format!("/to/http://{}/", closed_port().await));
    let durable = following(&database, Redirects::follow(1)).build().unwrap();
    let once = post(&url, "x").with(Options::default().guarantee(Guarantee::AtMostOnce));
    let id = durable.fire(once).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Ambiguous, 1)
    );
    // Under the default guarantee it is like any other failed connect.
    let error = in_time(durable.await_response(post(&url, "x")))
        .await
        .unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Connect));
    let text = error.to_string();
    assert!(text.contains("after a redirect: "), "{text}");
    assert_eq!(start.count(), 2);
}
