//! Web pages of other origins: none may use the API unless it was named.

use axum::http::{HeaderMap, HeaderValue, header};

/// The origin that a request comes from, if it is among those that may; `*` stands for all.
pub(crate) fn allowed<'a>(origins: &[String], headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let named = |allowed: &String| allowed == "*" || allowed.as_bytes() == origin.as_bytes();
    origins.iter().any(named).then_some(origin)
}

/// Lets the page at `origin` see the answer.
pub(crate) fn permit(headers: &mut HeaderMap, origin: &HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    let seen = HeaderValue::from_static("X-Request-Id, Retry-After, X-Should-Retry");
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, seen);
}

/// Answers a browser that asks what a page at `origin` may send: whatever headers it names, as clients have some of their own
/// (`X-Stainless-...` of OpenAI's), and those that mean nothing here are not looked at.
pub(crate) fn invite(asked: &HeaderMap, origin: &HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::new();
    permit(&mut headers, origin);
    headers.append(header::VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("3600"));
    headers
}
