//! The web page: files that the program carries in it, given out so that a browser keeps them while they stay the same, and
//! lets them load nothing from elsewhere.

use crate::error::ApiError;
use crate::routes::Call;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

macro_rules! files {
    ($($name:literal)*) => { [$(($name, include_bytes!(concat!("../web/", $name)).as_slice())),*] };
}

/// Names below `/page/`, and contents. The first is `/` itself.
#[rustfmt::skip]
static FILES: &[(&str, &[u8])] = &files![
    "index.html" "style.css" "icon.svg" "early.js" "app.js"
    "api.js" "chat.js" "commands.js" "complete.js" "dialogs.js" "dom.js" "fields.js" "generation.js" "history.js"
    "models.js" "notices.js" "playground.js" "plot.js" "prometheus.js" "settings.js" "side.js" "sse.js" "status.js"
    "store.js" "texts.js" "tokens.js" "watch.js"
    "vendor/htm.js" "vendor/preact.js" "vendor/preact-hooks.js" "vendor/uplot.js" "vendor/uplot.css"
    "vendor/htm.LICENSE" "vendor/preact.LICENSE" "vendor/uplot.LICENSE"
];

/// For each file, a tag that changes with it.
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |bytes: &[u8]| {
        Sha256::digest(bytes)[..12].iter().fold(String::from("\""), |tag, byte| tag + &format!("{byte:02x}"))
            + "\""
    };
    FILES.iter().map(|(_, bytes)| tag(bytes)).collect()
});

/// Scripts and styles come from the page's own files alone, none is written in a document, and no text becomes markup or a
/// program: what a model writes can only ever be text. Nothing is sent anywhere but to this server, and no other page can
/// show this one inside of it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// A file of the page, by the name in the path.
///
/// # Errors
/// 404 when there is none of the name.
pub(crate) async fn file(call: Call) -> Result<Response<Body>, ApiError> {
    let name = call.name.as_deref().unwrap_or(FILES[0].0);
    let Some(place) = FILES.iter().position(|(own, _)| *own == name) else {
        let name: String = name.chars().take(100).collect();
        return Err(ApiError::not_found("unknown_file", format!("the page has no file {name:?}")));
    };
    let ((name, bytes), tag) = (FILES[place], &TAGS[place]);
    let known = is_known(call.request.headers(), tag);
    let mut response = Response::new(if known { Body::empty() } else { Body::from(bytes) });
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    let mut set =
        |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(header::CONTENT_TYPE, media_type(name));
    // A browser asks each time whether its copy is still the right one, so that page and API are of the same version.
    set(header::CACHE_CONTROL, "no-cache");
    set(header::CONTENT_SECURITY_POLICY, POLICY);
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(header::REFERRER_POLICY, "no-referrer");
    if let Ok(tag) = HeaderValue::from_str(tag) {
        headers.insert(header::ETAG, tag);
    }
    Ok(response)
}

/// Whether the client has what the tag stands for (RFC 9110, 13.1.2).
fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let lists = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|list| list.to_str().ok());
    lists
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .any(|own| own == "*" || own.trim_start_matches("W/") == tag)
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "text/plain; charset=utf-8",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_file_of_the_page_is_carried() {
        let web = Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
        let mut there = BTreeSet::new();
        for folder in ["", "vendor/"] {
            for entry in fs::read_dir(web.join(folder)).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_file() {
                    there.insert(format!("{folder}{}", entry.file_name().to_str().unwrap()));
                }
            }
        }
        // Only node looks at it, for tests.
        assert!(there.remove("package.json"));
        let carried: BTreeSet<String> = FILES.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(carried, there);
    }

    #[test]
    fn a_tag_is_known_in_every_way_it_can_be_sent() {
        let tag = &TAGS[0];
        assert_eq!(tag.len(), 26);
        assert_eq!(BTreeSet::from_iter(TAGS.iter()).len(), FILES.len());
        let known = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::IF_NONE_MATCH, value.parse().unwrap());
            }
            is_known(&headers, tag)
        };
        assert!(known(&[tag]));
        assert!(known(&[&format!("W/{tag}")]));
        assert!(known(&[&format!("\"other\", {tag}")]));
        assert!(known(&["\"other\"", tag]));
        assert!(known(&["*"]));
        assert!(!known(&[]));
        assert!(!known(&["\"other\"", &tag[1..]]));
    }
}
