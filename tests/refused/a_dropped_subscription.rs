//~ unused `OutcomeSubscription` that must be used
#![deny(unused_must_use)]

pub async fn subscribe(
    durable: requeuest::Durable,
    handler: impl requeuest::OutcomeHandler,
) -> Result<(), requeuest::Error> {
    durable.on_outcome("payments", handler).await?;
    Ok(())
}

fn main() {}
