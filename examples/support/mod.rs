//! Shared by the examples: a server to call, and timestamped output.

use std::error::Error;
use std::fmt::Display;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Prints a line with the time since the first line.
pub(crate) fn say(line: impl Display) {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let line = format!("{:6.2} s  {line}", BEGAN.elapsed().as_secs_f64());
    println!("{}", line.trim_end());
}

/// An HTTP server on a loopback port. It ends with the process.
pub(crate) struct Server {
    addr: SocketAddr,
    bodies: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts a server that answers each request with the status that `answer` returns. `answer`
    /// gets the request's number, counted from 1, and its body.
    pub(crate) async fn start<A, F>(answer: A) -> Result<Self>
    where
        A: Fn(usize, String) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = u16> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?;
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let received = Arc::clone(&bodies);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, received) = (answer.clone(), Arc::clone(&received));
                let service = service_fn(move |request: http::Request<Incoming>| {
                    respond(request, answer.clone(), Arc::clone(&received))
                });
                tokio::spawn(async move {
                    // Fails when the client is killed, which an example does on purpose.
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self { addr, bodies })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.addr)
    }

    /// The bodies of all requests so far, in the order of arrival.
    pub(crate) fn received(&self) -> Vec<String> {
        self.bodies.lock().unwrap().clone()
    }
}

async fn respond<A, F>(
    request: http::Request<Incoming>,
    answer: A,
    received: Arc<Mutex<Vec<String>>>,
) -> Result<http::Response<String>>
where
    A: Fn(usize, String) -> F,
    F: Future<Output = u16>,
{
    let body = request.into_body().collect().await?.to_bytes();
    let body = String::from_utf8(body.to_vec())?;
    let number = {
        let mut received = received.lock().unwrap();
        received.push(body.clone());
        received.len()
    };
    let status = answer(number, body.clone()).await;
    say(format!("    server: {body:?} -> {status}"));
    Ok(http::Response::builder()
        .status(status)
        .body(format!("{status} for {body}"))?)
}
