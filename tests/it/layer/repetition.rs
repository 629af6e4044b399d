//! tower's `Retry` above the layer.

use std::collections::HashSet;

use bytes::Bytes;
use futures_util::future::{Ready, ready};
use http::{Request, Response};
use http_body_util::Full;
use requeuest::{Body, Error};
use tower::retry::{Policy, RetryLayer};
use tower::{ServiceBuilder, ServiceExt};

use super::http_post;
use crate::support::{Server, builder, hyper_client, in_time, migrated, quick, rows};

/// Makes a call again while it is answered with an error.
#[derive(Clone)]
pub struct Tries {
    pub left: u32,
    /// Whether the next try gets the extensions of the response.
    pub passes_on: bool,
}

type Outer = Request<Full<Bytes>>;

impl Policy<Outer, Response<Body>, Error> for Tries {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        request: &mut Outer,
        result: &mut Result<Response<Body>, Error>,
    ) -> Option<Ready<()>> {
        let response = result.as_ref().unwrap();
        if response.status().is_success() || self.left == 0 {
            return None;
        }
        self.left -= 1;
        if self.passes_on {
            request
                .extensions_mut()
                .extend(response.extensions().clone());
        }
        Some(ready(()))
    }

    fn clone_request(&mut self, request: &Outer) -> Option<Outer> {
        Some(request.clone())
    }
}

/// The different idempotency keys that a server saw.
pub fn keys(server: &Server) -> usize {
    let keys = server.seen().into_iter();
    let keys: HashSet<_> = keys
        .map(|seen| seen.headers["idempotency-key"].clone())
        .collect();
    keys.len()
}

#[tokio::test]
async fn a_retry_layer_that_passes_extensions_on_multiplies_nothing() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let tries = Tries {
        left: 2,
        passes_on: true,
    };
    let two_attempts = builder(&database).retry(quick().max_attempts(2));
    let client = ServiceBuilder::new()
        .layer(RetryLayer::new(tries))
        .layer(two_attempts.build_layer().unwrap())
        .service(hyper_client());
    let response = in_time(client.oneshot(http_post(server.url("/"), "x")))
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(server.count(), 2);
    assert_eq!(keys(&server), 1);
    assert_eq!(rows(&database, "outcomes").await, 1);
}
