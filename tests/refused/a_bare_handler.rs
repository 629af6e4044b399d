//~ is not a handler of outcomes

async fn handle(_: &mut sqlx::PgConnection, _: &requeuest::Outcome) -> Result<(), sqlx::Error> {
    Ok(())
}

async fn subscribe(durable: requeuest::Durable) {
    let _ = durable.on_outcome("payments", handle).await;
}

fn main() {
    drop(subscribe);
}
