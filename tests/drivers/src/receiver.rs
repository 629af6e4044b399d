//! An HTTP server that records the bodies of requests.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub struct Receiver {
    url: String,
    bodies: Arc<Mutex<Vec<String>>>,
}

impl Receiver {
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}/orders", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&bodies);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let body = read(stream).await;
                record.lock().unwrap().push(body);
            }
        });
        Self { url, bodies }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn bodies(&self) -> Vec<String> {
        self.bodies.lock().unwrap().clone()
    }
}

/// Reads a request, answers it and returns its body.
async fn read(mut stream: TcpStream) -> String {
    let mut text = String::new();
    let (length, start) = loop {
        let mut bytes = [0; 4096];
        let read = stream.read(&mut bytes).await.unwrap();
        assert_ne!(read, 0, "the client went away");
        text.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
        let Some((head, _)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            let is_length = name.eq_ignore_ascii_case("content-length");
            is_length.then(|| value.parse::<usize>().unwrap())
        });
        let (length, start) = (length.unwrap_or_default(), head.len() + 4);
        if text.len() >= start + length {
            break (length, start);
        }
    };
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    stream.write_all(answer).await.unwrap();
    text[start..start + length].to_owned()
}
