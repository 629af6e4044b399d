//~ requeuest can't read a request body of type `Order`

struct Order;

async fn fire(durable: requeuest::Durable) {
    let _ = durable.fire(http::Request::new(Order)).await;
}

fn main() {
    drop(fire);
}
