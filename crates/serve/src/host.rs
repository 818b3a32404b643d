//! Names by which a server of one machine is called: a web page whose own name was made to mean this machine (DNS rebinding)
//! would otherwise be of the same origin as the server, and could use it with its visitor's hands.

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, header};
use std::net::IpAddr;

/// The first name in `Host` that is neither an address, nor `localhost`, nor among those that were allowed. Ports do not
/// matter, and who sends no `Host` is no browser.
pub(crate) fn strange<'a>(headers: &'a HeaderMap, allowed: &[String]) -> Option<&'a HeaderValue> {
    headers.get_all(header::HOST).iter().find(|host| !is_known(host.as_bytes(), allowed))
}

fn is_known(host: &[u8], allowed: &[String]) -> bool {
    let Ok(authority) = Authority::try_from(host) else { return false };
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    address.parse::<IpAddr>().is_ok()
        || host.eq_ignore_ascii_case("localhost")
        || allowed.iter().any(|name| host.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_localhost_and_allowed_names_are_known() {
        let allowed = ["models.example.org".to_string()];
        for host in [
            "127.0.0.1",
            "127.0.0.1:8000",
            "[::1]:8000",
            "10.0.0.5:80",
            "LocalHost:1",
            "Models.example.org:8000",
        ] {
            assert!(is_known(host.as_bytes(), &allowed), "{host}");
        }
        for host in [
            "",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "a b",
            "127.0.0.1:8000/x",
        ] {
            assert!(!is_known(host.as_bytes(), &allowed), "{host}");
        }
    }
}
