//! Bodies of requests: JSON objects of bounded size, sent in bounded time, and all together in bounded memory.

use crate::app::Limits;
use crate::error::ApiError;
use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use futures_util::StreamExt;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Map, Value};

/// Memory for the bodies that are being received.
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

/// A body as far as it has come. It gives its room back when it is dropped, however the request ends.
struct Received<'a> {
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
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.room.taken.dec_by(self.taken as i64);
    }
}

/// Reads the object that a request brings.
///
/// # Errors
/// 415 for another media type, 413 for too many bytes, 408 when they come too slowly, 400 when they are no JSON object, 503 when
/// other bodies have all the memory for them.
pub(crate) async fn object(
    request: Request<Body>,
    limits: &Limits,
    room: &Room,
) -> Result<Map<String, Value>, ApiError> {
    let headers = request.headers();
    check_type(headers)?;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: usize| length > limits.body) {
        return Err(too_large(limits));
    }
    let read = tokio::time::timeout(limits.client_time, receive(request.into_body(), limits, room));
    let body = read.await.map_err(|_| {
        let seconds = limits.client_time.as_secs_f64();
        ApiError::too_slow(format!("the body was not there after {seconds} s, which is the limit"))
    })??;
    let value = serde_json::from_slice(&body.bytes)
        .map_err(|error| ApiError::request("invalid_json", format!("the body is not JSON: {error}")))?;
    match value {
        Value::Object(object) => Ok(object),
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
    received.ok_or_else(|| {
        let message = format!(
            "the bodies of requests that are being received have all of the {} bytes that there are for them; try again later",
            room.limit
        );
        ApiError::unavailable("body_memory", Some(1), message)
    })
}
