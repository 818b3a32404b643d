//! Tells whoever started the program how things stand, by systemd's protocol: a datagram to the socket that `NOTIFY_SOCKET`
//! names (sd_notify(3)). Without it, as at a terminal, nothing is told.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// All that was to be done at the start is done.
pub(crate) const READY: &str = "READY=1";
/// The end has begun.
pub(crate) const STOPPING: &str = "STOPPING=1";

/// Tells one of the above. A manager that cannot be told is no reason to stop serving, but it may be one for the manager to
/// stop the service, so it is said why.
pub(crate) fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&socket, state) {
        tell!(
            "warning: cannot tell the service manager {state} at NOTIFY_SOCKET={}: {error}",
            socket.display()
        );
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address(socket)?).map(drop)
}

/// A path, or behind an `@` a name in Linux's abstract space.
fn address(socket: &OsStr) -> io::Result<SocketAddr> {
    match socket.as_bytes().strip_prefix(b"@") {
        #[cfg(target_os = "linux")]
        Some(name) => <SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name),
        _ => SocketAddr::from_pathname(socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_is_told_at_a_path_and_at_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket").into_os_string();
        let name = format!("@ferropt-notify-{}", std::process::id());
        for socket in [path.as_os_str(), OsStr::new(&name)] {
            let manager = UnixDatagram::bind_addr(&address(socket).unwrap()).unwrap();
            send(socket, READY).unwrap();
            let mut told = [0; 64];
            let count = manager.recv(&mut told).unwrap();
            assert_eq!(&told[..count], b"READY=1");
        }
        assert!(send(folder.path().join("nobody").as_os_str(), READY).is_err());
    }
}
