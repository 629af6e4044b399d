//! Every entry point asks the guard, not only some.

use requeuest::guard::Guard;
use requeuest::{Channels, Client, DurableService, Error, MiddlewareTransport, Options};
use reqwest_middleware::ClientWithMiddleware;
use tower::{Layer, ServiceExt};

use super::{denied_at_an_attempt, guarded};
use crate::support::{
    LONG, Server, assert_nothing_persisted, builder, hyper_client, in_time, migrated, outcome_of,
    post, quick, with_middleware,
};

fn assert_denied(door: &str, error: &Error) {
    assert!(error.is_denied() && error.is_request(), "{door}: {error:?}");
    assert_eq!(error.field(), Some("url"), "{door}");
}

fn of_middleware(error: &reqwest_middleware::Error) -> &Error {
    Error::from_middleware(error).unwrap()
}

#[tokio::test]
async fn every_entry_point_refuses_a_denied_url() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let url = server.url("/");
    let durable = builder(&database)
        .guard(Guard::new())
        .pass_through(|request| request.path() == "/passing")
        .build()
        .unwrap();
    let request = || post(&url, "x");
    assert_denied("fire", &durable.fire(request()).await.unwrap_err());
    assert_denied(
        "await_response",
        &durable.await_response(request()).await.unwrap_err(),
    );
    let refused = durable.fire_in(database.pool(), request()).await;
    assert_denied("fire_in", &refused.unwrap_err());
    assert_denied(
        "fire_many",
        &durable.fire_many([request()]).await.unwrap_err(),
    );
    let mut connection = database.pool().acquire().await.unwrap();
    let refused = durable.fire_many_in(&mut connection, [request()]).await;
    assert_denied("fire_many_in", &refused.unwrap_err());

    let client: ClientWithMiddleware = with_middleware(reqwest::Client::new(), &durable);
    let fire = Options::default().fire();
    for path in ["/", "/passing"] {
        for options in [Options::default(), fire.clone()] {
            let service: DurableService<_, String> = durable.layer().layer(hyper_client());
            let mut request = http::Request::post(server.url(path))
                .body("x".to_owned())
                .unwrap();
            request.extensions_mut().insert(options.clone());
            let refused = in_time(service.oneshot(request)).await;
            assert_denied("layer", &refused.unwrap_err());

            let request = client.post(server.url(path)).with_extension(options);
            let refused = in_time(request.body("x").send()).await.unwrap_err();
            assert_denied("middleware", of_middleware(&refused));
        }
    }
    assert_nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
}

/// They have no guard of their own, so the attempt is denied.
#[tokio::test]
async fn requests_of_the_older_client_and_replays_are_denied_at_the_attempt() {
    let database = migrated().await;
    let server = Server::always(500).await;
    let before = builder(&database).retry(quick().max_attempts(1));
    let before = before.build().unwrap();
    let dead = before.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&before, dead).await;
    in_time(before.shutdown(std::time::Duration::from_secs(5)))
        .await
        .unwrap();

    let durable = guarded(&database, Guard::new());
    let replayed = durable.replay(dead).await.unwrap();
    denied_at_an_attempt(&durable, replayed).await;
    let client = Client::new(database.pool().clone(), Channels::List(&["other"]));
    let client = client.await.unwrap();
    let id = client
        .spawn("default", &post(server.url("/"), "x"))
        .await
        .unwrap();
    denied_at_an_attempt(&durable, id.into()).await;
    assert_eq!(server.count(), 1);
}

/// An attempt has been admitted by the handle that makes it, if that has a guard at all.
#[tokio::test]
async fn a_guard_below_another_handle_checks_its_attempts() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let inner = builder(&database).guard(Guard::new()).runner(false);
    let inner = inner.build().unwrap();
    let client = with_middleware(reqwest::Client::new(), &inner);
    let outer = [
        builder(&database).transport(MiddlewareTransport::new(client)),
        builder(&database).transport(inner.layer().layer(hyper_client())),
    ];
    for outer in outer {
        let durable = outer.retry(quick()).build().unwrap();
        let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
        denied_at_an_attempt(&durable, id).await;
        in_time(durable.shutdown(LONG)).await.unwrap();
    }
    assert_eq!(server.count(), 0);
}
