//! The OpenAPI page: made of the table of routes, the table of fields, and the schemas of answers.

use crate::fields::{self, CHAT, COMPLETION, DETOKENIZE, EMBED, GENERATE, METASEQ, TOKENIZE};
use crate::routes::{PAGE, ROUTES, Route};
use serde_json::{Map, Value, json};

/// JSON schemas of what is answered, by name.
const ANSWERS: &str = include_str!("answers.json");

/// Kinds of bodies, and what the page calls them.
const BODIES: [(u8, &str); 7] = [
    (COMPLETION, "CompletionRequest"),
    (CHAT, "ChatRequest"),
    (GENERATE, "GenerateRequest"),
    (METASEQ, "MetaseqRequest"),
    (TOKENIZE, "TokenizeRequest"),
    (DETOKENIZE, "DetokenizeRequest"),
    (EMBED, "EmbeddingRequest"),
];

/// Statuses of errors, and what a route must have for them.
const ERRORS: [(&str, &str, Needs); 12] = [
    ("400", "The request makes no sense; the message says what, and what was expected.", Needs::Body),
    ("401", "The API key is missing or unknown.", Needs::Key),
    ("403", "The name in the header Host is not known.", Needs::Nothing),
    ("404", "There is no such model or route.", Needs::Name),
    ("408", "The body came too slowly.", Needs::Body),
    ("413", "The body is too large.", Needs::Body),
    ("415", "The body is not declared as JSON.", Needs::Body),
    ("405", "The route does not know the method.", Needs::Nothing),
    ("429", "Too much at a time; Retry-After says when to try again.", Needs::Place),
    ("500", "The engine failed.", Needs::Turn),
    (
        "503",
        "The model or the server is not there now, or has no room; Retry-After says when to try again.",
        Needs::PlaceOrModel,
    ),
    ("504", "The request took longer than it may.", Needs::Turn),
];

/// What a route must have to answer with an error.
#[derive(Clone, Copy, PartialEq)]
enum Needs {
    Nothing,
    Body,
    Key,
    Name,
    Turn,
    Place,
    PlaceOrModel,
}

impl Needs {
    fn are_met(self, route: &Route) -> bool {
        match self {
            Needs::Nothing => true,
            Needs::Body => route.body != 0,
            Needs::Key => !route.open,
            Needs::Name => route.body != 0 || route.path.contains('{'),
            Needs::Turn => route.computes(),
            Needs::Place => !route.is_probe(),
            Needs::PlaceOrModel => !route.is_probe() || route.path == "/ready",
        }
    }
}

/// The page.
pub(crate) fn description() -> Value {
    // A constant, which a test parses.
    let mut schemas: Map<String, Value> = serde_json::from_str(ANSWERS).unwrap_or_default();
    for (body, name) in BODIES {
        schemas.insert(name.into(), request(body));
    }
    let mut paths = Map::new();
    for route in ROUTES.iter().filter(|route| route.answer != PAGE) {
        let path = route.path.replace("{*", "{");
        paths.entry(path).or_insert_with(|| json!({}))[route.method.to_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Ferropt",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OPT language models: OpenAI's completions, conversations and embeddings, metaseq's completions, and more.",
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
        },
    })
}

/// The schema of a kind of body.
fn request(body: u8) -> Value {
    let properties: Map<String, Value> =
        fields::of(body).map(|field| (field.name.into(), field.schema())).collect();
    let required = ROUTES.iter().find(|route| route.body == body).map(|route| route.required);
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": { "type": "null" } })
}

fn operation(route: &Route) -> Value {
    let mut responses = Map::new();
    let mut content = Map::new();
    if route.answer.contains('/') {
        for kind in ["application/openmetrics-text", "text/plain"] {
            content.insert(kind.into(), json!({ "schema": { "type": "string" } }));
        }
    } else {
        content.insert("application/json".into(), json!({ "schema": reference(route.answer) }));
    }
    if route.generates() {
        // One event; the tools that read these pages take the schema as that of each.
        let data = json!({ "type": "string", "description": "A JSON object; `[DONE]` after the last." });
        let event = json!({ "type": "object", "required": ["data"], "properties": { "data": data } });
        content.insert("text/event-stream".into(), json!({ "schema": event }));
    }
    responses.insert("200".into(), json!({ "description": "The answer.", "content": content }));
    let errors = ERRORS.iter().filter(|(_, _, needs)| needs.are_met(route));
    for (status, description, _) in errors {
        let schema = if route.path == "/ready" && *status == "503" { "Status" } else { "Error" };
        let content = json!({ "application/json": { "schema": reference(schema) } });
        responses.insert((*status).into(), json!({ "description": description, "content": content }));
    }
    let mut operation = json!({ "summary": route.summary, "responses": responses });
    // An empty alternative: a server without keys asks for none.
    operation["security"] = if route.open { json!([]) } else { json!([{ "key": [] }, {}]) };
    if let Some((_, name)) = BODIES.iter().find(|(body, _)| *body == route.body) {
        let content = json!({ "application/json": { "schema": reference(name) } });
        operation["requestBody"] = json!({ "required": true, "content": content });
    }
    if let Some((_, name)) = route.path.split_once('{') {
        let name = name.split('}').next().unwrap_or("").trim_start_matches('*');
        let schema = json!({ "type": "string", "minLength": 1 });
        operation["parameters"] = json!([{ "name": name, "in": "path", "required": true, "schema": schema }]);
    }
    operation
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references<'a>(value: &'a Value, all: &mut Vec<&'a str>) {
        match value {
            Value::Object(object) => {
                all.extend(object.get("$ref").and_then(Value::as_str));
                object.values().for_each(|value| references(value, all));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, all)),
            _ => {}
        }
    }

    #[test]
    fn every_route_and_body_is_described_and_every_reference_leads_somewhere() {
        let page = description();
        serde_json::from_str::<Value>(ANSWERS).unwrap();
        let mut all = Vec::new();
        references(&page, &mut all);
        assert!(all.len() > ROUTES.len());
        for reference in all {
            let path = reference.strip_prefix('#').unwrap();
            assert!(page.pointer(path).is_some(), "{reference}");
        }
        assert!(page["paths"].get("/").is_none(), "the web page is no part of the API");
        for route in ROUTES.iter().filter(|route| route.answer != PAGE) {
            let operation = &page["paths"][route.path.replace("{*", "{")][route.method.to_lowercase()];
            assert_eq!(operation["summary"], route.summary);
            assert_eq!(operation["requestBody"].is_object(), route.body != 0, "{}", route.path);
            let known: Vec<&str> = fields::of(route.body).map(|field| field.name).collect();
            assert!(route.required.iter().all(|name| known.contains(name)), "{}", route.path);
        }
    }
}
