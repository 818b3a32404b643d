//! From an HTTP request to a handler and back: who asks, which route, what is logged.

use crate::app::{App, Phase};
use crate::cors;
use crate::error::ApiError;
use crate::host;
use crate::outbox::Reader;
use crate::places::{self, Beyond};
use crate::record::Record;
use crate::routes::{Call, ROUTES, Route};
use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use axum::routing::any;
use ferropt_engine::Scope;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// Who is at the other end of a connection.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Whether it came by an address that only this machine can reach.
    pub(crate) local: bool,
    /// The limit that the connection is beyond; then it is there for probes.
    pub(crate) beyond: Option<Beyond>,
    /// It as one that takes in answers.
    pub(crate) reader: Arc<Reader>,
}

/// All routes of the table, and the answer to everything else.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let mut router = Router::new();
    let mut paths: Vec<&str> = ROUTES.iter().map(|route| route.path).collect();
    paths.sort_unstable();
    paths.dedup();
    for path in paths {
        let app = app.clone();
        router = router.route(path, any(move |request| answer(app.clone(), Some(path), request)));
    }
    let app = app.clone();
    router.fallback(move |request| answer(app.clone(), None, request))
}

/// Answers a request for a path of the table, or for one that is not there.
async fn answer(app: Arc<App>, path: Option<&'static str>, request: Request<Body>) -> Response<Body> {
    let origin = cors::allowed(&app.cors, request.headers()).cloned();
    if let Some(origin) = &origin
        && request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
    {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        *response.headers_mut() = cors::invite(request.headers(), origin);
        close_behind(&app, &mut response);
        return response;
    }
    let record = Arc::new(Record::new(app.clone(), path.unwrap_or("unknown"), request.method().as_str()));
    let asked_for: String = request.uri().path().chars().take(100).collect();
    let mut stays = false;
    let mut response = match find(&app, path, &record, request).await {
        Ok(call) => {
            stays = call.route.computes();
            call.route.handle(call).await
        }
        Err(error) => Err(error),
    }
    .unwrap_or_else(|error| {
        stays = false;
        record.error(&error);
        if error.status == StatusCode::NOT_FOUND {
            record.note("path", asked_for);
        }
        error.response()
    });
    record.status(response.status().as_u16());
    // Where the engine computes, the job knows when all was computed.
    if !stays {
        record.complete();
    }
    if let Some(origin) = &origin {
        cors::permit(response.headers_mut(), origin);
    }
    close_behind(&app, &mut response);
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// Lets an answer be the last of its connection once the server is to end: clients that keep connections would ask on them again, and
/// be refused until it is gone.
fn close_behind(app: &App, response: &mut Response<Body>) {
    if *app.phase.borrow() > Phase::Serving {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Finds out who asks, then the route. Who may not ask learns nothing about routes.
async fn find(
    app: &Arc<App>,
    path: Option<&'static str>,
    record: &Arc<Record>,
    request: Request<Body>,
) -> Result<Call, ApiError> {
    let there = || ROUTES.iter().filter(|route| Some(route.path) == path);
    let (mut parts, body) = request.into_parts();
    let Some(peer) = parts.extensions.remove::<Peer>() else {
        return Err(ApiError::internal("it is not known whose connection a request came by"));
    };
    // Without the port, which is another one for each connection. Who is refused is known by the address.
    let address = peer.address.ip().to_canonical();
    record.note("client", address.to_string());
    let mut client: Arc<str> = places::network(address).to_string().into();
    if let Some(beyond) = peer.beyond
        && !there().any(Route::is_probe)
    {
        return Err(beyond.refusal(&app.limits));
    }
    // A key keeps out what no name would.
    if app.keys.is_empty()
        && peer.local
        && let Some(host) = host::strange(&parts.headers, &app.allowed_hosts)
    {
        let host: String = String::from_utf8_lossy(host.as_bytes()).chars().take(100).collect();
        return Err(ApiError::forbidden(
            "unknown_host",
            format!(
                "this server has no keys and does not know the name {host:?} in the header Host; use http://localhost or an \
                 address, or start the server with --allow-host NAME"
            ),
        ));
    }
    let is_open = |route: &Route| route.open || (app.open_metrics && route.path == "/metrics");
    let key = if app.keys.is_empty() || there().any(is_open) {
        None
    } else {
        Some(app.keys.find(parts.headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes))?)
    };
    if let Some(key) = &key {
        client = key.name.clone();
        record.note("client", &*client);
    }
    let method = if parts.method == Method::HEAD { "GET" } else { parts.method.as_str() };
    let Some(route) = there().find(|route| route.method == method) else {
        return Err(refuse(&parts, there()));
    };
    let scope = match &key {
        Some(key) if !app.share_prefixes => key.scope(),
        _ => Scope::default(),
    };
    // Only what the engine would compute counts.
    if let Some(key) = key.filter(|_| route.computes()) {
        record.is_under(key.begin(Instant::now())?);
    }
    let name = parameter(&mut parts).await?;
    let request = Request::from_parts(parts, body);
    let (app, record, reader) = (app.clone(), record.clone(), peer.reader);
    Ok(Call { app, route, record, client, scope, reader, name, request })
}

fn refuse(parts: &Parts, there: impl Iterator<Item = &'static Route>) -> ApiError {
    let (method, path) = (&parts.method, parts.uri.path());
    let path: String = path.chars().take(100).collect();
    let methods: Vec<&str> = there.map(|route| route.method).collect();
    if methods.is_empty() {
        let message = format!("there is no {path}; /openapi.json has all routes");
        return ApiError::not_found("unknown_route", message);
    }
    let allow = methods.join(", ");
    let message = format!("{path} does not know the method {method}; use {allow}");
    ApiError::method(allow, message)
}

/// What stands for the braces in the path.
async fn parameter(parts: &mut Parts) -> Result<Option<String>, ApiError> {
    let parameters = RawPathParams::from_request_parts(parts, &()).await;
    let parameters = parameters
        .map_err(|_| ApiError::not_found("unknown_route", "the path is not UTF-8 when it is decoded"))?;
    Ok(parameters.iter().next().map(|(_, value)| value.to_string()))
}
