//~ `http::request::Builder` is not a request that requeuest can persist

async fn fire(durable: requeuest::Durable) {
    let _ = durable.fire(http::Request::post("http://localhost/")).await;
}

fn main() {
    drop(fire);
}
