//! The web page, as a browser asks for it. `scripts/check-page` tests what it does there.

use crate::{options, serve, stop};
use ferropt_serve::{Keys, new_key};
use std::fs;

#[test]
fn files_come_with_a_tag_and_a_policy_and_need_no_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    fs::write(&file, new_key("a").unwrap().1).unwrap();
    let (server, client) = serve(crate::Options { keys: Keys::read(&file).unwrap(), ..options() });
    for (path, kind) in [
        ("/", "text/html"),
        ("/page/app.js", "text/javascript"),
        ("/page/vendor/uplot.css", "text/css"),
        ("/page/icon.svg", "image/svg+xml"),
        ("/page/vendor/htm.LICENSE", "text/plain"),
    ] {
        let answer = client.get(path);
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.header("content-type").unwrap().starts_with(kind), "{path}");
        assert!(
            answer
                .header("content-security-policy")
                .unwrap()
                .starts_with("default-src 'none'; script-src 'self'")
        );
        assert!(answer.body.len() > 100);
        let tag = answer.header("etag").unwrap();
        let again = client.send("GET", path, &[("If-None-Match", tag)], b"");
        assert_eq!((again.status, again.body.len(), again.header("etag")), (304, 0, Some(tag)), "{path}");
        let changed = client.send("GET", path, &[("If-None-Match", "\"another\"")], b"");
        assert_eq!((changed.status, &changed.body), (200, &answer.body), "{path}");
    }
    for path in ["/page/package.json", "/page/../Cargo.toml", "/page/%2e%2e/Cargo.toml", "/page/vendor/%ff"] {
        assert_eq!(client.get(path).status, 404, "{path}");
    }
    assert_eq!(client.send("POST", "/", &[("Content-Type", "application/json")], b"{}").status, 405);
    assert_eq!(client.get("/v1/models").status, 401);
    stop(server);
}
