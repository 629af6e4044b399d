//! A request that ends every process that sends it.

use requeuest::{Body, Durable, RequestId, Status};
use tower::ServiceExt;

use super::{Arrivals, LEASE, Me, Member};
use crate::support::{
    Server, builder, builder_on, eventually, hyper_client, in_time, migrated, other_process, plays,
    post, quick, reply, rows,
};

const POISON: &str = "poison";

async fn has_ended(durable: &Durable, id: RequestId) -> bool {
    durable.status(id).await.unwrap().unwrap().is_terminal()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_ends_its_processes_is_given_up_and_spares_the_others() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let seen = arrivals.clone();
    // Slower than the poison, so that the first processes have them all in their hands.
    let server = Server::start(move |_, request| {
        seen.note(&request);
        async move {
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            reply(200, request.body)
        }
    })
    .await;
    let durable = other_process(&database).await;
    let mut others = Vec::new();
    for number in 0..3 {
        let request = post(server.url("/"), number.to_string());
        others.push(durable.fire(request).await.unwrap());
    }
    let poison = durable.fire(post(server.url("/"), POISON)).await.unwrap();
    for number in 3..6 {
        let request = post(server.url("/"), number.to_string());
        others.push(durable.fire(request).await.unwrap());
    }
    let mut died = 0;
    while !has_ended(&durable, poison).await {
        let url = server.url("/");
        let mut member = Member::start(module_path!(), "send", "sender", &database, &url);
        let ended = async {
            tokio::select! {
                status = member.child.wait() => !status.unwrap().success(),
                () = eventually("the poison is given up", || has_ended(&durable, poison)) => false,
            }
        };
        if !in_time(ended).await {
            // The others are delivered as well.
            for id in &others {
                in_time(durable.response(*id)).await.unwrap();
            }
            member.kill().await;
            break;
        }
        died += 1;
    }
    let given_up = in_time(durable.outcome(poison)).await.unwrap();
    assert_eq!(given_up.status(), Status::Discarded);
    assert_eq!(given_up.attempts(), 5);
    assert_eq!(died, 5);
    assert!(
        given_up
            .error()
            .unwrap()
            .contains("5 attempts in a row were lost")
    );
    let lost = "outcomes WHERE error_class = 'lost' AND slot = -1";
    assert_eq!(rows(&database, lost).await, 1);
    for id in others {
        let outcome = durable.outcome(id).await.unwrap();
        assert_eq!(outcome.status(), Status::Completed);
    }
    let poisoned = |arrival: &super::Arrival| arrival.number == POISON;
    assert!(!arrivals.all().iter().any(poisoned));
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn send() {
    if !plays("send") {
        return;
    }
    let me = Me::new();
    let client = hyper_client::<Body>();
    let transport = tower::service_fn(move |request: http::Request<Body>| {
        let client = client.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = http_body_util::BodyExt::collect(body).await?.to_bytes();
            if body == POISON {
                std::process::abort();
            }
            let request = http::Request::from_parts(parts, Body::from(body));
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(client.oneshot(request).await?)
        }
    });
    let _durable = builder_on(&me.pool)
        .transport(transport)
        .lease(LEASE)
        .retry(quick())
        .build()
        .unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn claims_that_are_given_back_or_held_are_not_lost() {
    let database = migrated().await;
    let (server, gate) = Server::held(503).await;
    for _ in 0..3 {
        let durable = builder(&database)
            .lease(LEASE)
            .retry(quick())
            .build()
            .unwrap();
        if server.count() == 0 {
            durable.fire(post(server.url("/"), "x")).await.unwrap();
        }
        let before = server.count();
        server.wait_for(before.max(1)).await;
        gate.add_permits(1);
        eventually("another attempt", || async { server.count() > before }).await;
        durable.shutdown(LEASE / 10).await.ok();
    }
    assert_eq!(rows(&database, "mq_msgs WHERE lost = 0").await, 1);
    // A result that is recorded ends the series.
    sqlx::query("UPDATE requeuest.mq_msgs SET lost = 3")
        .execute(database.pool())
        .await
        .unwrap();
    gate.add_permits(1000);
    let _durable = builder(&database).retry(quick()).build().unwrap();
    eventually("the series ends", || async {
        rows(&database, "mq_msgs WHERE lost = 0").await == 1
    })
    .await;
}
