//! Tokens of OAuth 2 client credentials.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future;
use http::Response;
use requeuest::guard::Guard;
use requeuest::hooks::{OAuth2, only_to};
use requeuest::{DurableBuilder, FailureClass, Redirects, ReqwestTransport, Status};

use super::{failures, values};
use crate::support::{
    Server, builder, in_time, migrated, outcome_of, post, quick, reply, with_middleware,
};

/// Gives tokens that hold for so many seconds: `token-0`, `token-1`, …
async fn token_server(seconds: u32) -> Server {
    Server::start(move |number, _| async move {
        let token = format!("token-{number}");
        reply(200, granted(&token, seconds))
    })
    .await
}

fn granted(token: &str, seconds: u32) -> String {
    format!(r#"{{"access_token":"{token}","token_type":"Bearer","expires_in":{seconds}}}"#)
}

fn oauth(tokens: &Server) -> OAuth2 {
    OAuth2::client_credentials(tokens.url("/token"), "billing", "hunter2")
}

/// Takes one token only: that of this number.
async fn api(current: &Arc<AtomicUsize>) -> Server {
    let current = Arc::clone(current);
    Server::start(move |_, seen| {
        let expected = format!("Bearer token-{}", current.load(Ordering::SeqCst));
        let is_known = seen
            .headers
            .get("authorization")
            .is_some_and(|it| *it == expected);
        async move { reply(if is_known { 200 } else { 401 }, "") }
    })
    .await
}

fn with(builder: DurableBuilder, oauth: OAuth2) -> requeuest::Durable {
    builder.retry(quick()).on_attempt(oauth).build().unwrap()
}

#[tokio::test]
async fn many_attempts_share_one_token() {
    let database = migrated().await;
    let (tokens, server) = (token_server(3600).await, Server::always(200).await);
    let oauth = oauth(&tokens)
        .scope("charges refunds")
        .audience("https://api.example");
    let durable = with(builder(&database), oauth);
    let calls = (0..20).map(|_| durable.await_response(post(server.url("/"), "x")));
    for response in in_time(future::join_all(calls)).await {
        response.unwrap();
    }
    assert_eq!(values(&server, "authorization"), ["Bearer token-0"; 20]);
    let seen = tokens.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        (seen[0].method.as_str(), seen[0].uri.path()),
        ("POST", "/token")
    );
    // `billing:hunter2`
    assert_eq!(
        seen[0].headers["authorization"],
        "Basic YmlsbGluZzpodW50ZXIy"
    );
    let form = "application/x-www-form-urlencoded";
    assert_eq!(seen[0].headers["content-type"], form);
    assert_eq!(
        seen[0].body,
        "grant_type=client_credentials&scope=charges+refunds&audience=https%3A%2F%2Fapi.example"
    );
}

#[tokio::test]
async fn a_token_is_renewed_before_its_end() {
    let database = migrated().await;
    let (tokens, server) = (token_server(1).await, Server::always(200).await);
    let durable = with(builder(&database), oauth(&tokens).credentials_in_body());
    let call = || durable.await_response(post(server.url("/"), "x"));
    in_time(call()).await.unwrap();
    while tokens.count() < 2 {
        in_time(call()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let used = values(&server, "authorization");
    assert_eq!(used[0], "Bearer token-0");
    assert_eq!(used.last().unwrap(), "Bearer token-1");
    let seen = tokens.seen();
    assert!(!seen[0].headers.contains_key("authorization"));
    assert_eq!(
        seen[0].body,
        "grant_type=client_credentials&client_id=billing&client_secret=hunter2"
    );
}

#[tokio::test]
async fn after_a_401_to_an_old_token_the_attempt_is_made_with_a_new_one() {
    let database = migrated().await;
    let current = Arc::new(AtomicUsize::new(0));
    let (tokens, server) = (token_server(3600).await, api(&current).await);
    let durable = with(builder(&database), oauth(&tokens));
    let fire = || async {
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        let outcome = outcome_of(&durable, id).await;
        (outcome.status(), outcome.attempts())
    };
    assert_eq!(fire().await, (Status::Completed, 1));
    // The receiver revokes the token.
    current.store(1, Ordering::SeqCst);
    assert_eq!(fire().await, (Status::Completed, 2));
    assert_eq!(tokens.count(), 2);
    // No token is good enough: a new one is tried once.
    current.store(1000, Ordering::SeqCst);
    assert_eq!(fire().await, (Status::Discarded, 2));
    assert_eq!(tokens.count(), 3);
    // Through a waiting caller's own client.
    current.store(3, Ordering::SeqCst);
    let client = with_middleware(reqwest::Client::new(), &durable);
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn without_a_token_nothing_is_sent_and_the_attempt_is_repeated() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let tokens = Server::start(|number, _| async move {
        match number {
            0 => {
                let body = r#"{"error":"invalid_client","error_description":"hunter2"}"#;
                reply(401, body)
            }
            1 => reply(200, "hunter2"),
            2 => reply(200, "x".repeat(65 * 1024)),
            3 => Response::builder()
                .status(302)
                .header("location", "/hunter2")
                .body("".into())
                .unwrap(),
            4 => reply(200, granted("a\\nb", 60)),
            _ => reply(200, granted("token", 60)),
        }
    })
    .await;
    let durable = with(builder(&database), oauth(&tokens));
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.attempts(), 6);
    assert_eq!(values(&server, "authorization"), ["Bearer token"]);
    let expected = [
        "it answered with 401 Unauthorized and `invalid_client`",
        "its answer is not the JSON of a token",
        "length limit exceeded",
        "it answered with 302 Found",
        "its token is not valid in a header",
    ];
    let from = format!("the hook failed: no token from http://{}: ", tokens.addr);
    let expected = expected.map(|text| ("hook".into(), format!("{from}{text}; nothing was sent")));
    assert_eq!(failures(&database, id).await, expected);
}

#[tokio::test]
async fn a_redirect_of_the_token_server_leads_the_secret_nowhere_else() {
    let database = migrated().await;
    let (server, other) = (Server::always(200).await, token_server(60).await);
    let location = other.url("/");
    let tokens = Server::start(move |_, _| {
        let location = location.clone();
        async move {
            let mut redirect = reply(307, "");
            let location = location.parse().unwrap();
            redirect.headers_mut().insert("location", location);
            redirect
        }
    })
    .await;
    let following = builder(&database).redirects(Redirects::follow(3));
    let durable = following
        .retry(quick().max_attempts(2))
        .on_attempt(oauth(&tokens).credentials_in_body())
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    let (_, text) = failures(&database, id).await.remove(0);
    assert!(text.contains("it answered with 307"), "{text}");
    assert_eq!((tokens.count(), other.count(), server.count()), (2, 0, 0));
}

#[tokio::test]
async fn a_token_server_that_hangs_fails_attempts_in_time() {
    let database = migrated().await;
    let (tokens, answers) = Server::held(200).await;
    let server = Server::always(200).await;
    let tight = builder(&database).hook_timeout(Duration::from_millis(100));
    let durable = with(tight, oauth(&tokens));
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    tokens.wait_for(2).await;
    let (class, text) = failures(&database, id).await.remove(0);
    assert_eq!(class, "hook");
    assert_eq!(
        text,
        "the hook did not return within 100ms; nothing was sent"
    );
    assert_eq!(server.count(), 0);
    drop(answers);
}

#[tokio::test]
async fn a_token_goes_to_its_destination_only_and_has_a_client_of_its_own() {
    let database = migrated().await;
    let (tokens, server) = (token_server(3600).await, Server::always(200).await);
    let other = Server::always(200).await;
    let client = reqwest::Client::builder()
        .user_agent("tokens")
        .build()
        .unwrap();
    let oauth = oauth(&tokens).transport(ReqwestTransport::new(client));
    let origin = format!("http://{}", server.addr);
    let durable = builder(&database)
        .on_attempt(only_to(origin, oauth))
        .build()
        .unwrap();
    for server in [&server, &other] {
        in_time(durable.await_response(post(server.url("/"), "x")))
            .await
            .unwrap();
    }
    assert_eq!(values(&server, "authorization"), ["Bearer token-0"]);
    assert_eq!(values(&other, "authorization"), [""]);
    assert_eq!(values(&tokens, "user-agent"), ["tokens"]);
}

#[tokio::test]
async fn a_guard_denies_the_token_server_too() {
    let database = migrated().await;
    let (tokens, server) = (token_server(3600).await, Server::always(200).await);
    let guard = Guard::new()
        .allow("127.0.0.1")
        .deny_ports([tokens.addr.port()]);
    let durable = builder(&database)
        .guard(guard)
        .retry(quick())
        .on_attempt(oauth(&tokens))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Discarded, "{outcome:?}");
    // As after a denied URL of a request: the next attempt would be denied too.
    assert_eq!(outcome.attempts(), 1);
    let error = in_time(durable.response(id)).await.unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Hook));
    assert!(error.to_string().contains("is not permitted"), "{error}");
    assert_eq!((tokens.count(), server.count()), (0, 0));
}

#[tokio::test]
async fn a_request_for_a_token_is_never_persisted() {
    let database = migrated().await;
    let (tokens, server) = (token_server(3600).await, Server::always(200).await);
    // Its client has a handle of its own as middleware.
    let inner = builder(&database).channel("inner").build().unwrap();
    let client = with_middleware(reqwest::Client::new(), &inner);
    let durable = builder(&database)
        .transport(requeuest::MiddlewareTransport::new(client))
        .on_attempt(oauth(&tokens))
        .build()
        .unwrap();
    in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(tokens.count(), 1);
    let all = crate::support::rows(&database, "outcomes").await;
    assert_eq!(all, 1);
}
