//! Tokens per second of the engine with random weights: reading a prompt, scoring, and generating one or many texts at a
//! time. For one text, the bytes of weights that each step reads, as a speed, are to be compared with memory's.
//!
//! `cargo bench -p ferropt-engine [-- PRESET [FORMAT]]`; OPT-125m in every format without arguments.

use anyhow::Result;
use ferropt_data::Tokenizer;
use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_device::{Device, Element, WeightFormat, bf16};
use ferropt_engine::{Engine, Event, Options, Parameters, Request};
use ferropt_model::{Config, Decoder};
use std::path::Path;
use std::time::Instant;

const PROMPT: usize = 1024;
const NEW: usize = 128;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let config = Config::preset(words.first().map_or("125m", String::as_str))?;
    let opt = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/tokenizer");
    let tokenizer = Tokenizer::load(&opt).or_else(|_| {
        println!("without OPT's tokenizer in {}: samples are drawn from 260 tokens only", opt.display());
        Tokenizer::train([Ok("a".repeat(99))], 260)
    })?;
    for format in WeightFormat::ALL {
        if words.get(1).is_some_and(|name| name != format.name()) {
            continue;
        }
        match format {
            WeightFormat::F32 => measure::<f32>(&config, &tokenizer, format)?,
            _ => measure::<bf16>(&config, &tokenizer, format)?,
        }
    }
    Ok(())
}

fn measure<E: Element>(config: &Config, tokenizer: &Tokenizer, format: WeightFormat) -> Result<()> {
    let device = CpuDevice::new(CpuOptions { pin: true, ..CpuOptions::default() })?;
    let begun = Instant::now();
    let mut state = 1u32;
    let mut read = |_: usize, _, out: &mut [f32]| {
        for out in out {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *out = (state >> 8) as f32 * (0.04 / (1 << 24) as f32) - 0.02;
        }
        Ok(())
    };
    let decoder = Decoder::new(&device, config, format, &mut read)?;
    let (bytes, name) = (decoder.bytes(&device), device.describe());
    println!(
        "{}, {name}: {:.0} MB, packed in {:.2} s",
        format.name(),
        bytes as f64 * 1e-6,
        begun.elapsed().as_secs_f64()
    );
    let options = Options::new(32, PROMPT + NEW);
    let mut engine = Engine::<_, E>::new(device, decoder, tokenizer, options)?;
    let prompt =
        |text: usize, len: usize| (0..len).map(|i| ((i * 7919 + text * 104_729) % 50_000) as u32).collect();
    let greedy = Parameters { temperature: 0.0, ignore_end: true, ..Parameters::default() };
    let reading = Parameters { max_tokens: Some(1), ..greedy.clone() };
    let seconds = run(&mut engine, [Request { prompt: prompt(99, PROMPT), parameters: reading }])?.0;
    println!("  prompt of {PROMPT}      {:>8.1} tokens/s", PROMPT as f64 / seconds);
    let scoring = Parameters { max_tokens: Some(0), echo: Some(0), log_probs: Some(0), ..greedy.clone() };
    let seconds = run(&mut engine, [Request { prompt: prompt(98, PROMPT), parameters: scoring }])?.0;
    println!("  scoring {PROMPT}        {:>8.1} tokens/s", PROMPT as f64 / seconds);
    for texts in [1, 8, 32] {
        for (kind, parameters) in [
            ("greedy ", greedy.clone()),
            ("sampled", Parameters { temperature: 0.8, top_p: 0.95, ..greedy.clone() }),
        ] {
            let parameters = Parameters { max_tokens: Some(NEW), ..parameters };
            let requests =
                (0..texts).map(|i| Request { prompt: prompt(i, 16), parameters: parameters.clone() });
            let (_, seconds) = run(&mut engine, requests)?;
            let rate = (texts * (NEW - 1)) as f64 / seconds;
            let weights = rate / texts as f64 * bytes as f64 * 1e-9;
            println!("  {texts:>2} texts, {kind}   {rate:>8.1} tokens/s, weights at {weights:.1} GB/s");
        }
    }
    Ok(())
}

/// Seconds for all of it, and from the first text on.
fn run<E: Element>(
    engine: &mut Engine<'_, CpuDevice, E>,
    requests: impl IntoIterator<Item = Request>,
) -> Result<(f64, f64)> {
    let begun = Instant::now();
    for request in requests {
        engine.submit(request)?;
    }
    let mut first = None;
    while !engine.is_idle() {
        let events = engine.step()?;
        if first.is_none()
            && events.iter().any(|(_, event)| matches!(event, Event::Text { .. } | Event::End { .. }))
        {
            first = Some(Instant::now());
        }
    }
    Ok((begun.elapsed().as_secs_f64(), first.unwrap_or(begun).elapsed().as_secs_f64()))
}
