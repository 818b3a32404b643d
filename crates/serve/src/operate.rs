//! Routes that tell how things stand.

use crate::app::Phase;
use crate::error::{ApiError, json_response};
use crate::metrics::older;
use crate::models::State;
use crate::openapi;
use crate::routes::Call;
use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use ferropt_data::SPECIALS;
use serde_json::{Value, json};

/// The process answers.
pub(crate) async fn health(_: Call) -> Result<Response<Body>, ApiError> {
    Ok(json_response(StatusCode::OK, &json!({ "status": "ok" })))
}

/// Whether requests are welcome. Says nothing about which models there are, as everybody may ask.
pub(crate) async fn ready(call: Call) -> Result<Response<Body>, ApiError> {
    let states: Vec<State> = call.app.models.states().map(|(_, state)| state).collect();
    let is_loading = |state: &State| matches!(state, State::Loading);
    let is_ready = |state: &State| matches!(state, State::Ready(_));
    let status = if *call.app.phase.borrow() > Phase::Serving {
        "stopping"
    } else if states.iter().any(is_loading) {
        "loading"
    } else if states.iter().any(is_ready) {
        "ready"
    } else {
        "failed"
    };
    let code = if status == "ready" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok(json_response(code, &json!({ "status": status })))
}

/// For Prometheus.
pub(crate) async fn metrics(call: Call) -> Result<Response<Body>, ApiError> {
    // This request does not count.
    let text = call.app.metrics.text(&call.app.models, call.app.in_flight().saturating_sub(1));
    let accepts = call.request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let (text, kind) = match accepts {
        Some(accept) if accept.contains("text/plain") && !accept.contains("openmetrics") => {
            (older(&text), "text/plain; version=0.0.4; charset=utf-8")
        }
        _ => (text, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
    };
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(response)
}

/// The OpenAPI page.
pub(crate) async fn description(_: Call) -> Result<Response<Body>, ApiError> {
    Ok(json_response(StatusCode::OK, &openapi::description()))
}

/// What programs that tokenise with this server ask for first.
pub(crate) async fn tokenizer(call: Call) -> Result<Response<Body>, ApiError> {
    call.app.models.find(None)?;
    let [_, pad, end, unknown] = SPECIALS;
    let answer = json!({ "bos_token": end, "eos_token": end, "pad_token": pad, "unk_token": unknown });
    Ok(json_response(StatusCode::OK, &answer))
}

/// All models, and their other names.
pub(crate) async fn models(call: Call) -> Result<Response<Body>, ApiError> {
    Ok(json_response(StatusCode::OK, &json!({ "object": "list", "data": list(&call) })))
}

/// One of them.
pub(crate) async fn model(call: Call) -> Result<Response<Body>, ApiError> {
    let name = call.name.as_deref().unwrap_or("");
    match list(&call).into_iter().find(|model| model["id"] == name) {
        Some(model) => Ok(json_response(StatusCode::OK, &model)),
        // It is not there, so this says so.
        None => {
            call.app.models.find(Some(name)).and_then(|_| Err(ApiError::not_found("model_not_found", name)))
        }
    }
}

fn list(call: &Call) -> Vec<Value> {
    let models = &call.app.models;
    let describe = |id: &str, name: &str, state: &State| {
        let (status, created, positions) = match state {
            State::Loading => ("loading", 0, None),
            State::Failed(_) => ("failed", 0, None),
            State::Ready(live) => ("ready", live.created, Some(live.engine.capacity().positions)),
        };
        json!({
            "id": id, "object": "model", "created": created, "owned_by": "ferropt", "root": name,
            "status": status, "max_model_len": positions,
        })
    };
    let states: Vec<(&str, State)> = models.states().collect();
    let own = states.iter().map(|(name, state)| describe(name, name, state));
    let aliases = models.aliases().iter().filter_map(|(alias, model)| {
        let (name, state) = states.iter().find(|(name, _)| name == model)?;
        Some(describe(alias, name, state))
    });
    own.chain(aliases).collect()
}
