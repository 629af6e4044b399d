//! On async-std: the caller's pool and transactions run there, the crate's work on a tokio runtime of its own.
//!
//! It needs one of the features `runtime-async-std-rustls` and `runtime-async-std-native-tls`.

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

/// The test kit wants tokio, here as in tests.
fn database() -> Result<TestDatabase, BoxError> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async { Ok(Postgres::start().await?.database().await?) })
}
