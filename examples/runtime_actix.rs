//! On actix: its systems and arbiters are tokio runtimes, so the code is the same as on tokio.

mod echo;

use requeuest::Durable;
use requeuest::testkit::Postgres;

#[actix_rt::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let database = Postgres::start().await?.database().await?;
    let url = echo::start()?;

    requeuest::migrate(database.pool()).await?;
    let durable = Durable::new(database.pool().clone());

    let id = durable.fire(http::Request::get(&url).body("")?).await?;
    println!("fired:   {}", durable.response(id).await?.text()?);

    // A handle is `Send`, so it can move to other arbiters.
    let (answer, answered) = tokio::sync::oneshot::channel();
    let other = durable.clone();
    let request = http::Request::get(&url).body("")?;
    let arbiter = actix_rt::Arbiter::new();
    arbiter.spawn(async move {
        // Fails if `main` has returned, which is fine.
        let _ = answer.send(other.await_response(request).await);
    });
    let response = answered.await??;
    println!("awaited: {}", response.text()?);
    Ok(())
}
