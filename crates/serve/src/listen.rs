//! Connections: how many, how slow they may be, and how they end.

use crate::app::{App, Phase};
use crate::outbox::Reader;
use crate::places::{Place, Places};
use crate::service::{Peer, router};
use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Sleep, sleep, timeout};

/// Bytes of a request's headers at most.
const HEADERS: usize = 1 << 16;

/// A probe asks at once, so that others do not keep spare places from it for long.
const SPARE_TIME: Duration = Duration::from_secs(2);

/// HTTP learns so late that a client has closed its side, so that who asked for something quick gets it.
const QUICK: Duration = Duration::from_millis(100);
/// While there is something of a client to read, it is looked at so often whether it has closed its side, and then it has so long
/// to take in what it asked for before.
const LOOK: Duration = Duration::from_millis(500);
const GRACE: Duration = Duration::from_secs(1);

/// Accepts connections until the server's last phase, then waits for them to end, but not for long.
pub(crate) async fn accept(listener: TcpListener, app: Arc<App>) {
    let router = router(&app);
    let places = Places::new(&app.limits, app.metrics.excess_connections.clone());
    let mut phase = app.phase.subscribe();
    let mut failures = Failures::default();
    loop {
        let accepted = tokio::select! {
            accepted = connection_and_place(&listener, &places, &app) => accepted,
            _ = phase.wait_for(|phase| *phase == Phase::Ending) => break,
        };
        match accepted {
            Ok((stream, peer, place)) => {
                failures.pause = PAUSE;
                // One without a place is closed.
                if let Some(place) = place {
                    tokio::spawn(connection(stream, peer, app.clone(), router.clone(), place));
                }
            }
            Err(error) => {
                // Too few file descriptors, or a client that left at once: the next try may be luckier.
                let (pause, times) = failures.note(Instant::now());
                if let Some(times) = times {
                    let line = serde_json::json!({ "error": error.to_string(), "times": times });
                    app.log.line("accept_failed", line);
                }
                sleep(pause).await;
            }
        }
    }
    drop(listener);
    // What a client does not take in by then is lost with it.
    let _ = timeout(Duration::from_secs(5), places.empty()).await;
}

/// Connections that could not be accepted.
struct Failures {
    /// How long it waits after the next.
    pause: Duration,
    /// When the log was told, and how many there were since.
    told: Option<Instant>,
    count: usize,
}

/// The first pause, the longest, and how often the log is told.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const TOLD: Duration = Duration::from_secs(60);

impl Default for Failures {
    fn default() -> Self {
        Failures { pause: PAUSE, told: None, count: 0 }
    }
}

impl Failures {
    /// Counts one. Returns how long to wait, and of how many to tell if it is time to.
    fn note(&mut self, now: Instant) -> (Duration, Option<usize>) {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        self.count += 1;
        if self.told.is_some_and(|told| now.duration_since(told) < TOLD) {
            return (pause, None);
        }
        self.told = Some(now);
        (pause, Some(std::mem::take(&mut self.count)))
    }
}

/// Further connections wait, the first of them here and the others in the system's queue, while there are as many as may be.
async fn connection_and_place(
    listener: &TcpListener,
    places: &Arc<Places>,
    app: &App,
) -> io::Result<(TcpStream, Peer, Option<Place>)> {
    let (stream, address) = listener.accept().await?;
    let place = places.take(address.ip()).await;
    let local = stream.local_addr().is_ok_and(|own| own.ip().to_canonical().is_loopback());
    let beyond = place.as_ref().and_then(|place| place.beyond);
    Ok((stream, Peer { address, local, beyond, reader: app.outbox.reader() }, place))
}

async fn connection(stream: TcpStream, peer: Peer, app: Arc<App>, router: Router, _place: Place) {
    // Events are small, and none should wait for the next. Without it the stream still works.
    let _ = stream.set_nodelay(true);
    let time = app.limits.client_time;
    let patience = if peer.beyond.is_some() { time.min(SPARE_TIME) } else { time };
    let socket = Arc::new(stream);
    let reader = peer.reader.clone();
    let stream = Patient { stream: socket.clone(), reader: reader.clone(), patience, timer: None, end: None };
    tokio::select! {
        () = speak(stream, peer, &app, router, patience) => {}
        () = gone(&socket) => {}
        () = reader.left() => {}
    }
}

/// Waits until a client is gone for good. Nobody else finds out while there is something of it to read, such as a request behind
/// the one that is being computed.
async fn gone(stream: &TcpStream) {
    while stream.ready(Interest::READABLE).await.is_ok_and(|ready| !ready.is_read_closed()) {
        sleep(LOOK).await;
    }
    sleep(GRACE).await;
}

/// Speaks TLS if it is to be, and HTTP.
async fn speak(stream: Patient, peer: Peer, app: &App, router: Router, patience: Duration) {
    let Some(tls) = &app.tls else { return requests(stream, peer, app, router, patience).await };
    let mut phase = app.phase.subscribe();
    let accepted = tokio::select! {
        accepted = timeout(patience, tls.acceptor().accept(stream)) => accepted,
        _ = phase.wait_for(|phase| *phase == Phase::Ending) => return,
    };
    match accepted {
        Ok(Ok(stream)) => requests(stream, peer, app, router, patience).await,
        // Too slow, or no TLS. Scanners come all the time, so they are counted and no more.
        Ok(Err(_)) | Err(_) => app.metrics.handshake_failed(),
    }
}

/// Answers the requests of a connection.
async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: Peer,
    app: &App,
    router: Router,
    patience: Duration,
) {
    let router = TowerToHyperService::new(router);
    let keep_alive = peer.beyond.is_none();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .keep_alive(keep_alive)
        .max_buf_size(HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let mut phase = app.phase.subscribe();
    // How a connection ends is the client's affair; its requests are logged by themselves.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = phase.wait_for(|phase| *phase == Phase::Ending) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// A stream that fails when the other side takes nothing in for too long, and whose end comes a little later.
struct Patient {
    stream: Arc<TcpStream>,
    reader: Arc<Reader>,
    patience: Duration,
    /// Since when nothing could be written.
    timer: Option<Pin<Box<Sleep>>>,
    /// Since when there is nothing more to read.
    end: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    /// Writes with `write`, as soon as there is room.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        while let Poll::Ready(room) = self.stream.poll_write_ready(context) {
            let written = room.and_then(|()| write(&self.stream));
            if !is_early(&written) {
                self.timer = None;
                self.reader.took();
                return Poll::Ready(written);
            }
        }
        let patience = self.patience;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(timer.as_mut().poll(context));
        self.reader.ran_out_of_time();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Whether the stream was not ready after all.
fn is_early<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let read = self.stream.try_read(buf.initialize_unfilled());
            if read.as_ref().is_ok_and(|count| *count == 0) {
                let end = self.end.get_or_insert_with(|| Box::pin(sleep(QUICK)));
                return end.as_mut().poll(cx).map(Ok);
            }
            if !is_early(&read) {
                return Poll::Ready(read.map(|count| buf.advance(count)));
            }
        }
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream| stream.try_write(buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream| stream.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// It is closed when it is dropped, which is what comes next.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_of_now_and_then() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        let mut at = |seconds| failures.note(start + Duration::from_secs(seconds));
        assert_eq!(at(0), (PAUSE, Some(1)));
        assert_eq!(at(1), (2 * PAUSE, None));
        (2..60).for_each(|seconds| assert_eq!(at(seconds).1, None));
        assert_eq!(at(60), (LONGEST_PAUSE, Some(60)));
    }
}
