//~ `TextClient` is not an HTTP client that requeuest can send with

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use tower::{Layer, Service};

#[derive(Clone)]
struct TextClient;

impl Service<http::Request<String>> for TextClient {
    type Response = http::Response<String>;
    type Error = Infallible;
    type Future = Ready<Result<http::Response<String>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<String>) -> Self::Future {
        ready(Ok(http::Response::new(request.into_body())))
    }
}

fn wrap(pool: sqlx::PgPool) {
    let layer = requeuest::DurableLayer::<requeuest::Body>::new(pool);
    let _ = layer.layer(TextClient);
}

fn main() {
    let _: fn(sqlx::PgPool) = wrap;
}
