//! Results that the database refuses for a reason that is not their data. Their requests were
//! answered, so none is sent again.

use std::time::Duration;

use requeuest::{Durable, Options, Uuid};
use sqlx::Executor;
use tokio::task::JoinSet;

use super::results::passing_elsewhere;
use super::{echo_server, short_lease_builder};
use crate::support::{Server, eventually, in_time, migrated, post, reply};

/// Long enough to be renewed on a busy machine.
const LEASE: Duration = Duration::from_secs(2);

/// Refuses outcomes of some requests, by their stored body or by their id.
const REFUSE: &str = "
    CREATE TABLE refused (id uuid PRIMARY KEY, code text);
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        v_code text := (SELECT code FROM public.refused r WHERE r.id = NEW.id);
    BEGIN
        IF v_code IS NOT NULL THEN
            RAISE EXCEPTION 'refused' USING ERRCODE = v_code;
        END IF;
        RETURN NEW;
    END;
    $$;
    CREATE TRIGGER refuse BEFORE INSERT ON requeuest.outcomes
    FOR EACH ROW EXECUTE FUNCTION refuse()";

fn slots(what: &str) -> String {
    format!(
        "DO $$ BEGIN
             FOR slot IN 0..15 LOOP EXECUTE format('ALTER TABLE requeuest.outcomes {what}', slot);
             END LOOP;
         END $$"
    )
}

#[tokio::test]
async fn results_that_are_all_refused_are_held_and_nothing_is_sent_again() {
    const CALLERS: usize = 40;
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let build = || short_lease_builder(database.pool()).lease(LEASE).build();
    let durable = build().unwrap();
    // Takes the requests over if their leases run out.
    let _other = build().unwrap();
    let always = "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql
         AS 'BEGIN RAISE EXCEPTION ''no''; END';
         CREATE TRIGGER no BEFORE INSERT ON requeuest.outcomes
         FOR EACH ROW EXECUTE FUNCTION no()";
    let detach = slots("DETACH PARTITION requeuest.outcomes_%1$s");
    let attach = slots("ATTACH PARTITION requeuest.outcomes_%1$s FOR VALUES IN (%1$s)");
    let faults = [
        (detach.as_str(), attach.as_str()),
        (always, "DROP TRIGGER no ON requeuest.outcomes"),
        (
            "ALTER TABLE requeuest.outcomes ADD CHECK (false) NOT VALID",
            "ALTER TABLE requeuest.outcomes DROP CONSTRAINT outcomes_check",
        ),
    ];
    for (round, (begin, end)) in faults.into_iter().enumerate() {
        let mut callers = JoinSet::new();
        for number in 0..CALLERS {
            let (durable, request) = (durable.clone(), post(server.url("/"), number.to_string()));
            callers.spawn(async move { (number, durable.await_response(request).await) });
        }
        server.wait_for(CALLERS * (round + 1)).await;
        database.pool().execute(begin).await.unwrap();
        gate.add_permits(CALLERS);
        passing_elsewhere(LEASE * 3 / 2).await;
        assert!(callers.try_join_next().is_none(), "{begin}");
        database.pool().execute(end).await.unwrap();
        for (number, response) in in_time(callers.join_all()).await {
            // Each with its data.
            assert_eq!(response.unwrap().text().unwrap(), number.to_string());
        }
        assert_eq!(server.count(), CALLERS * (round + 1), "{begin}");
    }
}

#[tokio::test]
async fn a_result_that_is_refused_whatever_its_data_is_held_alone() {
    let database = migrated().await;
    database.pool().execute(REFUSE).await.unwrap();
    let server = echo_server().await;
    let build = |concurrency| {
        let builder = short_lease_builder(database.pool()).lease(LEASE);
        builder.concurrency(concurrency).build().unwrap()
    };
    // The lane writes two batches at a time, and the runner holds one request.
    let durable = build(1);
    let elsewhere: Durable = short_lease_builder(database.pool())
        .runner(false)
        .build()
        .unwrap();
    let mut refused = JoinSet::new();
    let codes = ["P0001", "23514", "42501", "22000", "XX000"];
    for code in codes {
        let id = elsewhere
            .fire(post("http://127.0.0.1:9/", code))
            .await
            .unwrap();
        let refuse = "WITH url AS (
                UPDATE requeuest.mq_payloads SET head = replace(head, '127.0.0.1:9', $3)
                WHERE id = $1
            )
            INSERT INTO refused VALUES ($1, $2)";
        sqlx::query(refuse)
            .bind(Uuid::from(id))
            .bind(code)
            .bind(server.addr.to_string())
            .execute(database.pool())
            .await
            .unwrap();
        let waiting = elsewhere.clone();
        refused.spawn(async move { (code, waiting.outcome(id).await) });
    }
    let count_of = |body: &str| server.bodies().iter().filter(|seen| *seen == body).count();
    eventually("all are sent", || async {
        codes.iter().all(|code| count_of(code) > 0)
    })
    .await;
    let _other = build(4);
    for number in 0..8 {
        let request = post(server.url("/"), format!("good {number}"));
        let response = in_time(durable.await_response(request)).await.unwrap();
        assert_eq!(response.text().unwrap(), format!("good {number}"));
        // Through the runner.
        let id = elsewhere
            .fire(post(server.url("/"), "fired"))
            .await
            .unwrap();
        in_time(elsewhere.outcome(id)).await.unwrap();
    }
    passing_elsewhere(LEASE * 3 / 2).await;
    assert!(refused.try_join_next().is_none());
    database
        .pool()
        .execute("DROP TRIGGER refuse ON requeuest.outcomes")
        .await
        .unwrap();
    for (code, outcome) in in_time(refused.join_all()).await {
        let outcome = outcome.unwrap();
        assert_eq!(outcome.response().unwrap().text().unwrap(), code);
        assert_eq!(count_of(code), 1, "{code}");
    }
}

#[tokio::test]
async fn a_few_results_that_are_refused_again_and_again_stop_no_runner() {
    let database = migrated().await;
    let refuse = "CREATE SEQUENCE public.refusals;
         CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF convert_from(NEW.body, 'UTF8') = 'bad' THEN
                 PERFORM nextval('public.refusals');
                 RAISE EXCEPTION 'no';
             END IF;
             RETURN NEW;
         END $$;
         CREATE TRIGGER no BEFORE INSERT ON requeuest.outcomes
         FOR EACH ROW EXECUTE FUNCTION no()";
    database.pool().execute(refuse).await.unwrap();
    let server = echo_server().await;
    let builder = short_lease_builder(database.pool()).lease(LEASE);
    let durable = builder.concurrency(1).build().unwrap();
    let fire = |body: &'static str| {
        // Takes none of the runner's room before it is polled.
        let delayed = Options::default().delay(Duration::from_millis(1));
        durable.fire(post(server.url("/"), body).with(delayed))
    };
    for _ in 0..3 {
        fire("bad").await.unwrap();
    }
    eventually("each is refused four times", || async {
        let refusals = "SELECT last_value FROM public.refusals";
        let refusals: i64 = sqlx::query_scalar(refusals)
            .fetch_one(database.pool())
            .await
            .unwrap();
        refusals >= 12
    })
    .await;
    fire("bad").await.unwrap();
    server.wait_for(4).await;
    let id = fire("good").await.unwrap();
    in_time(durable.outcome(id)).await.unwrap();
    assert_eq!(server.count(), 5);
}

#[tokio::test]
async fn requests_that_a_trigger_refuses_fail_alone() {
    let database = migrated().await;
    let refuse = "
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN RAISE EXCEPTION ''no''; END';
        CREATE TRIGGER refuse BEFORE INSERT ON requeuest.mq_payloads
        FOR EACH ROW WHEN (NEW.body = 'poison') EXECUTE FUNCTION refuse()";
    database.pool().execute(refuse).await.unwrap();
    let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let mut callers = JoinSet::new();
    for number in 0..64 {
        let durable = durable.clone();
        let body = if number == 7 { "poison" } else { "good" };
        let request = post(server.url("/"), body);
        callers.spawn(async move { (body, durable.await_response(request).await) });
    }
    for (body, response) in in_time(callers.join_all()).await {
        match response {
            Ok(_) => assert_eq!(body, "good"),
            Err(error) => {
                assert_eq!(body, "poison", "{error}");
                assert!(error.is_database(), "{error}");
            }
        }
    }
    assert_eq!(server.count(), 63);
}

#[tokio::test]
async fn a_refusal_that_ends_while_its_cause_is_looked_for_costs_no_data() {
    let database = migrated().await;
    // Refuses the data once, as if it were at fault.
    database
        .pool()
        .execute(
            "CREATE SEQUENCE public.refusals;
             CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.body IS NOT NULL AND nextval('public.refusals') <= 1 THEN
                     RAISE EXCEPTION 'not now' USING ERRCODE = '23514';
                 END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER no BEFORE INSERT ON requeuest.outcomes
             FOR EACH ROW EXECUTE FUNCTION no()",
        )
        .await
        .unwrap();
    let server = echo_server().await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    let response = in_time(durable.await_response(post(server.url("/"), "kept")))
        .await
        .unwrap();
    assert_eq!(response.text().unwrap(), "kept");
    assert_eq!(server.count(), 1);
}
