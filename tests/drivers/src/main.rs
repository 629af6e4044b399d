//! Requests of requeuest in the transactions of other drivers and languages: a commit sends, a
//! rollback never does. The guide shows the same code.

mod diesel_async;
mod guide;
mod languages;
mod receiver;
mod sea_orm;
mod sqlx;
mod tokio_postgres;

use std::time::Duration;

use requeuest::testkit::{Postgres, TestDatabase, outcome};
use requeuest::{Durable, Options, OutboxStatement, Request, RequestId, Status};

use self::receiver::Receiver;

/// Longer than any step takes on a busy machine.
const LONG: Duration = Duration::from_secs(30);

/// A database with the schema and a table of the application, a handle that delivers, and a server
/// that receives.
struct Setting {
    database: TestDatabase,
    durable: Durable,
    receiver: Receiver,
}

impl Setting {
    async fn new() -> Self {
        let database = Postgres::shared().await.unwrap().database().await.unwrap();
        let url = database.url();
        requeuest::migrate_url(url).await.unwrap();
        requeuest::sqlx::query("CREATE TABLE orders (note text)")
            .execute(database.pool())
            .await
            .unwrap();
        Self {
            durable: Durable::connect(url).await.unwrap(),
            receiver: Receiver::start().await,
            database,
        }
    }

    fn url(&self) -> &str {
        self.database.url()
    }

    /// The statement of a request with this body.
    fn statement(&self, body: &'static str) -> OutboxStatement {
        let request = http::Request::post(self.receiver.url()).body(body).unwrap();
        let options = Options::default().key(body).ordered("orders");
        let request = Request::try_from(request).unwrap().with(options);
        self.durable.statement(&request).unwrap()
    }

    /// The request with the body `committed` arrives, and no other one.
    async fn assert_only(&self, committed: RequestId, rolled_back: RequestId) {
        let outcome = outcome(&self.durable, committed, LONG).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed);
        assert_eq!(self.durable.status(rolled_back).await.unwrap(), None);
        assert_eq!(self.receiver.bodies(), ["committed"]);
        let notes: Vec<String> = requeuest::sqlx::query_scalar("SELECT note FROM orders")
            .fetch_all(self.database.pool())
            .await
            .unwrap();
        assert_eq!(notes, ["committed"]);
        self.durable.shutdown(LONG).await.unwrap();
    }
}
