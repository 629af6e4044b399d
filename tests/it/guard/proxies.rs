//! Behind a proxy, a guard would see the proxy's address and nothing else.

use std::process::Stdio;

use requeuest::guard::Guard;
use requeuest::{Durable, Status};
use sqlx::PgPool;

use super::{Answers, guarded};
use crate::support::{Server, in_time, migrated, outcome_of, part, plays, post};

/// Settings of a process, as its environment has them.
const DATABASE: &str = "REQUEUEST_TEST_DATABASE";
const SERVER: &str = "REQUEUEST_TEST_SERVER";

#[tokio::test]
async fn the_proxies_of_the_environment_are_ignored() {
    let database = migrated().await;
    let (proxy, receiver) = (Server::always(200).await, Server::always(200).await);
    let mut child = part(module_path!(), "send_in_an_environment_with_a_proxy");
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        child.env(name, proxy.url(""));
    }
    for name in ["no_proxy", "NO_PROXY"] {
        child.env_remove(name);
    }
    let child = child
        .env(DATABASE, database.url())
        .env(SERVER, receiver.url("/"))
        .env("RUST_LOG", "requeuest=warn")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output());
    let ended = in_time(ended).await.unwrap().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let log = String::from_utf8_lossy(&ended.stderr);
    let warnings = log.matches("a handle with a guard ignores the environment's proxy");
    assert_eq!(warnings.count(), 1, "{log}");
    // Without a guard through the proxy, with one past it.
    let bodies = |server: &Server| server.bodies();
    assert_eq!(bodies(&proxy), ["without"]);
    assert_eq!(bodies(&receiver), ["with"]);
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn send_in_an_environment_with_a_proxy() {
    if !plays("send_in_an_environment_with_a_proxy") {
        return;
    }
    env_logger::init();
    let pool = PgPool::connect(&std::env::var(DATABASE).unwrap())
        .await
        .unwrap();
    let url = std::env::var(SERVER).unwrap();
    let builder = |channel| Durable::builder(pool.clone()).channel(channel);
    let with = builder("with").guard(Guard::new().allow("127.0.0.1"));
    for (durable, body) in [
        (with.build().unwrap(), "with"),
        (builder("without").build().unwrap(), "without"),
    ] {
        let response = in_time(durable.await_response(post(&url, body))).await;
        assert_eq!(response.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_trusted_proxy_gets_every_request_and_looks_the_names_up() {
    let database = migrated().await;
    let proxy = Server::always(200).await;
    let answers = Answers::in_turn(&[&["127.0.0.1"]]);
    // By name, which resolves to an address that no request may go to.
    let url = format!(
        "http://user:pass@Smokescreen.internal:{}",
        proxy.addr.port()
    );
    let guard = Guard::new().trust_proxy(url).resolve_with(answers.clone());
    let durable = guarded(&database, guard);
    for url in ["http://hooks.example/a", "http://1.1.1.1/b"] {
        let id = durable.fire(post(url, "x")).await.unwrap();
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    }
    let uris: Vec<_> = proxy
        .seen()
        .iter()
        .map(|seen| seen.uri.to_string())
        .collect();
    assert_eq!(uris, ["http://hooks.example/a", "http://1.1.1.1/b"]);
    for seen in proxy.seen() {
        assert_eq!(seen.headers["proxy-authorization"], "Basic dXNlcjpwYXNz");
    }
    // URLs are still judged here.
    let refused = durable.fire(post(proxy.url("/"), "x")).await;
    assert!(refused.unwrap_err().is_denied());
    assert_eq!(proxy.count(), 2);
}
