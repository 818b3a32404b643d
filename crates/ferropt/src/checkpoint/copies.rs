//! `ferropt checkpoint copies`: what a mirror has of a run.

use super::Bar;
use anyhow::{Context, bail, ensure};
use ferropt_train::checkpoint::mirror::{self, Copy, Mirror};
use ferropt_train::checkpoint::{Store, human_bytes};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `ferropt checkpoint copies`.
#[derive(clap::Args)]
#[command(after_help = "\
A mirror is where `checkpoint.mirror` of a run sends copies of its checkpoints: s3://BUCKET/PATH,
gs://BUCKET/PATH, az://CONTAINER/PATH or file:///FOLDER. Credentials and endpoints come from the
environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on). Needs a program that was built
with --features object-store.

Exit status 0 means that nothing is wrong with the copies that were looked at.

Examples:
  ferropt checkpoint copies s3://bucket/runs/first
  ferropt checkpoint copies s3://bucket/runs/first --verify
  ferropt checkpoint copies s3://bucket/runs/first --checkpoint 2000 --fetch first")]
pub(super) struct Copies {
    /// Address of the mirror
    url: String,
    /// Look at the copy of this step only
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<u64>,
    /// Read every byte, and compare it with its checksum
    #[arg(long)]
    verify: bool,
    /// Fetch one into a run folder: that of --checkpoint, or the newest whole one
    #[arg(long, value_name = "FOLDER", conflicts_with = "verify")]
    fetch: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Copies) -> anyhow::Result<()> {
    mirror::check(&args.url)?;
    let mirror = Mirror::open(&args.url)?;
    let mut copies = mirror.list()?;
    ensure!(
        !copies.is_empty(),
        "{} has no checkpoints: give the address that checkpoint.mirror has",
        args.url
    );
    if let Some(step) = args.checkpoint {
        let steps: Vec<String> = copies.iter().map(|copy| copy.step.to_string()).collect();
        copies.retain(|copy| copy.step == step);
        ensure!(!copies.is_empty(), "{} has no step {step}; it has {}", args.url, steps.join(", "));
    }
    if let Some(folder) = &args.fetch {
        return fetch(&mirror, copies, folder, &args);
    }
    let found =
        copies.iter().map(|copy| findings(&mirror, copy, args.verify)).collect::<Result<Vec<_>, _>>()?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let listed = copies.iter().zip(&found).map(|(copy, found)| object(copy, found)).collect::<Vec<_>>();
        let all = json!({ "url": args.url, "verified": args.verify, "checkpoints": listed });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        writeln!(out, "{:>10} {:>9} {:>6} {:>12}  folder", "step", "rollbacks", "files", "size")?;
        for (copy, found) in copies.iter().zip(&found) {
            let size = human_bytes(copy.bytes);
            writeln!(
                out,
                "{:>10} {:>9} {:>6} {size:>12}  {}",
                copy.step, copy.rollbacks, copy.files, copy.folder
            )?;
            found.iter().try_for_each(|finding| writeln!(out, "{:>10} {finding}", "!"))?;
        }
    }
    let wrong = found.iter().filter(|found| !found.is_empty()).count();
    if wrong > 0 {
        bail!("{wrong} of {} copies in {} cannot be used", copies.len(), args.url);
    }
    Ok(())
}

/// What is wrong with a copy.
fn findings(mirror: &Mirror, copy: &Copy, verify: bool) -> anyhow::Result<Vec<String>> {
    match &copy.damage {
        Some(damage) => Ok(vec![format!("{damage:#}")]),
        None if verify => {
            let bar = Bar::of_bytes();
            let findings = mirror.verify(copy, &mut |n, of| bar.show(n, of));
            bar.0.finish_and_clear();
            findings
        }
        None => Ok(Vec::new()),
    }
}

fn fetch(mirror: &Mirror, copies: Vec<Copy>, folder: &PathBuf, args: &Copies) -> anyhow::Result<()> {
    let whole = copies.into_iter().rev().find(|copy| copy.damage.is_none());
    let copy = whole.with_context(|| format!("no whole copy is in {}", args.url))?;
    let store = Store::open_for_writing(folder)?;
    let bar = Bar::of_bytes();
    let checkpoint = mirror.fetch_copy(&copy, &store, &mut |n, of| bar.show(n, of));
    bar.0.finish_and_clear();
    let checkpoint = checkpoint?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let fetched = json!({ "step": copy.step, "bytes": copy.bytes, "path": checkpoint.path() });
        writeln!(out, "{}", serde_json::to_string_pretty(&fetched)?)?;
    } else {
        let (size, path) = (human_bytes(copy.bytes), checkpoint.path().display());
        writeln!(out, "fetched step {}, {size}, every byte as its checksum says: {path}", copy.step)?;
    }
    Ok(())
}

fn object(copy: &Copy, findings: &[String]) -> serde_json::Value {
    json!({
        "folder": copy.folder,
        "step": copy.step,
        "rollbacks": copy.rollbacks,
        "files": copy.files,
        "bytes": copy.bytes,
        "findings": findings,
    })
}
