//~ `std::string::String` is not a request that requeuest can persist

async fn fire(durable: requeuest::Durable) {
    let _ = durable.fire_many(vec![String::new()]).await;
}

fn main() {
    drop(fire);
}
