//! Connections: how many, how slow they may be, and how they end.

use crate::app::{App, Phase};
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
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep, timeout};

/// Bytes of a request's headers at most.
const HEADERS: usize = 1 << 16;

/// Accepts connections until the server's last phase, then waits for them to end, but not for long.
pub(crate) async fn accept(listener: TcpListener, app: Arc<App>) {
    let (router, limit) = (router(&app), app.limits.connections.clamp(1, Semaphore::MAX_PERMITS));
    let places = Arc::new(Semaphore::new(limit));
    let mut phase = app.phase.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = place_and_connection(&listener, &places) => accepted,
            _ = phase.wait_for(|phase| *phase == Phase::Ending) => break,
        };
        match accepted {
            Ok((place, stream, address)) => {
                tokio::spawn(connection(stream, address, app.clone(), router.clone(), place));
            }
            Err(error) => {
                // Too few file descriptors, or a client that left at once: the next try may be luckier.
                app.log.line("accept_failed", serde_json::json!({ "error": error.to_string() }));
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    let all = places.acquire_many(u32::try_from(limit).unwrap_or(u32::MAX));
    // What a client does not take in by then is lost with it.
    let _ = timeout(Duration::from_secs(5), all).await;
}

/// Further connections wait in the system's queue while there are as many as may be.
async fn place_and_connection(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(OwnedSemaphorePermit, TcpStream, SocketAddr)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok((place, stream, address))
}

async fn connection(
    stream: TcpStream,
    address: SocketAddr,
    app: Arc<App>,
    router: Router,
    _place: OwnedSemaphorePermit,
) {
    // Events are small, and none should wait for the next. Without it the stream still works.
    let _ = stream.set_nodelay(true);
    let patience = app.limits.client_time;
    let stream = Patient { stream, patience, timer: None };
    let Some(tls) = &app.tls else { return requests(stream, address, &app, router).await };
    let mut phase = app.phase.subscribe();
    let accepted = tokio::select! {
        accepted = timeout(patience, tls.acceptor().accept(stream)) => accepted,
        _ = phase.wait_for(|phase| *phase == Phase::Ending) => return,
    };
    match accepted {
        Ok(Ok(stream)) => requests(stream, address, &app, router).await,
        // Too slow, or no TLS. Scanners come all the time, so they are counted and no more.
        Ok(Err(_)) | Err(_) => app.metrics.handshake_failed(),
    }
}

/// Answers the requests of a connection.
async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    address: SocketAddr,
    app: &App,
    router: Router,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(address));
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.limits.client_time)
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

/// A stream that fails when the other side takes nothing in for too long.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    /// Since when nothing could be written.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn wait<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.timer = None;
            return written;
        }
        let patience = self.patience;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wait(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wait(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
