//! Bodies of requests: JSON objects of bounded size, sent in bounded time.

use crate::app::Limits;
use crate::error::ApiError;
use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use futures_util::StreamExt;
use serde_json::{Map, Value};

/// Reads the object that a request brings.
///
/// # Errors
/// 415 for another media type, 413 for too many bytes, 408 when they come too slowly, 400 when they are no JSON object.
pub(crate) async fn object(request: Request<Body>, limits: &Limits) -> Result<Map<String, Value>, ApiError> {
    let headers = request.headers();
    check_type(headers)?;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: usize| length > limits.body) {
        return Err(too_large(limits));
    }
    let read = tokio::time::timeout(limits.client_time, bytes(request.into_body(), limits));
    let bytes = read.await.map_err(|_| {
        let seconds = limits.client_time.as_secs_f64();
        ApiError::too_slow(format!("the body was not there after {seconds} s, which is the limit"))
    })??;
    let value = serde_json::from_slice(&bytes)
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

async fn bytes(body: Body, limits: &Limits) -> Result<Vec<u8>, ApiError> {
    let (mut body, mut all) = (body.into_data_stream(), Vec::new());
    while let Some(part) = body.next().await {
        let part = part.map_err(|error| {
            ApiError::request("invalid_body", format!("the body could not be read: {error}"))
        })?;
        if all.len() + part.len() > limits.body {
            return Err(too_large(limits));
        }
        all.extend_from_slice(&part);
    }
    Ok(all)
}
