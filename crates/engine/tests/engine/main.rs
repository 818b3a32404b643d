//! The engine with small random models: whatever happens around a request, it gives the same tokens to the bit.

mod answers;
mod company;
mod drafts;
mod embeddings;
mod graphs;
mod metaseq;
mod threads;

use ferropt_data::Tokenizer;
use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Device, Element, PAGE, Segment, WeightFormat};
use ferropt_engine::{Completion, Ends, Engine, Limits, Options, Parameters, Request};
use ferropt_model::{Cache, Config, Decoder, Matrices, Memory};
use std::collections::BTreeMap;

/// One thread, as tests run beside each other; that results do not depend on it is tested with the operations.
fn device() -> CpuDevice {
    CpuDevice::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

/// Has 280 tokens; the model has 300 rows, of which the last must never be chosen.
fn tokenizer() -> Tokenizer {
    let text = "the cat sat on the mat and the dog sat on the log — naïve café. ".repeat(20);
    Tokenizer::train([Ok(text)], 280).unwrap()
}

fn config() -> Config {
    Config {
        layers: 2,
        heads: 2,
        width: 32,
        feed_forward: 64,
        embedding_width: 32,
        post_norm: false,
        own_head: false,
        vocab: 300,
        positions: 320,
        dropout: 0.0,
        attention_dropout: 0.0,
    }
}

/// Gives rows of a model whose probabilities are uneven enough to be told apart.
fn sound(config: &Config) -> impl Fn(usize, std::ops::Range<usize>, &mut [f32]) -> anyhow::Result<()> + Sync {
    let table = config.parameters();
    move |index, rows, out| {
        let (parameter, stream) = (&table[index], Stream::new(5, Purpose::Init, index, 0));
        let width = parameter.elements() / parameter.shape[0];
        let gain = parameter.names[0].ends_with("norm.weight");
        for (i, out) in out.iter_mut().enumerate() {
            *out = 0.25 * stream.normal(0, rows.start * width + i) + if gain { 1.0 } else { 0.0 };
        }
        Ok(())
    }
}

fn decoder<D: Device>(device: &D, config: &Config, format: WeightFormat) -> Decoder<D> {
    Decoder::new(device, config, format, &sound(config), Matrices::Rows).unwrap()
}

/// Room for everything, and no use of earlier texts.
fn roomy() -> Options {
    Options {
        limits: Limits { tokens: 1000, sequences: 200, reuse: false },
        cache_tokens: 200 * 320,
        draft_tokens: 8,
        pause: None,
        reserve: false,
        ends: Ends::default(),
    }
}

fn engine<E: Element>(
    tokenizer: &Tokenizer,
    format: WeightFormat,
    options: Options,
) -> Engine<'_, CpuDevice, E> {
    let device = device();
    let decoder = decoder(&device, &config(), format);
    Engine::new(device, decoder, None, tokenizer, options).unwrap()
}

/// Steps until all is done; `before` is called before each step.
fn run<D: Device, E: Element>(
    engine: &mut Engine<'_, D, E>,
    mut before: impl FnMut(&mut Engine<'_, D, E>, usize),
) -> BTreeMap<u64, Completion> {
    let mut all: BTreeMap<u64, Completion> = BTreeMap::new();
    for step in 0.. {
        before(engine, step);
        if engine.is_idle() {
            break;
        }
        assert!(step < 100_000, "it does not end");
        for (number, event) in engine.step().unwrap() {
            all.entry(number).or_default().add(event).unwrap();
        }
    }
    all
}

/// One request in an engine of its own.
fn alone<E: Element>(tokenizer: &Tokenizer, format: WeightFormat, request: &Request) -> Completion {
    let mut engine = engine::<E>(tokenizer, format, roomy());
    let number = engine.submit(request.clone()).unwrap();
    run(&mut engine, |_, _| {}).remove(&number).unwrap()
}

/// A text computed by the model alone, at once and without an engine; `look` may look at every row.
fn plainly<E: Element, R>(
    format: WeightFormat,
    text: &[u32],
    look: impl FnOnce(&CpuDevice, &Decoder<CpuDevice>, &mut Memory<CpuDevice, E>) -> R,
) -> R {
    let (device, config) = (device(), config());
    let decoder = decoder(&device, &config, format);
    let pages: Vec<u32> = (0..text.len().div_ceil(PAGE) as u32).collect();
    let mut cache = Cache::<_, E>::new(&device, &config, pages.len()).unwrap();
    let mut memory = Memory::new(&device, &config, text.len(), text.len()).unwrap();
    let segments = [Segment { rows: text.len(), past: 0, pages: &pages }];
    decoder.forward(&device, text, &segments, &mut cache, &mut memory).unwrap();
    look(&device, &decoder, &mut memory)
}

/// Whole numbers below `below`, of a fixed stream.
fn whole(which: usize, len: usize, below: usize) -> Vec<u32> {
    let stream = Stream::new(43, Purpose::Sampling, which, 0);
    (0..len).map(|i| stream.word(0, i) % below as u32).collect()
}

fn greedy(max_tokens: usize) -> Parameters {
    Parameters { temperature: 0.0, max_tokens: Some(max_tokens), ..Parameters::default() }
}

fn sampled(max_tokens: usize, seed: u64) -> Parameters {
    Parameters { seed, max_tokens: Some(max_tokens), ..Parameters::default() }
}
