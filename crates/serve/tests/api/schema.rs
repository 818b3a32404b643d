//! Compares requests and answers with the OpenAPI description. Knows the words of JSON Schema that it uses, and no others.

use crate::client::Answer;
use serde_json::Value;

/// An answer must be one that the description has for the route, and whoever sent a wrong body must have been refused.
pub fn check(description: &Value, method: &str, path: &str, body: &str, answer: &Answer) {
    let Some(operation) = operation(description, path).map(|item| &item[method]) else {
        assert_eq!(answer.status, 404, "{path}");
        return;
    };
    let response = &operation["responses"][answer.status.to_string()];
    assert!(response.is_object(), "{path} may not answer with {}: {}", answer.status, answer.text());
    if answer.header("content-type") == Some("application/json") {
        let schema = &response["content"]["application/json"]["schema"];
        if let Err(wrong) = fits(description, schema, &answer.json()) {
            panic!("{path}: the answer does not fit its schema: {wrong}: {}", answer.text());
        }
    }
    let request = &operation["requestBody"]["content"]["application/json"]["schema"];
    let value = serde_json::from_str(body);
    let fits = value.map_err(|e| e.to_string()).and_then(|value: Value| fits(description, request, &value));
    if let (200, Err(wrong)) = (answer.status, fits) {
        panic!("{path} took a body that does not fit its schema: {wrong}: {body}");
    }
}

/// The entry for a path, in which names stand for parts.
fn operation<'a>(description: &'a Value, path: &str) -> Option<&'a Value> {
    let same = |pattern: &str| {
        let (a, b): (Vec<&str>, Vec<&str>) = (pattern.split('/').collect(), path.split('/').collect());
        a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a == b || a.starts_with('{'))
    };
    description["paths"].as_object()?.iter().find(|(pattern, _)| same(pattern)).map(|(_, item)| item)
}

const WORDS: [&str; 17] = [
    "$ref",
    "type",
    "enum",
    "anyOf",
    "properties",
    "required",
    "additionalProperties",
    "propertyNames",
    "maxProperties",
    "items",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "description",
];

/// Whether a value fits a schema.
pub fn fits(description: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let fail = |why: &str| Err(format!("{value} is not {why} in {schema}"));
    let empty = serde_json::Map::new();
    for word in schema.as_object().unwrap_or(&empty).keys() {
        assert!(WORDS.contains(&word.as_str()), "the check does not know {word:?} of {schema}");
    }
    if let Some(reference) = schema["$ref"].as_str() {
        return fits(description, description.pointer(&reference[1..]).unwrap(), value);
    }
    let is = |kind: &str| match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|v| v.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => panic!("no type: {kind}"),
    };
    match &schema["type"] {
        Value::String(kind) if !is(kind) => return fail("of the type"),
        Value::Array(kinds) if !kinds.iter().any(|kind| is(kind.as_str().unwrap())) => {
            return fail("of a type");
        }
        _ => {}
    }
    if schema["enum"].as_array().is_some_and(|values| !values.contains(value)) {
        return fail("one of the values");
    }
    if let Some(all) = schema["anyOf"].as_array()
        && !all.iter().any(|schema| fits(description, schema, value).is_ok())
    {
        return fail("any of those");
    }
    if let Some(number) = value.as_f64() {
        let outside = schema["minimum"].as_f64().is_some_and(|least| number < least)
            || schema["maximum"].as_f64().is_some_and(|most| number > most);
        if outside {
            return fail("within the bounds");
        }
    }
    let length = |least: &str, most: &str, length: usize| {
        schema[least].as_u64().is_some_and(|least| (length as u64) < least)
            || schema[most].as_u64().is_some_and(|most| length as u64 > most)
    };
    match value {
        Value::String(text) if length("minLength", "maxLength", text.chars().count()) => {
            fail("of such a length")
        }
        Value::Array(list) if length("minItems", "maxItems", list.len()) => fail("of such a length"),
        Value::Array(list) => list
            .iter()
            .try_for_each(|item| fits(description, schema.get("items").unwrap_or(&Value::Null), item)),
        Value::Object(object) if length("minProperties", "maxProperties", object.len()) => {
            fail("of such a length")
        }
        Value::Object(object) => {
            for name in schema["required"].as_array().into_iter().flatten() {
                if !object.contains_key(name.as_str().unwrap()) {
                    return fail(&format!("with {name}"));
                }
            }
            for (name, value) in object {
                match (schema["properties"].get(name), &schema["additionalProperties"]) {
                    (Some(schema), _) => fits(description, schema, value)?,
                    (None, Value::Bool(false)) => return fail(&format!("without {name:?}")),
                    (None, schema) => fits(description, schema, value)?,
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
