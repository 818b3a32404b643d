//! The route that makes vectors of texts.

use crate::error::{ApiError, long_response};
use crate::layout::{self, List};
use crate::routes::Call;
use crate::texts::{begin, line_up, still_serving};
use axum::body::Body;
use axum::http::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ferropt_engine::{Event, Parameters};
use serde::Serialize;
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
    let entry = |(index, vector)| Embedding {
        object: "embedding",
        index,
        embedding: match asked.base64 {
            true => Vector::Base64(BASE64_STANDARD.encode(bytes(vector))),
            false => Vector::Numbers(List(vector, |x: &f32| f64::from(*x))),
        },
    };
    let answer = Answer {
        object: "list",
        data: vectors.iter().map(Vec::as_slice).enumerate().map(entry).collect(),
        model: asked.model.as_deref().unwrap_or(&live.name),
        usage: json!({ "prompt_tokens": tokens, "total_tokens": tokens }),
    };
    let json = tokio::task::block_in_place(|| layout::json(&answer));
    Ok(long_response(&call.reader, &call.record, json))
}

#[derive(Serialize)]
struct Answer<'a, N> {
    object: &'static str,
    data: Vec<Embedding<N>>,
    model: &'a str,
    usage: Value,
}

#[derive(Serialize)]
struct Embedding<N> {
    object: &'static str,
    index: usize,
    embedding: Vector<N>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<N> {
    Numbers(N),
    Base64(String),
}

fn bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}
