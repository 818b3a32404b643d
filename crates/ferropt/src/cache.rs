//! `ferropt checkpoint cache`: weights that are kept, ready to be used.

use ferropt_train::checkpoint::human_bytes;
use ferropt_train::weight_cache::{Entry, FOLDER_VARIABLE, WeightCache};
use serde_json::json;
use std::io::Write;
use std::time::SystemTime;

/// Arguments of `ferropt checkpoint cache`.
#[derive(clap::Args)]
#[command(after_help = "\
A model that was opened once is kept as the device reads it, so that the next time nothing
is computed, and processes have its memory in common. FERROPT_CACHE names the folder, or is
`off`; FERROPT_CACHE_SIZE is the most that is kept. Without it, the largest model is kept if
half of the free disk is left, and beside it 20 GB or a tenth of the free disk, if that is less.
What was used longest ago goes first.

Examples:
  ferropt checkpoint cache
  ferropt checkpoint cache --clear
  FERROPT_CACHE_SIZE=90GB ferropt generate --model opt-30b \"The sea\"")]
pub(crate) struct Args {
    /// Remove everything
    #[arg(long)]
    clear: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "clear")]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let Some(cache) = WeightCache::from_environment()? else {
        if args.json {
            writeln!(out, "{}", json!({ "folder": null, "entries": [] }))?;
        } else {
            writeln!(out, "no weights are kept: {FOLDER_VARIABLE} is off, or there is no home folder")?;
        }
        return Ok(());
    };
    if args.clear {
        let freed = cache.clear()?;
        writeln!(out, "removed {} from {}", human_bytes(freed), cache.folder().display())?;
        return Ok(());
    }
    let entries = cache.entries()?;
    if args.json {
        let listed: Vec<_> = entries.iter().map(object).collect();
        let all = json!({ "folder": cache.folder(), "entries": listed });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    for entry in &entries {
        let model = entry.sources.first().map_or("?", |source| &source.path);
        writeln!(out, "{:<5} {:>11}  {:>12}  {model}", entry.format, human_bytes(entry.bytes), age(entry))?;
    }
    let all = entries.iter().map(|entry| entry.bytes).sum();
    writeln!(out, "{} of {} in {}", entries.len(), human_bytes(all), cache.folder().display())?;
    Ok(())
}

fn object(entry: &Entry) -> serde_json::Value {
    let used = entry.used.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    json!({
        "file": entry.path,
        "bytes": entry.bytes,
        "format": entry.format,
        "used_unix_s": used,
        "made_of": entry.sources.iter().map(|source| &source.path).collect::<Vec<_>>(),
    })
}

/// How long ago it was used.
fn age(entry: &Entry) -> String {
    let minutes = entry.used.elapsed().map_or(0, |time| time.as_secs() / 60);
    match minutes {
        0 => "now".into(),
        1..120 => format!("{minutes} min ago"),
        120..2880 => format!("{} h ago", minutes / 60),
        _ => format!("{} days ago", minutes / 1440),
    }
}
