//! What `fire` takes, and what converts into a body.

use std::borrow::Cow;
use std::convert::Infallible;

use bytes::{Bytes, BytesMut};
use http::Request;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use requeuest::{Body, Durable, Options};
use reqwest_middleware::ClientBuilder;

use crate::support::{Server, builder, in_time, migrated, outcome_of};

#[tokio::test]
async fn fire_takes_what_each_stack_calls_a_request() -> anyhow::Result<()> {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = Durable::new(database.pool().clone());
    let url = server.url("/");
    let client = reqwest::Client::new();
    let middleware = ClientBuilder::new(client.clone()).build();
    let parts = ["in ", "parts"].map(|part| Ok::<_, Infallible>(Bytes::from(part)));
    let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(parts.clone()));
    let frames = futures_util::stream::iter(parts).map_ok_frames();
    let with = |options| {
        let request = Request::post(&url).body("own").unwrap();
        requeuest::Request::try_from(request).unwrap().with(options)
    };
    let own = with(Options::default());

    let ids = [
        durable.fire(Request::get(&url).body(())?).await?,
        durable.fire(Request::post(&url).body("text")?).await?,
        durable
            .fire(Request::post(&url).body(Full::new(Bytes::from("full")))?)
            .await?,
        durable
            .fire(Request::post(&url).body(axum::body::Body::from("axum"))?)
            .await?,
        durable
            .fire(Request::post(&url).body(Body::wrap(StreamBody::new(frames)))?)
            .await?,
        durable.fire(client.get(&url)).await?,
        durable.fire(client.post(&url).body("reqwest")).await?,
        durable.fire(client.post(&url).body(stream)).await?,
        durable
            .fire(client.post(&url).body("built").build()?)
            .await?,
        durable
            .fire(middleware.post(&url).body("middleware"))
            .await?,
        durable.fire(&own).await?,
        durable.fire(own).await?,
    ];
    let expected = [
        "",
        "text",
        "full",
        "axum",
        "in parts",
        "",
        "reqwest",
        "in parts",
        "built",
        "middleware",
        "own",
        "own",
    ];
    for (id, expected) in ids.into_iter().zip(expected) {
        let response = in_time(durable.response(id)).await?;
        assert_eq!(response.text()?, expected);
    }
    Ok(())
}

#[tokio::test]
async fn an_empty_stream_is_no_body_in_any_stack() -> anyhow::Result<()> {
    let database = migrated().await;
    let durable = builder(&database).runner(false).build()?;
    let url = "http://localhost/";
    let options = Options::default().key("once");
    let with = || Request::get(url).extension(options.clone());
    let first = durable.fire(with().body(())?).await?;
    let axum = with().body(axum::body::Body::empty())?;
    assert_eq!(durable.fire(axum).await?, first);
    let boxed = with().body(Empty::<Bytes>::new().boxed())?;
    assert_eq!(durable.fire(boxed).await?, first);
    Ok(())
}

trait Frames: futures_util::Stream<Item = Result<Bytes, Infallible>> + Sized {
    fn map_ok_frames(
        self,
    ) -> impl futures_util::Stream<Item = Result<http_body::Frame<Bytes>, Infallible>> {
        futures_util::StreamExt::map(self, |data| data.map(http_body::Frame::data))
    }
}

impl<S: futures_util::Stream<Item = Result<Bytes, Infallible>>> Frames for S {}

#[tokio::test]
async fn options_travel_in_the_extensions_of_each_stack() -> anyhow::Result<()> {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).runner(false).build()?;
    let options = Options::default().key("once");
    let middleware = ClientBuilder::new(reqwest::Client::new()).build();
    let url = server.url("/");
    let first = Request::post(&url).extension(options.clone()).body("x")?;
    let first = durable.fire(first).await?;
    let second = middleware.post(&url).body("x").with_extension(options);
    assert_eq!(durable.fire(second).await?, first);
    Ok(())
}

#[tokio::test]
async fn a_stream_over_the_limit_is_refused_before_anything_is_persisted() {
    let database = migrated().await;
    let durable = builder(&database).max_request_body(4).build().unwrap();
    let parts = ["123", "45"].map(|part| Ok::<_, Infallible>(Bytes::from(part)));
    let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(parts));
    let request = reqwest::Client::new()
        .post("http://localhost/")
        .body(stream);
    let refused = durable.fire(request).await.unwrap_err();
    assert!(refused.is_body_too_large(), "{refused}");
    crate::support::assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn a_builder_with_an_error_names_it() {
    let database = migrated().await;
    let durable = builder(&database).build().unwrap();
    let request = reqwest::Client::new().post("not a url?token=hunter2");
    let refused = durable.fire(request).await.unwrap_err();
    assert_eq!(refused.field(), Some("url"), "{refused:?}");
    assert!(
        !format!("{refused} {refused:?}").contains("hunter2"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn bodies_of_each_stack_convert() {
    let bodies: [Body; 12] = [
        Bytes::from("hello").into(),
        BytesMut::from("hello").into(),
        Vec::from("hello").into(),
        Vec::from("hello").into_boxed_slice().into(),
        "hello".into(),
        b"hello".as_slice().into(),
        String::from("hello").into(),
        Cow::Borrowed("hello").into(),
        Full::new(Bytes::from("hello")).into(),
        Full::new(Bytes::from("hello")).boxed().into(),
        reqwest::Body::from("hello").into(),
        axum::body::Body::from("hello").into(),
    ];
    for body in bodies {
        assert_eq!(body.text().await.unwrap(), "hello");
    }
    for empty in [
        Body::from(()),
        Empty::<Bytes>::new().into(),
        Body::default(),
    ] {
        assert_eq!(empty.as_bytes(), Some(&[][..]));
    }
    let back = axum::body::Body::from(Body::from("hello"));
    assert_eq!(back.collect().await.unwrap().to_bytes(), "hello");
}

#[tokio::test]
async fn many_requests_of_reqwest_are_fired_at_once() -> anyhow::Result<()> {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = Durable::new(database.pool().clone());
    let client = reqwest::Client::new();
    let url = server.url("/");
    let hooks = (0..3).map(|number| client.post(&url).body(number.to_string()));
    for id in durable.fire_many(hooks).await? {
        outcome_of(&durable, id).await;
    }
    let mut bodies = server.bodies();
    bodies.sort();
    assert_eq!(bodies, ["0", "1", "2"]);
    Ok(())
}
