//! On async-std: the caller's pool and transactions run on async-std, and the crate starts its own
//! tokio runtime. async-std is discontinued (RUSTSEC-2025-0052): this is for existing code only.
//!
//! Needs the feature `runtime-async-std-rustls` or `runtime-async-std-native-tls`.

mod echo;

use requeuest::Durable;
use requeuest::testkit::{Postgres, TestDatabase};
use sqlx::PgPool;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

#[async_std::main]
async fn main() -> Result<(), BoxError> {
    let database = async_std::task::spawn_blocking(database).await?;
    let url = echo::start()?;

    let pool = PgPool::connect(database.url()).await?;
    requeuest::migrate(&pool).await?;
    let durable = Durable::new(pool.clone());

    let mut transaction = pool.begin().await?;
    let request = http::Request::get(&url).body("")?;
    let id = durable.fire_in(&mut *transaction, request).await?;
    transaction.commit().await?;
    println!("fired:   {}", durable.response(id).await?.text()?);

    let response = durable
        .await_response(http::Request::get(&url).body("")?)
        .await?;
    println!("awaited: {}", response.text()?);
    Ok(())
}

/// The testkit always needs a tokio runtime.
fn database() -> Result<TestDatabase, BoxError> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async { Ok(Postgres::start().await?.database().await?) })
}
