//! `ferropt presets`: the models that can be named.

use ferropt_model::PRESETS;
use ferropt_train::config::published;
use ferropt_train::planner::grouped;
use serde_json::json;
use std::io::Write;

/// Arguments of `ferropt presets`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  ferropt presets\n  ferropt presets --json")]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        let list: Vec<_> = PRESETS
            .iter()
            .map(|p| {
                let config = p.config();
                let published = published(p.name);
                json!({
                    "name": p.name,
                    "layers": p.layers,
                    "heads": p.heads,
                    "width": p.width,
                    "parameters": config.parameter_count(),
                    "lr": published.map(|p| p.lr),
                    "batch_tokens": published.map(|p| p.batch_tokens),
                })
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?;
        return Ok(());
    }
    writeln!(out, "name   layers  heads  width       parameters   peak lr  batch (tokens)")?;
    for p in &PRESETS {
        let parameters = grouped(p.config().parameter_count());
        let (lr, batch) = published(p.name).map_or(("-".into(), "-".into()), |published| {
            (format!("{:.1e}", published.lr), grouped(published.batch_tokens))
        });
        writeln!(
            out,
            "{:<6} {:>6} {:>6} {:>6}  {parameters:>15}  {lr:>8}  {batch:>14}",
            p.name, p.layers, p.heads, p.width
        )?;
    }
    writeln!(
        out,
        "\nPeak learning rate and batch are those of the OPT paper, and the defaults of `ferropt train`."
    )?;
    Ok(())
}
