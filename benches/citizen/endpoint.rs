//! Receivers that behave well or badly, on plain sockets, so that they cost the measured side
//! little.
//!
//! Each endpoint has a port of its own and so is a destination of its own. All of them share one
//! thread.

use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::common::AnyError;

/// How often `wait_for` looks. The measured times don't depend on it.
const LOOK: Duration = Duration::from_millis(5);
/// How often a limited endpoint takes a request.
const LIMITED_TO: Duration = Duration::from_secs(1);
/// Larger heads fail their connection.
const MAX_HEAD: usize = 16 * 1024;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const UNAVAILABLE: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
const TOO_MANY: &[u8] =
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n";

/// What an endpoint does with requests.
#[derive(Clone, Copy)]
pub(crate) enum Behavior {
    /// Answers 200 at once.
    Good,
    /// Answers 200 after this time.
    Slow(Duration),
    /// Answers 503 at once.
    Unavailable,
    /// Answers 200 once a second, and otherwise 429 with `Retry-After: 5`.
    Limited,
    /// Accepts connections and never answers.
    Silent,
    /// Refuses connections.
    Refusing,
}

/// The thread that all endpoints run on. Dropping this closes their sockets.
pub(crate) struct Endpoints {
    runtime: Handle,
    arrivals: Arc<Arrivals>,
    _stop: oneshot::Sender<()>,
}

impl Endpoints {
    /// `numbers` is how many requests are numbered, from 0.
    pub(crate) fn start(numbers: usize) -> Result<Self, AnyError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        std::thread::spawn(move || runtime.block_on(stopped));
        Ok(Self {
            runtime: handle,
            arrivals: Arc::new(Arrivals::new(numbers)),
            _stop: stop,
        })
    }

    /// The numbered requests that good endpoints have received.
    pub(crate) fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    pub(crate) fn add(&self, behavior: Behavior) -> Result<Endpoint, AnyError> {
        let received = Arc::new(AtomicUsize::new(0));
        let _entered = self.runtime.enter();
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let origin = format!("http://{}", socket.local_addr()?);
        // A port that is bound but doesn't listen refuses connections, and stays reserved.
        let refusing = if matches!(behavior, Behavior::Refusing) {
            Some(socket)
        } else {
            let service = Service {
                behavior,
                received: Arc::clone(&received),
                arrivals: Arc::clone(&self.arrivals),
                taken: Mutex::new(None),
            };
            self.runtime.spawn(serve(socket.listen(1024)?, service));
            None
        };
        Ok(Endpoint {
            origin,
            received,
            _refusing: refusing,
        })
    }
}

pub(crate) struct Endpoint {
    origin: String,
    received: Arc<AtomicUsize>,
    _refusing: Option<TcpSocket>,
}

impl Endpoint {
    /// The URL of the request with this number.
    pub(crate) fn numbered(&self, number: usize) -> String {
        format!("{}/{number}", self.origin)
    }

    /// The URL of requests without a number.
    pub(crate) fn url(&self) -> String {
        format!("{}/", self.origin)
    }

    /// How many requests have arrived, those without a number included.
    pub(crate) fn received(&self) -> usize {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until at least this many requests have arrived.
    pub(crate) async fn wait_for(&self, count: usize, patience: Duration) -> Result<(), AnyError> {
        let reached = async {
            while self.received() < count {
                tokio::time::sleep(LOOK).await;
            }
        };
        Ok(tokio::time::timeout(patience, reached).await?)
    }
}

/// When numbered requests arrived first, and how many arrived again.
pub(crate) struct Arrivals {
    began: Instant,
    /// Nanoseconds since `began`; 0: not yet.
    first: Vec<AtomicU64>,
    repeated: AtomicUsize,
}

impl Arrivals {
    fn new(numbers: usize) -> Self {
        Self {
            began: Instant::now(),
            first: (0..numbers).map(|_| AtomicU64::new(0)).collect(),
            repeated: AtomicUsize::new(0),
        }
    }

    fn record(&self, number: usize) {
        let Some(first) = self.first.get(number) else {
            return;
        };
        let now = self.began.elapsed().as_nanos().max(1) as u64;
        let recorded = first.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        if recorded.is_err() {
            self.repeated.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn of(&self, number: usize) -> Option<Instant> {
        let first = self.first.get(number)?.load(Ordering::Relaxed);
        (first > 0).then(|| self.began + Duration::from_nanos(first))
    }

    /// Waits until all of these requests have arrived, or until the deadline.
    pub(crate) async fn wait_for(
        &self,
        numbers: impl IntoIterator<Item = usize>,
        deadline: Instant,
    ) {
        let all = async {
            for number in numbers {
                while self.of(number).is_none() {
                    tokio::time::sleep(LOOK).await;
                }
            }
        };
        let _ = tokio::time::timeout_at(deadline.into(), all).await;
    }

    /// Fails if a request has arrived more than once.
    pub(crate) fn expect_once(&self) -> Result<(), AnyError> {
        match self.repeated.load(Ordering::Relaxed) {
            0 => Ok(()),
            repeated => Err(format!("{repeated} requests arrived again").into()),
        }
    }
}

struct Service {
    behavior: Behavior,
    received: Arc<AtomicUsize>,
    arrivals: Arc<Arrivals>,
    /// When a limited endpoint last took a request.
    taken: Mutex<Option<Instant>>,
}

impl Service {
    /// Returns the answer, unless the endpoint never answers.
    async fn answer(&self, number: Option<usize>) -> Option<&'static [u8]> {
        self.received.fetch_add(1, Ordering::Relaxed);
        match self.behavior {
            Behavior::Good => {
                if let Some(number) = number {
                    self.arrivals.record(number);
                }
                Some(OK)
            }
            Behavior::Slow(time) => {
                tokio::time::sleep(time).await;
                Some(OK)
            }
            Behavior::Unavailable => Some(UNAVAILABLE),
            Behavior::Limited => {
                let now = Instant::now();
                let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
                if taken.is_some_and(|taken| now - taken < LIMITED_TO) {
                    return Some(TOO_MANY);
                }
                *taken = Some(now);
                Some(OK)
            }
            Behavior::Silent | Behavior::Refusing => None,
        }
    }
}

async fn serve(listener: TcpListener, service: Service) {
    let service = Arc::new(service);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = Arc::clone(&service);
                tokio::spawn(async move {
                    // The client sees a broken connection, and the figures show what it does then.
                    let _ = converse(stream, &service).await;
                });
            }
            // Too many open files, perhaps.
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Answers the requests of one connection, one after another.
async fn converse(mut stream: TcpStream, service: &Service) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut received = Vec::with_capacity(2048);
    loop {
        let (length, number) = loop {
            if let Some(end) = received.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                let (body, number) = parse(&received[..end])?;
                break (end + 4 + body, number);
            }
            if received.len() > MAX_HEAD || stream.read_buf(&mut received).await? == 0 {
                return Ok(());
            }
        };
        while received.len() < length {
            if stream.read_buf(&mut received).await? == 0 {
                return Ok(());
            }
        }
        received.drain(..length);
        match service.answer(number).await {
            Some(answer) => stream.write_all(answer).await?,
            // Until the client hangs up.
            None => while stream.read(&mut [0; 1024]).await? > 0 {},
        }
    }
}

/// Returns the length of the body, and the number in the path.
fn parse(head: &[u8]) -> io::Result<(usize, Option<usize>)> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let head = std::str::from_utf8(head).map_err(|_| invalid())?;
    let mut lines = head.split("\r\n");
    let path = lines.next().and_then(|line| line.split(' ').nth(1));
    let number = path.and_then(|path| path.strip_prefix('/')?.parse().ok());
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(invalid)?;
        if name.eq_ignore_ascii_case("content-length") {
            return Ok((value.trim().parse().map_err(|_| invalid())?, number));
        }
    }
    Ok((0, number))
}
