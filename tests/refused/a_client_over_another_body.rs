//~ is not an HTTP client that requeuest can send with

use requeuest::{DurableLayer, ReqwestTransport};
use tower::{Layer, ServiceExt};

fn wrap(pool: sqlx::PgPool) {
    let layer = DurableLayer::<requeuest::Body>::new(pool);
    let client = ReqwestTransport::new(requeuest::reqwest::Client::new())
        .map_request(|request: http::Request<String>| request.map(requeuest::Body::from));
    let _ = layer.layer(client);
}

fn main() {
    let _: fn(sqlx::PgPool) = wrap;
}
