//~ `u32` is not a request that requeuest can persist

async fn fire(durable: requeuest::Durable) {
    let _ = durable.fire(5_u32).await;
}

fn main() {
    drop(fire);
}
