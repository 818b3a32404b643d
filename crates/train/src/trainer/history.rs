//! Beginning and end of every start of a run, in its logbook.

use super::Ending;
use crate::config::Resolved;
use crate::logbook::{Logbook, NOTED};
use crate::recovery::GaveUp;
use anyhow::{Error, Result};
use ferropt_mesh::World;
use serde_json::json;

/// Events that end a start.
const ENDS: [&str; 4] = ["ended", "failed", "gave-up", "rank-lost"];

/// Opens the logbook of a run that is resumed after step `resumed`, or begun, and enters how it starts and what was found.
///
/// # Errors
/// When the logbook cannot be read or written.
pub(super) fn open(
    resolved: &Resolved,
    world: &World,
    resumed: Option<u64>,
    notes: &[String],
) -> Result<Logbook> {
    let mut book = Logbook::open(&resolved.config.run.dir)?;
    let step = resumed.unwrap_or(0);
    let last = book.entries().iter().rfind(|entry| entry.event != NOTED);
    if let Some(last) = last.filter(|last| !ENDS.contains(&&*last.event)) {
        let text = format!(
            "The start before this one ended without a word, after step {} or later: it was killed, or its machine was \
             lost.",
            last.step
        );
        book.add(step, "was-killed", &text, json!({}))?;
    }
    for note in notes {
        book.add(step, NOTED, &format!("{note}."), json!({}))?;
    }
    let config = format!("{:08x}", crc32c::crc32c(resolved.config.to_toml()?.as_bytes()));
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let (version, pid, steps) = (env!("CARGO_PKG_VERSION"), std::process::id(), resolved.steps);
    let event = if resumed.is_some() { "resumed" } else { "started" };
    let ranks = world.size();
    let many = if ranks > 1 { format!(", {ranks} ranks ({})", world.describe()) } else { String::new() };
    let text = format!(
        "{} of {steps} steps, ferropt {version} on {host}, process {pid}{many}, configuration {config}.",
        resolved.model_name()
    );
    let figures = json!({
        "version": version, "host": host, "pid": pid, "ranks": ranks, "steps": steps, "config_crc32c": config,
    });
    book.add(step, event, &text, figures)?;
    Ok(book)
}

/// Enters how a start has ended, as far as the disk lets it.
pub(super) fn close(book: &mut Logbook, step: u64, ending: Result<Ending, &Error>) {
    let mut figures = json!({});
    let (event, text) = match ending {
        Ok(Ending::Complete | Ending::AlreadyComplete) => ("ended", "All steps are done.".to_string()),
        Ok(Ending::Stopped) => ("ended", "Somebody asked it to stop.".into()),
        Ok(Ending::OutOfTime) => ("ended", "run.max_minutes are over.".into()),
        Err(error) => match error.chain().find_map(|cause| cause.downcast_ref::<GaveUp>()) {
            Some(GaveUp { text, cause }) => {
                figures = json!({ "cause": cause });
                ("gave-up", text.clone())
            }
            None => ("failed", format!("{error:#}.")),
        },
    };
    // Whoever started the run is told of its ending anyway.
    let _ = book.add(step, event, &text, figures);
}
