//! `ferropt info`: what this machine can do.

use ferropt_device::{Device, Which, bf16};
use ferropt_train::trainer::open_device;
use std::io::Write;

/// Arguments of `ferropt info`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  ferropt info\n  ferropt info --threads 1")]
pub(crate) struct Args {
    /// What computes: cpu, cuda or cuda:N (the N-th GPU)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Which,
    /// Threads; all available unless given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let device = open_device(args.device, args.threads)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "version        ferropt {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "device         {}", device.describe())?;
    writeln!(out, "measured peak  f32  {:.1} GFLOP/s", device.measured_peak::<f32>() * 1e-9)?;
    writeln!(out, "               bf16 {:.1} GFLOP/s", device.measured_peak::<bf16>() * 1e-9)?;
    Ok(())
}
