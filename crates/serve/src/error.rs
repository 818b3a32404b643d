//! Refusals and failures, in the shape of OpenAI's.

use crate::outbox::Reader;
use crate::record::Record;
use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};
use std::sync::Arc;

/// Why there is no answer, for the client. Nothing in it says more about the machine than the client has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// Machine-readable, for instance `model_not_found`.
    pub(crate) code: &'static str,
    /// The field of the request that is wrong.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    /// Seconds after which it is worth trying again.
    pub(crate) retry_after: Option<u64>,
    /// Methods that the path knows.
    pub(crate) allow: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, code, param: None, message: message.into(), retry_after: None, allow: None }
    }

    /// A field is wrong.
    pub(crate) fn field(name: &str, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(name.into()), ..ApiError::request("invalid_value", message) }
    }

    /// The request as a whole is wrong.
    pub(crate) fn request(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(crate) fn no_key(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    pub(crate) fn forbidden(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, code, message)
    }

    pub(crate) fn not_found(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, code, message)
    }

    pub(crate) fn method(allow: String, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
        ApiError { allow: Some(allow), ..error }
    }

    pub(crate) fn too_slow(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    }

    pub(crate) fn too_large(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }

    pub(crate) fn media_type(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    }

    /// Too much at a time; `seconds` later there may be room.
    pub(crate) fn too_many(code: &'static str, seconds: u64, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, code, message);
        ApiError { retry_after: Some(seconds), ..error }
    }

    /// Not now; so many seconds later it may be possible, or never.
    pub(crate) fn unavailable(
        code: &'static str,
        retry_after: Option<u64>,
        message: impl Into<String>,
    ) -> ApiError {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        ApiError { retry_after, ..error }
    }

    /// It took longer than it may, and would again.
    pub(crate) fn over(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "request_time", message)
    }

    /// The engine failed.
    pub(crate) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", message)
    }

    /// `{"error": {...}}`.
    pub(crate) fn object(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }

    pub(crate) fn response(&self) -> Response<Body> {
        let mut response = json_response(self.status, &self.object());
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(allow) = self.allow.as_deref().and_then(|allow| HeaderValue::from_str(allow).ok()) {
            headers.insert(header::ALLOW, allow);
        }
        // OpenAI's clients try again at every status from 500 on.
        let in_vain = self.status == StatusCode::SERVICE_UNAVAILABLE && self.retry_after.is_none();
        if in_vain || self.status == StatusCode::GATEWAY_TIMEOUT {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// An answer of JSON.
pub(crate) fn json_response(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = answer(Body::from(value.to_string()));
    *response.status_mut() = status;
    response
}

/// An answer to the request of a record, of JSON that may be long, and is kept until it is taken in.
pub(crate) fn long_response(reader: &Arc<Reader>, record: &Record, json: String) -> Response<Body> {
    answer(Body::from(reader.send(json, &record.busy)))
}

fn answer(json: Body) -> Response<Body> {
    let mut response = Response::new(json);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
