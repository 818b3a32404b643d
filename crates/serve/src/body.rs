//! Bodies of requests: JSON objects of bounded size, sent in bounded time, and all together in bounded memory.

use crate::app::Limits;
use crate::error::ApiError;
use crate::prepare::LONG;
use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use futures_util::StreamExt;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Map, Value};

/// Memory for the bodies that are being received and read.
pub(crate) struct Room {
    /// Bytes that there are, and that are taken.
    limit: usize,
    taken: Gauge,
}

impl Room {
    /// Of `limit` bytes, with those that are taken in a gauge.
    pub(crate) fn new(limit: usize, taken: Gauge) -> Room {
        Room { limit, taken }
    }

    /// Takes more bytes, if there are so many.
    fn take(&self, bytes: usize) -> bool {
        let taken = self.taken.inc_by(bytes as i64) as usize + bytes;
        if taken > self.limit {
            self.taken.dec_by(bytes as i64);
        }
        taken <= self.limit
    }
}

/// A body as far as it has come, with the memory that it and what is read from it take. It gives its room back when it is dropped, however the request ends.
pub(crate) struct Received<'a> {
    bytes: Vec<u8>,
    room: &'a Room,
    taken: usize,
}

impl Received<'_> {
    /// Appends a part of a body that may have `most` bytes, which takes room as the body comes: who announces a large one has
    /// nothing from others yet. Returns whether there was room.
    fn add(&mut self, part: &[u8], most: usize) -> bool {
        let needed = self.bytes.len() + part.len();
        if needed > self.taken {
            let all = (2 * self.taken).min(most).max(needed);
            if !self.room.take(all - self.taken) {
                return false;
            }
            self.taken = all;
            self.bytes.reserve_exact(all - self.bytes.len());
        }
        self.bytes.extend_from_slice(part);
        true
    }

    /// Reads it as JSON, whose values can take many times its memory.
    fn read(&mut self) -> Result<Value, ApiError> {
        let (more, limit) = (values(&self.bytes), self.room.limit);
        if self.taken + more > limit {
            let message = format!(
                "the values in the body would take some {more} bytes of memory, and there are {limit} for bodies; send less at a time"
            );
            return Err(ApiError::too_large(message));
        }
        if !self.room.take(more) {
            return Err(no_room(self.room));
        }
        self.taken += more;
        serde_json::from_slice(&self.bytes)
            .map_err(|error| ApiError::request("invalid_json", format!("the body is not JSON: {error}")))
    }
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.room.taken.dec_by(self.taken as i64);
    }
}

/// Reads the object that a request brings; what comes with it holds the memory for it.
///
/// # Errors
/// 415 for another media type, 413 for too many bytes or values, 408 when they come too slowly, 400 when they are no JSON object, 503
/// when other bodies have all the memory for them.
pub(crate) async fn object<'a>(
    request: Request<Body>,
    limits: &Limits,
    room: &'a Room,
) -> Result<(Map<String, Value>, Received<'a>), ApiError> {
    let headers = request.headers();
    check_type(headers)?;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: usize| length > limits.body) {
        return Err(too_large(limits));
    }
    let read = tokio::time::timeout(limits.client_time, receive(request.into_body(), limits, room));
    let mut body = read.await.map_err(|_| {
        let seconds = limits.client_time.as_secs_f64();
        ApiError::too_slow(format!("the body was not there after {seconds} s, which is the limit"))
    })??;
    let value =
        if body.bytes.len() > LONG { tokio::task::block_in_place(|| body.read()) } else { body.read() }?;
    match value {
        Value::Object(object) => Ok((object, body)),
        _ => Err(ApiError::request(
            "invalid_json",
            "the body is JSON, but not an object: expected {\"prompt\": ...}",
        )),
    }
}

fn too_large(limits: &Limits) -> ApiError {
    let message =
        format!("the body is larger than {} bytes, which is the limit; send less at a time", limits.body);
    ApiError::too_large(message)
}

fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let text =
        |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase());
    let kind = text(header::CONTENT_TYPE).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Web pages of other origins may send forms and plain text, but not this, without being asked about.
    if kind != "application/json" && !(kind.starts_with("application/") && kind.ends_with("+json")) {
        let given = if kind.is_empty() { "nothing".into() } else { format!("{kind:?}") };
        return Err(ApiError::media_type(format!(
            "the body must be JSON, with the header Content-Type: application/json; the header says {given}"
        )));
    }
    match text(header::CONTENT_ENCODING).filter(|encoding| encoding != "identity") {
        None => Ok(()),
        Some(encoding) => Err(ApiError::media_type(format!(
            "the body is encoded as {encoding:?}; send it without a Content-Encoding"
        ))),
    }
}

async fn receive<'a>(body: Body, limits: &Limits, room: &'a Room) -> Result<Received<'a>, ApiError> {
    let (mut body, mut length) = (body.into_data_stream(), 0);
    let mut received = Some(Received { bytes: Vec::new(), room, taken: 0 });
    while let Some(part) = body.next().await {
        let part = part.map_err(|error| {
            ApiError::request("invalid_body", format!("the body could not be read: {error}"))
        })?;
        length += part.len();
        if length > limits.body {
            return Err(too_large(limits));
        }
        // What there is no room for is read all the same, and not kept: who is cut off while sending sees no answer.
        received = received.take_if(|received| received.add(&part, limits.body));
    }
    received.ok_or_else(|| no_room(room))
}

fn no_room(room: &Room) -> ApiError {
    let message = format!(
        "the bodies of requests that are being received and read have all of the {} bytes that there are for them; try again later",
        room.limit
    );
    ApiError::unavailable("body_memory", Some(1), message)
}

/// Bytes of memory that the values of JSON take apart from its texts, nearly.
fn values(json: &[u8]) -> usize {
    // A list that grows has room for twice as many, and the smallest object for eleven fields.
    const VALUE: usize = 2 * size_of::<Value>();
    const OBJECT: usize = 12 * (size_of::<String>() + size_of::<Value>());
    let (mut bytes, mut in_text, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'{' => bytes += OBJECT,
            b'[' | b',' | b':' => bytes += VALUE,
            _ => {}
        }
    }
    bytes
}
