//! This crate with its defaults, except for the number of concurrent attempts (256 by default),
//! which is the same for all peers.

use std::ops::Range;
use std::time::Duration;

use requeuest::{Durable, DurableBuilder, ReqwestTransport};
use sqlx08::PgPool;
use sqlx08::postgres::PgPoolOptions;

use crate::peer::{AnyError, CONNECTIONS, Peer, Site, body, pieces};

const GRACE: Duration = Duration::from_secs(10);

pub(crate) struct Requeuest {
    site: Site,
    pool: PgPool,
}

impl Requeuest {
    fn builder(&self) -> DurableBuilder {
        Durable::builder(self.pool.clone())
            .transport(ReqwestTransport::new(self.site.http.clone()))
            .concurrency(self.site.concurrency)
    }

    fn request(&self, number: u64) -> Result<http::Request<String>, http::Error> {
        http::Request::post(&self.site.receiver).body(body(number))
    }

    /// Sends one request and waits for its response.
    pub(crate) async fn await_response(
        &self,
        durable: &Durable,
        number: u64,
    ) -> Result<(), AnyError> {
        let response = durable.await_response(self.request(number)?).await?;
        if !response.status().is_success() {
            return Err(format!("the receiver said {}", response.status()).into());
        }
        Ok(())
    }
}

impl Peer for Requeuest {
    const NAME: &'static str = "requeuest";
    const CRATE: &'static str = "requeuest";

    type Workers = Durable;

    async fn prepare(site: Site) -> Result<Self, AnyError> {
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect(&site.database_url)
            .await?;
        requeuest::migrate(&pool).await?;
        Ok(Self { site, pool })
    }

    async fn start(&self) -> Result<Durable, AnyError> {
        Ok(self.builder().build()?)
    }

    async fn enqueue(&self, durable: &Durable, number: u64) -> Result<(), AnyError> {
        durable.fire(self.request(number)?).await?;
        Ok(())
    }

    async fn enqueue_all(&self, numbers: Range<u64>) -> Result<(), AnyError> {
        let durable = self.builder().runner(false).build()?;
        for piece in pieces(numbers, 1000) {
            let requests: Vec<_> = piece
                .map(|number| self.request(number))
                .collect::<Result<_, _>>()?;
            durable.fire_many(requests).await?;
        }
        durable.shutdown(GRACE).await?;
        Ok(())
    }

    async fn stop(&self, durable: Durable) -> Result<(), AnyError> {
        durable.shutdown(GRACE).await?;
        self.pool.close().await;
        Ok(())
    }
}
