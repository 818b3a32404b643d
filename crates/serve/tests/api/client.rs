//! HTTP/1.1 over a plain socket.

use crate::schema;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Talks to one server.
pub struct Client {
    pub address: SocketAddr,
    pub key: Option<String>,
    description: OnceLock<Value>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The data of its events, of which the last must be the end.
    pub fn events(&self) -> Vec<Value> {
        assert!(self.header("content-type").unwrap().starts_with("text/event-stream"), "{self:?}");
        let mut data: Vec<&str> =
            self.text().lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text());
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// Waits until it is so.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: not after a minute");
        sleep(Duration::from_millis(5));
    }
}

impl Client {
    pub fn new(address: SocketAddr) -> Client {
        Client { address, key: None, description: OnceLock::new() }
    }

    pub fn with_key(&self, key: &str) -> Client {
        Client { address: self.address, key: Some(key.into()), description: OnceLock::new() }
    }

    pub fn until_ready(&self) {
        until("ready", || self.get("/ready").status == 200);
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends bytes, and reads whatever comes until the other side closes.
    pub fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect();
        // It may close before it has seen everything.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    }

    fn head(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        if let Some(key) = &self.key {
            head += &format!("Authorization: Bearer {key}\r\n");
        }
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        head + "\r\n"
    }

    /// Any request.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let length = body.len().to_string();
        let mut all = headers.to_vec();
        if !body.is_empty() {
            all.push(("Content-Length", &length));
        }
        let mut request = self.head(method, path, &all).into_bytes();
        request.extend_from_slice(body);
        parse(&self.raw(&request))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    /// A request whose body may be wrong; the answer must be as the server's description says.
    pub fn try_post(&self, path: &str, body: &str) -> Answer {
        let answer = self.send("POST", path, &[("Content-Type", "application/json")], body.as_bytes());
        let description = self.description.get_or_init(|| self.get("/openapi.json").json());
        schema::check(description, "post", path, body, &answer);
        answer
    }

    pub fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self.try_post(path, &body.to_string());
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        answer.json()
    }

    /// The events of a streamed answer.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.try_post(path, &body.to_string());
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        answer.events()
    }

    /// A connection on which a request was made; nothing was read yet.
    pub fn begin(&self, path: &str, body: &Value) -> Streaming {
        let body = body.to_string();
        let headers = [("Content-Type", "application/json"), ("Content-Length", &*body.len().to_string())];
        let mut stream = self.connect();
        stream.write_all((self.head("POST", path, &headers) + &body).as_bytes()).unwrap();
        Streaming(BufReader::new(stream))
    }

    /// A number of the metrics.
    pub fn metric(&self, start: &str) -> f64 {
        self.metric_if_any(start).unwrap_or_else(|| panic!("there is no {start}"))
    }

    /// The same; counters are absent before they count.
    pub fn metric_if_any(&self, start: &str) -> Option<f64> {
        let answer = self.get("/metrics");
        let line = answer.text().lines().find(|line| line.starts_with(start))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

/// An answer that is being received.
pub struct Streaming(BufReader<TcpStream>);

impl Streaming {
    /// Waits for a line that has this in it, and returns all that came before.
    pub fn until(&mut self, part: &str) -> String {
        let mut all = String::new();
        while !all.contains(part) {
            assert_ne!(self.0.read_line(&mut all).unwrap(), 0, "it ended without {part:?}: {all}");
        }
        all
    }

    pub fn rest(mut self) -> Answer {
        let mut all = Vec::new();
        self.0.read_to_end(&mut all).unwrap();
        parse(&all)
    }

    /// Everything that is left, with the chunks' lengths in it.
    pub fn rest_text(mut self) -> String {
        let mut all = String::new();
        self.0.read_to_string(&mut all).unwrap();
        all
    }
}

fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no HTTP: {:?}", String::from_utf8_lossy(bytes)));
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let header =
        |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string()));
    let mut answer =
        Answer { status, headers: lines.filter_map(header).collect(), body: bytes[end + 4..].to_vec() };
    if answer.header("transfer-encoding") == Some("chunked") {
        answer.body = unchunked(&answer.body);
    }
    answer
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n").expect("the last chunk is missing");
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            return all;
        }
        all.extend_from_slice(&bytes[end + 2..end + 2 + length]);
        bytes = &bytes[end + 4 + length..];
    }
}
