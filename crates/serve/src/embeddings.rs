//! The route that makes vectors of texts.

use crate::error::{ApiError, long_response};
use crate::routes::Call;
use crate::texts::{begin, line_up, still_serving};
use axum::body::Body;
use axum::http::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ferropt_engine::{Event, Parameters};
use serde_json::{Value, json};

/// Texts as vectors.
pub(crate) async fn embeddings(mut call: Call) -> Result<Response<Body>, ApiError> {
    still_serving(&call)?;
    let (live, mut asked) = begin(&mut call).await?;
    let width = live.engine.capacity().width;
    if let Some(dimensions) = asked.dimensions.filter(|dimensions| *dimensions != width) {
        let message = format!(
            "dimensions = {dimensions}: embeddings of this model have {width} numbers, and it was not trained to say anything \
             with fewer; leave it out"
        );
        return Err(ApiError::field("dimensions", message));
    }
    asked.parameters = Parameters::embedding(asked.pooling);
    let mut job = line_up(&call, &live, &mut asked)?;
    let (mut vectors, mut tokens) = (vec![Vec::new(); asked.prompts.len()], 0);
    while let Some(message) = job.next().await {
        match message? {
            (prompt, Event::Embedding(vector)) => vectors[prompt] = vector,
            (_, Event::Done(usage)) => tokens += usage.prompt,
            _ => {}
        }
    }
    if vectors.iter().flatten().any(|x| !x.is_finite()) {
        return Err(ApiError::internal("the model's hidden states are not finite"));
    }
    let data = vectors.iter().enumerate().map(|(index, vector)| {
        let vector: Value =
            if asked.base64 { BASE64_STANDARD.encode(bytes(vector)).into() } else { json!(vector) };
        json!({ "object": "embedding", "index": index, "embedding": vector })
    });
    let answer = json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": asked.model.as_deref().unwrap_or(&live.name),
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    });
    Ok(long_response(&call.reader, &call.record, answer.to_string()))
}

fn bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}
