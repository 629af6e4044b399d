//! What each attempt, each answer and the caller's extensions hold of a request.

use std::sync::{Arc, Mutex};

use http::Extensions;
use requeuest::{AttemptNumber, Channel, Options, RequestId};
use reqwest_middleware::{ClientBuilder, Middleware, Next};

use super::{id_of, quick_builder};
use crate::layer::context::{Seen, context_of};
use crate::support::{Server, closed_port, in_time, migrated, only_id, quick};

/// Notes what each attempt carries.
#[derive(Clone, Default)]
struct Noting(Arc<Mutex<Vec<Seen>>>);

#[async_trait::async_trait]
impl Middleware for Noting {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.0.lock().unwrap().push(context_of(extensions));
        next.run(request, extensions).await
    }
}

/// Keeps the id that it finds after a call, and finds nothing of a single attempt.
#[derive(Clone, Default)]
struct Outer(Arc<Mutex<Option<RequestId>>>);

#[async_trait::async_trait]
impl Middleware for Outer {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let response = next.run(request, extensions).await;
        assert!(extensions.get::<AttemptNumber>().is_none());
        assert!(extensions.get::<Channel>().is_none());
        *self.0.lock().unwrap() = extensions.get().copied();
        response
    }
}

#[tokio::test]
async fn inner_middleware_and_the_caller_know_the_request() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let (outer, inner) = (Outer::default(), Noting::default());
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(outer.clone())
        .with(quick_builder(&database).channel("shop").build().unwrap())
        .with(inner.clone())
        .build();
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    let id = *response.extensions().get::<RequestId>().unwrap();
    assert!(!response.headers().contains_key("requeuest-id"));
    let expected = [1, 2, 3].map(|number| (id, number, "shop".to_owned()));
    assert_eq!(*inner.0.lock().unwrap(), expected);
    assert_eq!(*outer.0.lock().unwrap(), Some(id));
}

#[tokio::test]
async fn the_caller_knows_the_request_of_an_error_and_of_a_202() {
    let database = migrated().await;
    let outer = Outer::default();
    let durable = quick_builder(&database).retry(quick().max_attempts(2));
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(outer.clone())
        .with(durable.build().unwrap())
        .build();
    let url = format!("http://{}/", closed_port().await);
    let failed = in_time(client.post(&url).body("x").send()).await;
    let error = failed.unwrap_err();
    // The stack's own, which can't carry the id.
    assert!(error.is_connect(), "{error:?}");
    let id = *outer.0.lock().unwrap();
    assert_eq!(id, Some(only_id(&database, "outcomes").await));

    let fired = client.post(&url).with_extension(Options::default().fire());
    let response = in_time(fired.send()).await.unwrap();
    let id = id_of(&response);
    assert_eq!(response.extensions().get(), Some(&id));
    assert_eq!(*outer.0.lock().unwrap(), Some(id));
}
