//! On tokio: a handle works on the tokio runtime in which it is created.

mod echo;

use requeuest::Durable;
use requeuest::testkit::Postgres;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let database = Postgres::start().await?.database().await?;
    let url = echo::start()?;

    requeuest::migrate(database.pool()).await?;
    let durable = Durable::new(database.pool().clone());

    let id = durable.fire(http::Request::get(&url).body("")?).await?;
    println!("fired:   {}", durable.response(id).await?.text()?);

    let response = durable
        .await_response(http::Request::get(&url).body("")?)
        .await?;
    println!("awaited: {}", response.text()?);
    Ok(())
}
