//! The measurements. Each has its own database, which is dropped before the next begins. Otherwise,
//! rows left behind would be vacuumed and written back while another peer is measured.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use requeuest::testkit::{Postgres, TestDatabase};
use sqlx08::{Connection, PgConnection};

use crate::callers::each;
use crate::limits;
use crate::peer::{self, AnyError, Peer, Site};
use crate::peers::requeuest::Requeuest;
use crate::receiver::Receiver;

/// Shared by all measurements.
pub(crate) struct Bench {
    pub(crate) postgres: Postgres,
    pub(crate) receiver: Receiver,
    pub(crate) callers: usize,
    pub(crate) concurrency: usize,
}

/// The result of one measurement.
pub(crate) struct Measured {
    /// The numbers of its requests, by which the receiver knows what arrived.
    pub(crate) numbers: Range<u64>,
    /// Requests per second; `None` if some requests never arrived.
    pub(crate) rate: Option<f64>,
}

impl Bench {
    /// Callers enqueue while workers deliver. The time ends once the receiver has everything.
    pub(crate) async fn fire<P: Peer>(&self, requests: u64) -> Result<Measured, AnyError> {
        let database = self.postgres.database().await?;
        let site = self.site(&database)?;
        let peer = Arc::new(P::prepare(site).await?);
        let workers = Arc::new(peer.start().await?);
        let enqueue = |numbers| {
            let (peer, workers) = (Arc::clone(&peer), Arc::clone(&workers));
            each(self.callers, numbers, move |number| {
                let (peer, workers) = (Arc::clone(&peer), Arc::clone(&workers));
                async move { peer.enqueue(&workers, number).await }
            })
        };
        // Opens the connections to the database and to the receiver.
        enqueue(self.receiver.expect(self.callers as u64)).await?;
        self.receiver.all().await;

        let numbers = self.receiver.expect(requests);
        let began = Instant::now();
        enqueue(numbers.clone()).await?;
        let measured = self.arrived(numbers, began).await;
        stop(&peer, workers).await?;
        self.clear(database).await?;
        Ok(measured)
    }

    /// Workers start when everything is enqueued. The time runs from their start until the receiver
    /// has everything.
    pub(crate) async fn drain<P: Peer>(&self, requests: u64) -> Result<Measured, AnyError> {
        let database = self.postgres.database().await?;
        let site = self.site(&database)?;
        let peer = P::prepare(site).await?;
        let numbers = self.receiver.expect(requests);
        peer.enqueue_all(numbers.clone()).await?;
        if self.receiver.tally(&numbers).lost != requests {
            return Err(format!("{} sends before its workers start", P::NAME).into());
        }
        let began = Instant::now();
        let workers = peer.start().await?;
        let measured = self.arrived(numbers, began).await;
        peer.stop(workers).await?;
        self.clear(database).await?;
        Ok(measured)
    }

    /// Callers wait for their responses. Only requeuest returns responses to callers.
    pub(crate) async fn await_response(&self, requests: u64) -> Result<Measured, AnyError> {
        let database = self.postgres.database().await?;
        let site = self.site(&database)?;
        let peer = Arc::new(Requeuest::prepare(site).await?);
        let durable = Arc::new(peer.start().await?);
        let call = |numbers| {
            let (peer, durable) = (Arc::clone(&peer), Arc::clone(&durable));
            each(self.callers, numbers, move |number| {
                let (peer, durable) = (Arc::clone(&peer), Arc::clone(&durable));
                async move { peer.await_response(&durable, number).await }
            })
        };
        call(self.receiver.expect(self.callers as u64)).await?;

        let numbers = self.receiver.expect(requests);
        let took = call(numbers.clone()).await?;
        stop(&peer, durable).await?;
        self.clear(database).await?;
        Ok(Measured {
            numbers,
            rate: Some(rate(requests, took)),
        })
    }

    /// The rates of the bare exchange and of bare commits.
    pub(crate) async fn limits(&self, requests: u64) -> Result<(f64, f64), AnyError> {
        let database = self.postgres.database().await?;
        let site = self.site(&database)?;
        let exchange = limits::exchange(self.callers, requests, &site, &self.receiver).await?;
        let commits = limits::commits(self.callers, requests, &site).await?;
        self.clear(database).await?;
        Ok((rate(requests, exchange), rate(requests, commits)))
    }

    async fn arrived(&self, numbers: Range<u64>, began: Instant) -> Measured {
        let rate = if self.receiver.all().await {
            Some(rate(numbers.end - numbers.start, began.elapsed()))
        } else {
            self.receiver.write_off();
            None
        };
        Measured { numbers, rate }
    }

    fn site(&self, database: &TestDatabase) -> Result<Site, AnyError> {
        Ok(Site {
            database_url: database.url().to_owned(),
            receiver: self.receiver.url().to_owned(),
            concurrency: self.concurrency,
            http: peer::http()?,
        })
    }

    async fn clear(&self, database: TestDatabase) -> Result<(), AnyError> {
        let mut connection = PgConnection::connect(&self.postgres.url()).await?;
        let drop = format!(r#"DROP DATABASE "{}" WITH (FORCE)"#, database.name());
        sqlx08::query(&drop).execute(&mut connection).await?;
        sqlx08::query("CHECKPOINT").execute(&mut connection).await?;
        connection.close().await?;
        Ok(())
    }
}

/// Stops workers that the callers shared. All callers have ended by now.
async fn stop<P: Peer>(peer: &Arc<P>, workers: Arc<P::Workers>) -> Result<(), AnyError> {
    let workers = Arc::into_inner(workers).ok_or("a caller still holds the workers")?;
    peer.stop(workers).await
}

fn rate(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64().max(f64::EPSILON)
}
